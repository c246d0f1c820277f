"""Several processes on a CPU (gloo): the same chips, the same figures, and nobody is left waiting."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from floodrepro.training.importing import import_terratorch

import_terratorch()  # before impactmesh imports it in its own way, which lowers the precision of matrices

from floodrepro.data.samplers import EachOnce, ShuffledByEpoch  # noqa: E402
from floodrepro.run_folder import RunFolder  # noqa: E402
from floodrepro.training.checkpoint_files import is_whole  # noqa: E402

HERE = Path(__file__).parent
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def command(*argv: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A command line of its own: Lightning starts the second process with the same arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, "-m", "floodrepro", *(str(argument) for argument in argv)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,  # a hang is a failure
        check=False,
    )


def fit(chips: Path, runs: Path, name: str, *extra: object) -> tuple[subprocess.CompletedProcess[str], RunFolder]:
    done = command(
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", runs, "--name", name),
        *("--trainer.max_epochs", 2, "--data.init_args.batch_size", 1, "--trainer.log_every_n_steps", 1, *extra),
    )
    return done, RunFolder(runs / name)


@pytest.fixture(scope="module")
def two(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two epochs in two processes, each step's chips noted by both."""
    runs = tmp_path_factory.mktemp("ddp")
    notes = ("--trainer.callbacks+=planting.Notes", "--trainer.callbacks.folder", runs)
    done, run = fit(chips, runs, "two", *TWO, *notes)
    assert done.returncode == 0, done.stderr
    return run


def notes(run: RunFolder, stage: str) -> list[list[str]]:
    """Chips of each process, as `planting.Notes` wrote them."""
    return [(run.path.parent / f"{stage}-{rank}.txt").read_text().split() for rank in (0, 1)]


def test_each_chip_is_seen_once_an_epoch(two, chips: Path):
    train = (chips / "split" / "impactmesh_flood_train.txt").read_text().split()
    first, second = notes(two, "train")
    assert len(first) == len(second) == len(train)  # half of them in each of two epochs
    half = len(train) // 2
    for epoch in (slice(0, half), slice(half, None)):
        assert sorted(first[epoch] + second[epoch]) == sorted(train)
    val = (chips / "split" / "impactmesh_flood_val.txt").read_text().split()
    first, second = notes(two, "val")
    per_epoch = len(first) // 2, len(second) // 2
    assert sorted(first[: per_epoch[0]] + second[: per_epoch[1]]) == sorted(val)


def test_each_step_sees_the_chips_that_one_process_would_see():
    one = list(ShuffledByEpoch(20, 7, batch_size=4))
    ranks = [list(ShuffledByEpoch(20, 7, batch_size=2, world=2, rank=rank)) for rank in (0, 1)]
    for step in range(5):
        joined = ranks[0][2 * step : 2 * step + 2] + ranks[1][2 * step : 2 * step + 2]
        assert joined == one[4 * step : 4 * step + 4]


@pytest.mark.parametrize("count", [2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_repeats_no_chip(count, world):
    samplers = [EachOnce(count, world=world, rank=rank) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(count))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_metrics_of_two_processes_equal_one_process_s(two, chips: Path, cli):
    """Same weights, same chips: counts add up, and val/loss is weighted by chips (batches of one here)."""
    one = json.loads(cli("validate", "--ckpt", two.best, "--format", "json").out)["metrics"]
    with two.metrics.open() as file:
        epochs = [row for row in csv.DictReader(file) if row["val/loss"]]
    best = min(epochs, key=lambda row: float(row["val/loss"]))
    compared = [name for name in one if name.startswith("val/")]
    assert {"val/loss", "val/mIoU", "val/IoU_1"} <= set(compared)
    for name in compared:
        assert float(best[name]) == pytest.approx(one[name], abs=1e-5), name


def test_record_speaks_of_both_processes(two):
    record = two.read_record()
    assert record["status"] == "finished"
    assert record["progress"]["step"] == 2 * 6  # 12 chips, two processes, one chip each


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_one_process_ends_the_run_and_it_resumes_to_the_same_weights(
    two, chips: Path, tmp_path: Path, rank: int
):
    death = ("--trainer.callbacks+=planting.Death", "--trainer.callbacks.step", 8, "--trainer.callbacks.rank", rank)
    more = ("--save-every", 2)
    start = time.monotonic()
    done, run = fit(chips, tmp_path, "killed", *TWO, *more, *death)
    assert done.returncode != 0
    assert time.monotonic() - start < 200
    assert run.read_record()["status"] != "finished"
    assert is_whole(run.checkpoints / "last.ckpt")
    done, run = fit(chips, tmp_path, "killed", *TWO, *more, "--resume-anyway")  # without the callback that kills
    assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(r.checkpoints / "last.ckpt", weights_only=True) for r in (run, two))
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    means = [[row["train/loss_epoch"] for row in r.read_metrics() if row["train/loss_epoch"]] for r in (run, two)]
    assert [float(mean) for mean in means[0]] == pytest.approx([float(mean) for mean in means[1]], rel=1e-6)


def test_one_process_s_value_that_is_not_finite_stops_all(chips: Path, tmp_path: Path):
    name = "model.neck.2.fpn1.1.running_mean"
    poison = ("--trainer.callbacks+=planting.Poison", "--trainer.callbacks.step", 6, "--trainer.callbacks.name", name)
    done, run = fit(chips, tmp_path, "poisoned", *TWO, *poison, "--trainer.callbacks.rank", 1)
    assert done.returncode == 3, done.stderr
    assert run.read_record()["incidents"][0]["kind"] in ("state", "elsewhere")
    assert not run.best.exists()


def test_rollback_with_several_processes_is_refused_before_the_second_one_starts(chips: Path, tmp_path: Path, cli):
    where = ("--data-root", chips, "--runs-root", tmp_path)
    outcome = cli("fit", "--config", "demo", *where, *TWO, "--on-overflow", "rollback")
    assert outcome.code == 2
    assert "a rollback needs a run of one process" in outcome.report[0]
