"""Predictors that know nothing, or one thing, so that a model's flood IoU has something to stand beside.

"Everything flooded" and "nothing flooded" are the two ends of a mapper that never looks. "VV drop" is the plainest
radar flood map: smooth open water reflects the pulse away from the satellite, so that a pixel which was land before the
event and is water at it loses backscatter, and one threshold for all pixels decides how much is enough.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import rasterio
import zarr

from floodrepro.data.names import BEFORE, EVENT, IGNORE_INDEX, LABEL_DIR, S1_BANDS, SUFFIXES
from floodrepro.errors import DataError
from floodrepro.evaluation.metrics import Counts, confusion, scores

NUM_CLASSES = 2
THRESHOLDS_DB = tuple(0.5 * step for step in range(2, 21))
"""Falls of VV, 1 to 10 dB, among which the training split chooses; fixed, so that the choice can be repeated."""

IDENTITY = {0: 0, 1: 1}
V1_TO_BINARY = {0: 0, 1: 0, 2: 1}
"""Label map of v1 masks: flood water is flood, permanent water is rest."""


@dataclass(frozen=True)
class Baseline:
    """One reference predictor's result on the test split.

    Args:
        name: Such as `VV drop`.
        detail: What it does, its threshold included.
        counts: Confusion counts (2, 2) over the split, rows = truth.
        scores: What `floodrepro.evaluation.metrics.scores` makes of the counts.
    """

    name: str
    detail: str
    counts: Counts
    scores: dict[str, float]


def evaluate_baselines(
    data_root: Path,
    *,
    train_split: Path,
    test_split: Path,
    label_map: Mapping[int, int] = IDENTITY,
    thresholds: Sequence[float] = THRESHOLDS_DB,
) -> list[Baseline]:
    """The baselines on the test split, in the order everything, nothing, VV drop.

    Args:
        data_root: Folder with S1RTC and MASK, as ImpactMesh names it.
        train_split: Text file of chip ids on which the VV threshold is chosen by flood IoU; the smallest fall wins a
            tie.
        test_split: Text file of the chip ids that are scored.
        label_map: Mask value to 0 (rest) or 1 (flood); the ignore index is kept. V1_TO_BINARY for v1 masks.
        thresholds: Candidate falls of VV in dB.

    Raises:
        DataError: If a split file is missing or empty, a chip is missing or unreadable, or a mask holds a value that
            `label_map` does not know.
    """
    candidates = _vv_drop_counts(data_root, train_split, label_map, sorted(thresholds))
    fall, _ = max(candidates, key=lambda candidate: scores(candidate[1])["IoU_1"])
    [(_, vv_drop)] = _vv_drop_counts(data_root, test_split, label_map, [fall])
    per_truth = vv_drop.sum(axis=1)
    everything, nothing = np.zeros_like(vv_drop), np.zeros_like(vv_drop)
    everything[:, 1] = per_truth
    nothing[:, 0] = per_truth
    return [
        Baseline("everything flooded", "class 1 everywhere", everything, scores(everything)),
        Baseline("nothing flooded", "class 0 everywhere", nothing, scores(nothing)),
        Baseline("VV drop", f"VV drop > {fall:.1f} dB, chosen on the training split", vv_drop, scores(vv_drop)),
    ]


def _vv_drop_counts(
    data_root: Path, split: Path, label_map: Mapping[int, int], thresholds: Sequence[float]
) -> list[tuple[float, Counts]]:
    """(threshold in dB, confusion counts over the split) for each threshold, chips read once."""
    totals = np.zeros((len(thresholds), NUM_CLASSES, NUM_CLASSES), np.int64)
    for chip in _chip_ids(split):
        truth = _read_truth(data_root / LABEL_DIR / f"{chip}{SUFFIXES[LABEL_DIR]}", label_map)
        change = _read_vv_change(data_root / "S1RTC" / f"{chip}{SUFFIXES['S1RTC']}")
        if truth.shape != change.shape:
            raise DataError(f"mask is {truth.shape} pixels, radar {change.shape}", where=chip)
        for index, fall in enumerate(thresholds):
            # A missing pixel is NaN, and a comparison with NaN is false: not flooded.
            totals[index] += confusion(truth, change < -fall, NUM_CLASSES, IGNORE_INDEX)
    return list(zip(thresholds, totals, strict=True))


def _chip_ids(split: Path) -> list[str]:
    try:
        chips = split.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"cannot read the split file: {error.strerror}", where=split) from error
    if not chips:
        raise DataError("the split file lists no chip", where=split)
    return chips


def _read_truth(path: Path, label_map: Mapping[int, int]) -> npt.NDArray[np.int64]:
    """Mask (H, W) with the label map applied and the ignore index kept."""
    try:
        with rasterio.open(path) as source:
            mask = source.read(1)
    except rasterio.errors.RasterioError as error:
        raise DataError(f"cannot read the mask: {error}", where=path) from error
    truth = np.full(mask.shape, IGNORE_INDEX, np.int64)
    for value in np.unique(mask).tolist():
        if value in label_map:
            truth[mask == value] = label_map[value]
        elif value != IGNORE_INDEX:
            raise DataError(
                f"the mask holds {value}, expected one of {sorted(label_map)} or {IGNORE_INDEX}",
                where=path,
                fix="pass the label map of this data set's protocol",
            )
    return truth


def _read_vv_change(path: Path) -> npt.NDArray[np.float32]:
    """VV at the event minus VV before it, (H, W) in dB; NaN where either is missing."""
    if not path.is_file():
        raise DataError("the chip's radar file is missing", where=path)
    try:
        # Not zarr.open_consolidated(path): in zarr 2.18 the ZIP would stay open until it is collected.
        with zarr.ZipStore(str(path), mode="r") as store:
            vv = zarr.open_consolidated(store, mode="r")["bands"][:, S1_BANDS.index("vv")].astype(np.float32)
    except (OSError, KeyError, ValueError, RuntimeError, BadZipFile) as error:
        raise DataError(f"cannot read the radar file: {error}", where=path) from error
    change: npt.NDArray[np.float32] = vv[EVENT] - vv[BEFORE]
    return change
