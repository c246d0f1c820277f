"""How fast a recipe trains: this package beside plain TerraTorch, and the guard beside no guard.

Each measurement is a process of its own, forked from one that has imported everything: the first touch of a device, the
allocator and the peak of memory belong to one side only. Sides take turns, so that what else the machine does meets
both.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from floodrepro import recipe as recipes
from floodrepro.errors import FloodreproError
from floodrepro.publishing.export import portable
from floodrepro.recipe import Recipe
from floodrepro.training.fit import FitOptions, fit
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.recorder import memory, percentiles

WARM_UP = 4  # steps of each process that do not count
LOSS_AT = 20  # the step whose loss is compared between options


@dataclass(frozen=True)
class Side:
    """One way to train.

    Args:
        name: What the report calls it.
        stock: Plain TerraTorch with impactmesh's own data module, instead of this package.
        options: How this package fits.
        overrides: Of the recipe.
        matmul: torch's float32 matmul precision; importing TerraTorch leaves "medium" behind.
    """

    name: str
    stock: bool = False
    options: FitOptions = field(default_factory=FitOptions)
    overrides: tuple[str, ...] = ()
    matmul: str = "highest"


# By what they are held against, first the one that the others are divided by.
SIDES = {
    "terratorch": (
        Side("terratorch", stock=True),
        Side("floodrepro"),
        Side("terratorch as imported (matmul precision medium)", stock=True, matmul="medium"),
    ),
    "options": (
        Side("floodrepro"),
        Side("--fused", options=FitOptions(fused=True)),
        Side("--channels-last", options=FitOptions(channels_last=True)),
        Side("--deterministic", overrides=("--trainer.deterministic=warn",)),
        Side("--compile", options=FitOptions(compiled=True)),
    ),
}


class StepTimes(Callback):
    """When each training batch ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Wait for the device, once a step and alike on all sides."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(outputs["loss"].detach())


def bench(recipe: Recipe, data: Path, sides: Sequence[Side], *, steps: int, rounds: int) -> dict[str, Any]:
    """Train with each side in turn, round by round, on the same chips.

    Args:
        recipe: What is trained; logging, validation and checkpoints by epoch are left out on all sides.
        data: Folder of chips, extracted.
        sides: The first is what the others are compared with: ratios are others / first.
        steps: Steps of each measurement that count.
        rounds: Measurements of each side.

    Returns:
        For each side chips per second and peak memory, and ratios round by round.
    """
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side.name].append(in_own_process(_measure, recipe, data, side, steps))
    chips = recipe["data"]["init_args"]["batch_size"]
    first = sides[0].name
    result: dict[str, Any] = {
        "what": f"{rounds} processes a side in turn, {steps} steps each after {WARM_UP} of warm-up",
        "chips_per_second": {
            name: percentiles([chips / statistics.median(run["seconds"]) for run in runs])
            for name, runs in found.items()
        },
        "peak_memory_gib": {
            name: {kind: max(run["memory"][kind] for run in runs) for kind in runs[0]["memory"]}
            for name, runs in found.items()
        },
        f"loss_at_step_{LOSS_AT}": {name: runs[0]["loss"] for name, runs in found.items()},
        "ratios": {f"{name} / {first}": _ratio(found[name], found[first]) for name in found if name != first},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": chips,
        "recipe_sha256": recipes.fingerprint(recipe),
        "versions": {name: version(name) for name in ("torch", "lightning", "terratorch", "impactmesh")},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return result


def _measure(recipe: Recipe, data: Path, side: Side, steps: int) -> dict[str, Any]:
    times = StepTimes()
    device = train(recipe, data, side, max(steps + WARM_UP, LOSS_AT), times)
    ends = times.ends[WARM_UP - 1 :][: steps + 1]
    return {
        "seconds": [b - a for a, b in pairwise(ends)],
        "loss": float(times.losses[LOSS_AT - 1]),
        "memory": memory(device),
    }


def train(recipe: Recipe, data: Path, side: Side, steps: int, *watching: Callback) -> torch.device:
    """Train with one side in a folder that is thrown away.

    Args:
        recipe: What is trained.
        data: Folder of chips, extracted.
        side: How.
        steps: Optimizer steps.
        watching: Callbacks, called last.

    Returns:
        The device that it ran on.
    """
    torch.set_float32_matmul_precision(side.matmul)
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(_bare(portable(recipe) if side.stock else recipe)), encoding="utf-8")
        ends = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
        cli = RecipeCLI([path], [*recipes.data_overrides(data, recipe), *ends, *side.overrides])
        if side.stock:
            cli.build(trim=False)
            cli.trainer.callbacks += watching
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        else:
            fit(cli, Path(folder) / "run", side.options, watch=watching)
        device: torch.device = cli.trainer.strategy.root_device
        return device


def _bare(recipe: Recipe) -> Recipe:
    """The recipe without what would run between steps, alike on all sides."""
    trainer = recipe["trainer"] | {
        "logger": False,
        "callbacks": [],
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    bare = recipe | {"trainer": trainer}
    bare.pop("lr_scheduler", None)  # watches a validation that does not take place
    return bare


def in_own_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Fork, work, and send the result back; the parent never touches a device or a thread pool."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        code = 1
        try:
            sys.stdout = sys.stderr
            content = json.dumps(work(*arguments)).encode()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(content)
            code = 0
        except FloodreproError as error:
            print(error.report(), file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        raise FloodreproError("a measurement failed; its own messages stand above")
    result: dict[str, Any] = json.loads(content)
    return result


def _ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast, from pairs of rounds; and peak memory, largest against largest."""
    pairs = sorted(
        statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in zip(ours, theirs, strict=True)
    )
    kind = "allocated" if "allocated" in ours[0]["memory"] else "process"
    peaks = [max(run["memory"][kind] for run in runs) for runs in (ours, theirs)]
    return {
        "median": round(statistics.median(pairs), 4),
        "min": round(pairs[0], 4),
        "max": round(pairs[-1], 4),
        "memory": round(peaks[0] / peaks[1], 4),
    }
