"""What benchmarks of training and testing share: a recipe without what would run beside it, and how runs are summed up.

A run is one measurement of one side: ``rate`` (chips per second), ``parts`` (seconds of a step's parts) and ``memory``
(peaks in GiB).
"""

import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from floodrepro import recipe as recipes
from floodrepro.publishing.plain import portable
from floodrepro.recipe import Recipe
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.recorder import percentiles

Run = dict[str, Any]


def parse(recipe: Recipe, folder: Path, data: Path, overrides: Sequence[str] = (), *, stock: bool = False) -> RecipeCLI:
    """A recipe on one device, without what would run between steps, alike on all sides.

    Args:
        recipe: What is run; its weights are random.
        folder: Where the recipe is written to.
        data: Folder of chips, extracted.
        overrides: Of the recipe.
        stock: With impactmesh's own data module, as plain TerraTorch would read it.
    """
    chosen = portable(recipe) if stock else recipe
    trainer = chosen["trainer"] | {
        **{"logger": False, "callbacks": [], "devices": 1, "num_nodes": 1, "strategy": "auto"},
        **{"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
    }
    bare = chosen | {"trainer": trainer}
    bare.pop("lr_scheduler", None)  # watches a validation that does not take place
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(bare), encoding="utf-8")
    return RecipeCLI([path], [*recipes.data_overrides(data, recipe), *overrides])


def read_ahead(recipe: Recipe) -> int:
    """Batches that loader processes may have ready before the first step: they say nothing about reading."""
    data = recipe["data"]["init_args"]
    return int(data.get("num_workers", 0)) * int(data.get("prefetch_factor") or 2)  # torch's own default is 2


def surroundings(recipe: Recipe) -> dict[str, Any]:
    """Device, versions and recipe of a measurement, as its JSON has them. On a GPU, for a process of its own."""
    gpu = torch.cuda.is_available()
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu[1].strip() if cpu else platform.machine(),
        "device_type": "gpu" if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute: what else the machine does
        "precision": recipe["trainer"]["precision"],
        "batch_size": recipe["data"]["init_args"]["batch_size"],
        "recipe_sha256": recipes.fingerprint(recipe),
        "versions": {name: version(name) for name in ("torch", "lightning", "terratorch", "impactmesh")},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sum_up(runs: Mapping[str, Sequence[Run]], against: Mapping[str, str]) -> dict[str, Any]:
    """Speed, parts and memory of each side, and ratios of sides from pairs of rounds.

    Args:
        runs: By side, one for each round.
        against: By side, the one that it is divided by.
    """
    return {
        "chips_per_second": {side: percentiles([run["rate"] for run in rounds]) for side, rounds in runs.items()},
        "ratios": {f"{a} / {b}": _ratio(runs[a], runs[b]) for a, b in against.items()},
        "seconds": {side: _medians([run["parts"] for run in rounds]) for side, rounds in runs.items()},
        "peak_memory_gib": {side: _peaks(rounds) for side, rounds in runs.items()},
    }


def _ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """How many times as fast; and peak memory, largest against largest."""
    pairs = [a["rate"] / b["rate"] for a, b in zip(ours, theirs, strict=True)]
    kind = "allocated" if "allocated" in ours[0]["memory"] else "process"
    figures = statistics.median(pairs), min(pairs), max(pairs), _peaks(ours)[kind] / _peaks(theirs)[kind]
    return dict(zip(("median", "min", "max", "memory"), (round(figure, 4) for figure in figures), strict=True))


def _peaks(rounds: Sequence[Run]) -> dict[str, float]:
    return {kind: max(run["memory"][kind] for run in rounds) for kind in rounds[0]["memory"]}


def _medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(f"{statistics.median(part[name] for part in parts):.4g}") for name in parts[0]}
