"""Callbacks that tests name in a recipe, to plant a fault in one process of a run."""

import os
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Notes(Callback):
    """Writes down the chips that each process sees."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _write(self, trainer: Trainer, stage: str, batch: Any) -> None:
        with (self.folder / f"{stage}-{trainer.global_rank}.txt").open("a") as file:
            file.write(" ".join(batch.chips) + "\n")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "train", batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "val", batch)


class Death(Callback):
    """Kills one process before a step."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)


class Poison(Callback):
    """Puts a NaN into one process's buffer after a step; before one, DDP would send it the first process's again."""

    def __init__(self, step: int, name: str, rank: int = 0) -> None:
        self.step, self.name, self.rank = step, name, rank

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            dict(pl_module.named_buffers())[self.name].flatten()[0] = float("nan")
