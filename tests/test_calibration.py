"""Calibration and threshold sweeps from histograms, against the pixels, torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.classification import BinaryCalibrationError

from floodrepro.evaluation.calibration import (
    brier,
    classwise_ece,
    expected_calibration_error,
    reliability,
    threshold_sweep,
)
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.metrics import confusion


def table_of(truth: np.ndarray, probability: np.ndarray) -> ChipTable:
    """The chip table of truth (N, P) and probabilities (N, P, K)."""
    chips, _, classes = probability.shape
    counts = np.stack([confusion(t, p.argmax(-1), classes) for t, p in zip(truth, probability, strict=True)])
    histogram = np.zeros((chips, classes, classes, BINS), np.int64)
    confidence = np.zeros((chips, classes, BINS))
    place = np.minimum(np.floor(probability * BINS).astype(int), BINS - 1)
    for k in range(classes):
        where = np.broadcast_to(np.arange(chips)[:, None], truth.shape)
        np.add.at(histogram, (where, truth, k, place[..., k]), 1)
        np.add.at(confidence, (where, k, place[..., k]), probability[..., k])
    squared = ((probability - np.eye(classes)[truth]) ** 2).sum(axis=1)
    names = np.array([f"EMSR{n}_1" for n in range(chips)])
    return ChipTable(names, counts, np.zeros(chips, np.int64), histogram, confidence, squared, {})


@pytest.fixture(scope="module")
def flooded() -> tuple[ChipTable, np.ndarray, np.ndarray]:
    """Over-confident flood probabilities of 6 chips: table, truth (6, 2000), probability of flood (6, 2000)."""
    rng = np.random.default_rng(5)
    probability = rng.beta(0.5, 1.5, (6, 2_000)).astype(np.float32).astype(np.float64)
    truth = (rng.random(probability.shape) < 0.7 * probability + 0.05).astype(int)
    return table_of(truth, np.stack([1 - probability, probability], axis=-1)), truth, probability


@pytest.fixture(scope="module")
def three() -> tuple[ChipTable, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    probability = rng.dirichlet([0.5, 0.7, 1], (4, 1_500))
    truth = np.where(rng.random((4, 1_500)) < 0.6, probability.argmax(-1), rng.integers(0, 3, (4, 1_500)))
    return table_of(truth, probability), truth, probability


@pytest.mark.parametrize("bins", [5, 10, 25, 50])
def test_reliability_is_scikit_learns_calibration_curve(flooded, bins):
    table, truth, probability = flooded
    found = reliability(table, 1, bins)
    frequency, confidence = calibration_curve(truth.ravel(), probability.ravel(), n_bins=bins)
    filled = found.pixels > 0
    assert found.frequency[filled] == pytest.approx(frequency)
    assert found.confidence[filled] == pytest.approx(confidence)
    assert found.pixels.sum() == truth.size
    assert found.edges == pytest.approx(np.linspace(0, 1, bins + 1))


@pytest.mark.parametrize("bins", [10, 50])
def test_flood_ece_is_that_of_torchmetrics(flooded, bins):
    table, truth, probability = flooded
    metric = BinaryCalibrationError(n_bins=bins, norm="l1")
    expected = float(metric(torch.from_numpy(probability.ravel()), torch.from_numpy(truth.ravel())))
    assert expected > 0.05
    assert expected_calibration_error(reliability(table, 1, bins)) == pytest.approx(expected, abs=1e-5)


def test_ece_by_hand_and_empty_bins_are_nan():
    truth = np.array([[0, 1, 1, 1]])
    flood = np.array([[0.1, 0.15, 0.9, 0.95]])
    table = table_of(truth, np.stack([1 - flood, flood], axis=-1))
    found = reliability(table, 1, bins=5)
    assert found.pixels.tolist() == [2, 0, 0, 0, 2]
    assert np.isnan(found.confidence[1:4]).all()
    assert np.isnan(found.frequency[1:4]).all()
    assert found.frequency[[0, 4]].tolist() == [0.5, 1]
    assert expected_calibration_error(found) == pytest.approx((2 * 0.375 + 2 * 0.075) / 4)
    assert brier(table) == pytest.approx(2 * (0.1**2 + 0.85**2 + 0.1**2 + 0.05**2) / 4)


def test_well_calibrated_probabilities_have_a_small_error_and_shifted_ones_a_large_one():
    rng = np.random.default_rng(7)
    flood = rng.random((4, 20_000))
    truth = (rng.random(flood.shape) < flood).astype(int)
    assert expected_calibration_error(reliability(table_of(truth, np.stack([1 - flood, flood], -1)), 1)) < 0.01
    shifted = np.clip(flood + 0.2, 0, 1)
    found = expected_calibration_error(reliability(table_of(truth, np.stack([1 - shifted, shifted], -1)), 1))
    assert found == pytest.approx(np.mean(shifted - flood), abs=0.01)


def test_classwise_error_is_each_class_against_the_rest(three):
    table, truth, probability = three
    for k, found in enumerate(classwise_ece(table)):
        metric = BinaryCalibrationError(n_bins=10, norm="l1")
        pair = torch.from_numpy(probability[..., k].ravel()), torch.from_numpy((truth == k).astype(int).ravel())
        assert found == pytest.approx(float(metric(*pair)), abs=1e-5)


def test_brier_is_scikit_learns(flooded, three):
    table, truth, probability = flooded
    assert brier(table) == pytest.approx(2 * brier_score_loss(truth.ravel(), probability.ravel()))
    table, truth, probability = three
    expected = brier_score_loss(truth.ravel(), probability.reshape(-1, 3), scale_by_half=False)
    assert brier(table) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_sweep_equals_counting_the_pixels_again_at_each_threshold(three, k):
    table, truth, probability = three
    thresholds, counts = threshold_sweep(table, k)
    assert thresholds.tolist() == [b / BINS for b in range(BINS)]
    for threshold, found in zip(thresholds, counts, strict=True):
        again = confusion((truth == k).astype(int), (probability[..., k] >= threshold).astype(int), 2)
        assert np.array_equal(found, again)


def test_sweep_is_exact_for_float32_probabilities_next_to_the_bin_edges():
    edges = np.linspace(0, 1, BINS + 1).astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))])
    flood = np.clip(near, 0, 1).astype(np.float64)[None]
    truth = (np.arange(flood.size) % 2)[None]
    thresholds, counts = threshold_sweep(table_of(truth, np.stack([1 - flood, flood], axis=-1)))
    for threshold, found in zip(thresholds, counts, strict=True):
        assert np.array_equal(found, confusion(truth, (flood >= threshold).astype(int), 2))


def test_sweep_starts_where_everything_is_flood_and_passes_the_two_class_argmax(flooded):
    table, truth, _ = flooded
    thresholds, counts = threshold_sweep(table)
    assert counts[0].tolist() == [[0, int((truth == 0).sum())], [0, int((truth == 1).sum())]]
    assert np.array_equal(counts[thresholds.tolist().index(0.5)], table.counts.sum(axis=0))


def test_without_a_counted_pixel_nothing_is_claimed(flooded):
    table = flooded[0].subset([])
    assert np.isnan(expected_calibration_error(reliability(table, 1)))
    assert np.isnan(brier(table))
    assert threshold_sweep(table)[1].sum() == 0


def test_bins_that_cannot_be_made_and_classes_that_are_not_there_are_refused(flooded):
    for bins in (0, 15, 100):
        with pytest.raises(ValueError, match="choose a divisor"):
            reliability(flooded[0], 1, bins)
    for k in (-1, 2):
        with pytest.raises(ValueError, match="classes 0 to 1"):
            threshold_sweep(flooded[0], k)
