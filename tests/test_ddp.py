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

from floodrepro.data.samplers import EachOnce, ShuffledByEpoch
from floodrepro.run_folder import RunFolder

HERE = Path(__file__).parent
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def command(*argv: object, program: tuple[str, ...] = (sys.executable, "-m")) -> subprocess.CompletedProcess[str]:
    """A command line of its own: Lightning or torchrun starts the second process with the same arguments."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*program, "floodrepro", *(str(argument) for argument in argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        timeout=400,  # a hang is a failure
        check=False,
    )


def arguments(chips: Path, runs: Path, name: str, *extra: object) -> tuple[object, ...]:
    return (
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", runs, "--name", name),
        *("--trainer.max_epochs", 2, "--data.init_args.batch_size", 1, "--trainer.log_every_n_steps", 1, *extra),
    )


@pytest.fixture(scope="module")
def two(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two epochs in two processes, each step's chips noted by both."""
    runs = tmp_path_factory.mktemp("ddp")
    notes = ("--trainer.callbacks+=faults.Notes", "--trainer.callbacks.folder", runs)
    done = command(*arguments(chips, runs, "two", *TWO, *notes))
    assert done.returncode == 0, done.stderr
    assert "the global batch is 2" in done.stderr
    assert done.stderr.count("epoch 2/2") == 1  # one process speaks
    return RunFolder(runs / "two")


def test_each_chip_is_seen_once_an_epoch(two, chips: Path):
    train = (chips / "split" / "impactmesh_flood_train.txt").read_text().split()
    notes = [(two.path.parent / f"train-{rank}.txt").read_text().split() for rank in (0, 1)]
    half = len(train) // 2
    for epoch in (slice(0, half), slice(half, None)):
        assert sorted(notes[0][epoch] + notes[1][epoch]) == sorted(train)


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


def test_metrics_of_two_processes_equal_one_process_s(two, cli):
    """Same weights, same chips: counts add up, and val/loss is weighted by chips (batches of one here)."""
    one = json.loads(cli("validate", "--ckpt", two.best, "--format", "json").out)["metrics"]
    with two.metrics.open() as file:
        epochs = [row for row in csv.DictReader(file) if row["val/loss"]]
    best = min(epochs, key=lambda row: float(row["val/loss"]))
    compared = [name for name in one if name.startswith("val/")]
    assert {"val/loss", "val/mIoU", "val/IoU_1"} <= set(compared)
    for name in compared:
        assert float(best[name]) == pytest.approx(one[name], abs=1e-5), name
    record = two.read_record()
    assert (record["status"], record["processes"], record["progress"]["step"]) == ("finished", 2, 2 * 6)


def test_the_death_of_one_process_ends_the_run_and_it_resumes_to_the_same_weights(two, chips: Path, tmp_path: Path):
    death = ("--trainer.callbacks+=faults.Death", "--trainer.callbacks.step", 8, "--trainer.callbacks.rank", 1)
    done = command(*arguments(chips, tmp_path, "killed", *TWO, "--save-every", 2, *death))
    assert done.returncode != 0
    run = RunFolder(tmp_path / "killed")
    assert run.read_record()["status"] != "finished"
    # Without the callback that kills, which the recipe named.
    done = command(*arguments(chips, tmp_path, "killed", *TWO, "--save-every", 2, "--resume-anyway"))
    assert done.returncode == 0, done.stderr
    ours, theirs = (torch.load(r.checkpoints / "last.ckpt", weights_only=True) for r in (run, two))
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name


def test_one_process_s_value_that_is_not_finite_stops_all(chips: Path, tmp_path: Path):
    name = "model.neck.2.fpn1.1.running_mean"
    poison = ("--trainer.callbacks+=faults.Poison", "--trainer.callbacks.step", 6, "--trainer.callbacks.name", name)
    done = command(*arguments(chips, tmp_path, "poisoned", *TWO, *poison, "--trainer.callbacks.rank", 1))
    assert done.returncode == 3, done.stderr
    assert RunFolder(tmp_path / "poisoned").read_record()["incidents"]


def test_refusal_of_one_process_ends_those_that_torchrun_started_within_seconds(chips: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text("{}")
    (tmp_path / "taken" / "recipe.yaml").mkdir()  # the first process cannot write its recipe
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    start = time.monotonic()
    done = command(*arguments(chips, tmp_path, "taken", *TWO), program=torchrun)
    assert done.returncode != 0
    assert time.monotonic() - start < 200  # two imports of TerraTorch; the rendezvous would wait for 30 minutes


def test_rollback_with_several_processes_is_refused_before_the_second_one_starts(chips: Path, tmp_path: Path, cli):
    where = ("--data-root", chips, "--runs-root", tmp_path)
    outcome = cli("fit", "--config", "demo", *where, *TWO, "--on-overflow", "rollback")
    assert outcome.code == 2
    assert "a rollback needs a run of one process" in outcome.report[0]
