"""Comparisons with a reference: over all pixels, event by event, over seeds, and with its published figures.

The primary score is the IoU of the positive class over all pixels of the split ("pooled").
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from floodrepro import recipe as recipes
from floodrepro.errors import TableError
from floodrepro.evaluation import intervals
from floodrepro.evaluation.chip_table import ChipTable, on_common_chips, refuse_to_compare
from floodrepro.evaluation.metrics import Counts, iou, mean_iou, pool_by_event
from floodrepro.verification.check import Cell, Check, Evidence, Table, Unanswered, Value, check, judge, number, points
from floodrepro.verification.checks.scores import ROWS, terratorch_scores


@check
def parity(evidence: Evidence) -> Check:
    """The pooled score against the reference's: two one-sided tests over events (`evaluation.intervals.jackknife`)."""
    k, name = evidence.positive, evidence.iou_name
    pair = _pair(evidence)
    ours, theirs = pair.ours, pair.theirs
    if not (ours[..., k].any() or theirs[..., k].any()):
        raise Unanswered("fail", f"neither the run nor the reference ever predicts {evidence.class_name}")
    if (having := int((ours[:, k].sum(axis=1) > 0).sum())) < 2:
        raise Unanswered("skip", f"{evidence.class_name} in {having} of {len(ours)} events, two are needed")
    try:
        primary = intervals.jackknife(ours, partial(iou, k=k), other=theirs, positive=k)
        printed = intervals.jackknife(ours, mean_iou, other=theirs, positive=k)
    except ValueError as error:
        raise Unanswered("skip", str(error)) from error
    notes, enough = list(pair.notes), evidence.criteria["parity"]["enough_events"]
    if len(ours) < enough:
        notes.append(f"{len(ours)} events are few: with fewer than {enough} the interval is rough.")
    without = iou(ours.sum(axis=0) - ours, k) - iou(theirs.sum(axis=0) - theirs, k)
    mover = int(np.argmax(np.abs(without - primary.estimate)))
    notes += [
        f"Without {pair.events[mover]}, the event that moves it most, the difference is "
        f"{points(100 * without[mover])} pp.",
        "The interval holds for these two sets of weights and for events like these, if the difference is spread over "
        "events. A kind of event that is missing here can hide any difference.",
    ]
    values = [
        Value(f"{name}, this run", float(iou(ours.sum(axis=0), k)), n_chips=pair.chips),
        Value(f"{name}, the reference", float(iou(theirs.sum(axis=0), k)), n_chips=pair.chips),
        _difference(evidence, f"{name}, pooled", primary, pair.chips),
        _difference(evidence, "mIoU, pooled (printed, not tested)", printed, pair.chips),
    ]
    return _decide(evidence, primary, "events", values=values, notes=notes)


@check
def head_to_head(evidence: Evidence) -> Check:
    """The mean of the events' own differences to the reference, each event once, with a paired t interval."""
    k, name, least = evidence.positive, evidence.iou_name, intervals.MIN_FLOOD_PIXELS
    pair = _pair(evidence)
    try:
        mean = intervals.mean_over_events(pair.ours, other=pair.theirs, positive=k)
    except ValueError as error:
        raise Unanswered("skip", str(error)) from error
    pixels = pair.ours[:, k].sum(axis=1)
    mine, other = iou(pair.ours, k), iou(pair.theirs, k)
    kept = np.flatnonzero(pixels >= least)
    gaps = (mine - other)[kept]
    rows = [
        [pair.events[n], int(pixels[n]), float(mine[n]), float(other[n]), 100 * float(mine[n] - other[n])]
        for n in kept[np.argsort(gaps, kind="stable")][:ROWS].tolist()
    ]
    columns = ["event", f"{evidence.class_name} pixels", name, f"{name}, reference", "difference in pp"]
    won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    values = [
        _difference(evidence, f"{name}, mean over events", mean, pair.chips),
        Value("events won, tied, lost", f"{won}, {len(gaps) - won - lost}, {lost}", n_events=len(gaps)),
    ]
    return _decide(
        evidence,
        mean,
        "events",
        f"; {won} events won, {lost} lost",
        values=values,
        tables=[Table("Events, the largest loss first", columns, rows)],
        notes=[*pair.notes, f"Events with fewer than {least} pixels of it in the truth are left out."],
    )


@check
def variance(evidence: Evidence) -> Check:
    """All runs that were declared together, their spread, and their mean against the reference."""
    runs, least, name = evidence.seeds, evidence.criteria["variance"]["min_seeds"], evidence.iou_name
    if len(runs) < 2:
        raise evidence.without("seeds", "one run: its spread over seeds is unknown")
    figures = [float(iou(run.table.counts.sum(axis=0), evidence.positive)) if run.table else np.nan for run in runs]
    listed: list[list[Cell]] = [
        [run.run, run.seed, run.status, figure] for run, figure in zip(runs, figures, strict=True)
    ]
    parts: dict[str, Any] = {"tables": [Table("All declared runs", ["run", "seed", "status", name], listed)]}
    if problem := _not_independent(evidence):
        return Check("fail", problem, **parts)
    if np.isnan(figures).any():
        return Check("skip", f"{name} is undefined in a run", **parts)
    deviation = 100 * float(np.std(figures, ddof=1))
    values = [
        Value(f"{name}, mean over seeds", float(np.mean(figures))),
        Value("standard deviation over seeds", deviation, "pp"),
    ]
    spread = f"{len(runs)} seeds, standard deviation {deviation:.1f} pp"
    if len(runs) < least:
        return Check("skip", f"{spread}; at least {least} seeds are needed", values, **parts)
    if evidence.reference is None:
        return Check("pass", f"{spread}; there is no reference to compare their mean with", values, **parts)
    pairs = [_on_common_chips(run.table, evidence.reference) for run in runs if run.table]
    ours = [float(iou(one.counts.sum(axis=0), evidence.positive)) for one, _, _ in pairs]
    result = intervals.over_seeds(ours, float(iou(pairs[0][1].counts.sum(axis=0), evidence.positive)))
    values.append(_difference(evidence, f"{name}, mean over {len(runs)} seeds", result))
    note = "Over seeds, chips and the reference's score are taken as they are: for events see the check of parity."
    return _decide(evidence, result, "seeds", values=values, notes=[note], **parts)


@check
def reference(evidence: Evidence) -> Check:
    """A reference whose sha256 is known, measured here, against its published figures on the published chips.

    It shows data version, normalisation and label map to be the published ones, from end to end.
    """
    table = evidence.reference
    if table is None:
        raise evidence.without("reference", "no reference was given")
    known = {entry["sha256"]: entry for entry in evidence.published.values() if "sha256" in entry}
    entry = known.get(_sha256(table))
    if entry is None:
        raise Unanswered("skip", "no figures of this reference are published that floodrepro knows")
    here = (len(table), table.metadata.get("split"), table.metadata.get("protocol"))
    there = (entry["chips"], entry["split"], entry["protocol"])
    if here != there:
        published, found = ("{:,} chips of {} ({})".format(*one) for one in (there, here))
        raise Unanswered("skip", f"published on {published}, here: {found}")
    scores, digits = terratorch_scores(table), entry["decimals"]
    values = []
    for metric, figure in entry["figures"].items():
        low, high = (round(figure + sign * 0.5 * 10.0**-digits, digits + 1) for sign in (-1, 1))
        values.append(Value(metric, scores.get(metric), n_chips=len(table), at_least=low, at_most=high))
    found = f"{len(values)} figures of {entry['name']} to {digits} decimals"
    return judge(values, found, notes=[f"Published: {entry['source']}."])


class _Pair(NamedTuple):
    events: list[str]
    ours: Counts  # by event
    theirs: Counts
    chips: int
    notes: list[str]


def _pair(evidence: Evidence) -> _Pair:
    """Both tables on common chips, by event.

    Raises:
        Unanswered: Something is missing, a skip; or the reference is of other chips or another protocol, a failure.
    """
    table, other = evidence.usable_table(), evidence.reference
    if other is None:
        raise evidence.without("reference", "no reference was given")
    ours, theirs, left_out = _on_common_chips(table, other)
    if _same_model(table, other):
        raise Unanswered("skip", "the reference is this very model: a comparison with itself shows nothing")
    notes = [f"{left_out} chips that one of the two did not see in full are left out."] if left_out else []
    events, counts = pool_by_event(ours.counts, ours.events)
    return _Pair(events, counts, pool_by_event(theirs.counts, theirs.events)[1], len(ours), notes)


def _on_common_chips(table: ChipTable, other: ChipTable) -> tuple[ChipTable, ChipTable, int]:
    """Both tables on the chips that both have seen in full, and how many chips were left out."""
    try:
        ours, theirs, left_out = on_common_chips(table, other)
    except TableError as error:
        raise Unanswered("skip", error.what) from error
    if reason := refuse_to_compare(ours, theirs):
        raise Unanswered("fail", f"wrong reference: {reason}")
    return ours, theirs, left_out


def _decide(evidence: Evidence, result: intervals.Result, counted: str, more: str = "", **parts: Any) -> Check:
    """The answer that a difference to the reference gives."""
    margin, level = (evidence.criteria["parity"][key] for key in ("margin_pp", "level"))
    tests = (margin / 100, (1 - level) / 2)
    word = result.verdict(*tests)
    low, high = (points(100 * end, margin) for end in result.interval(level))
    few = counted == "events" and result.n < evidence.criteria["parity"]["enough_events"]
    basis = f"{'rough: ' if few else ''}{result.n} {counted}"
    gap = f"{points(100 * result.estimate, margin)} pp ({100 * level:g} % CI {low} to {high}, {basis})"
    if word == "equivalent":
        return Check("pass", f"{gap}, within ±{margin:g} pp{more}", outcome="equivalent", **parts)
    if word == "different" and result.estimate > 0:
        return Check("pass", gap + more, outcome="different (better)", **parts)
    if word == "different":
        return Check("fail", gap + more, outcome="different (worse)", **parts)
    needed = result.needed(*tests)
    how_many = f"about {number(needed)} {counted} like these" if needed else f"no number of {counted}"
    finding = f"{gap}, margin ±{margin:g} pp; {how_many} would decide{more}"
    return Check("undecided", finding, outcome="undecided", **parts)


def _difference(evidence: Evidence, name: str, result: intervals.Result, chips: int | None = None) -> Value:
    level = evidence.criteria["parity"]["level"]
    low, high = result.interval(level)
    events = result.n if chips else None  # else seeds
    return Value(f"difference in {name}", 100 * result.estimate, "pp", 100 * low, 100 * high, level, chips, events)


def _not_independent(evidence: Evidence) -> str:
    """Which declared runs have no result, are copies, are of other chips, or have another recipe than was declared."""
    if dropped := [f"{run.run} ({run.status})" for run in evidence.seeds if run.table is None]:
        return f"declared, but without a chip table: {', '.join(dropped)}"
    tables = {run.run: run.table for run in evidence.seeds if run.table is not None}
    named = tables | ({"the reference": evidence.reference} if evidence.reference else {})
    for one, other in itertools.combinations(named, 2):
        if _same_model(named[one], named[other]):
            return f"{other} is a copy of {one}"
        if other in tables and (reason := refuse_to_compare(tables[one], tables[other])):
            return f"{one} and {other} do not compare: {reason}"
    wrong = []
    for run, table in zip(evidence.seeds, tables.values(), strict=True):
        expected = recipes.fingerprint({**evidence.recipe, "seed_everything": run.seed})
        changed = table.metadata.get("recipe_changes")  # a table made with overrides does not name its run's recipe
        if not changed and table.metadata.get("recipe_sha256", expected) != expected:
            wrong.append(run.run)
    return f"not this recipe with the declared seed: {', '.join(wrong)}" if wrong else ""


def _same_model(table: ChipTable, other: ChipTable) -> bool:
    """Whether two tables are of the same weights, by their hash or because they predict every chip alike."""
    if _sha256(table) and _sha256(table) == _sha256(other):
        return True
    one, another = table.histogram, other.histogram
    alike = one is another if one is None or another is None else np.array_equal(one, another)
    return alike and np.array_equal(table.counts, other.counts)


def _sha256(table: ChipTable) -> Any:
    return (table.metadata.get("checkpoint") or {}).get("sha256")
