"""What is answered before torch is imported, and how."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from floodrepro import console, recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.verification import results

LISTINGS = [line.split() for line in ("", "--help", "fit --help", "reproduce --help", "configs ls", "runs ls")]
MISTAKES = (
    (["fti"], "unknown command 'fti'; did you mean 'fit'?"),
    (["--config", "demo", "fit"], "to do: floodrepro fit --config demo"),
    (["fit", "--confg", "demo"], "unknown argument '--confg'; did you mean '--config'?"),
    (["fit", "--config", "demo", "--trainr.max_epochs", "3"], "did you mean '--trainer'?"),
    (["fit"], "to do: --config YAML"),
    (["doctor", "--precision", "bf16"], "to do: --config YAML"),
    (["fit", "--config", "no/such.yaml"], "config file not found"),
    (["fit", "--config", "demmo"], "did you mean 'demo'"),
    (["fit", "--config", "demo", "--name", ".."], "'..' is no plain name"),
    (["test", "--config", "demo", "--masks", "m", "--name", "../../esc"], "'../../esc' is no plain name"),
    (["test", "--ckpt", "no/such.ckpt"], "there is no such file: no/such.ckpt"),
    (["test", "--config", "demo"], "one of the arguments --ckpt/--ckpt_path --masks is required"),
    (["configs", "show", "nothing"], "config file not found"),
    (["export", "--run", "no/such/run"], "no run folder"),
    (["reproduce", "--seeds", "42;43"], "whole_numbers"),
    (["bench", "train", "--rounds", "0"], "'0', expected a number from 1"),
    (["test", "--config", "demo", "--masks", "m", "--probability", "inf"], "'inf', expected a number"),
)
PROBE = """
import contextlib, io, json, sys
from floodrepro.cli.main import main
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    heavy = [name for name in ("torch", "terratorch", "lightning", "numpy") if name in sys.modules]
    print(json.dumps([code, err.getvalue(), heavy]))
"""
BOMB = "a0: &0 [x, y]" + "".join(f"\na{n}: &{n} [{f'*{n - 1}, ' * 9}]" for n in range(1, 12))
ODD = ("[1]", "data: [1]", "model: 5", "trainer: x", "data: {init_args: 3}")


@pytest.fixture(scope="module")
def answers() -> list[tuple[int, str, list[str]]]:
    """Exit code, stderr, and what heavy is imported by then: one fresh process gives all answers, in this order."""
    asked = json.dumps([*LISTINGS, *(argv for argv, _ in MISTAKES)])
    done = subprocess.run([sys.executable, "-c", PROBE, asked], capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_help_and_listings_import_nothing_heavy(answers):
    assert answers[: len(LISTINGS)] == [(0, "", [])] * len(LISTINGS)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: MISTAKES[number][1])
def test_cheap_mistakes_are_answered_before_torch_is_imported(answers, number):
    says = MISTAKES[number][1]
    code, err, heavy = answers[len(LISTINGS) + number]
    assert (code, says in err, "torch" in heavy) == (2, True, False), err
    assert 1 <= len(err.splitlines()) <= 3


@pytest.mark.parametrize("text", [*ODD, "trainer:\n  max_epochs: [1, 2\nmodel: x", "a: &a [*a]", "[" * 9000, BOMB])
def test_yaml_that_does_not_parse_unfolds_without_end_or_has_no_keys_is_named_at_once(text, tmp_path: Path):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(UsageError, match="is no mapping" if text in ODD else "cannot be read") as caught:
        recipes.read_yaml(tmp_path / "broken.yaml")
    assert caught.value.where == f"{tmp_path}/broken.yaml" + ":3:6" * ("max_epochs" in text)


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        (["--logger.api_key", "sk-1", "--token=hf_1", "x"], ["--logger.api_key", "***", "--token=***", "x"]),
        ({"wandb": {"password": "p"}, "seed": 1}, {"wandb": {"password": "***"}, "seed": 1}),
        ("https://me:pw@host/a.tif?se=1&sig=2", "https://host/a.tif"),
        ("retries exceeded with url: a/stac?sig=2 (refused)", "retries exceeded with url: a/stac (refused)"),
        ("HF_TOKEN, with a token that may write", "HF_TOKEN, with a token that may write"),
        ("file:///home/jane/x", "x"),
        ("--data-root=/home/jane/My Data/chips", "--data-root=chips"),
        ("no file '/home/jane/My Data/chips'", "no file 'chips'"),
    ],
)
def test_secrets_and_folders_are_in_nothing_that_is_published(entry, left):
    assert results.without_folders(entry) == left
    assert console.public(entry) == (entry if "/home" in entry else left)


def test_other_systems_than_linux_are_refused_in_one_line(cli, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    outcome = cli("configs", "ls")
    assert outcome.code == 2
    assert "runs on Linux only" in outcome.report[0]


def test_shipped_recipes_are_listed_and_shown_as_they_are(cli):
    assert set(json.loads(cli("configs", "ls", "--format", "json").out)) == set(recipes.shipped())
    assert cli("configs", "show", "demo").out == (ROOT / "configs" / "demo.yaml").read_text()


def test_runs_are_listed_with_recipe_status_score_and_age(cli, trained):
    (run,) = json.loads(cli("runs", "ls", "--runs-root", trained.path.parent, "--format", "json").out)["runs"]
    record = trained.read_record()
    assert (run["name"], run["status"], run["monitor"]) == ("trained", "finished", "val/loss")
    assert run["best"] == record["best_metrics"]["val/loss"]
    assert run["age"].startswith("0:")
    assert record["recipe_sha256"][:12] in run["recipe"]  # two epochs: none of the shipped recipes
    assert "trained" in cli("runs", "ls", "--runs-root", trained.path.parent).out


def test_odd_records_hide_no_other_run(cli, tmp_path: Path):
    whole = {"started": "2026-01-01T00:00:00+00:00", "recipe_sha256": "5c" * 32, "status": "running", "monitor": "x"}
    odd = [{}, {"started": 5}, {"recipe_sha256": None}, {"best_metrics": [1]}, {"best_metrics": {"x": 10**400}}]
    for number, changes in enumerate([*odd, {"status": "\x1b[31mred"}]):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "run.json").write_text(json.dumps(whole | changes))
    os.mkfifo(tmp_path / "run.json")  # reading it would wait
    outcome = cli("runs", "ls", "--runs-root", tmp_path)
    assert (outcome.code, "\x1b" in outcome.out, outcome.out.count("running")) == (0, False, 2), outcome.err
    assert sorted(line.split()[0] for line in outcome.out.splitlines()[1:]) == [f"run{n}" for n in range(6)]


def test_closed_stdout_and_a_place_that_cannot_be_written_are_no_traceback():
    for flags in ("runs ls >&-", f"data synth --root {'a' * 300}", "runs ls --runs-root /dev/null/a"):
        command = f"{sys.executable} -m floodrepro {flags}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr


def test_log_keeps_messages_and_tracebacks_and_no_progress_bars(tmp_path: Path, capsys):
    def fail() -> None:
        console.say("before")
        print("\rbar 10 %", end="", file=sys.stderr)
        raise KeyError("mine")

    with pytest.raises(KeyError), console.log_to(tmp_path / "log.txt"):
        fail()
    with pytest.raises(KeyError), console.log_to(Path("/dev/full")):  # whose error is not the one to tell
        fail()
    log = (tmp_path / "log.txt").read_text()
    assert ["floodrepro: before" in log, "KeyError: 'mine'" in log, "10 %" in log] == [True, True, False]
    assert "bar 10 %" in capsys.readouterr().err
