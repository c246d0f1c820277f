"""Flood IoU event by event: one large flood must not hide the others. Events without flood stand apart."""

from functools import partial

import numpy as np
import numpy.typing as npt

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import Counts
from floodrepro.evaluation.resampling import event_jackknife, pool_by_event
from floodrepro.verification.check import Cell, Check, Evidence, Plot, Table, Value
from floodrepro.verification.comparison import flood_iou, has_flood, no_table, table_file

ID = "events"
_CLAIM = "Flood is found in practically every event that has some, so that the pooled figure stands for all of them."
_answer = partial(Check, ID, "Event by event", _CLAIM)
_DRAWN = 60  # rows of a forest plot that can still be read
_COLUMNS = ("event", "chips", "flood pixels", "share of all flood pixels in %", "flood IoU")


def check(evidence: Evidence) -> Check:
    """Flood IoU of each event's pooled counts; false alarms where an event has no flood in its truth."""
    if reason := no_table(evidence):
        return _answer("skip", reason)
    assert evidence.table is not None  # no_table
    table, asked = evidence.table, evidence.thresholds[ID]
    event_of = table.events
    names, counts = pool_by_event(table.counts, event_of)
    wet = has_flood(counts)
    chips = dict(zip(names, np.unique(event_of, return_counts=True)[1].tolist(), strict=True))
    dry = _dry_events(chips, names, counts, wet)
    if wet.sum() < 2:
        return _answer("skip", f"flood in {int(wet.sum())} of {len(names)} events: two at least are needed", tables=dry)
    kept = [name for name, keep in zip(names, wet.tolist(), strict=True) if keep]
    flood, figures = counts[wet, -1].sum(axis=1), flood_iou(counts[wet])
    order = np.argsort(figures, kind="stable").tolist()
    rows: list[tuple[Cell, ...]] = [
        (kept[n], chips[kept[n]], int(flood[n]), 100 * float(flood[n] / flood.sum()), float(figures[n])) for n in order
    ]
    large = flood >= asked["min_flood_pixels"]
    missed = large & (figures < asked["zero_iou"])
    share = float(missed.sum() / large.sum()) if large.any() else None
    ok = share is not None and share <= asked["max_share_of_zero_iou_events"]
    answer = partial(
        _answer,
        values=[
            *_values(table, counts, figures, flood),
            Value(
                "share of events in which almost no flood is found",
                share,
                n_events=int(large.sum()),
                threshold=f"at most {asked['max_share_of_zero_iou_events']:g} of the events with "
                f"{asked['min_flood_pixels']} pixels of flood or more have an IoU below {asked['zero_iou']:g}",
                ok=ok if large.any() else None,
            ),
        ],
        tables=[
            Table("All events with flood, from the worst up", _COLUMNS, rows),
            *dry,
        ],
        plots=[_forest(table.counts, event_of, [kept[n] for n in order], figures[order])],
        evidence=[table_file(table)],
    )
    if not large.any():
        return answer("skip", f"no event has {asked['min_flood_pixels']} pixels of flood or more")
    if ok:
        return answer("pass")
    lost = ", ".join(kept[n] for n in order if missed[n])
    return answer("fail", f"almost no flood is found in {int(missed.sum())} of {int(large.sum())} events: {lost}")


def _values(
    table: ChipTable, counts: Counts, figures: npt.NDArray[np.float64], flood: npt.NDArray[np.int64]
) -> list[Value]:
    value = partial(Value, n_chips=len(table), n_events=len(figures))
    return [
        Value("events with flood", len(figures)),
        Value("events without flood", len(counts) - len(figures)),
        Value("flood IoU, pooled", float(flood_iou(counts.sum(axis=0))), n_chips=len(table), n_events=len(counts)),
        value("flood IoU, mean over events with flood", float(figures.mean())),
        value("flood IoU, median over events with flood", float(np.median(figures))),
        value("flood IoU, worst event", float(figures.min())),
        value("share of all flood pixels in the largest event", 100 * float(flood.max() / flood.sum()), "%"),
    ]


def _dry_events(chips: dict[str, int], names: list[str], counts: Counts, wet: npt.NDArray[np.bool_]) -> list[Table]:
    """Flood IoU would be 0 or undefined there, and says nothing: what counts is how much is called flood."""
    rows: list[tuple[Cell, ...]] = []
    for name, matrix in zip(np.array(names)[~wet].tolist(), counts[~wet], strict=True):
        pixels, alarms = int(matrix.sum()), int(matrix[:, -1].sum())
        rows.append((name, chips[name], pixels, alarms, 100 * alarms / pixels if pixels else None))
    columns = ("event", "chips", "pixels", "called flood", "false alarms in %")
    return [Table("Events without flood", columns, rows)] if rows else []


def _forest(counts: Counts, event_of: npt.NDArray[np.str_], names: list[str], figures: npt.NDArray[np.float64]) -> Plot:
    shown = names[:_DRAWN]
    ends = [_spread(counts[event_of == name], float(figures[n])) for n, name in enumerate(shown)]
    series = {
        "label": "flood IoU",
        "x": figures[: len(shown)].tolist(),
        "y": shown,
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
    }
    which = f"the {len(shown)} worst of {len(names)} events" if len(shown) < len(names) else f"{len(names)} events"
    return Plot(
        "events",
        "forest",
        "Flood IoU by event",
        "flood IoU",
        "event",
        [series],
        f"Flood IoU of {which}, from the worst up. Bars: 90 % by the jackknife over an event's chips, a guide only: "
        "neighbouring chips are alike.",
    )


def _spread(counts: Counts, figure: float) -> tuple[float, float]:
    """A bar for one event, from those of its chips that flood IoU is made of; none where there is but one."""
    informative = counts[~np.isnan(flood_iou(counts))]
    if len(informative) < 2:
        return figure, figure
    interval = event_jackknife(informative, flood_iou, level=0.90)
    return max(0.0, interval.low), min(1.0, interval.high)
