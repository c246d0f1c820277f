"""Several processes on a CPU (gloo): the same chips, the same figures, and nobody is left waiting."""

import functools
import json
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from conftest import SMALL
from floodrepro.data.samplers import EachOnce, ShuffledByEpoch
from floodrepro.run_folder import RunFolder
from floodrepro.training.fit import _of_all
from processes import Command
from terratorch_runs import different
from tiny_training import train

TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


class Fault(Callback):
    """A signal for the second process alone, or a NaN in its buffer after a step: DDP would undo one from before."""

    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (1, self.step) and self.how in ("SIGTERM", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, self.how))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if (trainer.global_rank, trainer.global_step, self.how) == (1, self.step, "poison"):
            pl_module.model[1].running_mean[0] = torch.nan


def environments(**more: str) -> list[dict[str, str]]:
    """What tells each of two processes of one machine who it is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0", **more}
    return [common | {"LOCAL_RANK": rank, "RANK": rank} for rank in ("0", "1")]


def train_both(folder: Path, how: str = "", step: int = 0) -> tuple[list[int], str]:
    """Train ten epochs or what is left of them; the exit codes, and what they printed."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    run = functools.partial(_train, folder, Fault(how, step))
    both = [Command(log=log, program=run, environment=one) for one in environments()]
    return [process.wait(timeout=120) for process in both], log.read_text()  # a hang is a failure


def _train(folder: Path, fault: Callback) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    train(folder, fault, devices=2, strategy="ddp", max_epochs=10, every=4, resume=last if last.exists() else None)


def arguments(chips: Path, runs: Path, name: str, *extra: object) -> tuple[object, ...]:
    return (
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", runs, "--name", name, *SMALL),
        *("--trainer.max_epochs", 1, "--data.init_args.batch_size", 1, "--trainer.log_every_n_steps", 1, *extra),
    )


@pytest.fixture(scope="module")
def two(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An epoch in two processes."""
    runs = tmp_path_factory.mktemp("ddp")
    command = Command(*arguments(chips, runs, "two", *TWO), log=runs / "log.txt")
    assert command.wait() == 0, command.log
    assert "the global batch is 2" in command.log
    assert command.log.count("epoch 1/1") == 1  # one process speaks
    return RunFolder(runs / "two")


def test_each_step_sees_the_chips_that_one_process_would_see():
    one = list(ShuffledByEpoch(20, 7, batch_size=4))
    ranks = [list(ShuffledByEpoch(20, 7, batch_size=2, world=2, rank=rank)) for rank in (0, 1)]
    for step in range(5):
        joined = ranks[0][2 * step : 2 * step + 2] + ranks[1][2 * step : 2 * step + 2]
        assert joined == one[4 * step : 4 * step + 4]


def _gather(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    module = SimpleNamespace(failed_chips={f"chip{rank}": "cut short"})
    (folder / f"{rank}").write_text(str(_of_all(SimpleNamespace(world_size=2, datamodule=module), "failed_chips")))


def test_chips_that_any_process_left_out_are_in_the_record(tmp_path: Path):
    run = functools.partial(_gather, tmp_path)
    both = [Command(log=tmp_path / "log.txt", program=run, environment=one) for one in environments()]
    assert [process.wait(timeout=60) for process in both] == [0, 0], both[0].log
    assert (tmp_path / "0").read_text() == "{'chip0': 'cut short', 'chip1': 'cut short'}"


@pytest.mark.parametrize("count", [2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_repeats_no_chip(count, world):
    samplers = [EachOnce(count, world=world, rank=rank) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(count))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_metrics_of_two_processes_equal_one_process_s(two, cli):
    """Same weights, same chips: counts add up, and val/loss is weighted by chips (batches of one here)."""
    one = json.loads(cli("validate", "--ckpt", two.best, "--format", "json").out)["metrics"]
    epochs = [row for row in two.read_metrics() if row["val/loss"]]
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
    assert (codes[0] != 0, codes[1]) == (True, -signal.SIGKILL), log
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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--data.init_args.batch_size", 6, "--on-overflow", "rollback"), "a rollback needs a run of one process"),
        (("--data.init_args.batch_size", 8), "12 training chips do not fill one batch of 16"),
        (("--limit", 1, "--data.init_args.batch_size", 1), "fewer validation chips than devices"),
    ],
)
def test_what_two_processes_cannot_do_is_refused_before_the_second_one_starts(chips, tmp_path: Path, cli, flags, says):
    outcome = cli("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, *TWO, *flags)
    assert (outcome.code, says in outcome.report[0]) == (2, True), outcome.err
