"""Calibration and thresholds from a chip table's histograms: no pixel is read again. numpy only.

K = classes, B = the table's bins of probability, M = bins of a diagram, T = thresholds.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import Counts


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram of one class (Murphy and Winkler 1977).

    Args:
        edges: Of the bins of probability (M + 1,), from 0 to 1.
        pixels: Pixels (M,) whose probability of the class lies in the bin.
        confidence: Their mean probability (M,); NaN in an empty bin.
        frequency: Share (M,) of them that are of the class; NaN in an empty bin.
    """

    edges: npt.NDArray[np.float64]
    pixels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    frequency: npt.NDArray[np.float64]


def reliability(table: ChipTable, k: int, bins: int = 10) -> Reliability:
    """The reliability diagram of class k over all counted pixels of a table.

    Args:
        table: Chip table.
        k: The class.
        bins: M, equally wide; each is made of whole bins of the table.

    Raises:
        ValueError: There is no class k, or `bins` does not divide the table's bins.
    """
    histogram = _of_class(table, k)
    fine = histogram.shape[-1]
    if bins < 1 or fine % bins:
        raise ValueError(f"{bins} bins cannot be made of the table's {fine}: choose a divisor")
    merged = histogram.reshape(len(histogram), bins, -1).sum(axis=2)
    pixels = merged.sum(axis=0)
    summed = table.confidence[:, k].sum(axis=0).reshape(bins, -1).sum(axis=1)
    return Reliability(np.linspace(0, 1, bins + 1), pixels, _share(summed, pixels), _share(merged[k], pixels))


def expected_calibration_error(diagram: Reliability) -> float:
    """Mean of |confidence - frequency| over the pixels of a diagram, 0 to 1; NaN without a pixel.

    Naeini, Cooper and Hauskrecht 2015 (AAAI); Guo et al. 2017 (ICML) apply it to the winning class. Here it is that of
    the diagram's class, whether it wins or not: where 95 % of the pixels are background, the winning class says little
    about flood.
    """
    filled = diagram.pixels > 0
    if not filled.any():
        return float("nan")
    gaps = np.abs(diagram.confidence[filled] - diagram.frequency[filled])
    return float(np.average(gaps, weights=diagram.pixels[filled]))


def classwise_ece(table: ChipTable, bins: int = 10) -> npt.NDArray[np.float64]:
    """Expected calibration error (K,) of each class; their mean is the class-wise ECE of Kull et al. 2019 (NeurIPS).

    Raises:
        ValueError: `bins` does not divide the table's bins.
    """
    return np.array([expected_calibration_error(reliability(table, k, bins)) for k in range(table.num_classes)])


def brier(table: ChipTable) -> float:
    """Brier score: mean over pixels of the sum over classes of (probability - truth)^2, 0 to 2; NaN without a pixel.

    Brier 1950 (Monthly Weather Review), as it was first defined. For two classes it is twice the score that is often
    given for "flood or not" alone.
    """
    pixels = int(table.counts.sum())
    return float(table.squared_error.sum() / pixels) if pixels else float("nan")


def threshold_sweep(table: ChipTable, k: int = 1) -> tuple[npt.NDArray[np.float64], Counts]:
    """What calling class k wherever its probability is at least a threshold would have given.

    Thresholds are the lower edges of the table's bins, for there the counts are exact.

    Args:
        table: Chip table.
        k: The class, held against all others together.

    Returns:
        Thresholds (T,), T = B, from 0 (everything is k) to 1 - 1 / B; and confusion counts (T, 2, 2), rows = truth,
        1 = class k.

    Raises:
        ValueError: There is no class k.
    """
    histogram = _of_class(table, k)
    fine = histogram.shape[-1]
    of_class = histogram[k]
    of_rest = histogram.sum(axis=0) - of_class
    counts = np.empty((fine, 2, 2), np.int64)
    for row, pixels in enumerate((of_rest, of_class)):
        counts[:, row, 1] = pixels[::-1].cumsum()[::-1]
        counts[:, row, 0] = pixels.sum() - counts[:, row, 1]
    return np.arange(fine) / fine, counts


def _of_class(table: ChipTable, k: int) -> npt.NDArray[np.int64]:
    """Pixels (K, B) of each truth by their probability of class k, over all chips."""
    if not 0 <= k < table.num_classes:
        raise ValueError(f"class {k} of a table that has classes 0 to {table.num_classes - 1}")
    histogram: npt.NDArray[np.int64] = table.histogram[:, :, k].sum(axis=0)
    return histogram


def _share(part: npt.NDArray[np.float64 | np.int64], whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    shares = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares
