"""The scores, first the positive class's IoU over all pixels ("pooled"): compared, by event, calibrated, recomputed."""

import itertools
from typing import Any

import numpy as np

from floodrepro import recipe as recipes
from floodrepro.evaluation import intervals, metrics
from floodrepro.evaluation.chip_table import ChipTable, refuse_to_compare
from floodrepro.evaluation.metrics import Counts, iou, pool_by_event
from floodrepro.verification.checks import CRITERIA, Check, Evidence, Unanswered, figure, judge, number

_ROWS = 40  # events that one plot or table shows
_LIKELY = 0.1  # probability from which on the calibration is looked at by itself


def parity(evidence: Evidence) -> Check:
    """The pooled score against the reference's: two one-sided tests over events (`evaluation.intervals.jackknife`)."""
    k = evidence.positive
    ours, theirs, chips, notes = _pair(evidence)
    if not (ours[..., k].any() or theirs[..., k].any()):
        raise Unanswered("fail", f"neither the run nor the reference ever predicts {evidence.class_name}")
    if (having := int((ours[:, k].sum(axis=1) > 0).sum())) < 2:  # with two, both figures are defined without either
        raise Unanswered("skip", f"{evidence.class_name} in {having} of {len(ours)} events, two are needed")
    primary = intervals.jackknife(ours, lambda counts: iou(counts, k), other=theirs, positive=k)
    printed = intervals.jackknife(ours, metrics.mean_iou, other=theirs, positive=k)
    labels = {f"{evidence.iou_name}, pooled": primary, "mIoU, pooled (printed, not tested)": printed}
    values = [_difference(label, result, chips) for label, result in labels.items()]
    notes.append("The interval holds for these weights and events like these, and says nothing of missing kinds.")
    return _decide(primary, "events", values=values, notes=notes)


def head_to_head(evidence: Evidence) -> Check:
    """The mean of the events' own differences to the reference, each event once, with a paired t interval."""
    k, least = evidence.positive, metrics.MIN_FLOOD_PIXELS
    ours, theirs, chips, notes = _pair(evidence)
    gaps = (iou(ours, k) - iou(theirs, k))[ours[:, k].sum(axis=1) >= least]
    if len(gaps) < 2:
        raise Unanswered("skip", f"{len(gaps)} events have {least} pixels of {evidence.class_name}, two are needed")
    mean = intervals.mean_over_events(ours, other=theirs, positive=k)
    notes.append(f"Events with fewer than {least} pixels of {evidence.class_name} in the truth are left out.")
    values = [_difference(f"{evidence.iou_name}, mean over events", mean, chips)]
    more = f"; {(gaps > 0).sum()} of {len(gaps)} events won, {(gaps < 0).sum()} lost"
    return _decide(mean, "events", more, values=values, notes=notes)


def variance(evidence: Evidence) -> Check:
    """All runs that were declared together, their spread, and their mean against the reference."""
    runs = evidence.need("seeds", "one run: its spread over seeds is unknown", 2)
    k, name, least = evidence.positive, evidence.iou_name, CRITERIA["variance"]["min_seeds"]
    tables = _tables_of_seeds(evidence)
    figures = [float(iou(table.counts.sum(axis=0), k)) for table in tables]
    if np.isnan(figures).any():
        raise Unanswered("skip", f"{name} is undefined in a run")
    rows = [[run.run, run.seed, run.status, one] for run, one in zip(runs, figures, strict=True)]
    shown = {"title": "All declared runs", "columns": ["run", "seed", "status", name], "rows": rows}
    mean, deviation = float(np.mean(figures)), 100 * float(np.std(figures, ddof=1))
    values = [figure(f"{name}, mean over seeds", mean), figure("standard deviation over seeds", deviation, "pp")]
    found, few = f"{len(runs)} seeds, standard deviation {deviation:.1f} pp", len(runs) < least
    if few or evidence.reference is None:
        skip = f"{found}; at least {least} seeds are needed" if few else ""
        return judge(values, f"{found}; there is no reference to compare their mean with", skip, tables=[shown])
    pairs = [_on_common_chips(table, evidence.reference) for table in tables]
    ours, theirs = ([float(iou(one.counts.sum(axis=0), k)) for one in each] for each in zip(*pairs, strict=True))
    result = intervals.over_seeds(ours, theirs[0])
    note = "Over seeds, chips and the reference's score are taken as they are: for events see the check of parity."
    values.append(_difference(f"{name}, mean over {len(runs)} seeds", result))
    return _decide(result, "seeds", values=values, tables=[shown], notes=[note])


def reference(evidence: Evidence) -> Check:
    """A reference whose sha256 is known, measured here, against its published figures on the published chips.

    It shows data version, normalisation and label map to be the published ones, from end to end.
    """
    table: ChipTable = evidence.need("reference", "no reference was given")
    known = {entry["sha256"]: entry for entry in evidence.published.values() if "sha256" in entry}
    entry = known.get(table.weights)
    if entry is None:
        raise Unanswered("skip", "no figures of this reference are published that floodrepro knows")
    here = f"{len(table):,} chips of {table.metadata.get('split')} ({table.metadata.get('protocol')})"
    there = f"{entry['chips']:,} chips of {entry['split']} ({entry['protocol']})"
    if here != there:
        raise Unanswered("skip", f"published on {there}, here: {here}")
    scores, digits, values = metrics.scores(table.counts.sum(axis=0)), entry["decimals"], []
    for metric, printed in entry["figures"].items():
        low, high = (round(printed + sign * 0.5 * 10.0**-digits, digits + 1) for sign in (-1, 1))
        values.append(figure(metric, scores.get(metric), n_chips=len(table), at_least=low, at_most=high))
    found = f"{len(values)} figures of {entry['name']} to {digits} decimals"
    return judge(values, found, notes=[f"Published: {entry['source']}."])


def events(evidence: Evidence) -> Check:
    """The score of each event's pooled counts; false alarms where an event has none of the class in its truth."""
    asked, k, name = CRITERIA["events"], evidence.positive, evidence.iou_name
    class_name, zero, table = evidence.class_name, asked["zero_iou"], evidence.usable_table()
    names, counts = pool_by_event(table.counts, table.events)
    pixels, figures = counts[:, k].sum(axis=1), iou(counts, k)
    large = np.flatnonzero(pixels >= metrics.MIN_FLOOD_PIXELS)
    if not len(large):
        raise Unanswered("skip", f"no event has {metrics.MIN_FLOOD_PIXELS} pixels of {class_name} or more")
    order = large[np.argsort(figures[large], kind="stable")].tolist()
    missed = [names[n] for n in order if figures[n] < zero]
    share, largest = len(missed) / len(large), 100 * float(pixels.max() / pixels.sum())
    named = f" ({', '.join(missed[:5])})" if missed else ""
    values = [
        figure(f"share of events with {name} below {zero:g}{named}", share, at_most=asked["max_zero_iou_share"]),
        figure(f"{name}, mean over events", float(figures[large].mean()), n_events=len(large)),
        figure(f"{name}, median over events", float(np.median(figures[large])), n_events=len(large)),
        figure(f"{name}, worst event", float(figures[order[0]])),
        figure(f"share of all {class_name} pixels in the largest event", largest, "%"),
    ]
    top, dry = order[:_ROWS], sorted(set(range(len(names))) - set(order))[:_ROWS]
    models = {"this run": figures}
    if evidence.reference is not None and not refuse_to_compare(table, evidence.reference):
        models["the reference"] = iou(pool_by_event(evidence.reference.counts, evidence.reference.events)[1], k)
    shown = [names[n] for n in top]
    series = [{"label": label, "x": each[top].round(6).tolist(), "y": shown} for label, each in models.items()]
    caption = f"{name} by event, the worst on top{f' ({_ROWS} shown)' if len(order) > _ROWS else ''}."
    plot = {"name": "events", "kind": "dots", "x_label": name, "series": series, "caption": caption}
    title = f"Events, the worst first; those with little or no {class_name} last"
    columns = ["event", "chips", f"{class_name} pixels", f"called {class_name}", *(f"{name}, {one}" for one in models)]
    about = (np.unique(table.events, return_counts=True)[1], pixels, counts[:, :, k].sum(axis=1), *models.values())
    rows = [[names[n], *(each[n].item() for each in about)] for n in [*top, *dry]]
    found = f"{figures[order[0]]:.2f} to {figures[order[-1]]:.2f} over {len(large)} events"
    return judge(values, found, tables=[{"title": title, "columns": columns, "rows": rows}], plots=[plot])


def calibration(evidence: Evidence) -> Check:
    """Probabilities of the class against its frequencies, its area, and collapse to one class."""
    asked, k, table = CRITERIA["calibration"], evidence.positive, evidence.usable_table()
    if table.histogram is None or table.confidence is None or table.squared_error is None:
        raise Unanswered("skip", "the chip table holds classes, and no probabilities")
    true, called = table.counts[:, k].sum(axis=1), table.counts[:, :, k].sum(axis=1)
    pixels = table.counts.sum(axis=(1, 2))
    if not true.any():
        raise Unanswered("skip", f"no chip has {evidence.class_name} in its truth")
    whole, likely = (metrics.calibration_error(table.histogram, table.confidence, start) for start in (0, _LIKELY))
    values = [figure("expected calibration error", whole, at_most=asked["ece"])]
    if likely not in (None, whole):  # else no probability is below it
        name = f"the same where the probability is {_LIKELY:g} or more"
        values.append(figure(name, likely, at_most=asked["ece_likely"]))
    (least, most), ratio = asked["area_ratio"], float(called.sum() / true.sum())
    values.append(figure("predicted over true area", ratio, at_least=least, at_most=most))
    one_class = ((called == 0) | (called == pixels))[(true > 0) & (true < pixels)]
    if len(one_class):
        name, share = "share of chips with both that are predicted as one class", asked["one_class_share"]
        values.append(figure(name, float(one_class.mean()), n_chips=len(one_class), at_most=share))
    values.append(figure("Brier score", float(table.squared_error.sum() / pixels.sum())))  # Brier 1950
    return judge(values, f"calibration error {number(whole)}, predicted over true area {number(ratio)}")


def identities(evidence: Evidence) -> Check:
    """TerraTorch's own metrics against the same figures from the chip table's counts, for run and reference."""
    tables = {"run": evidence.usable_table()} | ({"reference": evidence.reference} if evidence.reference else {})
    gaps = {}
    for name, table in tables.items():
        found, metrics_there = metrics.scores(table.counts.sum(axis=0)), table.metadata.get("metrics") or {}
        stored = {key.rsplit("/", 1)[-1]: value for key, value in metrics_there.items()}
        if both := found.keys() & stored.keys():
            gaps[name] = max(abs(float(stored[key]) - (found[key] or 0.0)) for key in both)
    most = CRITERIA["identities"]["difference"]
    values = [figure(f"{name}: largest difference of a metric", gap, at_most=most) for name, gap in gaps.items()]
    damaged = {name: why for name, (status, why) in evidence.absent.items() if status == "fail" and "table" in name}
    values += [figure(name, why, expected="readable") for name, why in damaged.items()]
    skip = "" if "run" in gaps else "the chip table holds none of TerraTorch's metrics"
    return judge(values, f"the same to {max(gaps.values(), default=0.0):.1g}", skip)


def _pair(evidence: Evidence) -> tuple[Counts, Counts, int, list[str]]:
    """Both models' counts by event on common chips, the number of these, and notes."""
    table, other = evidence.usable_table(), evidence.need("reference", "no reference was given")
    ours, theirs = _on_common_chips(table, other)
    if _same_model(table, other):
        raise Unanswered("skip", "the reference is this very model: a comparison with itself shows nothing")
    left_out = len(table) - len(ours)
    notes = [f"{left_out} chips that one of the two did not see in full are left out."] if left_out else []
    counts, others = (pool_by_event(one.counts, one.events)[1] for one in (ours, theirs))
    return counts, others, len(ours), notes


def _on_common_chips(table: ChipTable, other: ChipTable) -> tuple[ChipTable, ChipTable]:
    """Both tables on the chips of which both have seen every pixel with a truth."""
    if np.array_equal(table.chips, other.chips):  # where a mask has no data, a model would be judged on harder pixels
        whole = table.chips[(table.unseen == 0) & (other.unseen == 0)]
        if not len(whole):
            raise Unanswered("skip", "there is no chip of which both have seen every pixel")
        table, other = table.subset(whole), other.subset(whole)
    if reason := refuse_to_compare(table, other):
        raise Unanswered("fail", f"wrong reference: {reason}")
    return table, other


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign, which does not round onto zero or the margin."""
    margin = CRITERIA["parity"]["margin_pp"]
    return ("+" if value > 0 else "") + number(100 * float(value), 0.0, margin, -margin, digits=2)


def _decide(result: intervals.Result, counted: str, more: str = "", **parts: Any) -> Check:
    margin, level, enough = (CRITERIA["parity"][key] for key in ("margin_pp", "level", "enough_events"))
    tests = (margin / 100, (1 - level) / 2)
    word = result.verdict(*tests)
    low, high = map(points, result.interval(level))
    rough = "rough: " if counted == "events" and result.n < enough else ""
    gap = f"{points(result.estimate)} pp ({100 * level:g} % CI {low} to {high}, {rough}{result.n} {counted})"
    found = {"status": "pass", "outcome": str(word), "finding": f"{gap}, within ±{margin:g} pp{more}"}
    if word == "different":
        status, how = ("pass", "better") if result.estimate > 0 else ("fail", "worse")
        found = {"status": status, "outcome": f"different ({how})", "finding": gap + more}
    elif word == "undecided":
        needed = result.needed(*tests)
        how_many = f"about {number(needed)} {counted} like these" if needed else f"no number of {counted}"
        found |= {"status": word, "finding": f"{gap}, margin ±{margin:g} pp; {how_many} would decide{more}"}
    return found | parts


def _difference(name: str, result: intervals.Result, chips: int | None = None) -> dict[str, Any]:
    level = CRITERIA["parity"]["level"]
    low, high = (100 * end for end in result.interval(level))
    interval, events = (low, high, level), result.n if chips else None  # else over seeds
    return figure(f"difference in {name}", 100 * result.estimate, "pp", interval, n_chips=chips, n_events=events)


def _tables_of_seeds(evidence: Evidence) -> list[ChipTable]:
    """Of all declared runs; fails those without a result, copies, and those of other chips or another recipe."""
    tables = {run.run: run.table for run in evidence.seeds if run.table is not None}
    if dropped := [f"{run.run} ({run.status})" for run in evidence.seeds if run.run not in tables]:
        raise Unanswered("fail", f"declared, but without a chip table: {', '.join(dropped)}")
    named = tables | ({"the reference": evidence.reference} if evidence.reference else {})
    for one, other in itertools.combinations(named, 2):
        if _same_model(named[one], named[other]):
            raise Unanswered("fail", f"{other} is a copy of {one}")
        if other in tables and (reason := refuse_to_compare(tables[one], tables[other])):
            raise Unanswered("fail", f"{one} and {other} do not compare: {reason}")
    for run in evidence.seeds:
        recipe = recipes.fingerprint({**evidence.recipe, "seed_everything": run.seed})
        about = tables[run.run].metadata  # a table made with overrides does not name its run's recipe
        if not about.get("recipe_changes") and about.get("recipe_sha256", recipe) != recipe:
            raise Unanswered("fail", f"{run.run} is not of this recipe with the declared seed")
    return list(tables.values())


def _same_model(table: ChipTable, other: ChipTable) -> bool:
    """Whether two tables are of the same weights, by their hash or because they predict every chip alike."""
    pairs = ((table.counts, other.counts), (table.histogram, other.histogram))  # without probabilities None
    alike = all(np.array_equal(np.asarray(one), np.asarray(another)) for one, another in pairs)
    return alike or (table.weights is not None and table.weights == other.weights)
