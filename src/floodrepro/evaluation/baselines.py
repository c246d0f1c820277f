"""Predictors that know nothing, or the plainest physics, beside which a model's flood IoU stands.

"Everything" and "nothing" are the two ends of a mapper that never looks. The other two are the plainest radar flood
maps: smooth open water reflects the pulse away from the satellite, so a pixel that was land before the event and is
water at it loses backscatter.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from floodrepro import console
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import BEFORE, EVENT, IGNORE_INDEX, data_arguments, protocol_of, uses_flood_data_module
from floodrepro.data.splits import read_splits
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.masks import read_truth
from floodrepro.evaluation.metrics import Counts, iou
from floodrepro.recipe import Recipe

FALLS_DB = tuple(0.5 * step for step in range(2, 21))
"""Falls of backscatter, 1 to 10 dB, among which the training split chooses; fixed, so that the choice repeats."""
DARKNESS_DB = tuple(range(14, 26))
"""VH at the event below minus these values in dB, likewise: open water is at about -21 dB, land at about -15 dB."""
TRAIN_CHIPS = 1_000
"""Chips of the training split that the thresholds are chosen on, evenly spaced: two numbers need no more."""
_NO_BACKSCATTER = -100.0  # dB; no surface is so dark, and -9999 is -10000 in float16


@dataclass(frozen=True)
class _Rule:
    """A pixel is flood where each feature exceeds its threshold."""

    name: str
    thresholds: tuple[tuple[float, ...], ...]
    words: str  # with a place for each chosen threshold

    def features(self, radar: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Features (H, W) of radar (2 times, VV and VH, H, W) in dB."""
        fall = radar[0] - radar[1]
        return [fall[0]] if len(self.thresholds) == 1 else [fall.mean(axis=0), -radar[1, 1]]


_RULES = (
    _Rule("vv-drop", (FALLS_DB,), "VV falls by more than {:g} dB"),
    _Rule(
        "vv-vh-change",
        (FALLS_DB, DARKNESS_DB),
        "VV and VH fall by more than {:g} dB on average, and VH at the event is below -{:g} dB",
    ),
)


def write_baselines(recipe: Recipe, table: ChipTable, folder: Path) -> dict[str, Path]:
    """Write the baselines' chip tables on the chips of a model's table: everything, nothing, vv-drop, vv-vh-change.

    The thresholds of the last two are chosen on the training split by IoU of the positive class. They need the radar
    images of floodrepro's own data module. Tables of the same data that are there already are kept.

    Args:
        recipe: Says where the chips are and what their classes are.
        table: A model's chip table.
        folder: Where ``baselines/<split>/NAME.parquet`` goes.

    Returns:
        The files by name.
    """
    place = folder / "baselines" / str(table.metadata.get("split", "test"))
    names = ["everything", "nothing", *(rule.name for rule in _RULES)]
    paths = {name: place / f"{name}.parquet" for name in names}
    if all(path.is_file() and _is_of_same_data(chip_table.read_table(path), table) for path in paths.values()):
        return paths
    k = table.positive
    found = {
        "everything": _table_like(table, "everything", f"{table.class_names[k]} everywhere", _all_as(table.counts, k)),
        "nothing": _table_like(table, "nothing", f"{table.class_names[0]} everywhere", _all_as(table.counts, 0)),
    }
    try:
        found |= radar_baselines(recipe, table)
    except (DataError, UsageError) as error:
        console.warn(f"the radar baselines are left out: {error.what}")
    for name, one in found.items():
        chip_table.write_table(one, paths[name])
    return {name: paths[name] for name in found}


def radar_baselines(recipe: Recipe, table: ChipTable) -> dict[str, ChipTable]:
    """Chip tables of the two radar rules, thresholds chosen on the training split.

    Raises:
        UsageError: The recipe has another data module, or names no training split.
        DataError: A chip is missing or damaged.
    """
    if not uses_flood_data_module(recipe):
        raise UsageError("they need the radar images of floodrepro's own data module", where="data.class_path")
    arguments = data_arguments(recipe)
    source = Chips(Path(arguments["data_root"]), protocol_of(recipe))
    train = list(next(iter(read_splits(arguments, "train").values())))
    train = train[:: -(-len(train) // TRAIN_CHIPS)]
    console.say(f"choosing the thresholds of the radar baselines on {len(train)} training chips")
    found: dict[str, ChipTable] = {}
    chosen: dict[str, tuple[float, ...]] = {}
    for rule, counted in zip(_RULES, _count(source, train, {}, table.num_classes), strict=True):
        scores = np.nan_to_num(iou(_by_threshold(counted.sum(axis=0), table.positive), table.positive))
        best = np.unravel_index(int(scores.argmax()), scores.shape)  # of equal ones the smallest thresholds
        chosen[rule.name] = tuple(grid[i] for grid, i in zip(rule.thresholds, best, strict=True))
    chips = [str(chip) for chip in table.chips]
    for rule, counted in zip(_RULES, _count(source, chips, chosen, table.num_classes), strict=True):
        only = (0,) * len(rule.thresholds)
        counts = np.stack([_by_threshold(chip, table.positive)[only] for chip in counted])
        words = f"{rule.words.format(*chosen[rule.name])}; chosen on {len(train)} training chips"
        found[rule.name] = _table_like(table, rule.name, words, counts)
    return found


def _count(
    source: Chips, chips: Sequence[str], chosen: Mapping[str, tuple[float, ...]], classes: int
) -> list[npt.NDArray[np.int64]]:
    """For each rule, pixels (N, K, bins of each feature) by truth; each chip is read once."""

    def one(chip: str) -> list[npt.NDArray[np.int64]]:
        truth = read_truth(source, chip)
        radar = source.bands(chip, "S1RTC")[[BEFORE, EVENT]].astype(np.float32)
        if radar.shape[2:] != truth.shape:
            raise DataError(f"the mask of {chip} is {truth.shape} pixels, its radar {radar.shape[2:]}")
        radar[radar < _NO_BACKSCATTER] = np.nan
        known = truth != IGNORE_INDEX
        found = []
        for rule in _RULES:
            grids = [(value,) for value in chosen[rule.name]] if chosen else rule.thresholds
            place = truth[known]
            for feature, grid in zip(rule.features(radar), grids, strict=True):
                # A missing value exceeds no threshold: not flood.
                exceeded = np.searchsorted(grid, np.nan_to_num(feature[known], nan=-np.inf), side="left")
                place = place * (len(grid) + 1) + exceeded
            shape = (classes, *(len(grid) + 1 for grid in grids))
            found.append(np.bincount(place, minlength=int(np.prod(shape))).reshape(shape))
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, console.progress("chips") as show:
        rows = []
        for done, row in enumerate(pool.map(one, chips), 1):
            rows.append(row)
            show(done, len(chips))
    return [np.stack([row[number] for row in rows]) for number in range(len(_RULES))]


def _by_threshold(counted: npt.NDArray[np.int64], positive: int) -> Counts:
    """Confusion counts (thresholds of each feature, K, K) of pixels (K, bins of each feature)."""
    above = counted
    for axis in range(1, counted.ndim):
        above = np.flip(np.flip(above, axis).cumsum(axis), axis)
    called = np.moveaxis(above[(slice(None), *[slice(1, None)] * (counted.ndim - 1))], 0, -1)
    truth = counted.reshape(len(counted), -1).sum(axis=1)
    counts = np.zeros((*called.shape, len(counted)), np.int64)
    counts[..., 0] = truth - called
    counts[..., positive] = called
    return counts


def _all_as(counts: Counts, k: int) -> Counts:
    """The counts (N, K, K) of a predictor that says class k everywhere, on the same truth."""
    everywhere = np.zeros_like(counts)
    everywhere[:, :, k] = counts.sum(axis=2)
    return everywhere


def _table_like(table: ChipTable, name: str, detail: str, counts: Counts) -> ChipTable:
    """A table of other predictions on the same chips."""
    kept = ("split", "class_names", "positive_class", "protocol", "data", "made")
    metadata: dict[str, Any] = {key: table.metadata[key] for key in kept if key in table.metadata}
    metadata |= {"predictor": {"kind": "baseline", "name": name}, "detail": detail, "checkpoint": None, "metrics": {}}
    return replace(table, counts=counts, histogram=None, confidence=None, squared_error=None, metadata=metadata)


def _is_of_same_data(baseline: ChipTable, table: ChipTable) -> bool:
    return chip_table.refuse_to_compare(baseline, table) is None
