"""How fast a recipe trains: this package beside plain TerraTorch, and each option that may change roundings alone.

Each measurement is a process of its own: the first touch of a device, the allocator and the peak of memory belong to
one side only. Sides take turns, so that what else the machine does meets all.
"""

import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from floodrepro import console
from floodrepro.errors import FloodreproError
from floodrepro.recipe import Recipe
from floodrepro.system.bench_sides import Run, parse, read_ahead, sum_up
from floodrepro.system.chips_at_hand import LongEpoch
from floodrepro.system.device_rate import FORWARDS_OF_A_STEP, device_facts
from floodrepro.system.own_process import in_own_process
from floodrepro.system.step_times import StepTimes
from floodrepro.training.fit import FitOptions, fit

WARM_UP = 4  # steps of each process that do not count
LOSS_AT = 20  # the step whose loss is compared between sides


@dataclass(frozen=True)
class Side:
    """One way to train.

    Args:
        name: What the report calls it.
        stock: Plain TerraTorch with impactmesh's own data module, instead of this package.
        options: How this package fits.
        overrides: Of the recipe.
        matmul: torch's float32 matmul precision; importing TerraTorch leaves "medium" behind.
        reading: Whether chips are read at every step, with augmentation, instead of lying in memory, without.
    """

    name: str
    stock: bool = False
    options: FitOptions = field(default_factory=FitOptions)
    overrides: tuple[str, ...] = ()
    matmul: str = "highest"
    reading: bool = False


_STOCK, _EXACT = Side("terratorch", stock=True), Side("floodrepro")
_READING = (Side("terratorch, reading", stock=True, reading=True), Side("floodrepro, reading", reading=True))
_OPTIONS = (
    Side("--compile", options=FitOptions(compiled=True)),
    Side("--channels-last", options=FitOptions(channels_last=True)),
    Side("--fused", options=FitOptions(fused=True)),
    Side("--precision bf16", overrides=("--trainer.precision=bf16-mixed",)),
)

# By what they are held against, first the one that the others are divided by.
SIDES = {
    "terratorch": (
        _STOCK,
        _EXACT,
        Side("terratorch as imported (matmul precision medium)", stock=True, matmul="medium"),
        *_READING,
    ),
    "options": (_EXACT, *_OPTIONS, Side("--deterministic", overrides=("--trainer.deterministic=warn",))),
    "all": (_STOCK, _EXACT, *_OPTIONS, *_READING),
}


def bench(recipe: Recipe, data: Path, sides: Sequence[Side], *, size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Train with each side in turn, round by round, on the same chips.

    Args:
        recipe: What is trained; logging, validation and checkpoints by epoch are left out on all sides.
        data: Folder of chips, extracted.
        sides: The first is what the others are compared with, and the first that reads what others that read are.
        size: A chip's edge in pixels.
        steps: Steps of each measurement that count.
        rounds: Measurements of each side.

    Returns:
        For each side chips per second, model TFLOP/s, seconds of a step by part, peak memory and loss; ratios round by
        round; sides that failed, and why.

    Raises:
        FloodreproError: The first side failed.
    """
    facts = in_own_process(device_facts, recipe, size)
    found: dict[str, list[Run]] = {side.name: [] for side in sides}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            if side.name in failed:
                continue
            console.say(f"round {number + 1} of {rounds}: {side.name}")
            try:
                found[side.name].append(in_own_process(_measure, recipe, data, side, steps))
            except FloodreproError as error:  # an option that this machine cannot: the others are still of use
                if side is sides[0]:
                    raise
                console.warn(f"{side.name}: {error.what}")
                failed[side.name] = error.what
    there = {side: found[side.name] for side in sides if side.name not in failed}
    firsts = {side.name: next(a.name for a in there if a.reading == side.reading) for side in there}
    against = {name: first for name, first in firsts.items() if name != first}
    result = {
        "what": f"{rounds} processes a side in turn, {steps} steps each after {WARM_UP} of warm-up (and what workers "
        "had read ahead); "
        "chips in memory and without augmentation, except where they are read",
        "chip_pixels": size,
        **sum_up({side.name: runs for side, runs in there.items()}, against),
        **_losses({side.name: [run["loss"] for run in runs] for side, runs in there.items() if not side.reading}),
        "failed": failed,
        **facts,
    }
    step = FORWARDS_OF_A_STEP * facts["forward_gflop_per_chip"] / 1e3
    rates = {name: step * speed["median"] for name, speed in result["chips_per_second"].items()}
    result["model_tflops"] = {name: float(f"{rate:.4g}") for name, rate in rates.items()}
    result["share_of_matmul_rate"] = {k: round(rate / facts["matmul_tflops"]["median"], 4) for k, rate in rates.items()}
    return result


def _measure(recipe: Recipe, data: Path, side: Side, steps: int) -> Run:
    ahead = read_ahead(recipe) if side.reading else 0
    warm_up = WARM_UP + ahead
    times = StepTimes(recipe["seed_everything"], warm_up)
    count = steps + warm_up if side.reading else max(steps + warm_up, LOSS_AT)
    chosen = copy.deepcopy(recipe)
    chosen["data"]["init_args"]["augment"] = side.reading
    train(chosen, data, side, count, LongEpoch(count, in_memory=not side.reading), times)
    ends, parts = times.parts.ends()[warm_up - 1 :][: steps + 1], times.parts.by_step()[warm_up:][:steps]
    return {
        "rate": recipe["data"]["init_args"]["batch_size"] / step_seconds(ends, in_bursts=ahead > 0),
        "parts": {name: statistics.median(step[name] for step in parts) for name in parts[0]},
        "loss": None if side.reading else float(times.losses[LOSS_AT - 1]),
        "memory": times.memory,
    }


def step_seconds(ends: Sequence[float], *, in_bursts: bool) -> float:
    """Seconds of a step: the median, or the mean where batches come in bursts.

    Where several workers read, most steps find a batch ready though the loader may be what limits: their median would
    be the device's rate, not the loader's.

    Args:
        ends: When each step ended, from the last one of the warm-up on.
        in_bursts: Whether workers read.
    """
    steps = [b - a for a, b in pairwise(ends)]
    return statistics.mean(steps) if in_bursts else statistics.median(steps)


def train(recipe: Recipe, data: Path, side: Side, steps: int, *watching: Callback) -> None:
    """Train with one side in a folder that is thrown away.

    Args:
        recipe: What is trained.
        data: Folder of chips, extracted.
        side: How.
        steps: Optimizer steps.
        watching: Callbacks, called last.
    """
    torch.set_float32_matmul_precision(side.matmul)
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        ends = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
        cli = parse(recipe, Path(folder), data, [*ends, *side.overrides], stock=side.stock)
        if side.stock:
            cli.build(trim=False)
            cli.trainer.callbacks += watching
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        else:
            fit(cli, Path(folder) / "run", side.options, watch=watching)


def _losses(losses: dict[str, list[float]]) -> dict[str, Any]:
    """The loss at one step from the same state and chips; how far it is from the first side's, beside their spread."""
    first = next(iter(losses.values()))
    middle = statistics.median(first)
    return {
        f"loss_at_step_{LOSS_AT}": losses,
        "loss_difference": {name: abs(statistics.median(values) - middle) for name, values in losses.items()},
        "loss_spread_of_first": max(first) - min(first) if len(first) > 1 else None,
    }
