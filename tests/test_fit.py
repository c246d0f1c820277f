"""Training through the command line: what a run folder holds, and what is refused before anything is lost."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT
from floodrepro import recipe as recipes
from floodrepro.data.survey import quick_audit


def test_run_folder_holds_what_was_run(trained, chips):
    recipe = recipes.read(trained.recipe)
    record = trained.read_record()
    assert recipe["trainer"]["max_epochs"] == 2
    assert recipe["data"]["init_args"]["data_root"] == str(chips / "data")
    assert record["recipe_sha256"] == recipes.fingerprint(recipe)
    assert record["recipe_sha256"] in trained.recipe.read_text().splitlines()[0]
    assert (record["status"], record["epochs"]) == ("finished", 2)
    assert record["data_digest"] == quick_audit(chips, "v0").digest
    assert record["environment"]["packages"]["terratorch"] == "1.2.7"
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == [
        "best.ckpt",
        *("last.ckpt", "last.ckpt.sha256", "previous.ckpt", "previous.ckpt.sha256", "start.json"),
    ]


def test_record_and_metrics_and_checkpoint_agree_on_the_best_epoch(trained):
    record = trained.read_record()
    with trained.metrics.open() as file:
        losses = {int(row["epoch"]): float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    saved = torch.load(trained.best, weights_only=True)
    assert sorted(losses) == [0, 1]
    assert record["best_epoch"] == min(losses, key=losses.get) == saved["epoch"]
    assert record["best_val_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    assert record["best_metrics"]["val/loss"] == record["best_val_loss"]
    assert 0 <= record["best_metrics"]["val/IoU_1"] <= 1


def test_stdout_holds_the_result_and_nothing_else(cli, chips, tmp_path: Path):
    outcome = cli(
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--format", "json"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches", "1"),
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["run"] == str(tmp_path / "demo")
    assert Path(result["checkpoint"]).is_file()
    assert "epoch 1/1" in outcome.err


def test_existing_run_folder_is_refused_and_left_alone(cli, trained, chips):
    before = {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")}
    outcome = cli(
        *("fit", "--config", "demo", "--data-root", chips),
        *("--runs-root", trained.path.parent, "--name", trained.path.name),
    )
    assert outcome.code == 2
    assert "--name trained-2" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in trained.path.rglob("*")} == before


def test_print_config_prints_the_effective_recipe_and_makes_nothing(cli, chips, tmp_path: Path):
    outcome = cli(
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--precision", "bf16"),
        *("--data.init_args.batch_size", "3", "--print_config"),
    )
    assert outcome.code == 0
    recipe = yaml.safe_load(outcome.out)
    assert recipe["trainer"]["precision"] == "bf16-mixed"
    assert recipe["data"]["init_args"]["batch_size"] == 3
    assert outcome.out.startswith(f"# sha256 {recipes.fingerprint(recipe)}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_later_config_wins_over_an_earlier_one(cli, tmp_path: Path):
    change = tmp_path / "change.yaml"
    change.write_text("trainer:\n  max_epochs: 7\n")
    outcome = cli("fit", "--config", "demo", "--config", change, "--print_config")
    assert outcome.code == 0, outcome.err
    recipe = yaml.safe_load(outcome.out)
    assert recipe["trainer"] == {**recipes.read(recipes.find("demo"))["trainer"], "max_epochs": 7}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: fp16 is fine")
@pytest.mark.parametrize("how", [["--precision", "fp16"], ["--trainer.precision", "16-mixed"]])
def test_fp16_on_a_cpu_is_refused_with_the_alternative(cli, chips, tmp_path: Path, how):
    outcome = cli("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path / "runs", *how)
    assert outcome.code == 2
    assert "fp16 does not run on a CPU" in outcome.err
    assert "--precision fp32" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_bf16_trains_on_a_cpu(cli, chips, tmp_path: Path):
    outcome = cli(
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--precision", "bf16"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches", "1"),
    )
    assert outcome.code == 0, outcome.err


def test_two_fits_with_one_seed_give_the_same_weights_whatever_the_number_of_workers(cli, chips, tmp_path: Path):
    states = []
    for workers in (0, 2):
        outcome = cli(
            *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--name", f"workers-{workers}"),
            *("--trainer.max_epochs", "2", "--data.init_args.batch_size", "3"),
            *("--data.init_args.num_workers", workers),
        )
        assert outcome.code == 0, outcome.err
        best = tmp_path / f"workers-{workers}" / "checkpoints" / "best.ckpt"
        states.append(torch.load(best, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_failed_fit_says_so_in_its_record(cli, own_chips, tmp_path: Path):
    train = own_chips / "split" / "impactmesh_flood_train.txt"
    chip = train.read_text().splitlines()[0]
    (own_chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").write_bytes(b"not a zip")
    outcome = cli("fit", "--config", "demo", "--data-root", own_chips, "--runs-root", tmp_path / "runs")
    assert outcome.code == 1
    assert len(outcome.report) <= 3
    record = json.loads((tmp_path / "runs" / "demo" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["reason"]


def test_event_in_two_splits_is_found_before_training_starts(cli, own_chips, tmp_path: Path):
    split = own_chips / "split"
    moved = (split / "impactmesh_flood_train.txt").read_text().splitlines()[0]
    with (split / "impactmesh_flood_val.txt").open("a") as file:
        file.write(f"{moved}\n")
    outcome = cli("fit", "--config", "demo", "--data-root", own_chips, "--runs-root", tmp_path / "runs")
    assert outcome.code == 1
    assert moved.split("_")[0] in outcome.report[0]
    assert not (tmp_path / "runs").exists()


def unwritable() -> Path:
    """A folder in which even root can make nothing."""
    return Path("/sys/floodrepro") if os.geteuid() == 0 else Path("/floodrepro")


def test_no_write_permission_is_a_clear_error(cli, chips, tmp_path: Path):
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    for root in (unwritable(), occupied):
        outcome = cli("fit", "--config", "demo", "--data-root", chips, "--runs-root", root)
        assert outcome.code == 1
        assert "cannot be made" in outcome.report[0]
        assert len(outcome.report) <= 3
    assert occupied.read_text() == "mine"


IMPORT_PROBE = """
import json, logging, os, socket, sys
asked = []
real = socket.getaddrinfo
socket.getaddrinfo = lambda *a, **k: asked.append(a[0]) or real(*a, **k)
os.environ.pop("LIGHTLY_DID_VERSION_CHECK", None)
import torch
before = (torch.get_float32_matmul_precision(), logging.getLogger().level, len(logging.getLogger().handlers))
if sys.argv[1] == "plain":
    import terratorch.cli_tools
else:
    import floodrepro.training.recipe_cli
import time; time.sleep(1)  # the version check runs in a thread
after = (torch.get_float32_matmul_precision(), logging.getLogger().level, len(logging.getLogger().handlers))
print(json.dumps({"unchanged": before == after, "asked": asked}))
"""


@pytest.mark.parametrize(("how", "clean"), [("floodrepro", True), ("plain", False)])
def test_importing_terratorch_leaves_the_process_alone_and_asks_no_network(how, clean):
    """The plain import is the planted fault: the probe has to see what it does."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_PROBE, how], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["unchanged"] is clean
    assert (seen["asked"] == []) is clean


def test_these_tests_run_on_the_versions_of_constraints_txt():
    from importlib.metadata import version

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    for package in (
        "terratorch",
        "lightning",
        "impactmesh",
        "torch",
        "torchvision",
        "torchgeo",
        "zarr",
        "jsonargparse",
    ):
        assert version(package).split("+")[0] == pins[package]
