"""A callback that strikes its own process with a real signal at a chosen moment; named in a recipe."""

import os
import signal
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Strike(Callback):
    """Sends a signal once, when a moment has come a number of times.

    Args:
        at: ``step`` (before a training batch), ``val`` (before a validation batch), ``saved`` (after a state was
            written), ``end_epoch``, ``end``, or ``fetch`` (while a training batch is read).
        count: How many times the moment comes before.
        how: A signal's name, or ``error`` for an exception.
        group: Whether the whole process group is struck.
    """

    def __init__(self, at: str, count: int = 1, how: str = "SIGKILL", group: bool = False) -> None:
        self._at, self._count, self._how, self._group = at, count, how, group

    def _come(self, moment: str) -> None:
        if moment != self._at:
            return
        self._count -= 1
        if self._count:
            return
        if self._how == "error":
            raise RuntimeError("planted")
        (os.killpg if self._group else os.kill)(os.getpid(), getattr(signal, self._how))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save, read = trainer.save_checkpoint, trainer.fit_loop._data_fetcher.__class__.__next__

        def save_and_strike(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            self._come("saved")

        trainer.save_checkpoint = save_and_strike
        if self._at == "fetch":
            dataset = trainer.train_dataloader.dataset
            name = "__getitems__" if hasattr(type(dataset), "__getitems__") else "__getitem__"
            read = getattr(type(dataset), name)

            def read_and_strike(this: Any, what: Any) -> Any:
                if trainer.training:
                    self._come("fetch")
                return read(this, what)

            setattr(type(dataset), name, read_and_strike)

    def on_train_batch_start(self, *args: Any) -> None:
        self._come("step")

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._come("val")

    def on_train_epoch_end(self, *args: Any) -> None:
        self._come("end_epoch")

    def on_train_end(self, *args: Any) -> None:
        self._come("end")
