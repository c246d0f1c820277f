"""The scores of one run: event by event, as probabilities, and recomputed from the chip table's counts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from floodrepro.evaluation import metrics
from floodrepro.evaluation.chip_table import ChipTable, refuse_to_compare
from floodrepro.evaluation.metrics import Floats, iou, pool_by_event
from floodrepro.verification.check import Check, Evidence, Plot, Status, Table, Value, judge

ROWS = 40  # events that one plot or table shows
_BINS = 10  # of the reliability diagram
_TOLERANCE = 1e-6  # TerraTorch divides in float32


def events(evidence: Evidence) -> Check:
    """The score of each event's pooled counts; false alarms where an event has none of the class in its truth."""
    asked, k, name, class_name = (
        evidence.thresholds["events"],
        evidence.positive,
        evidence.iou_name,
        evidence.class_name,
    )
    most = asked["max_share_of_zero_iou_events"]
    claim = f"At most {100 * most:g} % of the events with {class_name} have {name} below {asked['zero_iou']:g}."
    answer = partial(Check, "events", "Event by event", claim)
    table = usable_table(evidence)
    if not isinstance(table, ChipTable):
        return answer(*table)
    names, counts = pool_by_event(table.counts, table.events)
    pixels = counts[:, k].sum(axis=1)
    chips = np.unique(table.events, return_counts=True)[1]
    large = np.flatnonzero(pixels >= asked["min_pixels"])
    if not len(large):
        return answer("skip", f"no event has {asked['min_pixels']} pixels of {class_name} or more")
    figures = iou(counts, k)
    order = large[np.argsort(figures[large], kind="stable")].tolist()
    missed = [names[n] for n in order if figures[n] < asked["zero_iou"]]
    values = [
        Value(f"share of events with {name} below {asked['zero_iou']:g}", len(missed) / len(large), at_most=most),
        Value(f"{name}, mean over events", float(figures[large].mean()), n_events=len(large)),
        Value(f"{name}, median over events", float(np.median(figures[large])), n_events=len(large)),
        Value(f"{name}, worst event", float(figures[order[0]])),
        Value(f"share of all {class_name} pixels in the largest event", 100 * float(pixels.max() / pixels.sum()), "%"),
    ]
    spread = f"{float(figures[order[0]]):.2f} to {float(figures[order[-1]]):.2f} over {len(large)} events"
    status, finding = judge(values[:1], spread)
    rows = [[names[n], int(chips[n]), int(pixels[n]), float(figures[n])] for n in order[:ROWS]]
    tables = [Table("Events, the worst first", ["event", "chips", f"{class_name} pixels", name], rows)]
    if len(large) < len(names):
        rest = [n for n in range(len(names)) if n not in set(order)][:ROWS]
        rows = [[names[n], int(chips[n]), int(pixels[n]), int(counts[n, :, k].sum())] for n in rest]
        columns = ["event", "chips", f"{class_name} pixels", f"called {class_name}"]
        tables.append(Table(f"Events with little or no {class_name}", columns, rows))
    return answer(
        status,
        f"{finding}: {', '.join(missed[:5])}" if missed else finding,
        values=values,
        tables=tables,
        plots=[_dots(evidence, table, [names[n] for n in order[:ROWS]], figures[order[:ROWS]])],
        evidence=[table_file(table)],
    )


def calibration(evidence: Evidence) -> Check:
    """Probabilities of the class against its frequencies, its area, and collapse to one class."""
    asked, k, class_name = evidence.thresholds["calibration"], evidence.positive, evidence.class_name
    least, most = asked["area_ratio"]
    claim = (
        f"Probabilities of {class_name} are near its frequencies, its area is predicted {least:g} to {most:g} times as "
        "large as it is, and chips with both are not predicted as one class."
    )
    answer = partial(Check, "calibration", "Probabilities and area", claim)
    table = usable_table(evidence)
    if not isinstance(table, ChipTable):
        return answer(*table)
    pooled = table.counts.sum(axis=0)
    if table.histogram is None or table.confidence is None:
        return answer("skip", "the chip table holds classes, and no probabilities")
    if not pooled[k].any():
        return answer("skip", f"no chip has {class_name} in its truth")
    diagram = metrics.reliability(table.histogram, table.confidence, _BINS)
    likely = metrics.Reliability(diagram.edges[1:], diagram.pixels[1:], diagram.confidence[1:], diagram.frequency[1:])
    true, pixels, called = (
        table.counts[:, k].sum(axis=1),
        table.counts.sum(axis=(1, 2)),
        table.counts[:, :, k].sum(axis=1),
    )
    mixed = (true > 0) & (true < pixels)
    one_class = float(((called == 0) | (called == pixels))[mixed].mean()) if mixed.any() else None
    thresholds, swept = metrics.threshold_sweep(table.histogram)
    curve = iou(swept, 1)
    best = int(np.lexsort((np.abs(thresholds - 0.5), -curve))[0])  # of equal ones the nearest to 0.5
    error_likely = metrics.expected_calibration_error(likely)
    values = [
        Value("expected calibration error", metrics.expected_calibration_error(diagram), at_most=asked["ece"]),
        Value(
            f"the same where the probability is {diagram.edges[1]:g} or more",
            error_likely,
            at_most=None if error_likely is None else asked["ece_likely"],
        ),
        Value("predicted over true area", float(pooled[:, k].sum() / pooled[k].sum()), at_least=least, at_most=most),
        Value(
            "share of chips with both that are predicted as one class",
            one_class,
            n_chips=int(mixed.sum()),
            at_most=asked["one_class_share"] if mixed.any() else None,
        ),
        Value("Brier score", table.brier),
        Value(f"best threshold of {class_name} on these chips", float(thresholds[best])),
    ]
    error, area = values[0].text, values[2].text
    status, finding = judge(values, f"calibration error {error}, predicted over true area {area}")
    filled = diagram.pixels > 0
    plots = [
        Plot(
            "reliability",
            "lines",
            f"Reliability of {class_name}",
            f"mean probability of {class_name}",
            f"share of pixels that are {class_name}",
            [_line("this run", diagram.confidence[filled], diagram.frequency[filled]), _GUIDE],
            "Below the diagonal the model is more certain than it should be, above it less.",
        ),
    ]
    return answer(status, finding, values=values, plots=plots, evidence=[table_file(table)])


def identities(evidence: Evidence) -> Check:
    """TerraTorch's own metrics against the same figures from the chip table's counts, for run and reference."""
    claim = "TerraTorch's metrics of run and reference are those that the chip table's counts give."
    answer = partial(Check, "identities", "Scores recomputed", claim)
    table = usable_table(evidence)
    if not isinstance(table, ChipTable):
        return answer(*table)
    values, largest = [], 0.0
    for name, one in (("run", table), ("reference", evidence.reference)):
        stored = {key.rsplit("/", 1)[-1]: value for key, value in ((one and one.metadata.get("metrics")) or {}).items()}
        found = terratorch_scores(one) if one else {}
        gaps = [abs(float(stored[key]) - (found[key] or 0.0)) for key in found if key in stored]
        if gaps:
            largest = max(largest, *gaps)
            values.append(Value(f"{name}: largest difference of {len(gaps)} metrics", max(gaps), at_most=_TOLERANCE))
    values += [
        Value(name, problem, expected="readable") for name, problem in evidence.damaged.items() if "table" in name
    ]
    skip = "" if values and values[0].name.startswith("run") else "the chip table holds none of TerraTorch's metrics"
    status, finding = judge(values, f"the same to {largest:.1g}", skip)
    return answer(status, finding, values=values, evidence=[table_file(table)])


def terratorch_scores(table: ChipTable) -> dict[str, float | None]:
    """TerraTorch's scores of the pooled counts by its names, and `Class_Accuracy_k`, the recall of class k."""
    counts = table.counts.sum(axis=0)
    recall = {f"Class_Accuracy_{k}": metrics.class_scores(counts, k)["recall"] for k in range(table.num_classes)}
    return metrics.scores(counts) | recall


def usable_table(evidence: Evidence) -> ChipTable | tuple[Status, str]:
    """The run's chip table, or why nothing can be computed from it."""
    if evidence.table is None:
        return evidence.absent("table", "the run has no chip table")
    return evidence.table if evidence.table.counts.any() else ("skip", "all pixels of the chip table are ignored")


def table_file(table: ChipTable) -> str:
    """Where the run folder keeps the table of its best checkpoint."""
    return f"evaluation/{table.metadata.get('split', 'test')}/best.parquet"


_GUIDE = {"label": "equal", "x": [0.0, 1.0], "y": [0.0, 1.0], "guide": True}


def _line(label: str, x: Floats, y: Floats) -> dict[str, Any]:
    return {"label": label, "x": x.round(6).tolist(), "y": y.round(6).tolist()}


def _dots(evidence: Evidence, table: ChipTable, names: Sequence[str], figures: Floats) -> Plot:
    """Events with this run's score and, where it has the same events, the reference's."""
    series = [{"label": "this run", "x": figures.round(6).tolist(), "y": list(names)}]
    other = evidence.reference
    if other is not None and not refuse_to_compare(table, other):
        where, counts = pool_by_event(other.counts, other.events)
        places = [where.index(name) for name in names]
        theirs = counts[places]
        series.append(_line("the reference", iou(theirs, evidence.positive), np.zeros(0)) | {"y": list(names)})
    caption = f"{evidence.iou_name} by event, the worst on top{'' if len(names) < ROWS else f' ({ROWS} shown)'}."
    return Plot("events", "dots", f"{evidence.iou_name} by event", evidence.iou_name, "", series, caption)
