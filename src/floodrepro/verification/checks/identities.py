"""Do the figures agree: scores with counts, TerraTorch's metrics with the table, subsets with the whole?"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import Counts, per_class, scores
from floodrepro.verification.check import Cell, Check, Evidence, Table, Value
from floodrepro.verification.comparison import no_table, table_file
from floodrepro.verification.judging import judge

ID = "identities"
_TITLE = "Identities of the figures"
_CLAIM = (
    "In every table mIoU is the mean IoU, F1 follows from IoU and accuracy from the counts; TerraTorch's own metrics "
    "and the exported card's are those of the counts, and the subsets are parts of the whole."
)


def check(evidence: Evidence) -> Check:
    """Compute every figure a second way."""
    if missing := no_table(evidence):
        return Check(ID, _TITLE, _CLAIM, "skip", missing)
    assert evidence.table is not None  # no_table
    tolerance = float(evidence.thresholds[ID]["tolerance"])
    tables = {"run": evidence.table} | {f"subset {name}": table for name, table in evidence.subsets.items()}
    if evidence.reference is not None:
        tables["reference"] = evidence.reference
    values: list[Value] = []
    notes: list[str] = []
    rows: list[list[Cell]] = []
    for name, table in tables.items():
        values.append(
            _at_most(f"{name}: deviation from the identities", deviation(table.counts.sum(axis=0)), tolerance)
        )
        compared = _beside_terratorch(table)
        rows += [[name, *row] for row in compared]
        if compared:
            largest = max(difference for *_, difference in compared)
            values.append(_at_most(f"{name}: difference to TerraTorch's metrics", largest, tolerance))
        elif name != "run" and not table.metadata.get("subset_of"):
            notes.append(f"The table of {name} holds none of TerraTorch's metrics.")
    values += _card(evidence.card, evidence.table, tolerance, notes)
    values += [_part_of(name, subset, evidence.table) for name, subset in evidence.subsets.items()]
    for stem, entry in evidence.published.items():
        broken = contradictions(entry.get("figures") or {}, entry.get("decimals", 4))
        notes += [f"Published figures, {entry.get('name', stem)}: {line}." for line in broken]
    skip = "" if any(row[0] == "run" for row in rows) else "the chip table holds none of TerraTorch's metrics"
    status, reason = judge(values, skip)
    beside = Table("Beside TerraTorch", ["table", "metric", "from counts", "TerraTorch's", "difference"], rows)
    files = [table_file(table) for name, table in tables.items() if name != "reference"]
    return Check(ID, _TITLE, _CLAIM, status, reason, values, [beside] if rows else [], notes=notes, evidence=files)


def deviation(counts: Counts) -> float:
    """The largest deviation of `scores` from what the identities make of each class's IoU and of the counts.

    mIoU = mean of IoU, F1 = mean of 2 IoU / (1 + IoU), over the classes that truth or prediction has; pixel accuracy =
    diagonal / all pixels.
    """
    found, iou = scores(counts), per_class(counts)["iou"]
    present = iou[~np.isnan(iou)]
    if not present.size:
        return 0.0  # no pixel is counted: there is nothing to agree with
    expected = {f"IoU_{k}": value for k, value in enumerate(np.nan_to_num(iou).tolist())}
    expected["mIoU"] = float(present.mean())
    expected["F1_Score"] = float((2 * present / (1 + present)).mean())
    expected["Pixel_Accuracy"] = sum(int(counts[k, k]) for k in range(len(counts))) / int(counts.sum())
    return max(_difference(found[name], value) for name, value in expected.items())


def contradictions(figures: Mapping[str, float], decimals: int) -> list[str]:
    """Which identities a published row of figures breaks by more than its rounding explains.

    For two classes the pixel accuracy follows from the two IoUs: with e = FP + FN as a share of all pixels,
    TP = e IoU_1 / (1 - IoU_1), TN = e IoU_0 / (1 - IoU_0), and the three add up to 1.

    Args:
        figures: By TerraTorch's names; what is missing is not asked for.
        decimals: To which they are rounded.
    """
    iou = [figures[f"IoU_{k}"] for k in range(len(figures)) if f"IoU_{k}" in figures]
    if len(iou) < 2:
        return []
    half = 0.5 * 10**-decimals
    expected: dict[str, Callable[[list[float]], float]] = {
        "mIoU": lambda values: sum(values) / len(values),
        "F1_Score": lambda values: sum(2 * x / (1 + x) for x in values) / len(values),
    }
    if len(iou) == 2:
        expected["Pixel_Accuracy"] = lambda values: 1 - 1 / (sum(1 / (1 - x) for x in values) - 1)
    found = []
    for name, formula in expected.items():
        # Each grows with every IoU: the roundings' ends are reached together.
        low, high = formula([max(x - half, 0.0) for x in iou]), formula([min(x + half, 1 - half) for x in iou])
        if name in figures and not low - half <= figures[name] <= high + half:
            found.append(f"{name} is {figures[name]}, its IoUs give {formula(iou):.{decimals}f}")
    return found


def _beside_terratorch(table: ChipTable) -> list[tuple[str, float, float, float]]:
    """Metric, from counts, TerraTorch's, and the difference, for what both have."""
    stored: Mapping[str, Any] = table.metadata.get("metrics") or {}
    several = f"test/{table.metadata.get('split')}/"  # one of several test splits
    prefix = several if any(name.startswith(several) for name in stored) else "test/"
    counts = table.counts.sum(axis=0)
    recall = np.nan_to_num(per_class(counts)["recall"]).tolist()  # torchmetrics' 0 for a class that is not in the truth
    ours = scores(counts) | {f"Class_Accuracy_{k}": value for k, value in enumerate(recall)}
    pairs = [(name, value, float(stored[prefix + name])) for name, value in ours.items() if prefix + name in stored]
    return [(name, value, theirs, _difference(value, theirs)) for name, value, theirs in pairs]


def _card(card: Mapping[str, float], table: ChipTable, tolerance: float, notes: list[str]) -> list[Value]:
    """Whether the exported card says what the table says."""
    if not card:
        notes.append("No exported card has figures yet: export --card-only writes it from these results.")
        return []
    counts = table.counts.sum(axis=0)
    ours = scores(counts) | {f"Class_Accuracy_{k}": value for k, value in enumerate(per_class(counts)["recall"])}
    largest = max(_difference(value, ours.get(name.rsplit("/", 1)[-1], math.nan)) for name, value in card.items())
    return [_at_most("card: difference to the counts (export --card-only writes it anew)", largest, tolerance)]


def _part_of(name: str, subset: ChipTable, whole: ChipTable) -> Value:
    """Whether a subset's chips are in the main table with the same counts."""
    places = {chip: row for row, chip in enumerate(whole.chips.tolist())}
    rows = [places.get(chip) for chip in subset.chips.tolist()]
    differing = sum(
        row is None or not np.array_equal(whole.counts[row], counts)
        for row, counts in zip(rows, subset.counts, strict=True)
    )
    return Value(
        f"subset {name}: chips that the whole has not, or with other counts",
        differing,
        n_chips=len(subset),
        threshold="none",
        ok=not differing,
    )


def _at_most(name: str, value: float, tolerance: float) -> Value:
    return Value(name, value, threshold=f"at most {tolerance:g}", ok=value <= tolerance)


def _difference(one: float, other: float) -> float:
    """Absolute; infinite where only one is a number."""
    if math.isnan(one) and math.isnan(other):
        return 0.0
    return abs(one - other) if math.isfinite(one - other) else math.inf
