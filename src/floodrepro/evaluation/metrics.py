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
