"""How fast a split is tested: TerraTorch's own test loop, and the one of `floodrepro test` with its chip table.

Each pass is a process of its own; sides take turns. Both have the same chips and weights, and the bench fails if their
metrics differ.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from floodrepro import console
from floodrepro.data.names import SPLITS, split_file
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.evaluation.passes import MAIN_METRICS
from floodrepro.evaluation.tabulate import AGREEMENT, run_test
from floodrepro.recipe import Recipe
from floodrepro.system.bench_sides import Run, parse, read_ahead, sum_up, surroundings
from floodrepro.system.own_process import in_own_process
from floodrepro.system.step_times import PassTimes

WARM_UP = 2  # batches of each pass that do not count, beside those that workers have read ahead
SIDES = ("terratorch", "floodrepro")
_TIMED = "--trainer.callbacks=[{class_path: floodrepro.system.step_times.PassTimes}]"


def bench(recipe: Recipe, data: Path, *, size: int, rounds: int) -> dict[str, Any]:
    """Test with TerraTorch and with this package in turn, round by round, over all chips that there are.

    Args:
        recipe: Whose model and data section are used; the weights are random.
        data: Folder of chips, extracted.
        size: A chip's edge in pixels.
        rounds: Passes of each side.

    Returns:
        For each side chips per second, seconds of a batch by part, peak memory; the ratio round by round; the metrics.

    Raises:
        UsageError: There are too few chips.
        FloodreproError: The sides' metrics differ, or the weights predict one class, so that equality would say little.
    """
    split = data / "split"
    chips = "".join((split / split_file(name)).read_text() for name in SPLITS)
    warm_up = WARM_UP + read_ahead(recipe)
    if len(chips.split()) <= warm_up * recipe["data"]["init_args"]["batch_size"]:
        raise UsageError(f"{warm_up} batches are warm-up: there have to be more", fix=f"--batches {4 * warm_up}")
    (split / "all.txt").write_text(chips)
    found: dict[str, list[Run]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        checkpoint = Path(folder) / "random.ckpt"
        facts = in_own_process(_save_weights, recipe, data, checkpoint)
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                console.say(f"round {number + 1} of {rounds}: {name}")
                found[name].append(in_own_process(_measure, recipe, data, checkpoint, name == "terratorch"))
            _difference(*found.values())  # a difference is said before the other rounds are run
    theirs, ours = (found[name] for name in SIDES)
    return {
        "what": f"{rounds} passes a side in turn, {ours[0]['batches']} batches each after {warm_up} of warm-up, with "
        "reading, and with the chip table where there is one",
        "chip_pixels": size,
        **sum_up(found, {"floodrepro": "terratorch"}),
        "seconds_after_the_last_batch": {
            name: round(statistics.median(run["after"] for run in runs), 3) for name, runs in found.items()
        },
        "largest_difference_of_metrics": _difference(theirs, ours),
        "metrics": {name: value for name, value in ours[0]["metrics"].items() if name.rsplit("/")[-1] in MAIN_METRICS},
        **facts,
    }


def _save_weights(recipe: Recipe, data: Path, checkpoint: Path) -> dict[str, Any]:
    cli = parse(recipe, checkpoint.parent, data, _overrides(data))
    cli.build()
    torch.save({"state_dict": cli.model.state_dict(), "hyper_parameters": {}}, checkpoint)
    return surroundings(recipe)


def _overrides(data: Path) -> list[str]:
    """All chips are tested, and no split has a part of them for itself."""
    splits = {"train": "null", "val": "null", "test": data / "split" / "all.txt"}
    return [*(f"--data.init_args.{name}_split={file}" for name, file in splits.items()), _TIMED]


def _measure(recipe: Recipe, data: Path, checkpoint: Path, stock: bool) -> Run:
    torch.set_float32_matmul_precision("highest")  # on both sides: importing TerraTorch leaves "medium" behind
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        cli = parse(recipe, Path(folder), data, _overrides(data), stock=stock)
        if stock:
            cli.build(trim=False)
            cli.model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
            [metrics] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        else:
            metrics = run_test(cli, checkpoint, folder=Path(folder)).measured.metrics
    times = next(callback for callback in cli.trainer.callbacks if isinstance(callback, PassTimes))
    after = time.perf_counter() - times.ended
    warm_up = WARM_UP + read_ahead(recipe)
    ends, steps = times.parts.ends(), times.parts.by_step()[warm_up:]
    return {
        "rate": recipe["data"]["init_args"]["batch_size"] * len(steps) / (ends[-1] - ends[warm_up - 1]),
        "batches": len(steps),
        "parts": {name: statistics.median(step[name] for step in steps) for name in steps[0]},
        "after": after,
        "memory": times.memory,
        "metrics": {name: float(value) for name, value in metrics.items()},
    }


def _difference(theirs: Sequence[Run], ours: Sequence[Run]) -> float:
    """The largest difference of a metric between the sides; TerraTorch alone has Boundary_mIoU."""
    differences = [
        float(abs(value - b["metrics"][name]))
        for a, b in zip(ours, theirs, strict=True)
        for name, value in a["metrics"].items()
    ]
    largest = max(differences, key=lambda difference: (math.isnan(difference), difference))
    if not largest <= AGREEMENT:
        raise FloodreproError(f"the metrics of TerraTorch's test and of floodrepro's differ by {largest:g}")
    if not min(ours[0]["metrics"][f"test/IoU_{k}"] for k in (0, 1)) > 0:
        raise FloodreproError("the random weights predict one class everywhere: equal metrics say nothing")
    return largest
