"""Predictors that know nothing, or the plainest physics, beside which a model's flood IoU stands.

"Everything" and "nothing" never look. The other two are the plainest radar flood maps: smooth open water reflects the
pulse away from the satellite, so a pixel that was land before the event and is water at it loses backscatter.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.splits import read_splits
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation.chip_table import ChipTable, read_table, refuse_to_compare, write_table
from floodrepro.evaluation.masks import read_truth
from floodrepro.evaluation.metrics import Counts, iou
from floodrepro.recipe import Recipe

_FAR = 1e9  # beyond any value in dB
_NO_BACKSCATTER = -100.0  # dB; no surface is so dark, and -9999 is -10000 in float16
# Falls of backscatter, and values in dB below which VH is dark at the event: open water is at about -21 dB, land at
# about -15 dB. The training split chooses among them; they are fixed, so that the choice repeats.
_FALLS = tuple(0.5 * step for step in range(2, 21))
_BOTH = "VV and VH fall by more than {:g} dB on average, and VH at the event is below -{:g} dB"
# By name: how many of VV and VH have to fall, the thresholds of VH's darkness, and the rule in words.
_RULES: dict[str, tuple[int, tuple[float, ...], str]] = {
    "vv-drop": (1, (-_FAR,), "VV falls by more than {:g} dB"),
    "vv-vh-change": (2, tuple(range(14, 26)), _BOTH),
}
_TRAIN_CHIPS = 1_000  # that the thresholds are chosen on, evenly spaced: two numbers need no more


def write_baselines(recipe: Recipe, table: ChipTable, folder: Path) -> dict[str, Path]:
    """Write ``baselines/<split>/NAME.parquet`` on the chips of a model's table, and return the files by name.

    Everything and nothing, and the two radar rules where `radar_baselines` can. Tables of the same data that are there
    already are kept.

    Raises:
        RunFolderError: A table cannot be written.
    """
    place, k = folder / "baselines" / str(table.metadata.get("split", "test")), table.positive
    paths = {name: place / f"{name}.parquet" for name in ("everything", "nothing", *_RULES)}
    if all(path.is_file() and refuse_to_compare(read_table(path), table) is None for path in paths.values()):
        return paths
    found = {}
    for name, called in (("everything", k), ("nothing", _rest(k))):
        counts = np.zeros_like(table.counts)
        counts[:, :, called] = table.counts.sum(axis=2)
        found[name] = _table_like(table, name, f"{table.class_names[called]} everywhere", counts)
    try:
        found |= radar_baselines(recipe, table)
    except (DataError, UsageError) as error:
        console.warn(f"the radar baselines are left out: {error.what}")
    for name, one in found.items():
        write_table(one, paths[name])
    return {name: paths[name] for name in found}


def radar_baselines(recipe: Recipe, table: ChipTable) -> dict[str, ChipTable]:
    """Chip tables of the two radar rules, thresholds chosen on the training split by IoU of the positive class.

    Raises:
        UsageError: The recipe has another data module, or names no training split.
        DataError: A chip is missing or damaged.
    """
    if not protocols.uses_flood_data_module(recipe):
        raise UsageError("they need the radar images of floodrepro's own data module", where="data.class_path")
    arguments, k = protocols.data_arguments(recipe), table.positive
    source = Chips(Path(arguments["data_root"]), protocols.protocol_of(recipe))
    count_chip = partial(_by_threshold, source, table.num_classes, k)
    train = list(next(iter(read_splits(arguments, "train").values())))
    train = train[:: -(-len(train) // _TRAIN_CHIPS)]
    console.say(f"choosing the thresholds of the radar baselines on {len(train)} training chips")
    totals: dict[str, Any] = dict.fromkeys(_RULES, 0)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, console.progress("chips") as show:
        for done, counts in enumerate(pool.map(count_chip, train), 1):
            totals = {name: totals[name] + counts[name] for name in _RULES}
            show(done, len(train) + len(table))
        figures = {name: np.nan_to_num(iou(total, k)) for name, total in totals.items()}
        # Of equal ones the smallest thresholds.
        best = {name: np.unravel_index(int(each.argmax()), each.shape) for name, each in figures.items()}
        rows = []
        for counts in pool.map(count_chip, table.chips.tolist()):
            rows.append([counts[name][best[name]] for name in _RULES])
            show(len(train) + len(rows), len(train) + len(table))
    found = {}
    for (name, (_, darkness, words)), counts in zip(_RULES.items(), np.array(rows).swapaxes(0, 1), strict=True):
        rule = words.format(_FALLS[best[name][0]], darkness[best[name][1]])
        found[name] = _table_like(table, name, f"{rule}; chosen on {len(train)} training chips", counts)
    return found


def _by_threshold(source: Chips, classes: int, positive: int, chip: str) -> dict[str, Counts]:
    """By rule, confusion counts (falls, darkness, K, K) of a chip at each pair of thresholds."""
    truth = read_truth(source, chip)
    radar = source.bands(chip, "S1RTC")[[protocols.BEFORE, protocols.EVENT]].astype(np.float32)
    radar[radar < _NO_BACKSCATTER] = np.nan
    known, found = truth != protocols.IGNORE_INDEX, {}
    for name, (channels, darkness, _) in _RULES.items():
        features = ((radar[1] - radar[0])[:channels].mean(axis=0), radar[1, 1])
        # A missing value is below no threshold: not flood.
        sample = [truth[known], *(np.nan_to_num(one[known], nan=_FAR, posinf=_FAR, neginf=-_FAR) for one in features)]
        edges = [np.array([-_FAR, *(-t for t in grid[::-1]), _FAR]) for grid in (_FALLS, darkness)]
        pixels = np.histogramdd(sample, [np.arange(classes + 1), *edges])[0].astype(np.int64)
        below = pixels.cumsum(axis=1).cumsum(axis=2)
        called = np.moveaxis(below[:, -2::-1, -2::-1], 0, -1)
        found[name] = np.zeros((*called.shape, classes), np.int64)
        found[name][..., positive] = called
        found[name][..., _rest(positive)] = below[:, -1, -1] - called
    return found


def _rest(positive: int) -> int:
    """The class of what a baseline does not call positive."""
    return 0 if positive else 1


def _table_like(table: ChipTable, name: str, detail: str, counts: Counts) -> ChipTable:
    """A table of other predictions on the same chips."""
    kept = ("split", "class_names", "positive_class", "protocol", "data", "made")
    metadata: dict[str, Any] = {key: table.metadata[key] for key in kept if key in table.metadata}
    metadata |= {"predictor": {"kind": "baseline", "name": name}, "detail": detail, "checkpoint": None, "metrics": {}}
    return replace(table, counts=counts, histogram=None, confidence=None, squared_error=None, metadata=metadata)
