"""Scores as pure functions of a chip table's counts. numpy only: neither torch nor a pixel is needed.

Counts are int64 (..., K, K), rows = truth, columns = prediction, pixels with the ignore index left out. N = chips,
K = classes, B = the table's bins of probability. A figure that is 0 / 0 is None, or NaN in an array: a chip without
flood, predicted without flood, has no flood IoU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Pixels of the class in the truth (one hectare at 10 m) from which an event counts in a mean over events: below, one
# field decides its IoU.
MIN_FLOOD_PIXELS = 100
_WIDE_BINS = 10  # of a calibration error: as many as in the literature


def scores(counts: Counts) -> dict[str, float | None]:
    """The scores that TerraTorch reports, under its names, from counts (K, K) summed over a split.

    `mIoU` and `F1_Score` are means over the classes that occur in truth or prediction, as in torchmetrics 1.9;
    `Pixel_Accuracy` is the share of pixels that are right, and `Class_Accuracy_k` the recall of class k. What is
    undefined for a class is None, where TerraTorch 1.2.7 reports 0.
    """
    each = _of_classes(counts)
    found = {"mIoU": _mean(each["iou"]), "F1_Score": _mean(each["f1"])}
    found["Pixel_Accuracy"] = _ratio(np.trace(counts), counts.sum())
    for k in range(len(counts)):
        found |= {f"IoU_{k}": each["iou"][k], f"Class_Accuracy_{k}": each["recall"][k]}
    return {name: _or_none(value) for name, value in found.items()}


def class_scores(counts: Counts, k: int = -1) -> dict[str, float | None]:
    """Scores of class k against the rest, from counts (K, K).

    Returns:
        `iou` = TP / (TP + FP + FN) (Jaccard 1912), `precision` = TP / (TP + FP), `recall` = TP / (TP + FN),
        `f1` = 2 TP / (2 TP + FP + FN) (Dice 1945), and `truth_share`, the class's share of the counted pixels.
    """
    return {name: _or_none(values[k]) for name, values in _of_classes(counts).items()}


def iou(counts: Counts, k: int = -1) -> Floats:
    """IoU (...) of class k from counts (..., K, K); NaN where neither truth nor prediction has the class."""
    return _of_classes(counts)["iou"][..., k]


def mean_iou(counts: Counts) -> Floats:
    """Mean IoU (...) over the classes that truth or prediction has, from counts (..., K, K); NaN without any."""
    return _mean(_of_classes(counts)["iou"])


def pool_by_event(counts: Counts, events: Sequence[str] | npt.NDArray[np.str_]) -> tuple[list[str], Counts]:
    """The events of chips, sorted, and the chips' counts (N, K, K) summed over each: (E, K, K)."""
    names, places = np.unique(np.asarray(events), return_inverse=True)
    pooled = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(pooled, places, counts)
    return names.tolist(), pooled


def which_iou(
    counts: Counts, events: Sequence[str] | npt.NDArray[np.str_], k: int = -1, label: str = "the class"
) -> list[dict[str, Any]]:
    """Three figures that papers call "the IoU of flood", from counts (N, K, K) and events (N,) of chips.

    Pooled over all pixels, mean over chips whose truth has class k, mean over events whose truth has MIN_FLOOD_PIXELS
    of it: each with `name`, `iou` (None where undefined), `n` and `of` (what n counts).
    """
    found = [("pooled over all pixels", iou(counts.sum(axis=0), k), len(counts), "chips")]
    for of, each, least in (("chips", counts, 1), ("events", pool_by_event(counts, events)[1], MIN_FLOOD_PIXELS)):
        figures = iou(each[each[:, k].sum(axis=-1) >= least], k)
        found.append((f"mean over {of} with {label}", _mean(figures), len(figures), of))
    return [{"name": name, "iou": _or_none(value), "n": n, "of": of} for name, value, n, of in found]


def calibration_error(histogram: npt.NDArray[np.int64], confidence: Floats, least: float = 0.0) -> float | None:
    """Mean over pixels of |mean probability - frequency| in their tenth of the probabilities, 0 to 1.

    Naeini, Cooper and Hauskrecht 2015 (AAAI), of the positive class whether it wins or not: where 95 % of the pixels
    are background, the winning class says little about flood. Of a chip table's histogram (N, 2, B) and confidence
    (N, B), pixels of a probability of `least`, a multiple of 0.1, or more count; None without any.
    """
    first = round(least * _WIDE_BINS)
    pixels = histogram.sum(axis=0).reshape(2, _WIDE_BINS, -1).sum(axis=2)[:, first:]
    summed = confidence.sum(axis=0).reshape(_WIDE_BINS, -1).sum(axis=1)[first:]
    return _or_none(_ratio(np.abs(summed - pixels[1]).sum(), pixels.sum()))


def _of_classes(counts: Counts) -> dict[str, Floats]:
    """Scores (..., K) of all classes, by the names of `class_scores`."""
    hits, truth, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(axis=-1), counts.sum(axis=-2)
    return {
        "iou": _ratio(hits, truth + predicted - hits),
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, truth),
        "f1": _ratio(2 * hits, truth + predicted),
        "truth_share": _ratio(truth, truth.sum(axis=-1, keepdims=True)),
    }


def _ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return np.asarray(np.divide(part, whole))


def _mean(figures: Floats) -> Floats:
    """Over the last axis, of those that are defined; NaN of none."""
    return _ratio(np.nansum(figures, axis=-1), np.isfinite(figures).sum(axis=-1))


def _or_none(figure: npt.ArrayLike) -> float | None:
    value = float(np.asarray(figure))
    return value if np.isfinite(value) else None
