"""Tests: equivalence within a margin, over events and over seeds, and sign flips. numpy and scipy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr  # Student's t distribution function

from floodrepro.evaluation.metrics import Counts
from floodrepro.evaluation.resampling import Floats, Interval, Statistic, jackknife, t_interval

_BLOCK = 1_000  # sign patterns at a time


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of a difference against a margin.

    Args:
        difference: The estimate.
        standard_error: Of it.
        degrees_of_freedom: Of the t distribution that was used.
        margin: The difference that would matter; same unit as the difference.
        alpha: Error that each one-sided test may make.
        p_value: The larger one of the two.
        equivalent: p_value < alpha: the interval lies within the margin. False does not mean that they differ.
        interval: Of the difference, level 1 - 2 alpha.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    margin: float
    alpha: float
    p_value: float
    equivalent: bool
    interval: Interval


def equivalence_over_events(
    counts: Counts,
    other: Counts,
    statistic: Statistic,
    *,
    margin: float,
    alpha: float = 0.05,
    n_chips: int = 0,
) -> Equivalence:
    """Is the difference between two models within a margin, for events like these?

    Two one-sided t tests (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics) with `jackknife`. It
    speaks of two fixed sets of weights: that another seed would do as well is not in it.

    Args:
        counts: Counts (E, K, K).
        other: Counts (E, K, K) of the other model on the same events.
        statistic: The figure.
        margin: The difference that would matter, in the figure's unit.
        alpha: Error that each one-sided test may make.
        n_chips: Chips behind the counts, for the record.

    Raises:
        ValueError: As `jackknife`, or a margin that is not positive.
    """
    difference, error, freedom = map(float, jackknife(counts, statistic, other=other))
    return _two_one_sided(difference, error, freedom, margin, alpha, "event jackknife", len(counts), n_chips)


def equivalence_over_seeds(
    values: Sequence[float], reference: float | Sequence[float], *, margin: float, alpha: float = 0.05
) -> Equivalence:
    """Is the mean over training runs within a margin of a reference, on this test set?

    Two one-sided t tests (Schuirmann 1987): of one sample against a figure that is taken as it stands, or of two
    samples with unequal variances (Welch 1947, Biometrika) against several runs of the reference.

    Args:
        values: The figure of each run (n,), all that were declared.
        reference: The reference's figure, or one for each of its runs (m,).
        margin: The difference that would matter, in the figure's unit.
        alpha: Error that each one-sided test may make.

    Raises:
        ValueError: Fewer than two runs (of the reference too, where a sequence is given), a figure that is not finite,
            or a margin that is not positive.
    """
    runs, variance = _runs(values)
    if isinstance(reference, int | float):
        difference, freedom, method = float(runs.mean()) - reference, len(runs) - 1.0, "seeds"
    else:
        others, other_variance = _runs(reference)
        difference, method = float(runs.mean() - others.mean()), "seeds, Welch"
        parts = variance**2 / (len(runs) - 1) + other_variance**2 / (len(others) - 1)
        variance += other_variance
        freedom = variance**2 / parts if parts > 0 else len(runs) + len(others) - 2.0
    return _two_one_sided(difference, variance**0.5, freedom, margin, alpha, method, 0, 0)


def sign_flip_test(differences: Floats, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p value of "the differences are symmetric about 0", by flipping their signs (Fisher 1935).

    The statistic is the absolute mean. All 2^E sign patterns are tried where these are no more than `flips`; otherwise
    they are drawn, and the observed one is counted among them (Phipson and Smyth 2010), so that p is never 0.

    Args:
        differences: One an event (E,). A 0 has no sign: it adds no patterns and changes nothing.
        flips: Patterns to draw.
        seed: Of the draws.

    Raises:
        ValueError: Fewer than two events, or a difference that is not finite.
    """
    differences = np.asarray(differences, np.float64)
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} event: signs can be flipped from two on")
    if not np.isfinite(differences).all():
        raise ValueError("differences that are not finite: leave out events in which the figure is undefined")
    moving = differences[differences != 0]
    observed = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()  # sums in another order differ by roundings: a tie
    if 2 ** len(moving) <= flips:
        patterns = (np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving))) & 1
        return float((np.abs((1 - 2 * patterns) @ moving) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached = 1
    for start in range(0, flips, _BLOCK):
        signs = 1 - 2 * generator.integers(0, 2, (min(_BLOCK, flips - start), len(moving)), np.int8)
        reached += int((np.abs(signs @ moving) >= observed).sum())
    return reached / (flips + 1)


def _two_one_sided(
    difference: float,
    error: float,
    freedom: float,
    margin: float,
    alpha: float,
    method: str,
    n_events: int,
    n_chips: int,
) -> Equivalence:
    if not margin > 0:
        raise ValueError(f"a margin of {margin}: it must be positive")
    interval = t_interval(difference, error, freedom, 1 - 2 * alpha, method, n_events, n_chips)
    room = margin - abs(difference)  # to the nearer bound, whose test has the larger p
    p_value = float(stdtr(freedom, -room / error)) if error > 0 else float(room <= 0)
    return Equivalence(difference, error, freedom, margin, alpha, p_value, p_value < alpha, interval)


def _runs(values: Sequence[float]) -> tuple[Floats, float]:
    """The runs' figures and the squared standard error of their mean."""
    runs = np.asarray(values, np.float64)
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run: the spread over seeds needs at least two")
    if not np.isfinite(runs).all():
        raise ValueError("a run without a finite figure")
    return runs, float(runs.var(ddof=1)) / len(runs)
