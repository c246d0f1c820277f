"""Is the run equivalent to its reference, over flood events like these? Flood IoU first, then mIoU."""

from functools import partial

import numpy as np

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import Counts
from floodrepro.evaluation.resampling import (
    Interval,
    Statistic,
    event_bootstrap,
    leave_one_event_out,
    pool_by_event,
)
from floodrepro.evaluation.statistics import Equivalence, equivalence_over_events
from floodrepro.verification.check import Check, Evidence, Value
from floodrepro.verification.comparison import ENDPOINTS, has_flood, in_words, no_pair, table_file

ID = "parity"
_CLAIM = "Flood IoU and mIoU are both equivalent to the reference's within the margin, over events like these."
_answer = partial(Check, ID, "Parity with the reference", _CLAIM)


def check(evidence: Evidence) -> Check:
    """Two one-sided tests over events for both endpoints; the bootstrap over events beside them.

    The reason is filled in for a pass as well: it is the verdict in words.
    """
    if refusal := no_pair(evidence):
        return _answer(*refusal)
    assert evidence.table is not None and evidence.reference is not None  # no_pair
    table, asked = evidence.table, evidence.thresholds[ID]
    names, ours = pool_by_event(table.counts, table.events)
    _, theirs = pool_by_event(evidence.reference.counts, evidence.reference.events)
    if len(names) < 2:
        return _answer("skip", f"one event only ({names[0]}): no interval over events can be made")
    if int(has_flood(ours).sum()) < 2:
        return _answer("skip", f"flood in {int(has_flood(ours).sum())} of {len(names)} events: two at least are needed")
    if not (ours[..., -1].any() or theirs[..., -1].any()):
        return _answer("fail", "neither the run nor the reference ever predicts flood: that they agree shows nothing")
    margin, alpha = asked["margin_pp"] / 100, (1 - asked["level"]) / 2
    try:
        results = {
            name: equivalence_over_events(ours, theirs, statistic, margin=margin, alpha=alpha, n_chips=len(table))
            for name, statistic in ENDPOINTS.items()
        }
    except ValueError as error:
        return _answer("skip", str(error))
    values = [
        value
        for name, statistic in ENDPOINTS.items()
        for value in _values(name, statistic, results[name], (names, ours, theirs), len(table))
    ]
    behind = f"{len(names)} events"
    return _answer(
        "pass" if all(result.equivalent for result in results.values()) else "fail",
        "; ".join(f"{name} is {in_words(result, behind)}" for name, result in results.items()),
        values=values,
        notes=_notes(table, names, ours, asked["enough_events"]),
        evidence=[table_file(table)],
    )


def _values(
    name: str, statistic: Statistic, result: Equivalence, paired: tuple[list[str], Counts, Counts], chips: int
) -> list[Value]:
    events, ours, theirs = paired
    margin = f"{100 * result.margin:g} pp"
    figures = [float(statistic(counts.sum(axis=0))) for counts in (ours, theirs)]
    without = leave_one_event_out(ours, statistic, other=theirs)
    mover = int(np.argmax(np.abs(without - result.difference)))
    value = partial(Value, n_chips=chips, n_events=len(events))
    return [
        value(name, figures[0]),
        value(f"{name}, reference", figures[1]),
        _difference(name, result.interval, f"interval within ±{margin}", result.equivalent),
        value(
            f"{name}, p of a difference of {margin} or more", result.p_value, method="the larger of two one-sided tests"
        ),
        _bootstrap(name, statistic, ours, theirs, result, chips),
        Value(
            f"{name}, difference without {events[mover]}, the event that moves it most",
            100 * float(without[mover]),
            "pp",
            *(100 * float(without.min()), 100 * float(without.max())),
            method="range over leaving out each event once",
            n_events=len(events) - 1,
        ),
    ]


def _bootstrap(name: str, statistic: Statistic, ours: Counts, theirs: Counts, result: Equivalence, chips: int) -> Value:
    """The second opinion; the figure may be undefined in too many resamples where few events have flood."""
    try:
        interval = event_bootstrap(ours, statistic, other=theirs, level=result.interval.level, n_chips=chips)
    except ValueError as error:
        return Value(
            f"{name}, by bootstrap, difference to the reference", None, "pp", method=f"event bootstrap: {error}"
        )
    return _difference(f"{name}, by bootstrap", interval)


def _difference(name: str, interval: Interval, threshold: str = "", ok: bool | None = None) -> Value:
    return Value(
        f"{name}, difference to the reference",
        100 * interval.estimate,
        "pp",
        100 * interval.low,
        100 * interval.high,
        interval.level,
        interval.method,
        interval.n_chips,
        interval.n_events,
        threshold,
        ok,
    )


def _notes(table: ChipTable, names: list[str], ours: Counts, enough: int) -> list[str]:
    notes = ["The interval speaks of these two sets of weights on events like these, not of another training."]
    if len(names) < enough:
        notes.append(
            f"{len(names)} events, fewer than {enough}: the interval is approximate; docs/statistics.md has its "
            "coverage in simulations."
        )
    if dry := len(names) - int(has_flood(ours).sum()):
        notes.append(f"Events without flood in their truth, which add false alarms only: {dry} of {len(names)}.")
    if ignored := int((table.counts.sum(axis=(1, 2)) == 0).sum()):
        notes.append(f"Chips without a counted pixel: {ignored} of {len(table)}.")
    return notes
