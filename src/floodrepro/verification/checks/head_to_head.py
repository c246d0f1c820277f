"""Chip against chip, event against event: where does the run lose to its reference, and could that be chance?"""

from functools import partial

import numpy as np
import numpy.typing as npt

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.resampling import pool_by_event
from floodrepro.evaluation.statistics import sign_flip_test
from floodrepro.verification.check import Check, Evidence, Plot, Table, Value
from floodrepro.verification.comparison import flood_iou, has_flood, no_pair, table_file

ID = "head_to_head"
_CLAIM = "Flood IoU over events is not significantly worse than the reference's; that alone is no equivalence."
_answer = partial(Check, ID, "Head to head with the reference", _CLAIM)
_LARGEST = 10
_POINTS = 2_000
_COLUMNS = ("flood pixels", "flood IoU", "flood IoU, reference", "difference in pp")
Floats = npt.NDArray[np.float64]


def check(evidence: Evidence) -> Check:
    """Wins, ties and losses by chip, the largest regressions, and a sign-flip test over events with flood.

    Where flood IoU is undefined in one of the two, the chip is dry and that one left it dry: it wins, for the other one
    raised a false alarm. Where it is undefined in both they agree on a dry chip, which is left out and counted, as
    is a chip without a counted pixel. Two false alarms on a dry chip are a tie at 0. Regressions are ranked where both
    are defined.
    """
    if refusal := no_pair(evidence):
        return _answer(*refusal)
    assert evidence.table is not None and evidence.reference is not None  # no_pair
    table, reference, alpha = evidence.table, evidence.reference, evidence.thresholds[ID]["alpha"]
    ours, theirs = flood_iou(table.counts), flood_iou(reference.counts)
    differences, events = _by_event(table, reference)
    answer = partial(
        _answer,
        tables=[
            _regressions("Largest regressions by chip", "chip", table.chips.tolist(), table.counts, ours, theirs),
            events,
        ],
        plots=[_scatter(ours, theirs)],
        evidence=[table_file(table)],
    )
    values = _chips(ours, theirs, table.counts.sum(axis=(1, 2)) > 0)
    if len(differences) < 2:
        reason = f"flood in {len(differences)} of the events: signs can be flipped from two on"
        return answer("skip", reason, values=values)
    p_value, mean = sign_flip_test(differences), float(differences.mean())
    worse = mean < 0 and p_value < alpha
    values.append(
        Value(
            "mean difference of flood IoU over events", 100 * mean, "pp", n_chips=len(table), n_events=len(differences)
        )
    )
    moving = int(np.count_nonzero(differences))  # a difference of 0 has no sign to flip
    least = min(1.0, 2.0 ** (1 - moving))
    if least >= alpha:
        of = f"{moving} of {len(differences)} events with flood differ"
        reason = f"{of}: the test's smallest p is {least:.3g}, it could not fail"
        return answer("skip", reason, values=[*values, _p(p_value, len(differences), "", None)])
    asked = f"not below {alpha:g} where the mean difference is negative"
    return answer(
        "fail" if worse else "pass",
        f"significantly worse: {-100 * mean:.1f} pp of flood IoU on average over {len(differences)} events, "
        f"p = {p_value:.2g}"
        if worse
        else "",
        values=[*values, _p(p_value, len(differences), asked, not worse)],
        notes=["A difference that is not significant is not a proof that there is none: see parity for equivalence."],
    )


def _p(p_value: float, events: int, threshold: str, ok: bool | None) -> Value:
    method = "sign flips of the events' differences, two-sided"
    return Value("p of the mean difference", p_value, method=method, n_events=events, threshold=threshold, ok=ok)


def _chips(ours: Floats, theirs: Floats, counted: npt.NDArray[np.bool_]) -> list[Value]:
    dry, false_alarm = np.isnan(ours) & ~np.isnan(theirs), ~np.isnan(ours) & np.isnan(theirs)
    counts = {
        "chips won": (ours > theirs) | dry,
        "chips tied": ours == theirs,
        "chips lost": (ours < theirs) | false_alarm,
        "of the chips won, dry ones left dry by this run alone": dry,
        "of the chips lost, dry ones left dry by the reference alone": false_alarm,
        "chips left out: dry, and left dry by both": np.isnan(ours) & np.isnan(theirs) & counted,
        "chips left out: all pixels ignored": ~counted,
    }
    return [Value(name, int(which.sum()), n_chips=len(ours)) for name, which in counts.items()]


def _by_event(table: ChipTable, reference: ChipTable) -> tuple[Floats, Table]:
    """Differences of the events with flood in truth, where both figures are defined, and the largest losses."""
    names, ours = pool_by_event(table.counts, table.events)
    _, theirs = pool_by_event(reference.counts, reference.events)
    wet = has_flood(ours)
    kept = [name for name, keep in zip(names, wet.tolist(), strict=True) if keep]
    figures = flood_iou(ours[wet]), flood_iou(theirs[wet])
    return figures[0] - figures[1], _regressions("Largest regressions by event", "event", kept, ours[wet], *figures)


def _regressions(
    title: str, what: str, names: list[str], counts: npt.NDArray[np.int64], ours: Floats, theirs: Floats
) -> Table:
    change = ours - theirs
    worst = [place for place in np.argsort(change, kind="stable").tolist() if change[place] < 0][:_LARGEST]
    flood = counts[:, -1].sum(axis=1)
    rows = [
        (names[n], int(flood[n]), float(ours[n]), float(theirs[n]), 100 * float(change[n])) for n in worst
    ]  # argsort puts NaN last, and NaN is not below 0
    return Table(title, (what, *_COLUMNS), rows)


def _scatter(ours: Floats, theirs: Floats) -> Plot:
    """Of more points than can be told apart, evenly spaced ones in the table's order: the same ones each time."""
    both = np.flatnonzero(~np.isnan(ours) & ~np.isnan(theirs))
    if thinned := len(both) > _POINTS:
        both = both[np.linspace(0, len(both) - 1, _POINTS).round().astype(int)]
    chips = {"label": "chips", "x": theirs[both].round(4).tolist(), "y": ours[both].round(4).tolist()}
    shown = f"{len(both):,} chips, evenly thinned out" if thinned else f"{len(both):,} chips"
    return Plot(
        "head_to_head",
        "scatter",
        "Flood IoU of each chip",
        "flood IoU of the reference",
        "flood IoU of this run",
        [chips, {"label": "equal", "x": [0.0, 1.0], "y": [0.0, 1.0]}],
        f"{shown} in which flood IoU is defined in both. Below the diagonal this run is worse than the reference.",
    )
