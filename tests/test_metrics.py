"""Scores and calibration from counts: by hand, and beside torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, precision_recall_fscore_support
from torchmetrics.classification import (
    BinaryCalibrationError,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
)

from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import (
    class_scores,
    expected_calibration_error,
    iou,
    mean_iou,
    pool_by_event,
    reliability,
    scores,
    threshold_sweep,
    which_iou,
)

DRY = np.array([[100, 0], [0, 0]])


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    return confusion_matrix(truth.ravel(), prediction.ravel(), labels=range(classes))  # others are left out


def random_pair(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, classes, 3_000)
    return truth, np.where(rng.random(3_000) < 0.6, np.maximum(truth, 0), rng.integers(0, classes, 3_000))


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_are_those_of_torchmetrics_under_terratorchs_names(classes):
    truth, prediction = random_pair(classes, seed=classes)
    options = {"num_classes": classes, "ignore_index": -1}
    metrics = {
        "mIoU": MulticlassJaccardIndex(average="macro", **options),
        "F1_Score": MulticlassF1Score(average="macro", **options),
        "Pixel_Accuracy": MulticlassAccuracy(average="micro", **options),
    }
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    expected = {name: float(metric(*pair)) for name, metric in metrics.items()}
    each = MulticlassJaccardIndex(average=None, **options)(*pair)
    expected |= {f"IoU_{k}": float(value) for k, value in enumerate(each)}
    counts = confusion(truth, prediction, classes)
    assert scores(counts) == pytest.approx(expected, abs=1e-6)
    assert mean_iou(counts) == pytest.approx(expected["mIoU"], abs=1e-6)
    known = truth >= 0
    by_class = precision_recall_fscore_support(truth[known], prediction[known])[:3]
    for k in range(classes):
        found = class_scores(counts, k)
        assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx([row[k] for row in by_class])
        assert [found["truth_share"], found["predicted_share"]] == [
            np.mean(values[known] == k) for values in (truth, prediction)
        ]
        assert found["iou"] == iou(counts, k) == pytest.approx(float(each[k]), abs=1e-6)


def test_class_that_is_absent_is_none_never_zero():
    assert scores(DRY) == {"mIoU": 1.0, "IoU_0": 1.0, "IoU_1": None, "F1_Score": 1.0, "Pixel_Accuracy": 1.0}
    assert class_scores(DRY)["iou"] is class_scores(DRY)["precision"] is class_scores(DRY)["recall"] is None
    assert np.isnan(iou(DRY))
    alarm, missed = np.array([[99, 1], [0, 0]]), np.array([[90, 0], [10, 0]])
    assert (class_scores(alarm)["iou"], class_scores(alarm)["recall"]) == (0, None)
    assert (class_scores(missed)["recall"], class_scores(missed)["precision"]) == (0, None)
    assert set(scores(np.zeros((2, 2), np.int64)).values()) == {None}


def test_many_chips_at_once_give_what_each_gives_alone():
    stack = np.stack([confusion(*random_pair(3, seed), 3) for seed in range(6)]).reshape(2, 3, 3, 3)
    stack[0, 1] = 0
    for place in np.ndindex(2, 3):
        assert np.array_equal(iou(stack, 2)[place], iou(stack[place], 2), equal_nan=True)
        assert np.array_equal(mean_iou(stack)[place], mean_iou(stack[place]), equal_nan=True)


def test_three_ious_have_three_names_and_three_n():
    """One large flood found, one small flood missed, a dry chip, and one of 4 pixels that decides nothing."""
    counts = np.array([[[0, 0], [100, 900]], [[800, 0], [200, 0]], [[1000, 0], [0, 0]], [[996, 0], [4, 0]]])
    events = ["EMSR1", "EMSR2", "EMSR2", "EMSR3"]
    names, pooled = pool_by_event(counts, events)
    assert names == ["EMSR1", "EMSR2", "EMSR3"]
    assert pooled[1].tolist() == [[1800, 0], [200, 0]]
    assert [(entry["iou"], entry["n"], entry["of"]) for entry in which_iou(counts, events)] == [
        (900 / 1204, 4, "chips"),
        (pytest.approx(0.3), 3, "chips"),
        (pytest.approx(0.45), 2, "events"),
    ]
    assert [entry["iou"] for entry in which_iou(DRY[None], ["EMSR1"])] == [None, None, None]


def table_of(truth: np.ndarray, probability: np.ndarray) -> ChipTable:
    """The chip table of truth (N, P) and probabilities of flood (N, P)."""
    layers = (layer[:, None] for layer in (truth, (probability > 0.5).astype(int), probability))
    return ChipTable.of_batches(
        [(f"EMSR{n}_1", f"EMSR{n}") for n in range(len(truth))], [count(*layers, classes=2)], {}
    )


@pytest.fixture(scope="module")
def flooded() -> tuple[ChipTable, np.ndarray, np.ndarray]:
    """Over-confident flood probabilities of 6 chips: table, truth (6, 2000), probability of flood (6, 2000)."""
    rng = np.random.default_rng(5)
    probability = rng.beta(0.5, 1.5, (6, 2_000)).astype(np.float32).astype(np.float64)
    truth = (rng.random(probability.shape) < 0.7 * probability + 0.05).astype(int)
    return table_of(truth, probability), truth, probability


@pytest.mark.parametrize("bins", [10, 50])
def test_reliability_and_its_error_are_scikit_learns_and_torchmetrics(flooded, bins):
    table, truth, probability = flooded
    found = reliability(table.histogram, table.confidence, bins)
    frequency, confidence = calibration_curve(truth.ravel(), probability.ravel(), n_bins=bins)
    filled = found.pixels > 0
    assert found.frequency[filled] == pytest.approx(frequency)
    assert found.confidence[filled] == pytest.approx(confidence)
    metric = BinaryCalibrationError(n_bins=bins, norm="l1")
    expected = float(metric(torch.from_numpy(probability.ravel()), torch.from_numpy(truth.ravel())))
    assert expected > 0.05
    assert expected_calibration_error(found) == pytest.approx(expected, abs=1e-5)
    assert table.brier == pytest.approx(brier_score_loss(truth.ravel(), probability.ravel()))
    with pytest.raises(ValueError, match="cannot reshape"):
        reliability(table.histogram, table.confidence, 15)


def test_sweep_equals_counting_again_at_each_threshold_even_next_to_the_bin_edges(flooded):
    _, truth, probability = flooded
    edges = np.linspace(0, 1, BINS + 1).astype(np.float32)
    near = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(1))])
    probability[0, : len(near)] = np.clip(near, 0, 1)
    table = table_of(truth, probability)
    thresholds, counts = threshold_sweep(table.histogram)
    assert thresholds.tolist() == [b / BINS for b in range(BINS)]
    for threshold, found in zip(thresholds, counts, strict=True):
        assert np.array_equal(found, confusion(truth, probability >= threshold, 2))


def test_without_a_counted_pixel_nothing_is_claimed(flooded):
    table = flooded[0].subset([])
    assert expected_calibration_error(reliability(table.histogram, table.confidence)) is None
    assert table.brier is None
