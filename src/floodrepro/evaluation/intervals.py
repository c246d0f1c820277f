"""Intervals and tests over flood events and over seeds. `docs/statistics.md` explains the choice. numpy and scipy only.

E = events, K = classes. Counts are int64 (E, K, K), rows = truth, one confusion matrix per event.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from floodrepro.evaluation.metrics import MIN_FLOOD_PIXELS, Counts, Floats, iou

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

        Where nothing varies: 1 - ((1 - level) / 2)^(1 / n) on both sides (Hanley and Lippman-Hand 1983, JAMA).
        """
        tail = (1 - level) / 2
        half = float(stats.t.ppf(1 - tail, self.freedom)) * self.error if self.error > 0 else 1 - tail ** (1 / self.n)
        return self.estimate - half, self.estimate + half

    def verdict(self, margin: float, alpha: float = 0.05) -> Verdict:
        """Where the 1 - 2 alpha interval lies: within the margin, outside on one side, or neither.

        The first is two one-sided t tests, each at `alpha` (Schuirmann 1987, J. Pharmacokinetics and
        Biopharmaceutics). The margin has the figure's unit.
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

    Whole events are left out, for their chips are alike (Cameron and Miller 2015, Journal of Human Resources). t has
    the effective number of events, (sum w)^2 / sum w^2 (Kish 1965, Survey Sampling), less one, at least one, as its
    degrees of freedom (Carter, Schnepel and Steigerwald 2017, Review of Economics and Statistics).

    Args:
        counts: Counts (E, K, K).
        statistic: The figure.
        other: Counts (E, K, K) of a second model on the same events; the figure is then the difference to it.
        positive: The class by whose pixels, in truth or prediction, events weigh.

    Raises:
        ValueError: Fewer than two events, or the figure is undefined, overall or without one of the events.
    """
    events, models = len(counts), [counts] if other is None else [counts, other]
    if events < 2:
        raise ValueError(f"{events} event: an interval over events needs at least two")
    # The figure over all events, then without each one of them.
    figures = [statistic(np.concatenate([[m.sum(axis=0)], m.sum(axis=0) - m])) for m in models]
    estimate, *without = figures[0] - sum(figures[1:])
    if not np.isfinite(estimate):
        raise ValueError("the figure is undefined over all events: no counted pixel has the class")
    if not np.isfinite(without).all():
        raise ValueError("the figure depends on one event: it is undefined without it")
    error = np.sqrt(events - 1) * np.std(without)  # numpy divides by E
    pixels = np.array(models, np.float64).sum(axis=0)
    weight = pixels[:, positive].sum(axis=1) + pixels[:, :, positive].sum(axis=1) - pixels[:, positive, positive]
    effective = weight.sum() ** 2 / (weight**2).sum() if weight.any() else events
    return Result(float(estimate), float(error), max(float(effective) - 1, 1.0), events)


def mean_over_events(counts: Counts, *, other: Counts | None = None, positive: int = -1) -> Result:
    """The mean of the events' own IoU, or of their paired differences, with Student's t over events.

    Only events with MIN_FLOOD_PIXELS of the class or more in the truth count; a ValueError is raised for less than two.
    """
    kept = counts[:, positive].sum(axis=-1) >= MIN_FLOOD_PIXELS
    values = iou(counts[kept], positive)
    return _student(values if other is None else values - iou(other[kept], positive), "events with the class")


def over_seeds(figures: Sequence[float], reference: float) -> Result:
    """The mean over training runs less the reference's figure; a ValueError is raised for less than two runs."""
    return _student(np.asarray(figures, np.float64) - reference, "seeds")


def _student(values: Floats, what: str) -> Result:
    if len(values) < 2:
        raise ValueError(f"{len(values)} {what}: an interval needs at least two")
    return Result(float(values.mean()), float(stats.sem(values)), len(values) - 1.0, len(values))
