"""Intervals, equivalence and sign flips: by hand, and beside scipy."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from floodrepro.evaluation.metrics import iou, mean_iou
from floodrepro.evaluation.resampling import (
    effective_events,
    event_bootstrap,
    event_jackknife,
    jackknife,
    leave_one_event_out,
    pool_by_event,
)
from floodrepro.evaluation.statistics import equivalence_over_events, equivalence_over_seeds, sign_flip_test


def flood(counts: np.ndarray) -> np.ndarray:
    return iou(counts, 1)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Of events with equally many pixels this is a plain mean over events."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def drawn(events: int, seed: int, classes: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.lognormal(6, 1.2, (events, 1, 1)) * rng.random((events, classes, classes))).astype(np.int64) + 1


def of_equal_size(right: list[int]) -> np.ndarray:
    """Events of 100 pixels, so many of them right."""
    return np.array([[[hits, 100 - hits], [0, 0]] for hits in right])


def test_chips_are_pooled_over_their_events_in_order():
    counts = np.arange(16).reshape(4, 2, 2)
    names, pooled = pool_by_event(counts, np.array(["EMSR9", "EMSR10", "EMSR9", "EMSR8"]))
    assert names == ["EMSR10", "EMSR8", "EMSR9"]
    assert pooled.tolist() == [counts[1].tolist(), counts[3].tolist(), (counts[0] + counts[2]).tolist()]
    assert pooled.dtype == np.int64


def test_leaving_out_is_pooling_the_others():
    counts, other = drawn(5, 0), drawn(5, 1)
    found = leave_one_event_out(counts, flood, other=other)
    for event in range(5):
        rest = np.arange(5) != event
        assert found[event] == pytest.approx(flood(counts[rest].sum(0)) - flood(other[rest].sum(0)))


def test_leaving_out_the_only_flood_is_undefined_not_zero():
    counts = np.array([[[9, 0], [1, 2]], [[5, 0], [0, 0]], [[7, 0], [0, 0]]])
    assert np.isnan(leave_one_event_out(counts, flood)).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="hangs on one event"):
        event_jackknife(counts, flood)


def test_jackknife_of_equal_events_is_students_interval_of_their_mean():
    right = [90, 80, 85, 60, 95, 70, 75]
    found = event_jackknife(of_equal_size(right), accuracy, level=0.9, n_chips=21)
    share = np.array(right) / 100
    low, high = stats.ttest_1samp(share, 0).confidence_interval(0.9)
    assert (found.estimate, found.low, found.high) == pytest.approx((share.mean(), low, high), abs=1e-3)
    _, error, _ = jackknife(of_equal_size(right), accuracy)
    assert error == pytest.approx(stats.sem(share))
    assert (found.level, found.n_events, found.n_chips) == (0.9, 7, 21)
    assert found.method.startswith("event jackknife, t with ")


def test_jackknife_error_by_hand():
    counts = np.array([[[0, 1], [1, 2]], [[0, 0], [2, 6]], [[0, 3], [0, 1]]])  # flood IoU 2/4, 6/8, 1/4; pooled 9/16
    estimate, error, _ = jackknife(counts, flood)
    without = np.array([7 / 12, 3 / 8, 8 / 12])
    assert estimate == 9 / 16
    assert error == pytest.approx(np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum()))


def test_paired_interval_takes_out_what_both_models_share():
    rng = np.random.default_rng(3)
    right = rng.integers(40, 90, 30)
    model, reference = of_equal_size(right + rng.integers(3, 6, 30)), of_equal_size(right)
    paired = event_jackknife(model, accuracy, other=reference)
    low, high = stats.ttest_rel(model[:, 0, 0] / 100, reference[:, 0, 0] / 100).confidence_interval(0.9)
    assert (paired.low, paired.high) == pytest.approx((low, high), abs=1e-3)
    assert paired.high - paired.low < (alone := event_jackknife(model, accuracy)).high - alone.low


def test_effective_events_are_all_of_them_when_they_are_alike_and_one_when_one_is_everything():
    alike = np.tile([[700, 20], [30, 250]], (40, 1, 1))
    assert effective_events(alike, flood) == pytest.approx(40)
    giant = alike.copy()
    giant[0] *= 10_000_000
    assert effective_events(giant, flood) == pytest.approx(1, abs=1e-3)
    assert jackknife(giant, flood)[2] == 1  # t needs one degree of freedom at least


def test_event_weighs_by_its_flood_not_by_its_dry_land():
    alike = np.tile([[700, 20], [30, 250]], (40, 1, 1))
    with_dry = np.concatenate([alike, np.tile([[10**9, 0], [0, 0]], (20, 1, 1))])
    assert effective_events(with_dry, flood) == pytest.approx(40)
    sizes = np.array([1, 2, 3, 10])
    scaled = sizes[:, None, None] * np.array([[0, 200], [300, 2_500]])
    assert effective_events(scaled, flood) == pytest.approx(sizes.sum() ** 2 / (sizes**2).sum(), rel=1e-6)
    assert effective_events(scaled, flood, other=scaled) == pytest.approx(effective_events(scaled, flood))


def test_many_test_sets_at_once_give_what_each_gives_alone():
    counts, other = (np.stack([drawn(9, seed + first) for seed in range(6)]) for first in (0, 50))
    together = jackknife(counts, flood, other=other)
    for row in range(6):
        assert jackknife(counts[row], flood, other=other[row]) == pytest.approx([part[row] for part in together])


@pytest.mark.parametrize("statistic", [flood, mean_iou])
def test_bootstrap_is_scipys_paired_bootstrap_over_events(statistic):
    counts, other = drawn(40, 4, classes=3), drawn(40, 5, classes=3)

    def difference(places: np.ndarray, axis: int) -> np.ndarray:
        return statistic(counts[places].sum(axis=axis - 2)) - statistic(other[places].sum(axis=axis - 2))

    expected = stats.bootstrap(
        (np.arange(40),),
        lambda places, axis=-1: difference(places.astype(int), axis),
        n_resamples=10_000,
        confidence_level=0.9,
        method="percentile",
        random_state=np.random.default_rng(1),
    )
    found = event_bootstrap(counts, statistic, other=other, seed=2)
    width = found.high - found.low
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.04 * width)
    assert found.estimate == pytest.approx(float(statistic(counts.sum(0)) - statistic(other.sum(0))))


def test_bootstrap_of_two_events_draws_only_their_three_mixtures():
    counts = np.array([[[0, 5], [0, 5]], [[0, 1], [0, 9]]])  # flood IoU 0.5 and 0.9; pooled 0.7
    found = event_bootstrap(counts, flood, level=0.98)
    assert (found.low, found.estimate, found.high) == (0.5, 0.7, 0.9)
    middle = event_bootstrap(counts, flood, level=0.40)  # half of all resamples hold one of each
    assert (middle.low, middle.high) == (0.7, 0.7)


def test_bootstrap_draws_the_same_events_for_both_models_and_again_with_the_same_seed():
    counts = drawn(20, 6)
    same = event_bootstrap(counts, flood, other=counts)
    assert (same.low, same.high) == (0, 0)
    assert event_bootstrap(counts, flood, seed=3) == event_bootstrap(counts, flood, seed=3)
    assert event_bootstrap(counts, flood, seed=3) != event_bootstrap(counts, flood, seed=4)


def test_every_resample_is_drawn_whatever_the_block():
    seen = []

    def counting(pooled: np.ndarray) -> np.ndarray:
        seen.append(len(pooled) if pooled.ndim == 3 else 0)
        return flood(pooled)

    event_bootstrap(drawn(6, 0), counting, resamples=2_500)
    assert sum(seen) == 2_500


def test_undefined_resamples_are_left_out_and_counted_and_too_many_are_refused():
    dry, wet = [[50, 0], [0, 0]], [[40, 2], [3, 9]]
    found = event_bootstrap(np.array([dry] * 12 + [wet] * 4), flood)  # all dry in (3/4)^16 = 1 % of the resamples
    left_out = int(found.method.removeprefix("event bootstrap, percentile, ").split()[0])
    assert left_out == pytest.approx(100, abs=50)
    assert found.low == found.high == pytest.approx(9 / 14)
    with pytest.raises(ValueError, match=r"undefined in \d+ of 10000 resamples"):
        event_bootstrap(np.array([dry] * 8 + [wet]), flood)


@pytest.mark.parametrize("interval", [event_jackknife, event_bootstrap, leave_one_event_out])
def test_one_event_has_no_interval(interval):
    with pytest.raises(ValueError, match="at least two"):
        interval(drawn(1, 0), flood)


@pytest.mark.parametrize("interval", [event_jackknife, event_bootstrap])
def test_without_a_pixel_or_with_other_events_there_is_no_interval(interval):
    with pytest.raises(ValueError, match="undefined over all events"):
        interval(np.zeros((5, 2, 2), np.int64), flood)
    with pytest.raises(ValueError, match="not the same events and classes"):
        interval(drawn(5, 0), flood, other=drawn(4, 0))
    with pytest.raises(ValueError, match="not the same events and classes"):
        interval(drawn(5, 0), flood, other=drawn(5, 0, classes=3))


def test_equivalence_over_events_is_two_one_sided_tests_and_the_interval_says_the_same():
    rng = np.random.default_rng(8)
    right = rng.integers(40, 90, 25)
    model, reference = of_equal_size(right + rng.integers(0, 4, 25)), of_equal_size(right)
    difference = (model - reference)[:, 0, 0] / 100
    for margin in (0.01, 0.0165, 0.02, 0.03):
        found = equivalence_over_events(model, reference, accuracy, margin=margin)
        below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        assert found.p_value == pytest.approx(max(below, above), rel=0.05, abs=1e-6)
        assert found.equivalent == (found.p_value < 0.05)
        assert found.equivalent == (-margin < found.interval.low and found.interval.high < margin)
        assert (found.interval.level, found.interval.n_events) == (0.9, 25)


def test_model_is_equivalent_to_itself_and_a_broken_one_is_not():
    counts = drawn(12, 9)
    itself = equivalence_over_events(counts, counts, flood, margin=0.02)
    assert (itself.equivalent, itself.p_value, itself.difference) == (True, 0, 0)
    broken = counts.copy()
    broken[:, 1] = broken[:, 1, ::-1] // 4  # hits and misses swapped
    assert not equivalence_over_events(broken, counts, flood, margin=0.02).equivalent


def test_equivalence_over_seeds_against_a_figure_is_two_one_sample_tests():
    runs = [0.371, 0.384, 0.379, 0.376, 0.369]
    found = equivalence_over_seeds(runs, 0.3832, margin=0.02)
    below = stats.ttest_1samp(runs, 0.3832 + 0.02, alternative="less").pvalue
    above = stats.ttest_1samp(runs, 0.3832 - 0.02, alternative="greater").pvalue
    assert found.p_value == pytest.approx(max(below, above))
    assert found.degrees_of_freedom == 4
    low, high = stats.ttest_1samp(runs, 0.3832).confidence_interval(0.9)
    assert (found.interval.low + 0.3832, found.interval.high + 0.3832) == pytest.approx((low + 0, high + 0))
    assert found.equivalent


def test_equivalence_over_seeds_against_several_runs_is_welchs():
    runs, others = [0.371, 0.384, 0.379, 0.376, 0.369], [0.39, 0.371, 0.402]
    found = equivalence_over_seeds(runs, others, margin=0.02)
    below = stats.ttest_ind(np.array(runs) - 0.02, others, equal_var=False, alternative="less").pvalue
    above = stats.ttest_ind(np.array(runs) + 0.02, others, equal_var=False, alternative="greater").pvalue
    assert found.p_value == pytest.approx(max(below, above))
    welch = stats.ttest_ind(runs, others, equal_var=False)
    assert found.degrees_of_freedom == pytest.approx(welch.df)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(welch.confidence_interval(0.9)))


def test_seeds_without_any_spread_are_judged_by_their_difference_alone():
    assert equivalence_over_seeds([0.38, 0.38], 0.39, margin=0.02).equivalent
    assert not equivalence_over_seeds([0.38, 0.38], 0.41, margin=0.02).equivalent
    assert equivalence_over_seeds([0.38, 0.38], [0.38, 0.38], margin=0.02).p_value == 0


@pytest.mark.parametrize(
    ("runs", "reference", "margin", "message"),
    [
        ([0.4], 0.4, 0.02, "at least two"),
        ([0.4, 0.41], [0.4], 0.02, "at least two"),
        ([0.4, float("nan")], 0.4, 0.02, "finite"),
        ([0.4, 0.41], 0.4, 0.0, "positive"),
        ([0.4, 0.41], 0.4, float("nan"), "positive"),
    ],
)
def test_seeds_that_allow_no_verdict_are_refused(runs, reference, margin, message):
    with pytest.raises(ValueError, match=message):
        equivalence_over_seeds(runs, reference, margin=margin)


def test_sign_flip_by_hand():
    assert sign_flip_test(np.array([1.0, 2.0, 3.0])) == 2 / 8  # only + + + and - - - reach 6
    assert sign_flip_test(np.array([1.0, 2.0, -3.0])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_exact_sign_flips_are_scipys_permutation_test(seed):
    differences = np.random.default_rng(seed).normal(0.3, 1, 10)
    expected = stats.permutation_test(
        (differences, np.zeros(10)), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples"
    )
    assert sign_flip_test(differences) == pytest.approx(expected.pvalue)
    signs = np.array(list(product([1, -1], repeat=10)))
    assert sign_flip_test(differences) == (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()


def test_drawn_sign_flips_come_near_the_exact_ones_and_never_say_zero():
    differences = np.random.default_rng(1).normal(0.4, 1, 12)
    exact, near = sign_flip_test(differences), sign_flip_test(differences, flips=4_000)
    assert near == pytest.approx(exact, abs=4 * (exact / 4_000) ** 0.5)
    assert near != exact
    assert sign_flip_test(np.ones(50)) == 1 / 10_001


def test_events_without_a_difference_neither_help_nor_hurt():
    differences = np.array([0.1, 0.2, 0.05, 0.3])
    assert sign_flip_test(np.concatenate([differences, np.zeros(40)])) == sign_flip_test(differences) == 2 / 16
    assert sign_flip_test(np.zeros(5)) == 1


@pytest.mark.parametrize(("differences", "message"), [([0.1], "from two on"), ([0.1, np.nan, 0.2], "not finite")])
def test_sign_flips_that_say_nothing_are_refused(differences, message):
    with pytest.raises(ValueError, match=message):
        sign_flip_test(np.array(differences))
