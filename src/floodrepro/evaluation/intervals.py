"""Intervals and tests over flood events and over seeds. `docs/statistics.md` explains the choice. numpy and scipy only.

A whole event is left out at a time, for its chips are alike (Cameron and Miller 2015, Journal of Human Resources).
E = events, K = classes. Counts are int64 (E, K, K), rows = truth, one confusion matrix per event.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from floodrepro.evaluation.metrics import MIN_FLOOD_PIXELS as MIN_FLOOD_PIXELS
from floodrepro.evaluation.metrics import Counts, Floats, iou

Statistic = Callable[[Counts], Floats]  # from counts (..., K, K) to a figure (...), NaN where it is undefined
Verdict = Literal["equivalent", "different", "undecided"]
_MOST = 1_000_000  # events or seeds; beyond it, no test set decides


@dataclass(frozen=True)
class Result:
    """An estimate and what is known of its spread."""

    estimate: float  # the figure, or the difference of two
    error: float  # its standard error
    freedom: float  # degrees of freedom of the t distribution
    n: int  # number of events or seeds behind it

    def interval(self, level: float = 0.90) -> tuple[float, float]:
        """Two-sided interval: t quantile times standard error on both sides.

        Where nothing varies, the spread is unknown and not zero. The half width is then the share of events that may
        still differ after n alike ones, 1 - ((1 - level) / 2)^(1 / n) (Hanley and Lippman-Hand 1983, JAMA).
        """
        tail = (1 - level) / 2
        half = float(stats.t.ppf(1 - tail, self.freedom)) * self.error if self.error > 0 else 1 - tail ** (1 / self.n)
        return self.estimate - half, self.estimate + half

    def verdict(self, margin: float, alpha: float = 0.05) -> Verdict:
        """Two one-sided t tests (Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics), each at `alpha`.

        Returns:
            `equivalent` if the 1 - 2 alpha interval lies within the margin, which has the figure's unit, `different` if
            it lies outside on one side, otherwise `undecided`.
        """
        low, high = self.interval(1 - 2 * alpha)
        if -margin < low and high < margin:
            return "equivalent"
        return "different" if low > margin or high < -margin else "undecided"

    def needed(self, margin: float, alpha: float = 0.05) -> int | None:
        """Events or seeds with which this estimate and this spread would be decided; None where no number would do."""

        def decided(n: int) -> bool:
            more = n / self.n
            scaled = replace(self, error=self.error / more**0.5, freedom=self.freedom * more, n=n)
            return scaled.verdict(margin, alpha) != "undecided"

        numbers = range(self.n, _MOST)
        place = bisect.bisect_left(numbers, True, key=decided)
        return numbers[place] if place < len(numbers) else None


def jackknife(counts: Counts, statistic: Statistic, *, other: Counts | None = None, positive: int = -1) -> Result:
    """A pooled figure with its leave-one-event-out standard error (Tukey 1958; Efron and Tibshirani 1993, chapter 11).

    t has the effective number of events less one as its degrees of freedom, at least one (Carter, Schnepel and
    Steigerwald 2017, Review of Economics and Statistics). That number is (sum w)^2 / sum w^2, from 1 to E (Kish 1965,
    Survey Sampling): an event weighs by its pixels of the positive class, in truth or prediction.

    Args:
        counts: Counts (E, K, K).
        statistic: The figure.
        other: Counts (E, K, K) of a second model on the same events; the figure is then the difference to it.
        positive: The class by which events weigh.

    Raises:
        ValueError: Fewer than two events, or the figure is undefined, overall or without one of the events.
    """
    events, models = len(counts), [counts] if other is None else [counts, other]
    if events < 2:
        raise ValueError(f"{events} event: an interval over events needs at least two")
    # The figure over all events, then without each one of them.
    pools = [np.concatenate([[m.sum(axis=0)], m.sum(axis=0) - m]) for m in models]
    estimate, *rest = statistic(pools[0]) - (statistic(pools[1]) if other is not None else 0.0)
    without = np.array(rest)
    if not np.isfinite(estimate):
        raise ValueError("the figure is undefined over all events: no counted pixel has the class")
    if not np.isfinite(without).all():
        raise ValueError("the figure depends on one event: it is undefined without it")
    error = np.sqrt((events - 1) / events * ((without - without.mean()) ** 2).sum())
    pixels = sum(models[1:], counts).astype(np.float64)
    weight = pixels[:, positive].sum(axis=1) + pixels[:, :, positive].sum(axis=1) - pixels[:, positive, positive]
    effective = weight.sum() ** 2 / (weight**2).sum() if weight.any() else events
    return Result(float(estimate), float(error), max(float(effective) - 1, 1.0), events)


def mean_over_events(counts: Counts, *, other: Counts | None = None, positive: int = -1) -> Result:
    """The mean of the events' own IoU, or of their paired differences, with Student's t over events.

    Each flood counts once, however large. Events with less than MIN_FLOOD_PIXELS of the class in the truth are left
    out; `n` is the number of the others.

    Raises:
        ValueError: Fewer than two such events.
    """
    kept = counts[:, positive].sum(axis=-1) >= MIN_FLOOD_PIXELS
    values = iou(counts[kept], positive)
    return _student(values if other is None else values - iou(other[kept], positive), "events with flood")


def over_seeds(figures: Sequence[float], reference: float) -> Result:
    """The mean over training runs less the reference's figure, which is taken as it stands.

    Raises:
        ValueError: Fewer than two runs, or a figure that is not finite.
    """
    return _student(np.asarray(figures, np.float64) - reference, "seeds")


def _student(values: Floats, what: str) -> Result:
    if len(values) < 2:
        raise ValueError(f"{len(values)} {what}: an interval needs at least two")
    if not np.isfinite(values).all():
        raise ValueError(f"a figure that is not finite among the {what}")
    return Result(float(values.mean()), float(stats.sem(values)), len(values) - 1.0, len(values))
