"""Scores as pure functions of confusion counts: numpy only, so that a report needs neither torch nor the pixels.

Counts are int64 (K, K), rows = truth, columns = prediction, pixels with the ignore index left out.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def confusion(
    truth: npt.NDArray[Any], prediction: npt.NDArray[Any], num_classes: int, ignore_index: int = -1
) -> Counts:
    """Confusion counts of one or more chips.

    Args:
        truth: Class of each pixel, integers of any shape.
        prediction: Predicted class of each pixel, same shape; integers or booleans.
        num_classes: K. Classes are 0 to K - 1.
        ignore_index: Truth of the pixels that are not counted.

    Returns:
        Counts (K, K): rows = truth, columns = prediction.

    Raises:
        ValueError: If the shapes differ, or a counted pixel's truth or prediction is not a class.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    counted = truth != ignore_index
    true_class = truth[counted].astype(np.int64)
    predicted_class = prediction[counted].astype(np.int64)
    for name, classes in (("truth", true_class), ("prediction", predicted_class)):
        outside = (classes < 0) | (classes >= num_classes)
        if outside.any():
            raise ValueError(f"{name} holds {np.unique(classes[outside]).tolist()}, expected 0 to {num_classes - 1}")
    pairs = np.bincount(true_class * num_classes + predicted_class, minlength=num_classes**2)
    return pairs.astype(np.int64).reshape(num_classes, num_classes)


def scores(counts: Counts) -> dict[str, float]:
    """The scores that TerraTorch reports, from counts accumulated over a whole split.

    The conventions are torchmetrics 1.9's, which TerraTorch 1.2.7 uses: a class that is absent from both truth and
    prediction scores 0 by itself and is left out of the two macro means. Without a single counted pixel mIoU is NaN
    and the others are 0.

    Args:
        counts: Confusion counts (K, K), rows = truth.

    Returns:
        `mIoU` (macro), `IoU_<k>` for each class, `F1_Score` (macro) and `Pixel_Accuracy` (micro), each 0 to 1.
    """
    hits = np.diag(counts).astype(np.float64)
    marginals = (counts.sum(axis=0) + counts.sum(axis=1)).astype(np.float64)
    present = marginals > 0
    iou = np.divide(hits, marginals - hits, out=np.zeros_like(hits), where=present)
    f1 = np.divide(2 * hits, marginals, out=np.zeros_like(hits), where=present)
    total = int(counts.sum())
    return {
        "mIoU": float(iou[present].mean()) if total else float("nan"),
        **{f"IoU_{k}": float(value) for k, value in enumerate(iou)},
        "F1_Score": float(f1[present].mean()) if total else 0.0,
        "Pixel_Accuracy": float(hits.sum() / total) if total else 0.0,
    }


def per_class(counts: Counts) -> dict[str, npt.NDArray[np.float64]]:
    """Scores of each class against the rest, of one or many confusion matrices at once.

    iou = TP / (TP + FP + FN) (Jaccard 1912), f1 = 2 TP / (2 TP + FP + FN) (Dice 1945), precision = TP / (TP + FP),
    recall = TP / (TP + FN). `accuracy` is what TerraTorch reports as `Class_Accuracy_<k>`: torchmetrics' accuracy of
    one class, which is its recall. The share of all pixels that are right is `Pixel_Accuracy` in `scores`.

    Args:
        counts: Confusion counts (..., K, K), rows = truth.

    Returns:
        `iou`, `f1`, `precision`, `recall`, `accuracy`, each (..., K), 0 to 1. NaN where the score is 0 / 0: a dry chip
        that is predicted dry has no flood IoU, which is not the same as a flood IoU of 0.

    Raises:
        ValueError: The last two axes differ.
    """
    hits, truth, predicted = _margins(counts)
    recall = _ratio(hits, truth)
    return {
        "iou": _ratio(hits, truth + predicted - hits),
        "f1": _ratio(2 * hits, truth + predicted),
        "precision": _ratio(hits, predicted),
        "recall": recall,
        "accuracy": recall.copy(),
    }


def iou(counts: Counts, k: int) -> npt.NDArray[np.float64]:
    """IoU (...) of class k of confusion counts (..., K, K); NaN where neither truth nor prediction has the class.

    Raises:
        ValueError: The last two axes differ, or there is no class k.
    """
    hits, truth, predicted = _margins(counts)
    if not 0 <= k < counts.shape[-1]:
        raise ValueError(f"class {k} of counts that have classes 0 to {counts.shape[-1] - 1}")
    return _ratio(hits[..., k], (truth + predicted - hits)[..., k])


def mean_iou(counts: Counts) -> npt.NDArray[np.float64]:
    """Mean IoU (...) over the classes that truth or prediction has, as torchmetrics' macro average; NaN without any.

    Args:
        counts: Confusion counts (..., K, K), rows = truth.

    Raises:
        ValueError: The last two axes differ.
    """
    hits, truth, predicted = _margins(counts)
    each = _ratio(hits, truth + predicted - hits)
    return _ratio(np.nansum(each, axis=-1), (~np.isnan(each)).sum(axis=-1))


def _margins(
    counts: Counts,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Pixels (..., K) that are right, that are of the class, and that are predicted as it."""
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"confusion counts end in two axes of K classes, these are {counts.shape}")
    values = counts.astype(np.float64)
    return np.diagonal(values, axis1=-2, axis2=-1), values.sum(axis=-1), values.sum(axis=-2)


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """One over the other, NaN where the whole is 0."""
    shares = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=shares, where=np.asarray(whole) > 0)
    return shares
