"""The scores of one run: event by event, as probabilities, and recomputed from the chip table's counts."""

from dataclasses import replace

import numpy as np

from floodrepro.evaluation import metrics
from floodrepro.evaluation.chip_table import ChipTable, refuse_to_compare
from floodrepro.evaluation.metrics import iou, pool_by_event
from floodrepro.verification.check import Cell, Check, Evidence, Plot, Table, Unanswered, Value, check, judge

ROWS = 40  # events that one plot or table shows
_BINS = 10  # of the reliability diagram


@check
def events(evidence: Evidence) -> Check:
    """The score of each event's pooled counts; false alarms where an event has none of the class in its truth."""
    asked, k, name = evidence.criteria["events"], evidence.positive, evidence.iou_name
    class_name, zero = evidence.class_name, asked["zero_iou"]
    table = evidence.usable_table()
    names, counts = pool_by_event(table.counts, table.events)
    pixels, figures = counts[:, k].sum(axis=1), iou(counts, k)
    chips = np.unique(table.events, return_counts=True)[1]
    large = np.flatnonzero(pixels >= asked["min_pixels"])
    if not len(large):
        raise Unanswered("skip", f"no event has {asked['min_pixels']} pixels of {class_name} or more")
    order = large[np.argsort(figures[large], kind="stable")].tolist()
    missed = [names[n] for n in order if figures[n] < zero]
    share, most = len(missed) / len(large), asked["max_zero_iou_share"]
    values = [
        Value(f"share of events with {name} below {zero:g}", share, at_most=most),
        Value(f"{name}, mean over events", float(figures[large].mean()), n_events=len(large)),
        Value(f"{name}, median over events", float(np.median(figures[large])), n_events=len(large)),
        Value(f"{name}, worst event", float(figures[order[0]])),
        Value(f"share of all {class_name} pixels in the largest event", 100 * float(pixels.max() / pixels.sum()), "%"),
    ]
    found = f"{figures[order[0]]:.2f} to {figures[order[-1]]:.2f} over {len(large)} events"
    about: list[list[Cell]] = [[names[n], int(chips[n]), int(pixels[n])] for n in range(len(names))]
    columns = ["event", "chips", f"{class_name} pixels"]
    scored = [[*about[n], float(figures[n])] for n in order[:ROWS]]
    rest = [[*about[n], int(counts[n, :, k].sum())] for n in range(len(names)) if n not in set(order)][:ROWS]
    tables = [
        Table("Events, the worst first", [*columns, name], scored),
        Table(f"Events with little or no {class_name}", [*columns, f"called {class_name}"], rest),
    ]
    shown = [names[n] for n in order[:ROWS]]
    series = [{"label": "this run", "x": figures[order[:ROWS]].round(6).tolist(), "y": shown}]
    if evidence.reference is not None and not refuse_to_compare(table, evidence.reference):
        theirs = iou(pool_by_event(evidence.reference.counts, evidence.reference.events)[1], k)
        series.append({"label": "the reference", "x": theirs[order[:ROWS]].round(6).tolist(), "y": shown})
    caption = f"{name} by event, the worst on top{f' ({ROWS} shown)' if len(order) > ROWS else ''}."
    plot = Plot("events", "dots", f"{name} by event", name, "", series, caption)
    answer = judge(values, found, tables=tables, plots=[plot])
    return replace(answer, finding=f"{answer.finding}: {', '.join(missed[:5])}") if missed else answer


@check
def calibration(evidence: Evidence) -> Check:
    """Probabilities of the class against its frequencies, its area, and collapse to one class."""
    asked, k, class_name = evidence.criteria["calibration"], evidence.positive, evidence.class_name
    table = evidence.usable_table()
    true, pixels = table.counts[:, k].sum(axis=1), table.counts.sum(axis=(1, 2))
    called = table.counts[:, :, k].sum(axis=1)
    if table.histogram is None or table.confidence is None:
        raise Unanswered("skip", "the chip table holds classes, and no probabilities")
    if not true.any():
        raise Unanswered("skip", f"no chip has {class_name} in its truth")
    diagram = metrics.reliability(table.histogram, table.confidence, _BINS)
    likely = metrics.Reliability(diagram.edges[1:], diagram.pixels[1:], diagram.confidence[1:], diagram.frequency[1:])
    mixed = (true > 0) & (true < pixels)
    one_class = ((called == 0) | (called == pixels))[mixed]
    thresholds, swept = metrics.threshold_sweep(table.histogram)
    best = int(np.lexsort((np.abs(thresholds - 0.5), -iou(swept, 1)))[0])  # of equal ones the nearest to 0.5
    least, most = asked["area_ratio"]
    values = [
        Value("expected calibration error", metrics.expected_calibration_error(diagram), at_most=asked["ece"]),
        Value("predicted over true area", float(called.sum() / true.sum()), at_least=least, at_most=most),
        Value("Brier score", table.brier),
        Value(f"best threshold of {class_name} on these chips", float(thresholds[best])),
    ]
    found = f"calibration error {values[0].text}, predicted over true area {values[1].text}"
    error = metrics.expected_calibration_error(likely)
    if error is not None and diagram.pixels[0]:  # else it is the same figure
        name = f"the same where the probability is {diagram.edges[1]:g} or more"
        values.insert(1, Value(name, error, at_most=asked["ece_likely"]))
    if mixed.any():
        name, share = "share of chips with both that are predicted as one class", float(one_class.mean())
        values.insert(-2, Value(name, share, n_chips=len(one_class), at_most=asked["one_class_share"]))
    filled = diagram.pixels > 0
    curve = {"x": diagram.confidence[filled].round(6).tolist(), "y": diagram.frequency[filled].round(6).tolist()}
    plot = Plot(
        "reliability",
        "lines",
        f"Reliability of {class_name}",
        f"mean probability of {class_name}",
        f"share of pixels that are {class_name}",
        [{"label": "this run"} | curve, {"label": "equal", "x": [0.0, 1.0], "y": [0.0, 1.0], "guide": True}],
        "Below the diagonal the model is more certain than it should be, above it less.",
    )
    return judge(values, found, plots=[plot])


@check
def identities(evidence: Evidence) -> Check:
    """TerraTorch's own metrics against the same figures from the chip table's counts, for run and reference."""
    tables = {"run": evidence.usable_table()} | ({"reference": evidence.reference} if evidence.reference else {})
    most, gaps = evidence.criteria["identities"]["difference"], {}
    for name, table in tables.items():
        found, metrics_there = terratorch_scores(table), table.metadata.get("metrics") or {}
        stored = {key.rsplit("/", 1)[-1]: value for key, value in metrics_there.items()}
        if both := found.keys() & stored.keys():
            gaps[name] = max(abs(float(stored[key]) - (found[key] or 0.0)) for key in both)
    values = [Value(f"{name}: largest difference of a metric", gap, at_most=most) for name, gap in gaps.items()]
    damaged = {name: why for name, (status, why) in evidence.absent.items() if status == "fail" and "table" in name}
    values += [Value(name, why, expected="readable") for name, why in damaged.items()]
    skip = "" if "run" in gaps else "the chip table holds none of TerraTorch's metrics"
    return judge(values, f"the same to {max(gaps.values(), default=0.0):.1g}", skip)


def terratorch_scores(table: ChipTable) -> dict[str, float | None]:
    """TerraTorch's scores of the pooled counts by its names, and `Class_Accuracy_k`, the recall of class k."""
    counts = table.counts.sum(axis=0)
    recall = {f"Class_Accuracy_{k}": metrics.class_scores(counts, k)["recall"] for k in range(table.num_classes)}
    return metrics.scores(counts) | recall
