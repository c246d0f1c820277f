"""Do the probabilities of flood mean what they say, and is flood still told apart from the rest?"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from floodrepro.evaluation.calibration import (
    Reliability,
    brier,
    classwise_ece,
    expected_calibration_error,
    reliability,
    threshold_sweep,
)
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import Counts, iou
from floodrepro.verification.check import Check, Evidence, Plot, Value
from floodrepro.verification.comparison import finite, has_flood, no_table, table_file
from floodrepro.verification.judging import judge

ID = "calibration"
_CLAIM = "Probabilities of flood are near its frequencies, about as much flood is called as there is, and no collapse."
_answer = partial(Check, ID, "Calibration and mode collapse", _CLAIM)
_BINS = 10
_DEFAULT = 0.5  # the threshold that taking the likelier of two classes amounts to


def check(evidence: Evidence) -> Check:
    """ECE of flood, its area, and the chips that are predicted as one class, each against its threshold."""
    if reason := no_table(evidence):
        return _answer("skip", reason)
    assert evidence.table is not None  # no_table
    table, k = evidence.table, evidence.table.num_classes - 1
    pooled = table.counts.sum(axis=0)
    if not has_flood(pooled):
        return _answer("skip", "no flood in the truth of any chip")
    diagram = reliability(table, k, _BINS)
    judged = _judged(table, diagram, pooled, evidence.thresholds[ID])
    status, reason = judge(judged)
    swept, plots = _sweep(table, k)
    each = classwise_ece(table, _BINS)
    names = table.metadata.get("class_names") or [str(n) for n in range(table.num_classes)]
    value = partial(Value, n_chips=len(table))
    return _answer(
        status,
        reason,
        values=[
            *judged,
            value("expected calibration error, class-wise", finite(float(np.mean(each)))),
            *(value(f"expected calibration error, {name}", finite(e)) for name, e in zip(names, each, strict=True)),
            value("Brier score, 0 to 2", finite(brier(table))),
            *swept,
        ],
        plots=[_diagram(diagram), *plots],
        notes=[
            "The best threshold was found on the very chips that it is shown for: it is no result, but a diagnosis."
        ],
        evidence=[table_file(table)],
    )


def _judged(table: ChipTable, diagram: Reliability, pooled: Counts, asked: Mapping[str, Any]) -> list[Value]:
    """The figures that something is asked of."""
    value = partial(Value, n_chips=len(table))
    error, likely = (expected_calibration_error(d) for d in (diagram, _without_lowest(diagram)))
    area = float(pooled[:, -1].sum() / pooled[-1].sum())
    low, high = asked["area_ratio"]
    one_class, mixed = _one_class(table.counts)
    share = one_class / mixed if mixed else math.nan
    return [
        value(
            "expected calibration error of flood",
            finite(error),
            threshold=f"at most {asked['ece_flood']:g}",
            ok=error <= asked["ece_flood"],
        ),
        value(
            f"expected calibration error of flood where its probability is {diagram.edges[1]:g} or more",
            finite(likely),
            threshold=f"at most {asked['ece_likely_flood']:g}",
            ok=likely <= asked["ece_likely_flood"] if math.isfinite(likely) else None,
        ),
        value("predicted over true flood area", area, threshold=f"{low:g} to {high:g}", ok=low <= area <= high),
        Value(
            "share of chips with flood and other ground that are predicted as all flood or no flood",
            finite(share),
            n_chips=mixed,
            threshold=f"below {asked['one_class_share']:g}",
            ok=share < asked["one_class_share"] if mixed else None,
        ),
    ]


def _without_lowest(diagram: Reliability) -> Reliability:
    """Without the lowest bin: ground that is surely not flood, and so much of it that it drowns the rest."""
    return Reliability(diagram.edges[1:], diagram.pixels[1:], diagram.confidence[1:], diagram.frequency[1:])


def _one_class(counts: Counts) -> tuple[int, int]:
    """Of the chips (N, K, K) that have flood and other ground in truth: called all flood or none, and all of them."""
    flood, pixels, called = counts[:, -1].sum(axis=1), counts.sum(axis=(1, 2)), counts[:, :, -1].sum(axis=1)
    mixed = (flood > 0) & (flood < pixels)
    return int((mixed & ((called == 0) | (called == pixels))).sum()), int(mixed.sum())


def _sweep(table: ChipTable, k: int) -> tuple[list[Value], list[Plot]]:
    """Flood IoU over the threshold; of equal ones the best is the nearest to the default."""
    thresholds, counts = threshold_sweep(table, k)
    figures = iou(counts, 1)  # never undefined: there is flood in truth
    best = int(np.lexsort((np.abs(thresholds - _DEFAULT), -figures))[0])
    default = int(np.argmin(np.abs(thresholds - _DEFAULT)))
    value = partial(Value, n_chips=len(table))
    values = [
        value("best threshold of flood", float(thresholds[best])),
        value(f"best threshold, distance from {_DEFAULT:g}", float(thresholds[best]) - _DEFAULT),
        value("flood IoU at the best threshold", float(figures[best])),
        value(f"flood IoU at {_DEFAULT:g}", float(figures[default])),
    ]
    caption = f"The best is {thresholds[best]:.2f}, with a flood IoU of {figures[best]:.4f}."
    series = _line("flood IoU", thresholds, figures)
    title = "Flood IoU over the threshold"
    return values, [
        Plot("thresholds", "lines", title, "threshold of flood's probability", "flood IoU", [series], caption)
    ]


def _diagram(diagram: Reliability) -> Plot:
    filled = diagram.pixels > 0
    return Plot(
        "reliability",
        "lines",
        "Reliability of flood",
        "mean probability of flood",
        "share of pixels that are flood",
        [
            _line("flood", diagram.confidence[filled], diagram.frequency[filled]),
            {"label": "as it should be", "x": [0.0, 1.0], "y": [0.0, 1.0]},
        ],
        "Below the diagonal the model is surer of flood than it should be, above it less sure.",
    )


def _line(label: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {"label": label, "x": x.round(6).tolist(), "y": y.round(6).tolist()}
