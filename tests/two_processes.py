"""The tiny training in two processes (gloo), as a cluster starts them, and what can befall the second one."""

import os
import signal
import socket
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from processes import CONTEXT
from tiny_training import train


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


class Notes(Callback):
    """Writes down the chips that each process trains on; named in a recipe."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with (self.folder / f"train-{trainer.global_rank}.txt").open("a") as file:
            file.write(" ".join(batch.chips) + "\n")


def environments(**more: str) -> list[dict[str, str]]:
    """What tells each of two processes of one machine who it is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0", **more}
    return [common | {"LOCAL_RANK": rank, "RANK": rank} for rank in ("0", "1")]


def train_both(folder: Path, how: str = "", step: int = 0) -> tuple[list[int], str]:
    """Train ten epochs or what is left of them; the exit codes, and what went to stderr."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    both = [CONTEXT.Process(target=_train, args=(one, folder, log, how, step)) for one in environments()]
    for process in both:
        process.start()
    for process in both:
        process.join(120)  # a hang is a failure
        process.kill()
        process.join()
    return [process.exitcode for process in both], log.read_text()


def _train(environment: dict[str, str], folder: Path, log: Path, how: str, step: int) -> None:
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    last = folder / "checkpoints" / "last.ckpt"
    resume = last if last.exists() else None
    train(folder, Fault(how, step), devices=2, strategy="ddp", max_epochs=10, every=4, resume=resume)
