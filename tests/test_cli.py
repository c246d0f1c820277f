"""What is answered before torch is imported, and how."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from floodrepro import __version__, console
from floodrepro import recipe as recipes
from floodrepro.cli.main import COMMANDS
from floodrepro.errors import DataError, FloodreproError, UsageError
from floodrepro.verification import results

LISTINGS = ([], ["--help"], ["fit", "--help"], ["configs", "ls"], ["runs", "ls"])
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


@pytest.mark.parametrize("text", ["a: &a [*a]", "[" * 3000 + "]" * 3000, "&0 [x, y]"], ids=["itself", "deep", "bomb"])
def test_yaml_that_unfolds_without_end_is_refused_at_once(text, tmp_path: Path):
    bomb = text + "".join(f"\na{n}: &{n} [{f'*{n - 1}, ' * 9}]" for n in range(1, 12))
    (tmp_path / "bomb.yaml").write_text(f"a0: {bomb}" if text.startswith("&") else text)
    with pytest.raises(UsageError, match="cannot be read"):
        recipes.read_yaml(tmp_path / "bomb.yaml")


def test_yaml_that_does_not_parse_is_named_with_its_line(cli, tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("trainer:\n  max_epochs: [1, 2\nmodel: x\n")
    told = cli("fit", "--config", broken)
    assert (told.code, f"{broken}:3" in told.err) == (2, True)


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


def test_entry_point_says_its_version():
    script = Path(sys.executable).with_name("floodrepro")
    assert subprocess.check_output([script, "--version"], text=True) == f"floodrepro {__version__}\n"


def test_other_systems_than_linux_are_refused_in_one_line(cli, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    outcome = cli("configs", "ls")
    assert outcome.code == 2
    assert "runs on Linux only" in outcome.report[0]


def test_each_command_has_help_that_tells_what_it_does(cli):
    for name, (_, summary) in COMMANDS.items():
        outcome = cli(name, "--help")
        assert (outcome.code, f"usage: floodrepro {name}" in outcome.out) == (0, True)
        assert summary in cli("--help").out


def test_shipped_recipes_are_listed_and_shown_as_they_are(cli):
    listed = json.loads(cli("configs", "ls", "--format", "json").out)
    assert set(listed) == set(recipes.shipped())
    assert cli("configs", "show", "demo").out == (ROOT / "configs" / "demo.yaml").read_text()


def test_runs_are_listed_with_recipe_status_score_and_age(cli, trained):
    (run,) = json.loads(cli("runs", "ls", "--runs-root", trained.path.parent, "--format", "json").out)["runs"]
    record = trained.read_record()
    assert (run["name"], run["status"], run["monitor"]) == ("trained", "finished", "val/loss")
    assert run["best"] == record["best_metrics"]["val/loss"]
    assert run["age"].startswith("0:")
    assert record["recipe_sha256"][:12] in run["recipe"]  # two epochs: none of the shipped recipes
    assert "trained" in cli("runs", "ls", "--runs-root", trained.path.parent).out


@pytest.mark.parametrize(
    "record",
    [
        *({"started": 5}, {"recipe_sha256": None}, {"best_metrics": [1]}),
        *({"monitor": "x", "best_metrics": {"x": 10**400}}, {"status": "\x1b[31mred"}, "fifo"),
    ],
    ids=str,
)
def test_one_odd_record_does_not_hide_the_other_runs(cli, tmp_path: Path, record: Any):
    whole = {"started": "2026-01-01T00:00:00+00:00", "recipe_sha256": "5c" * 32, "status": "running"}
    for name, content in (("odd", whole | (record if isinstance(record, dict) else {})), ("good", whole)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(content))
    if record == "fifo":
        (tmp_path / "odd" / "run.json").unlink()
        os.mkfifo(tmp_path / "odd" / "run.json")
    outcome = cli("runs", "ls", "--runs-root", tmp_path)
    assert (outcome.code, "running" in outcome.out, "\x1b" in outcome.out) == (0, True, False), outcome.err
    assert ("odd" in outcome.out) == (record != "fifo")


def test_closed_stdout_and_a_place_that_cannot_be_written_are_no_traceback():
    for flags in ("runs ls >&-", f"data synth --root {'a' * 300}", "runs ls --runs-root /dev/null/a"):
        command = f"{sys.executable} -m floodrepro {flags}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr


def test_an_error_of_a_loader_worker_keeps_what_where_and_what_to_do():
    """torch raises the class again with the worker's traceback as its only argument."""
    original = DataError("chip A is damaged", where="data/A.zip", fix="fetch it again")
    told = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback …\n"
    told += f"floodrepro.errors.DataError: {original}\n"
    again = DataError(told)
    assert (again.what, again.where, again.fix) == (original.what, original.where, original.fix)
    assert again.report().count("\n") == 2
    assert FloodreproError("Caught nothing").what == "Caught nothing"


def test_log_keeps_messages_and_tracebacks_and_no_progress_bars(tmp_path: Path, capsys):
    def fail() -> None:
        console.say("before")
        print("\rbar 10 %", end="", file=sys.stderr)
        raise KeyError("mine")

    with pytest.raises(KeyError), console.log_to(tmp_path / "log.txt"):
        fail()
    log = (tmp_path / "log.txt").read_text()
    assert "floodrepro: before" in log
    assert "KeyError: 'mine'" in log
    assert "10 %" not in log
    assert "bar 10 %" in capsys.readouterr().err
