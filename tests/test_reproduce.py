"""The list of commands: what it holds, what is skipped, how it ends. tests/test_demo.py runs the demo's whole."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from conftest import Outcome


def commands(cli, *argv: object) -> dict[str, list[str]]:
    outcome = cli("reproduce", *argv, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["commands"]


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


def test_every_command_of_the_list_is_one_that_its_parser_takes(cli):
    for argv in ((), ("--demo",), ("--seeds", "1,2", "--protocol", "v0", "--reference", "a.ckpt")):
        for command in commands(cli, *argv).values():
            unknown = cli(*command, "--no-such-flag")
            assert "unknown argument '--no-such-flag'" in unknown.err, command


@pytest.fixture(scope="module")
def generated(cli, tmp_path_factory) -> tuple[Path, Outcome]:
    """The demo's first stage, which needs no torch."""
    folder = tmp_path_factory.mktemp("reproduce") / "demo"
    return folder, cli("reproduce", "--demo", "--run-dir", folder, "--until", "synth")


def test_finished_stage_is_skipped_until_its_command_or_output_changes(cli, generated):
    folder, first = generated
    again = cli("reproduce", "--demo", "--run-dir", folder, "--until", "synth")
    assert (first.code, again.code) == (0, 0), first.err
    assert "[1/1] synth: done already" in again.err
    os.utime(folder / "ImpactMesh-Flood" / "split", (1, 1))
    changed = cli("reproduce", "--demo", "--run-dir", folder, "--until", "synth")
    assert "done already" not in changed.err


def test_killed_synth_starts_again_and_a_lost_output_or_damaged_record_is_found(cli, tmp_path):
    argv = ("reproduce", "--demo", "--run-dir", str(tmp_path), "--until", "synth")
    radar = tmp_path / "ImpactMesh-Flood" / "data" / "S1RTC"
    with subprocess.Popen([sys.executable, "-m", "floodrepro", *argv]) as killed:
        while not radar.is_dir():
            time.sleep(0.02)
        killed.terminate()
    again = cli(*argv)
    assert (killed.returncode, again.code, len(list(radar.iterdir()))) == (143, 0, 128), again.err
    shutil.rmtree(radar)
    assert "done already" not in cli(*argv).err
    (tmp_path / "runs" / ".done-synth.json").write_text("{")
    assert cli(*argv).code == 2  # what is left there may be somebody's
    (tmp_path / "runs" / "declared.json").write_text("{")
    assert "(a damaged file) were declared here" in cli(*argv).report[0]


def test_first_failure_ends_the_list_with_its_exit_code(cli, generated, tmp_path):
    data = generated[0] / "ImpactMesh-Flood"  # chips are there already, which synth refuses
    wrong = cli("reproduce", "--demo", "--run-dir", tmp_path, "--data-root", data)
    assert wrong.code == 2
    assert "stage synth ended with exit code 2" in wrong.err
    assert "[2/7]" not in wrong.err
    assert json.loads((tmp_path / "runs" / "declared.json").read_text())["seeds"] == [42]


def test_other_seeds_than_the_declared_ones_and_a_second_reproduction_are_refused(cli, tmp_path):
    (tmp_path / "declared.json").write_text('{"seeds": [1, 2], "declared": "2026-01-01"}')
    refused = cli("reproduce", "--run-dir", tmp_path, "--seeds", "1,3")
    assert (refused.code, "were declared here" in refused.err) == (2, True)
    with FileLock(tmp_path / ".reproduce.lock"):
        assert "another reproduction is running" in cli("reproduce", "--run-dir", tmp_path).err
