"""Comparisons with a reference: over all pixels, event by event, over seeds, and with its published figures.

The primary score is the IoU of the positive class over all pixels of the split ("pooled").
"""

import itertools
from functools import partial
from typing import Any

import numpy as np

from floodrepro import recipe as recipes
from floodrepro.evaluation import intervals
from floodrepro.evaluation.chip_table import ChipTable, on_common_chips, refuse_to_compare
from floodrepro.evaluation.metrics import iou, mean_iou, pool_by_event
from floodrepro.verification.check import (
    Cell,
    Check,
    Evidence,
    Outcome,
    SeedRun,
    Status,
    Table,
    Value,
    finite,
    judge,
    number,
    points,
)
from floodrepro.verification.checks.scores import ROWS, table_file, terratorch_scores, usable_table


def parity(evidence: Evidence) -> Check:
    """The pooled score against the reference's: two one-sided tests over events (`evaluation.intervals.jackknife`)."""
    asked, k, name = evidence.thresholds["parity"], evidence.positive, evidence.iou_name
    claim = f"{name} over all pixels is equivalent to the reference's within ±{asked['margin_pp']:g} pp, or better."
    answer = partial(Check, "parity", "Equal to the reference", claim)
    table, reference, notes = _pair(evidence)
    if not isinstance(table, ChipTable):
        return answer(*table)
    events, ours = pool_by_event(table.counts, table.events)
    _, theirs = pool_by_event(reference.counts, reference.events)
    if not (ours[..., k].any() or theirs[..., k].any()):
        return answer("fail", f"neither the run nor the reference ever predicts {evidence.class_name}")
    if (having := int((ours[:, k].sum(axis=1) > 0).sum())) < 2:
        return answer("skip", f"{evidence.class_name} in {having} of {len(events)} events, two are needed")
    try:
        primary = intervals.jackknife(ours, partial(iou, k=k), other=theirs, positive=k)
        printed = intervals.jackknife(ours, mean_iou, other=theirs, positive=k)
    except ValueError as error:
        return answer("skip", str(error))
    status, outcome, finding = _decide(evidence, primary, "events")
    if len(events) < asked["enough_events"]:
        notes.append(f"{len(events)} events are few: with fewer than {asked['enough_events']} the interval is rough.")
    shares = [float(iou(counts.sum(axis=0), k)) for counts in (ours, theirs)]
    without = iou(ours.sum(axis=0) - ours, k) - iou(theirs.sum(axis=0) - theirs, k)
    mover = int(np.argmax(np.abs(without - primary.estimate)))
    notes += [
        f"Without {events[mover]}, the event that moves it most, the difference is {points(100 * without[mover])} pp.",
        "The interval holds for these two sets of weights and for events like these, if the difference is spread over "
        "events. A kind of event that is missing here can hide any difference.",
    ]
    return answer(
        status,
        finding,
        outcome=outcome,
        values=[
            Value(f"{name}, this run", shares[0], n_chips=len(table), n_events=len(events)),
            Value(f"{name}, the reference", shares[1], n_chips=len(table), n_events=len(events)),
            _difference(evidence, f"{name}, pooled", primary, len(table)),
            _difference(evidence, "mIoU, pooled (printed, not tested)", printed, len(table)),
        ],
        notes=notes,
        evidence=[table_file(table)],
    )


def head_to_head(evidence: Evidence) -> Check:
    """The mean of the events' own differences to the reference, each event once, with a paired t interval."""
    asked, k, name = evidence.thresholds["parity"], evidence.positive, evidence.iou_name
    claim = (
        f"The mean over events of {name} is equivalent to the reference's within ±{asked['margin_pp']:g} pp, or better."
    )
    answer = partial(Check, "head_to_head", "Events won and lost", claim)
    table, reference, notes = _pair(evidence)
    if not isinstance(table, ChipTable):
        return answer(*table)
    events, ours = pool_by_event(table.counts, table.events)
    _, theirs = pool_by_event(reference.counts, reference.events)
    try:
        mean = intervals.mean_over_events(ours, other=theirs, positive=k)
    except ValueError as error:
        return answer("skip", str(error))
    status, outcome, finding = _decide(evidence, mean, "events")
    kept = ours[:, k].sum(axis=1) >= intervals.MIN_FLOOD_PIXELS
    mine, other = iou(ours[kept], k), iou(theirs[kept], k)
    gaps = mine - other
    names = np.array(events)[kept]
    columns = ["event", f"{evidence.class_name} pixels", name, f"{name}, reference", "difference in pp"]
    rows: list[list[Cell]] = [
        [str(names[n]), int(ours[kept][n, k].sum()), float(mine[n]), float(other[n]), 100 * float(gaps[n])]
        for n in np.argsort(gaps, kind="stable")[:ROWS].tolist()
    ]
    won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    return answer(
        status,
        f"{finding}; {won} events won, {lost} lost",
        outcome=outcome,
        values=[
            _difference(evidence, f"{name}, mean over events", mean, len(table)),
            Value("events won, tied, lost", f"{won}, {len(gaps) - won - lost}, {lost}", n_events=len(gaps)),
        ],
        tables=[Table("Events, the largest loss first", columns, rows)],
        notes=[*notes, f"Events with fewer than {intervals.MIN_FLOOD_PIXELS} pixels of it in the truth are left out."],
        evidence=[table_file(table)],
    )


def variance(evidence: Evidence) -> Check:
    """All runs that were declared together, their spread, and their mean against the reference."""
    runs, asked, k, name = evidence.seeds, evidence.thresholds["variance"], evidence.positive, evidence.iou_name
    claim = (
        "Every declared run is reported and is a training of its own, and their mean is equivalent to the reference's "
        f"score within ±{evidence.thresholds['parity']['margin_pp']:g} pp, or better."
    )
    answer = partial(Check, "variance", "Spread over seeds", claim)
    if len(runs) < 2:
        return answer(*evidence.absent("seeds", "one run: its spread over seeds is unknown"))
    figures = [None if run.table is None else finite(float(iou(run.table.counts.sum(axis=0), k))) for run in runs]
    listed = [[run.run, run.seed, run.status, figure] for run, figure in zip(runs, figures, strict=True)]
    answer = partial(answer, tables=[Table("All declared runs", ["run", "seed", "status", name], listed)])
    if dropped := [f"{run.run} ({run.status})" for run in runs if run.table is None]:
        return answer("fail", f"declared, but without a chip table: {', '.join(dropped)}")
    if problem := _not_independent(evidence):
        return answer("fail", problem)
    known = [figure for figure in figures if figure is not None]
    if len(known) < len(runs):
        return answer("skip", f"{name} is undefined in a run")
    mean, deviation = float(np.mean(known)), 100 * float(np.std(known, ddof=1))
    values = [Value(f"{name}, mean over seeds", mean), Value("standard deviation over seeds", deviation, "pp")]
    spread = f"{len(runs)} seeds, standard deviation {deviation:.1f} pp"
    if len(runs) < asked["min_seeds"]:
        return answer("skip", f"{spread}; at least {asked['min_seeds']} seeds are needed", values=values)
    if evidence.reference is None:
        return answer("pass", f"{spread}; there is no reference to compare their mean with", values=values)
    result = intervals.over_seeds(known, float(iou(evidence.reference.counts.sum(axis=0), k)))
    status, outcome, finding = _decide(evidence, result, "seeds")
    difference = _difference(evidence, f"{name}, mean over {len(runs)} seeds", result, None)
    note = "Over seeds, chips and the reference's score are taken as they are: for events see the check of parity."
    return answer(status, finding, outcome=outcome, values=[*values, difference], notes=[note])


def reference(evidence: Evidence) -> Check:
    """A reference whose sha256 is known, measured here, against its published figures on the published chips.

    It shows data version, normalisation and label map to be the published ones, from end to end.
    """
    claim = "A reference with published figures reproduces them here, on the published chips, within their rounding."
    answer = partial(Check, "reference", "Published figures reproduced", claim)
    table = evidence.reference
    if table is None:
        return answer("skip", evidence.missing.get("reference", "no reference was given"))
    entry = next((one for one in evidence.published.values() if one.get("sha256") == _sha256(table)), None)
    if entry is None or not _sha256(table):
        return answer("skip", "no figures of this reference are published that floodrepro knows")
    split, protocol = table.metadata.get("split"), table.metadata.get("protocol")
    if (protocol, split, len(table)) != (entry["protocol"], entry["split"], entry["chips"]):
        here = f"{len(table):,} chips of {split} ({protocol})"
        return answer(
            "skip", f"published on {entry['chips']:,} chips of {entry['split']} ({entry['protocol']}), here: {here}"
        )
    found, unit = terratorch_scores(table), 10.0 ** -entry["decimals"]
    values = [
        Value(
            metric,
            found.get(metric),
            at_least=round(figure - unit / 2, entry["decimals"] + 1),
            at_most=round(figure + unit / 2, entry["decimals"] + 1),
            n_chips=len(table),
        )
        for metric, figure in entry["figures"].items()
    ]
    status, finding = judge(values, f"{len(values)} figures of {entry['name']} to {entry['decimals']} decimals")
    return answer(status, finding, values=values, notes=[f"Published: {entry['source']}."])


def same_model(table: ChipTable, other: ChipTable) -> bool:
    """Whether two tables are of the same weights, by their hash or because they predict every chip alike."""
    if _sha256(table) and _sha256(table) == _sha256(other):
        return True
    alike = np.array_equal(table.counts, other.counts)
    if table.histogram is None or other.histogram is None:
        return alike and table.histogram is other.histogram
    return alike and np.array_equal(table.histogram, other.histogram)


def _pair(evidence: Evidence) -> tuple[Any, Any, list[str]]:
    """Both tables on common chips and notes; in place of the first, status and finding where they do not compare.

    A reference that is missing is a skip. One of other chips or another protocol was given by mistake: a failure.
    """
    table, other = usable_table(evidence), evidence.reference
    if not isinstance(table, ChipTable):
        return table, None, []
    if other is None:
        return ("skip", evidence.missing.get("reference", "no reference was given")), None, []
    ours, theirs, left_out = on_common_chips(table, other)
    if reason := refuse_to_compare(ours, theirs):
        return ("fail", f"wrong reference: {reason}"), None, []
    if same_model(table, other):
        return ("skip", "the reference is this very model: a comparison with itself shows nothing"), None, []
    notes = [f"{left_out} chips that one of the two did not see in full are left out."] if left_out else []
    return ours, theirs, notes


def _decide(evidence: Evidence, result: intervals.Result, counted: str) -> tuple[Status, Outcome, str]:
    """Status, outcome and finding of a difference to the reference."""
    asked = evidence.thresholds["parity"]
    margin, level = asked["margin_pp"], asked["level"]
    word = result.verdict(margin / 100, (1 - level) / 2)
    low, high = (points(100 * end, margin) for end in result.interval(level))
    gap = f"{points(100 * result.estimate, margin)} pp ({100 * level:g} % CI {low} to {high}, {result.n} {counted})"
    if word == "equivalent":
        return "pass", "equivalent", f"{gap}, within ±{margin:g} pp"
    if word == "different":
        better = result.estimate > 0
        return ("pass", "different (better)", gap) if better else ("fail", "different (worse)", gap)
    needed = result.needed(margin / 100, (1 - level) / 2)
    more = (
        f"about {number(needed)} {counted} like these would decide"
        if needed
        else f"no number of {counted} would decide"
    )
    return "undecided", "undecided", f"{gap}, margin ±{margin:g} pp; {more}"


def _difference(evidence: Evidence, name: str, result: intervals.Result, chips: int | None) -> Value:
    level = evidence.thresholds["parity"]["level"]
    low, high = result.interval(level)
    events = result.n if chips is not None else None
    return Value(name, 100 * result.estimate, "pp", 100 * low, 100 * high, level, chips, events)


def _not_independent(evidence: Evidence) -> str:
    """Which declared runs are copies, are of other chips, or have another recipe or seed than was declared."""
    tables = [(run.run, run.table) for run in evidence.seeds if run.table is not None]
    if evidence.reference is not None:
        tables.append(("the reference", evidence.reference))
    for (one, table), (other, another) in itertools.combinations(tables, 2):
        if reason := refuse_to_compare(table, another):
            return f"{one} and {other} do not compare: {reason}"
        if same_model(table, another):
            return f"{other} is a copy of {one}"
    wrong = [run.run for run in evidence.seeds if not _as_declared(evidence, run)]
    return f"not this recipe with the declared seed: {', '.join(wrong)}" if wrong else ""


def _as_declared(evidence: Evidence, run: SeedRun) -> bool:
    """Whether a run has this run's recipe with its own seed; a table made with overrides does not name its recipe."""
    if run.run == evidence.run.path.name and evidence.record.get("seed", run.seed) != run.seed:
        return False
    metadata = run.table.metadata if run.table else {}
    expected = recipes.fingerprint({**evidence.recipe, "seed_everything": run.seed})
    return bool(metadata.get("recipe_changes")) or metadata.get("recipe_sha256", expected) == expected


def _sha256(table: ChipTable) -> Any:
    return (table.metadata.get("checkpoint") or {}).get("sha256")
