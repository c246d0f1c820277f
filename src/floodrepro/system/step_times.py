"""When the parts of a training or a test step are done, by the device's own clock where it has one."""

import time
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from floodrepro.training.recorder import memory, reset_peaks


class Parts:
    """Moments, a fixed number in each step.

    Args:
        names: Of the parts of a step, in order; a moment is noted at the end of each.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._moments: list[Any] = []  # floats, or torch.cuda.Event
        self._on_gpu = False

    def begin(self, device: torch.device) -> None:
        """Note when the first step begins."""
        self._on_gpu, self._moments = device.type == "cuda", []
        self.note()

    def note(self, *_: Any) -> None:
        """Note that a part is done: now, or on a GPU when it has done what it was given so far, without a wait."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the beginning to each moment; waits for the device, once."""
        first = self._moments[0]
        if not self._on_gpu:
            return [moment - first for moment in self._moments]
        torch.cuda.synchronize()
        return [first.elapsed_time(moment) / 1e3 for moment in self._moments]

    def ends(self) -> list[float]:
        """Seconds from the beginning to the end of each step."""
        return self.seconds()[len(self._names) :: len(self._names)]

    def by_step(self) -> list[dict[str, float]]:
        """Seconds of each part, step by step."""
        durations = [b - a for a, b in pairwise(self.seconds())]
        count = len(self._names)
        steps = [durations[i : i + count] for i in range(0, len(durations), count)]
        return [dict(zip(self._names, step, strict=True)) for step in steps]


class StepTimes(Callback):
    """Times training steps and keeps their losses. To be called last: what other callbacks do belongs to the step.

    Args:
        seed: What dropout is drawn from: alike on all sides, whatever building and loading took from the generator.
        warm_up: Steps whose peak of memory does not count.
    """

    def __init__(self, seed: int = 0, warm_up: int = 0) -> None:
        self._seed, self._warm_up = seed, warm_up
        self.memory: dict[str, float] = {}  # at the end of training: afterwards Lightning moves the model off the GPU
        self.parts = Parts("data", "forward, loss, metrics", "backward", "optimizer and the rest")
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        torch.manual_seed(self._seed)
        self.parts.begin(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is on the device, as the model is given it."""
        self.parts.note()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The loss is there."""
        self.parts.note()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are there."""
        self.parts.note()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """The weights are there, and all other callbacks have seen the step."""
        self.parts.note()
        self.losses.append(outputs["loss"].detach())
        if len(self.losses) == self._warm_up:
            reset_peaks(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peaks."""
        self.memory = memory(pl_module.device)


class PassTimes(Callback):
    """Times the batches of a test. To be called first: what later callbacks do with a batch is a part of its own."""

    def __init__(self) -> None:
        self.parts = Parts("data", "forward, loss, metrics", "counts by chip")
        self.ended = 0.0
        self.memory: dict[str, float] = {}

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin. Lightning calls the task's own hook after those of all callbacks: it has the batch's end."""
        pl_module.on_test_batch_end = self.parts.note
        self.parts.begin(pl_module.device)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """The batch is on the device, as the model is given it."""
        self.parts.note()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """TerraTorch's own step is over."""
        self.parts.note()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last batch is done with."""
        self.ended = time.perf_counter()
        self.memory = memory(pl_module.device)
