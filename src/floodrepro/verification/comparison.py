"""What the checks of chip tables share: the figures they compare, when they may, and the words for what came out."""

import math
from collections.abc import Mapping
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from floodrepro.evaluation.chip_table import ChipTable, refuse_to_compare
from floodrepro.evaluation.metrics import Counts, iou, mean_iou
from floodrepro.evaluation.resampling import Statistic
from floodrepro.evaluation.statistics import Equivalence
from floodrepro.verification.check import Evidence, Status
from floodrepro.verification.wording import digits_beside


def flood_iou(counts: Counts) -> npt.NDArray[np.float64]:
    """IoU (...) of flood, which is the last class in all three protocols, from counts (..., K, K)."""
    return iou(counts, counts.shape[-1] - 1)


ENDPOINTS: Mapping[str, Statistic] = {"flood IoU": flood_iou, "mIoU": mean_iou}
"""By name, the primary one first: mIoU is a mean in which the easy class hides what happens to flood."""


def has_flood(counts: Counts) -> npt.NDArray[np.bool_]:
    """Which (...) of some counts (..., K, K) have flood in their truth."""
    found: npt.NDArray[np.bool_] = counts[..., -1, :].sum(axis=-1) > 0
    return found


def no_table(evidence: Evidence) -> str | None:
    """Why nothing can be computed from the run's chip table; None if it can be."""
    if evidence.table is None:
        return evidence.missing.get("table", "the run has no chip table")
    return None if evidence.table.counts.any() else "all pixels of the chip table are ignored"


def no_pair(evidence: Evidence) -> tuple[Status, str] | None:
    """Why run and reference cannot be compared, and with which status; None if they can be.

    What is missing is a skip. A reference of other chips or another protocol was given by mistake: a failure, so that
    it cannot be overlooked.
    """
    if reason := no_table(evidence):
        return "skip", reason
    if evidence.reference is None or evidence.table is None:
        return "skip", evidence.missing.get("reference", "no reference was given")
    if reason := refuse_to_compare(evidence.table, evidence.reference):
        return "fail", f"wrong reference: {reason}"
    if same := same_model(evidence.table, evidence.reference):
        return "skip", f"the reference {same}: a comparison with itself shows nothing"
    return None


def same_model(table: ChipTable, other: ChipTable) -> str | None:
    """Why the other table is of the same weights, under whatever name and hash, as a predicate; None if it is not."""
    ours, theirs = ((one.metadata.get("checkpoint") or {}).get("sha256") for one in (table, other))
    if ours and ours == theirs:
        return "is this very checkpoint"
    if np.array_equal(table.counts, other.counts) and np.array_equal(table.histogram, other.histogram):
        return "predicts every chip alike, and as surely"
    return None


def table_file(table: ChipTable) -> str:
    """Where a run folder keeps the table."""
    name = str((table.metadata.get("checkpoint") or {}).get("name", "best.ckpt"))
    return f"evaluation/{table.metadata.get('split', 'test')}/{PurePath(name).stem}.parquet"


def finite(value: float) -> float | None:
    """The figure as JSON knows it: None where it is undefined."""
    return float(value) if math.isfinite(value) else None


def in_words(result: Equivalence, behind: str) -> str:
    """What a test of equivalence of two IoUs showed, and no more than that.

    Args:
        result: In shares, 0 to 1; said in percentage points.
        behind: Such as `12 events`.
    """
    margin, (low, high) = 100 * result.margin, (100 * result.interval.low, 100 * result.interval.high)
    shown, confidence = f"{_points(low, margin)} to {_points(high, margin)} pp", f"{100 * result.interval.level:g} % CI"
    if result.equivalent:
        return f"equivalent within ±{margin:g} pp ({confidence} {shown}, {behind})"
    side = "worse" if high < 0 else "better" if low > 0 else ""
    if high < -margin or low > margin:
        gap = f"{abs(100 * result.difference):.1f} pp {side} than the reference"
        return f"different: {gap}, the interval {shown} lies outside ±{margin:g} pp ({confidence}, {behind})"
    reaches = f"not shown to be equivalent: the interval {shown} reaches beyond ±{margin:g} pp ({confidence}, {behind})"
    return f"{reaches}; {side} than the reference" if side else reaches


def _points(value: float, margin: float) -> str:
    return f"{value:+z.{digits_beside(value, margin, 1)}f}"
