"""Predictors that know nothing, or the plainest physics, beside which a model's flood IoU stands.

"Everything" and "nothing" never look. The other two are the plainest radar flood maps: smooth open water reflects the
pulse away from the satellite, so a pixel that was land before the event and is water at it loses backscatter.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.splits import read_splits
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation.chip_table import ChipTable, read_table, refuse_to_compare, write_table
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
    "vv-drop": (1, (-_FAR / 2,), "VV falls by more than {:g} dB"),
    "vv-vh-change": (2, tuple(range(14, 26)), _BOTH),
}
_TRAIN_CHIPS = 1_000  # that the thresholds are chosen on, evenly spaced: two numbers need no more


def write_baselines(recipe: Recipe, table: ChipTable, folder: Path) -> dict[str, Path]:
    """Write ``baselines/<split>/NAME.parquet`` on the chips of a model's table, and return the files by name.

    Everything and nothing, and, where there are radar images, the two rules with the thresholds that give the best IoU
    of the positive class on the training split. Tables of the same data that are there already are kept.

    Raises:
        RunFolderError: A table cannot be written.
    """
    place, k = folder / "baselines" / str(table.metadata.get("split", "test")), table.positive
    paths = {name: place / f"{name}.parquet" for name in ("everything", "nothing", *_RULES)}
    if all(path.is_file() and refuse_to_compare(read_table(path), table) is None for path in paths.values()):
        return paths
    found: dict[str, tuple[str, Counts]] = {}  # in words, and counts
    for name, called in (("everything", k), ("nothing", 0 if k else 1)):
        counts = np.zeros_like(table.counts)
        counts[:, :, called] = table.counts.sum(axis=2)
        found[name] = (f"{table.metadata['class_names'][called]} everywhere", counts)
    try:
        found |= _apply_rules(recipe, table)
    except (DataError, UsageError) as error:
        console.warn(f"the radar baselines are left out: {error.what}")
    kept = ("split", "class_names", "positive_class", "protocol", "data", "made")
    metadata = {key: table.metadata[key] for key in kept if key in table.metadata} | {"checkpoint": None, "metrics": {}}
    plain = replace(table, histogram=None, confidence=None, squared_error=None)
    for name, (detail, counts) in found.items():
        about = metadata | {"predictor": {"kind": "baseline", "name": name}, "detail": detail}
        write_table(replace(plain, counts=counts, metadata=about), paths[name])
    return {name: paths[name] for name in found}


def _apply_rules(recipe: Recipe, table: ChipTable) -> dict[str, tuple[str, Counts]]:
    """The radar rules in words, and their counts of the table's chips."""
    if not protocols.uses_flood_data_module(recipe):
        raise UsageError("they need the radar images of floodrepro's own data module", where="data.class_path")
    arguments, k = protocols.data_arguments(recipe), table.positive
    source = Chips(Path(arguments["data_root"]), protocols.protocol_of(recipe))
    train = list(next(iter(read_splits(arguments, "train").values())))
    train = train[:: -(-len(train) // _TRAIN_CHIPS)]
    console.say(f"choosing the thresholds of the radar baselines on {len(train)} training chips")
    chips, counted = [*train, *table.chips.tolist()], list[dict[str, Counts]]()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, console.progress("chips") as show:
        for counts in pool.map(partial(_count_by_threshold, source, table.counts.shape[-1], k), chips):
            counted.append(counts)
            show(len(counted), len(chips))
    found = {}
    for name, (_, darkness, words) in _RULES.items():
        each = np.stack([counts[name] for counts in counted])
        figures = np.nan_to_num(iou(each[: len(train)].sum(axis=0), k))
        fall, dark = np.unravel_index(int(figures.argmax()), figures.shape)  # of equal ones the smallest
        rule = words.format(_FALLS[fall], darkness[dark])
        found[name] = (f"{rule}; chosen on {len(train)} training chips", each[len(train) :, fall, dark])
    return found


def _count_by_threshold(source: Chips, classes: int, positive: int, chip: str) -> dict[str, Counts]:
    """By rule, confusion counts (falls, darkness, K, K) of a chip at each pair of thresholds."""
    truth = source.truth(chip)
    known, found = truth != protocols.IGNORE_INDEX, {}
    radar = source.bands(chip, "S1RTC")[[protocols.BEFORE, protocols.EVENT]].astype(np.float32)[:, :, known]
    radar[radar < _NO_BACKSCATTER] = np.nan
    for name, (channels, darkness, _) in _RULES.items():
        # How many thresholds a pixel is beyond; a missing value is beyond none: not flood.
        fall = np.nan_to_num((radar[0] - radar[1])[:channels].mean(axis=0), nan=-_FAR)
        beyond = np.searchsorted(_FALLS, fall), np.searchsorted(darkness, np.nan_to_num(-radar[1, 1], nan=-_FAR))
        shape = (classes, len(_FALLS) + 1, len(darkness) + 1)
        pixels = np.bincount(np.ravel_multi_index((truth[known], *beyond), shape), minlength=math.prod(shape))
        at_least = pixels.reshape(shape)[:, ::-1, ::-1].cumsum(axis=1).cumsum(axis=2)[:, ::-1, ::-1]
        called = np.moveaxis(at_least[:, 1:, 1:], 0, -1)
        found[name] = np.zeros((*called.shape, classes), np.int64)
        found[name][..., positive] = called
        found[name][..., 0 if positive else 1] = at_least[:, 0, 0] - called
    return found
