"""The list of commands: what it holds, what is skipped, how it ends. tests/test_demo.py runs the demo's whole."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import Outcome


def commands(cli, *argv: object) -> dict[str, list[str]]:
    return json.loads(cli("reproduce", *argv, "--dry-run", "--format", "json").ok().out)["commands"]


def test_default_is_the_protocol_that_can_be_run_today(cli):
    found = commands(cli, "--data-root", "data")
    assert " ".join(found) == "doctor weights fetch audit fit-42 test-42 reference export verify card"
    assert found["fit-42"][:3] == ["fit", "--config", "terramind_v1_base_impactmesh_flood_v1_binary"]
    assert found["fetch"][-2:] == ["--protocol", "v1-binary"]
    assert found["verify"][-1].endswith("reference/test/reference.parquet")


def test_each_seed_is_fitted_and_tested_and_a_recipe_brings_its_protocol(cli):
    recipe = "terramind_v1_tiny_impactmesh_flood_v1"  # three classes: IBM's checkpoint has two
    found = commands(cli, "--seeds", "42,43", "--config", recipe, "--precision", "bf16", "--trainer.max_epochs", "3")
    assert [name for name in found if name.startswith(("fit", "test"))] == ["fit-42", "fit-43", "test-42", "test-43"]
    assert ("reference" in found, found["fetch"][-1]) == (False, "v1")
    for name, end in (("fit-43", ["--name", "seed-43", "--seed", "43"]), ("doctor", [])):
        assert found[name][-4 - len(end) :] == ["--precision", "bf16", "--trainer.max_epochs", "3", *end]
    assert list(commands(cli, "--from", "fit", "--until", "test")) == ["fit-42", "test-42"]


def test_every_command_of_the_list_is_one_that_its_parser_takes(cli, monkeypatch):
    monkeypatch.setattr("floodrepro.cli.main.existing_file", Path)
    for argv in ((), ("--demo",), ("--seeds", "1,2", "--protocol", "v0", "--reference", "a.ckpt")):
        for command in commands(cli, *argv).values():
            assert "unknown argument '--no-such-flag'" in cli(*command, "--no-such-flag").err, command


@pytest.fixture(scope="module")
def generated(cli, tmp_path_factory) -> tuple[list[str], Outcome]:
    """The demo's first stage, which needs no torch: stopped on its way and called again."""
    folder = tmp_path_factory.mktemp("reproduce")
    argv = ["reproduce", "--demo", "--run-dir", str(folder), "--until", "synth"]
    with subprocess.Popen([sys.executable, "-m", "floodrepro", *argv]) as stopped:
        while not any(folder.glob("**/S1RTC")):
            time.sleep(0.02)
        stopped.terminate()
    assert stopped.returncode == 143
    return argv, cli(*argv)


def test_finished_stage_is_skipped_until_its_command_or_output_changes(cli, generated):
    argv, first = generated
    folder, again = Path(argv[3]), cli(*argv)
    assert (first.code, again.code) == (0, 0), first.err
    assert len(list((folder / "ImpactMesh-Flood/data/S1RTC").iterdir())) == 128
    assert "[1/1] synth: done already" in again.err
    os.utime(folder / "ImpactMesh-Flood" / "split", (1, 1))
    assert "done already" not in cli(*argv).err


def test_lost_output_and_a_damaged_record_are_found(cli, generated):
    argv, _ = generated
    shutil.rmtree(Path(argv[3]) / "ImpactMesh-Flood/data/S1RTC")
    assert "done already" not in cli(*argv).err
    (Path(argv[3]) / "runs" / ".done-synth.json").write_text("{")
    assert cli(*argv).code == 2  # what is left there may be somebody's
    (Path(argv[3]) / "runs" / "declared.json").write_text("{")
    assert "(a damaged file) were declared here" in cli(*argv).report[0]


def test_first_failure_ends_the_list_with_its_exit_code(cli, generated, tmp_path):
    data = Path(generated[0][3]) / "ImpactMesh-Flood"  # chips are there already, which synth refuses
    wrong = cli("reproduce", "--demo", "--run-dir", tmp_path, "--data-root", data)
    assert wrong.code == 2
    assert "stage synth ended with exit code 2" in wrong.err
    assert "[2/7]" not in wrong.err
    assert json.loads((tmp_path / "runs" / "declared.json").read_text())["seeds"] == [42]


def test_other_seeds_than_the_declared_ones_are_refused(cli, tmp_path):
    (tmp_path / "declared.json").write_text('{"seeds": [1, 2], "declared": "2026-01-01"}')
    refused = cli("reproduce", "--run-dir", tmp_path, "--seeds", "1,3")
    assert (refused.code, "were declared here" in refused.err) == (2, True)
