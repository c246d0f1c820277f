"""Callbacks that spoil a training in the ways that the guard has to notice; named in a recipe by their class path."""

import os
import signal
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Overflow(Callback):
    """One activation of the neck too large for fp16, in one training forward: inf there, a number in bf16 and fp32.

    Args:
        step: Optimizer steps before it.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._planted = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step or self._planted:
            return
        self._planted = True
        layer = next(m for m in pl_module.model.neck.modules() if isinstance(m, torch.nn.ConvTranspose2d))

        def plant(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            handle.remove()
            spoilt = output.clone()
            spoilt[0, 0, 0, 0] = 1e6
            return spoilt

        handle = layer.register_forward_hook(plant)


class Forgotten(Callback):
    """Fails a fit during which an earlier attempt's graph is still in memory; to be used without the collector."""

    graphs: ClassVar[list[weakref.ref]] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.graphs.append(weakref.ref(loss))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alive = sum(graph() is not None for graph in self.graphs)
        if alive:
            raise AssertionError(f"{alive} losses of an earlier attempt are held, and all their activations")


class Poison(Callback):
    """A value that is not finite, written into a parameter or a buffer after a step, as cosmic rays or bugs do.

    Args:
        step: Optimizer steps before it.
        name: The tensor's name.
        rank: The process that it happens in.
    """

    def __init__(self, step: int, name: str, rank: int = 0) -> None:
        self._step, self._name, self._rank = step, name, rank

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step and trainer.global_rank == self._rank:
            tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
            with torch.no_grad():
                tensors[self._name].view(-1)[0] = float("nan")


class OneClass(Callback):
    """Predictions of class 0 everywhere, by a huge bias of the head, from a step on."""

    def __init__(self, step: int = 1) -> None:
        self._step = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step >= self._step:
            with torch.no_grad():
                biases = [p for n, p in pl_module.model.head.named_parameters() if n.endswith("bias")]
                biases[-1].copy_(torch.tensor([1e4, -1e4]))


class Death(Callback):
    """SIGKILL for one of several processes."""

    def __init__(self, step: int, rank: int) -> None:
        self._step, self._rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._step and trainer.global_rank == self._rank:
            os.kill(os.getpid(), signal.SIGKILL)


class Notes(Callback):
    """Each process's chips, in files of its own.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def _note(self, trainer: Trainer, stage: str, batch: Any) -> None:
        with Path(self._folder, f"{stage}-{trainer.global_rank}.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{chip}\n" for chip in batch.chips)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._note(trainer, "train", batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, "val", batch)
