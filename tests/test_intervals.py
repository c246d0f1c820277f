"""Intervals, the three words and seeds: by hand, and beside scipy."""

import numpy as np
import pytest
from scipy import stats

from floodrepro.evaluation.intervals import Result, jackknife, mean_over_events, over_seeds
from floodrepro.evaluation.metrics import iou


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Of events with equally many pixels this is a plain mean over events."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def of_equal_size(right: np.ndarray | list[int]) -> np.ndarray:
    """Events of 100 pixels, so many of them right."""
    return np.array([[[0, 0], [100 - hits, hits]] for hits in right])


def test_jackknife_is_as_by_hand_and_its_interval_of_equal_events_and_of_seeds_is_students_of_their_mean():
    counts = np.array([[[0, 1], [1, 2]], [[0, 0], [2, 6]], [[0, 3], [0, 1]]])  # flood IoU 2/4, 6/8, 1/4; pooled 9/16
    found = jackknife(counts, iou)
    without = np.array([7 / 12, 3 / 8, 8 / 12])
    assert found.estimate == 9 / 16
    assert found.error == pytest.approx(np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum()))
    right = [90, 80, 85, 60, 95, 70, 75]
    expected = stats.ttest_1samp(np.array(right) / 100, 0.5).confidence_interval(0.9)
    events, seeds = jackknife(of_equal_size(right), accuracy), over_seeds(np.array(right) / 100, 0.5)
    assert events.interval() == pytest.approx(tuple(expected))
    assert seeds.interval() == pytest.approx(tuple(end - 0.5 for end in expected))
    assert [(one.freedom, one.n) for one in (events, seeds)] == [(pytest.approx(6), 7)] * 2


def test_paired_interval_takes_out_what_both_models_share():
    rng = np.random.default_rng(3)
    right = rng.integers(40, 90, 30)
    model, reference = of_equal_size(right + rng.integers(3, 6, 30)), of_equal_size(right)
    expected = stats.ttest_rel(model[:, 1, 1] / 100, reference[:, 1, 1] / 100).confidence_interval(0.9)
    for paired in (jackknife(model, accuracy, other=reference), mean_over_events(model, other=reference)):
        assert paired.interval() == pytest.approx(tuple(expected), abs=1e-3)
    assert jackknife(model, accuracy, other=reference).error < jackknife(model, accuracy).error / 3


def test_effective_events_are_all_of_them_when_alike_and_one_when_one_is_everything():
    alike = np.tile([[700, 20], [30, 250]], (40, 1, 1))
    assert jackknife(alike, iou).freedom == pytest.approx(39)
    dry = np.tile([[10**9, 0], [0, 0]], (20, 1, 1))
    assert jackknife(np.concatenate([alike, dry]), iou).freedom == pytest.approx(39)  # dry land weighs nothing
    giant = alike.copy()
    giant[0] *= 10_000_000
    assert jackknife(giant, iou, other=giant).freedom == 1  # t needs one degree of freedom at least
    three = np.array([[[0, 0], [0, 300]], [[0, 0], [0, 100]], [[0, 0], [50, 50]]])
    assert jackknife(three, iou).freedom == pytest.approx(25 / 11 - 1)


def test_positive_class_need_not_be_the_last():
    counts = np.array([[[300, 5], [2, 90]], [[100, 3], [4, 500]], [[90, 1], [9, 40]]])
    assert jackknife(counts, lambda c: iou(c, 0), positive=0) == jackknife(counts[:, ::-1, ::-1], iou)
    found = mean_over_events(counts, positive=0)  # 305, 103 and 91 pixels: the last is too small
    assert (found.estimate, found.n) == (pytest.approx((300 / 307 + 100 / 107) / 2), 2)


def test_equivalence_is_two_one_sided_t_tests():
    rng = np.random.default_rng(8)
    right = rng.integers(40, 90, 25)
    model, reference = of_equal_size(right + rng.integers(0, 4, 25)), of_equal_size(right)
    difference = (model - reference)[:, 1, 1] / 100
    words = set()
    for margin in (0.01, 0.0165, 0.02, 0.03):
        below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        found = mean_over_events(model, other=reference)
        (low, high), word = found.interval(), found.verdict(margin)
        assert (word == "equivalent") == (max(below, above) < 0.05)
        assert (word == "different") == (high < -margin or low > margin)
        words.add(word)
    assert words == {"equivalent", "undecided", "different"}


def test_needed_events_are_the_fewest_that_decide():
    found = Result(0.004, 0.012, 19.0, 20)
    assert found.verdict(0.02) == "undecided"
    enough = found.needed(0.02)
    for n, decided in ((enough, True), (enough - 1, False)):
        scaled = Result(0.004, 0.012 * (20 / n) ** 0.5, 19.0 * n / 20, n)
        assert (scaled.verdict(0.02) != "undecided") is decided
    assert Result(0.02, 0.01, 19.0, 20).needed(0.02) is None  # on the margin itself


def test_no_difference_in_any_event_is_no_proof_with_few_events():
    """The spread is unknown then, not zero: the false equivalences of models that differ in one event of ten."""
    counts = np.tile([[700, 20], [30, 250]], (30, 1, 1))
    few, many = (jackknife(np.tile(counts, (n, 1, 1)), iou, other=np.tile(counts, (n, 1, 1))) for n in (1, 5))
    assert few.interval() == pytest.approx((0.05 ** (1 / 30) - 1, 1 - 0.05 ** (1 / 30)))
    assert few.verdict(0.02) == "undecided"
    assert few.needed(0.02) == 149
    assert many.verdict(0.02) == "equivalent"


def test_what_has_no_interval_is_refused():
    for call, given, message in (
        (jackknife, (of_equal_size([50]), iou), "at least two"),
        (jackknife, (np.zeros((5, 2, 2), np.int64), iou), "undefined over all events"),
        (jackknife, (np.array([[[9, 0], [1, 2]], [[5, 0], [0, 0]]]), iou), "depends on one event"),
        (mean_over_events, (of_equal_size([50]),), "at least two"),
        (over_seeds, ([0.4], 0.4), "at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*given)
