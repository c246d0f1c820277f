"""Intervals over flood events: what is left out or resampled. numpy and scipy only.

Pixels of a chip and chips of an event are alike, so that neither can be counted as independent: what is resampled or
left out is always a whole event with all its counts (Cameron and Miller 2015, Journal of Human Resources, on inference
with clusters). Two models are compared on the same events, never on two draws of events. `docs/statistics.md` says in
plain words what was chosen, and shows the simulation behind it.

E = events, K = classes. Counts are int64 (E, K, K), rows = truth, one matrix an event. Arguments that recur:
`statistic` is the figure; `other` has the counts of another model on the same events, and the figure is then the
difference to it; `n_chips` is the number of chips behind the counts, for the record.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # inverse of Student's t distribution function

from floodrepro.evaluation.metrics import Counts

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Counts], Floats]
"""Confusion counts (..., K, K) to a figure (...), NaN where it is undefined, such as `mean_iou`."""

UNDEFINED_AT_MOST = 0.05
"""Share of resamples that may be undefined and left out; beyond it their percentiles describe a chosen rest."""

_BLOCK = 1_000  # resamples at a time: 1.6 MB of weights for 200 events


@dataclass(frozen=True)
class Interval:
    """A figure and its two-sided confidence interval.

    Args:
        estimate: The figure over all events.
        low: Lower end.
        high: Upper end.
        level: Confidence, 0 to 1.
        method: How it was made, in words.
        n_events: Events behind it; 0 for an interval over seeds.
        n_chips: Chips behind it; 0 where it was not said.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n_events: int
    n_chips: int


def pool_by_event(counts: Counts, events: npt.NDArray[np.str_]) -> tuple[list[str], Counts]:
    """The events of chips, sorted, and the chips' counts (N, K, K) summed over each: (E, K, K).

    Args:
        counts: Of each chip (N, K, K).
        events: Event (N,) of each chip.
    """
    names, places = np.unique(events, return_inverse=True)
    pooled = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(pooled, places, counts)
    return names.tolist(), pooled


def leave_one_event_out(counts: Counts, statistic: Statistic, *, other: Counts | None = None) -> Floats:
    """The figure (E,) without each event in turn; NaN where it is undefined without that event.

    Leading axes are kept: counts (..., E, K, K) give (..., E).

    Raises:
        ValueError: Fewer than two events, or `other` has other events or classes.
    """
    _require_events(counts, other)

    def without_each(pooled: Counts) -> Floats:
        return statistic(pooled.sum(axis=-3, keepdims=True) - pooled)

    return without_each(counts) if other is None else without_each(counts) - without_each(other)


def effective_events(counts: Counts, statistic: Statistic, *, other: Counts | None = None) -> Floats:
    """How many events of one size would weigh as these do: (sum w)^2 / sum w^2, from 1 to E.

    Kish 1965 (Survey Sampling) for the formula; Carter, Schnepel and Steigerwald 2017 (Review of Economics and
    Statistics) for t tests with clusters of unequal size. An event's weight w is the sum over its pixels of how much
    one such pixel moves the figure, up or down: for flood IoU about its pixels of flood, true or predicted. A dry event
    that is predicted dry weighs nothing. Leading axes are kept: counts (..., E, K, K) give (...).
    """
    weights = np.zeros(counts.shape[:-2])
    for model in (counts,) if other is None else (counts, other):
        total = model.sum(axis=-3)
        step = 1 + total.sum(axis=(-2, -1), keepdims=True) // 1_000_000
        now = statistic(total)
        for cell in np.ndindex(model.shape[-2:]):
            one = np.zeros(model.shape[-2:], np.int64)
            one[cell] = 1
            slope = np.abs(statistic(total + step * one) - now) / step[..., 0, 0]
            weights += slope[..., None] * model[..., *cell]
    squares = (weights**2).sum(axis=-1)
    events = np.full(squares.shape, float(counts.shape[-3]))  # no pixel moves the figure: nothing weighs more
    np.divide(weights.sum(axis=-1) ** 2, squares, out=events, where=squares > 0)
    return events


def jackknife(counts: Counts, statistic: Statistic, *, other: Counts | None = None) -> tuple[Floats, Floats, Floats]:
    """Estimate, standard error and degrees of freedom of a figure; counts (..., E, K, K) give three of (...).

    With x_e the figure without event e, the squared error is (E - 1) / E times the sum of (x_e - mean x)^2 (Quenouille
    1956 and Tukey 1958; Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11). Degrees of freedom
    are those of `effective_events` less one, and at least one.

    Raises:
        ValueError: Fewer than two events, `other` has other events or classes, the figure is undefined, or it hangs on
            one event: undefined without it.
    """
    without = leave_one_event_out(counts, statistic, other=other)
    estimate = _estimate(counts, statistic, other)
    if not np.isfinite(without).all():
        raise ValueError("the figure hangs on one event: it is undefined without it")
    events = counts.shape[-3]
    spread = ((without - without.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    freedom = np.maximum(effective_events(counts, statistic, other=other) - 1, 1)
    return estimate, np.sqrt((events - 1) / events * spread), freedom


def event_jackknife(
    counts: Counts,
    statistic: Statistic,
    *,
    other: Counts | None = None,
    level: float = 0.90,
    n_chips: int = 0,
) -> Interval:
    """The default interval: `jackknife` over events, with t of the effective number of events less one.

    Raises:
        ValueError: As `jackknife`.
    """
    estimate, error, freedom = map(float, jackknife(counts, statistic, other=other))
    return t_interval(estimate, error, freedom, level, "event jackknife", len(counts), n_chips)


def event_bootstrap(
    counts: Counts,
    statistic: Statistic,
    *,
    other: Counts | None = None,
    level: float = 0.90,
    resamples: int = 10_000,
    seed: int = 0,
    n_chips: int = 0,
) -> Interval:
    """Percentile interval from resampled events (Efron and Tibshirani 1993, chapter 13).

    Each resample draws E events with replacement, the same ones for both models, and pools their counts. Resamples in
    which the figure is undefined are left out, and counted in `method`.

    Raises:
        ValueError: As `jackknife` but for the last, or more than UNDEFINED_AT_MOST of the resamples are undefined.
    """
    _require_events(counts, other)
    estimate = float(_estimate(counts, statistic, other))
    events = len(counts)
    models = (counts,) if other is None else (counts, other)
    flat = np.stack(models, axis=1).reshape(events, -1).astype(np.float64)  # sums below 2^53 stay exact
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        weights = generator.multinomial(events, np.full(events, 1 / events), size=size)
        pooled = (weights @ flat).astype(np.int64).reshape(size, len(models), *counts.shape[1:])
        drawn.append(_figure(statistic, pooled[:, 0], None if other is None else pooled[:, 1]))
    values = np.concatenate(drawn)
    undefined = int(np.isnan(values).sum())
    if undefined > UNDEFINED_AT_MOST * resamples:
        raise ValueError(f"undefined in {undefined} of {resamples} resamples: too few events have the class")
    low, high = np.quantile(values[~np.isnan(values)], [(1 - level) / 2, (1 + level) / 2])
    method = "event bootstrap, percentile" + (f", {undefined} undefined resamples left out" if undefined else "")
    return Interval(estimate, float(low), float(high), level, method, events, n_chips)


def t_interval(
    estimate: float, error: float, freedom: float, level: float, method: str, n_events: int, n_chips: int
) -> Interval:
    """Estimate and t quantile times standard error on both sides; `freedom` is the degrees of freedom of t."""
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    described = f"{method}, t with {freedom:.1f} degrees of freedom"
    return Interval(estimate, estimate - half, estimate + half, level, described, n_events, n_chips)


def _require_events(counts: Counts, other: Counts | None) -> None:
    if counts.shape[-3] < 2:
        raise ValueError(f"{counts.shape[-3]} event: an interval over events needs at least two")
    if other is not None and other.shape != counts.shape:
        raise ValueError(f"counts {counts.shape} and {other.shape}: not the same events and classes")


def _figure(statistic: Statistic, counts: Counts, other: Counts | None) -> Floats:
    return statistic(counts) if other is None else statistic(counts) - statistic(other)


def _estimate(counts: Counts, statistic: Statistic, other: Counts | None) -> Floats:
    estimate = _figure(statistic, counts.sum(axis=-3), None if other is None else other.sum(axis=-3))
    if not np.isfinite(estimate).all():
        raise ValueError("the figure is undefined over all events: no counted pixel has the class")
    return estimate
