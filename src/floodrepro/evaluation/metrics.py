"""Scores as pure functions of a chip table's counts. numpy only: neither torch nor a pixel is needed.

Counts are int64 (..., K, K), rows = truth, columns = prediction, pixels with the ignore index left out. N = chips,
K = classes, B = the table's bins of probability, M = bins of a diagram. A figure that is 0 / 0 is None, or NaN in an
array: a chip without flood, predicted without flood, has no flood IoU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Pixels of the class in the truth (one hectare at 10 m) from which an event counts in a mean over events: below, one
# field decides its IoU.
MIN_FLOOD_PIXELS = 100


def scores(counts: Counts) -> dict[str, float | None]:
    """The scores that TerraTorch reports, under its names, from counts (K, K) summed over a split.

    `mIoU` and `F1_Score` are means over the classes that occur in truth or prediction, as in torchmetrics 1.9;
    `Pixel_Accuracy` is the share of pixels that are right. A class that does not occur is None, where TerraTorch
    1.2.7 reports 0.
    """
    hits, truth, predicted = _margins(counts)
    figures = {
        "mIoU": mean_iou(counts),
        **{f"IoU_{k}": iou(counts, k) for k in range(len(counts))},
        "F1_Score": _mean(_ratio(2 * hits, truth + predicted)),
        "Pixel_Accuracy": _ratio(hits.sum(), counts.sum()),
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in figures.items()}


def class_scores(counts: Counts, k: int = -1) -> dict[str, float | None]:
    """Scores of class k against the rest, from counts (K, K).

    Returns:
        `iou` = TP / (TP + FP + FN) (Jaccard 1912), `precision` = TP / (TP + FP), `recall` = TP / (TP + FN), which
        TerraTorch calls Class_Accuracy, `f1` = 2 TP / (2 TP + FP + FN) (Dice 1945), `truth_share` and
        `predicted_share`: the class's share of the counted pixels.
    """
    hits, truth, predicted = (float(margin[k]) for margin in _margins(counts))
    found = {
        "iou": (hits, truth + predicted - hits),
        "precision": (hits, predicted),
        "recall": (hits, truth),
        "f1": (2 * hits, truth + predicted),
        "truth_share": (truth, counts.sum()),
        "predicted_share": (predicted, counts.sum()),
    }
    return {name: float(part / whole) if whole else None for name, (part, whole) in found.items()}


def iou(counts: Counts, k: int = -1) -> Floats:
    """IoU (...) of class k from counts (..., K, K); NaN where neither truth nor prediction has the class."""
    hits, truth, predicted = _margins(counts)
    return _ratio(hits[..., k], (truth + predicted - hits)[..., k])


def mean_iou(counts: Counts) -> Floats:
    """Mean IoU (...) over the classes that truth or prediction has, from counts (..., K, K); NaN without any."""
    hits, truth, predicted = _margins(counts)
    return _mean(_ratio(hits, truth + predicted - hits))


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
    groups = {"chips": (counts, 1), "events": (pool_by_event(counts, events)[1], MIN_FLOOD_PIXELS)}
    pooled = class_scores(counts.sum(axis=0), k)["iou"]
    found: list[dict[str, Any]] = [{"name": "pooled over all pixels", "iou": pooled, "n": len(counts), "of": "chips"}]
    for of, (each, least) in groups.items():
        figures = iou(each[each[:, k].sum(axis=-1) >= least], k)
        mean = float(figures.mean()) if len(figures) else None
        found.append({"name": f"mean over {of} with {label}", "iou": mean, "n": len(figures), "of": of})
    return found


class Reliability(NamedTuple):
    """A reliability diagram of the positive class (Murphy and Winkler 1977): M bins of probability."""

    edges: Floats  # (M + 1,), from 0 to 1
    pixels: npt.NDArray[np.int64]  # (M,), whose probability of the class lies in the bin
    confidence: Floats  # (M,), their mean probability; NaN in an empty bin
    frequency: Floats  # (M,), share of them that are of the class; NaN in an empty bin


def reliability(histogram: npt.NDArray[np.int64], confidence: Floats, bins: int = 10) -> Reliability:
    """The reliability diagram over all pixels of a chip table, from its histogram (N, 2, B) and confidence (N, B).

    Raises:
        ValueError: `bins` does not divide the table's bins.
    """
    rest, positive = histogram.sum(axis=0).reshape(2, bins, -1).sum(axis=2)
    summed = confidence.sum(axis=0).reshape(bins, -1).sum(axis=1)
    pixels = rest + positive
    return Reliability(np.linspace(0, 1, bins + 1), pixels, _ratio(summed, pixels), _ratio(positive, pixels))


def expected_calibration_error(diagram: Reliability) -> float | None:
    """Mean of |confidence - frequency| over the pixels of a diagram, 0 to 1; None without a pixel.

    Naeini, Cooper and Hauskrecht 2015 (AAAI), of the positive class whether it wins or not: where 95 % of the pixels
    are background, the winning class says little about flood.
    """
    gaps = np.nan_to_num(np.abs(diagram.confidence - diagram.frequency))
    return float(np.average(gaps, weights=diagram.pixels)) if diagram.pixels.any() else None


def threshold_sweep(histogram: npt.NDArray[np.int64]) -> tuple[Floats, Counts]:
    """Thresholds (B,), the lower edges of the bins, and the confusion counts (B, 2, 2) that each would have given.

    The positive class is called wherever its probability is at least the threshold.
    """
    pooled = histogram.sum(axis=0)
    called = pooled[:, ::-1].cumsum(axis=1)[:, ::-1]
    counts = np.stack([pooled.sum(axis=1, keepdims=True) - called, called], axis=-1)
    return np.arange(pooled.shape[-1]) / pooled.shape[-1], np.moveaxis(counts, 1, 0)


def _margins(counts: Counts) -> tuple[Floats, Floats, Floats]:
    """Pixels (..., K) that are right, that are of the class, and that are predicted as it."""
    values = counts.astype(np.float64)
    return np.diagonal(values, axis1=-2, axis2=-1), values.sum(axis=-1), values.sum(axis=-2)


def _ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    """One over the other, NaN where the whole is 0."""
    shares = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=shares, where=np.asarray(whole) > 0)
    return shares


def _mean(figures: Floats) -> Floats:
    """Over the last axis, of those that are defined; NaN of none."""
    return _ratio(np.nansum(figures, axis=-1), np.isfinite(figures).sum(axis=-1))
