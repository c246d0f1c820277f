"""What the guard costs: its own time in each step, and steps with it beside steps without it, in one run."""

import statistics
import time
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from floodrepro.recipe import Recipe
from floodrepro.system.bench_sides import surroundings
from floodrepro.system.bench_train import WARM_UP, Side, train
from floodrepro.system.own_process import in_own_process
from floodrepro.system.step_times import StepTimes
from floodrepro.training.fit import FitOptions
from floodrepro.training.guard import Guard

LIMIT = 0.01  # share of a step's time that the guard may take
_BLOCK = 4  # steps in a row with the guard, then as many without: what else the machine does meets both


class Switched(Guard):
    """A guard that sleeps in every other block of steps, and times itself while it is awake."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.awake: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide for this step."""
        self.awake.append(trainer.global_step // _BLOCK % 2 == 0)
        self.seconds.append(0.0)
        self._timed(super().on_train_batch_start, trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """As the guard, timed."""
        self._timed(super().on_before_backward, trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """As the guard, timed."""
        self._timed(super().on_before_optimizer_step, trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """As the guard, timed."""
        self._timed(super().on_train_batch_end, trainer, pl_module, *args)

    def _timed(self, hook: Any, *args: Any) -> None:
        if self.awake[-1]:
            start = time.perf_counter()
            hook(*args)
            self.seconds[-1] += time.perf_counter() - start


def bench_guard(recipe: Recipe, data: Path, *, steps: int) -> dict[str, Any]:
    """Train once with a guard that is awake in every other block of steps.

    Args:
        recipe: What is trained.
        data: Folder of chips, extracted.
        steps: Steps that count, at least a block with the guard and one without.

    Returns:
        Medians of step time with and without, their ratio, and the share of a step that the guard's hooks take on the
        host.
    """
    return in_own_process(_measure, recipe, data, steps)


def _measure(recipe: Recipe, data: Path, steps: int) -> dict[str, Any]:
    times, guard = StepTimes(), Switched()
    side = Side("guard", options=FitOptions(guard=False))
    train(recipe, data, side, max(steps, 2 * _BLOCK) + WARM_UP, times, guard)
    durations = [b - a for a, b in pairwise(times.parts.ends())]
    rows = list(zip(durations, guard.awake[1:], guard.seconds[1:], strict=False))  # from the second step on
    rows = rows[WARM_UP - 1 :]
    # Not all steps cost the same: the guard reads the gradients in one of each block.
    blocks = [(on, [seconds for seconds, _, _ in block]) for on, block in groupby(rows, key=lambda row: row[1])]
    whole = [(on, statistics.mean(seconds)) for on, seconds in blocks if len(seconds) == _BLOCK]
    awake = statistics.median(seconds for on, seconds in whole if on)
    asleep = statistics.median(seconds for on, seconds in whole if not on)
    hooks = statistics.mean(spent for _, on, spent in rows if on)
    return {
        "what": f"one process, {len(rows)} steps, the guard awake in every other block of {_BLOCK}",
        "step_seconds": {"with": awake, "without": asleep, "in the guard's hooks": hooks},
        "share_of_a_step": round(hooks / asleep, 5),
        "ratio": round(awake / asleep, 4),
        "limit": LIMIT,
        **surroundings(recipe),
    }
