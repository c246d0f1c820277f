"""Several processes on a CPU (gloo): the same chips, the same figures, and nobody is left waiting."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from floodrepro.data.samplers import EachOnce, ShuffledByEpoch
from floodrepro.run_folder import RunFolder
from processes import Command
from terratorch_runs import different
from two_processes import environments, train_both

HERE = Path(__file__).parent
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


def command(*argv: object) -> subprocess.CompletedProcess[str]:
    """A command line of its own: Lightning starts the second process with the same arguments."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "floodrepro", *(str(argument) for argument in argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        timeout=400,  # a hang is a failure
        check=False,
    )


def arguments(chips: Path, runs: Path, name: str, *extra: object) -> tuple[object, ...]:
    return (
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", runs, "--name", name),
        *("--trainer.max_epochs", 1, "--data.init_args.batch_size", 1, "--trainer.log_every_n_steps", 1, *extra),
    )


@pytest.fixture(scope="module")
def two(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An epoch in two processes, each step's chips noted by both."""
    runs = tmp_path_factory.mktemp("ddp")
    notes = ("--trainer.callbacks+=two_processes.Notes", "--trainer.callbacks.folder", runs)
    done = command(*arguments(chips, runs, "two", *TWO, *notes))
    assert done.returncode == 0, done.stderr
    assert "the global batch is 2" in done.stderr
    assert done.stderr.count("epoch 1/1") == 1  # one process speaks
    return RunFolder(runs / "two")


def test_each_chip_is_seen_once_an_epoch(two, chips: Path):
    train = (chips / "split" / "impactmesh_flood_train.txt").read_text().split()
    notes = [(two.path.parent / f"train-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert sorted(notes[0] + notes[1]) == sorted(train)


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
    assert (record["status"], record["processes"], record["progress"]["step"]) == ("finished", 2, 6)


def test_two_processes_stop_together_die_together_and_resume_to_the_same_bits(tmp_path: Path):
    assert train_both(tmp_path / "straight")[0] == [0, 0]
    struck = tmp_path / "struck"
    last = struck / "checkpoints" / "last.ckpt"
    assert train_both(struck, "SIGTERM", 13)[0] == [143, 143]
    assert torch.load(last, weights_only=True)["global_step"] == 15  # asked at every tenth batch of an epoch of three
    codes, log = train_both(struck, "SIGKILL", 25)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0, log
    assert train_both(struck)[0] == [0, 0]
    assert different(tmp_path / "straight" / "checkpoints" / "last.ckpt", last)[0] == []


def test_one_process_s_value_that_is_not_finite_stops_all(tmp_path: Path):
    codes, log = train_both(tmp_path, "poison", 9)  # the end of an epoch
    assert codes == [1, 1]
    assert log.count("Incident: NaNGuard stopped the run") >= 2
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 9


def test_refusal_of_one_process_ends_those_that_a_cluster_started_within_seconds(chips: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.json").write_text("{}")
    (tmp_path / "taken" / "recipe.yaml").mkdir()  # the first process cannot write its recipe
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    both = [
        Command(*arguments(chips, tmp_path, "taken", *TWO), log=tmp_path / f"{rank}.log", environment=environment)
        for rank, environment in enumerate(environments(**torchrun))
    ]
    for process in both:
        assert process.wait(timeout=120) in (1, 2), process.log  # the rendezvous would wait for 30 minutes
        assert "the run folder cannot be written" in process.log


def test_rollback_with_several_processes_is_refused_before_the_second_one_starts(chips: Path, tmp_path: Path, cli):
    where = ("--data-root", chips, "--runs-root", tmp_path)
    outcome = cli("fit", "--config", "demo", *where, *TWO, "--on-overflow", "rollback")
    assert outcome.code == 2
    assert "a rollback needs a run of one process" in outcome.report[0]
