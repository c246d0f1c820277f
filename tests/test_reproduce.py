"""The list of commands: what it holds, what is skipped, how it ends, and the demo from its first stage to its last."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from floodrepro.run_folder import RunFolder

# Fast enough for a test: what the demo's model learns is shown by tests/test_demo.py.
SHORT = ("--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--data.init_args.batch_size=2")


def run(*argv: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "floodrepro", "reproduce", *(str(word) for word in argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def commands(cli, *argv: object) -> dict[str, list[str]]:
    outcome = cli("reproduce", *argv, "--dry-run", "--format", "json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["commands"]


def test_default_is_the_protocol_that_can_be_run_today(cli):
    found = commands(cli, "--data-root", "data")
    assert list(found) == [
        "doctor",
        "weights",
        "fetch",
        "audit",
        "fit-42",
        "test-42",
        "reference",
        "export",
        "verify",
        "card",
    ]
    assert found["fit-42"][:3] == ["fit", "--config", "terramind_v1_base_impactmesh_flood_v1_binary"]
    assert found["fetch"][-2:] == ["--protocol", "v1-binary"]
    assert found["verify"][-2:] == ["--reference", found["verify"][-1]]


def test_each_seed_is_fitted_and_tested_and_protocol_v1_has_no_reference(cli):
    found = commands(cli, "--seeds", "42,43", "--protocol", "v1", "--size", "tiny", "--precision", "bf16")
    assert [name for name in found if name.startswith(("fit", "test"))] == ["fit-42", "fit-43", "test-42", "test-43"]
    assert "reference" not in found
    assert found["fit-43"][-2:] == ["--precision", "bf16"]
    assert found["fit-43"][found["fit-43"].index("--seed") + 1] == "43"


def test_from_and_until_cut_the_list_and_overrides_reach_the_fit(cli):
    found = commands(cli, "--from", "fit", "--until", "test", "--trainer.max_epochs", "3")
    assert list(found) == ["fit-42", "test-42"]
    assert found["fit-42"][-2:] == ["--trainer.max_epochs", "3"]


def test_every_command_of_the_list_is_one_that_its_parser_takes(cli):
    for argv in ((), ("--demo",), ("--seeds", "1,2", "--protocol", "v0", "--revision", "abc")):
        for command in commands(cli, *argv).values():
            unknown = cli(*command, "--no-such-flag")
            assert "unknown flag '--no-such-flag'" in unknown.err, command


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's list until its test, a short fit, stopped by SIGTERM in the fit and run again."""
    folder = tmp_path_factory.mktemp("reproduce") / "demo"
    argv = ["--demo", "--run-dir", folder, "--until", "test", *SHORT]
    process = subprocess.Popen(
        [sys.executable, "-m", "floodrepro", "reproduce", *(str(word) for word in argv)],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "runs" / "seed-42" / "log.txt"
    end = time.monotonic() + 300
    while not log.exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    # The fit may have been faster than the signal: then the list goes to its end.
    assert process.returncode in (143, 0), err
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    return folder


def test_list_that_was_stopped_goes_to_its_end_by_the_same_command(demo):
    finished = RunFolder(demo / "runs" / "seed-42")
    assert finished.read_record()["status"] == "finished"
    assert (finished.evaluation / "test" / "best.parquet").is_file()
    declared = json.loads((demo / "runs" / "declared.json").read_text())
    assert declared["seeds"] == [42]
    assert declared["declared"] <= finished.read_record()["started"]


def test_finished_stages_are_skipped_and_a_changed_output_is_made_again(demo):
    again = run("--demo", "--run-dir", demo, "--until", "test", *SHORT)
    assert again.returncode == 0
    assert again.stderr.count("done already") == 4  # the reference is a fit too
    assert "epoch" not in again.stderr
    os.utime(demo / "runs" / "seed-42" / "evaluation" / "test" / "best.parquet", (1, 1))
    made = run("--demo", "--run-dir", demo, "--from", "test", "--until", "test", *SHORT)
    assert made.returncode == 0, made.stderr
    assert "done already" not in made.stderr


def test_first_failure_ends_the_list_with_its_exit_code(demo, tmp_path):
    wrong = run(
        "--demo",
        "--run-dir",
        tmp_path,
        "--data-root",
        demo / "ImpactMesh-Flood",
        "--from",
        "fit",
        "--optimizer.init_args.lrr=1",
    )
    assert wrong.returncode == 2
    assert "stage fit-42 ended with exit code 2" in wrong.stderr
    assert not (tmp_path / "runs" / "shorter").exists()


def test_other_seeds_than_the_declared_ones_are_refused(demo):
    declaration = demo / "runs" / "declared.json"
    before = declaration.read_text()
    declaration.write_text(json.dumps(json.loads(before) | {"seeds": [1, 2]}))
    refused = run("--demo", "--run-dir", demo, "--until", "test", *SHORT)
    declaration.write_text(before)
    assert refused.returncode == 2
    assert "were declared here" in refused.stderr
