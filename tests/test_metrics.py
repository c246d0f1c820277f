"""Scores and calibration from counts: by hand, and beside torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchmetrics import classification as torchs

from floodrepro.evaluation import metrics
from floodrepro.evaluation.chip_table import BINS
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import class_scores, iou, mean_iou, scores

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
    theirs = {
        "mIoU": torchs.MulticlassJaccardIndex(average="macro", **options),
        "F1_Score": torchs.MulticlassF1Score(average="macro", **options),
        "Pixel_Accuracy": torchs.MulticlassAccuracy(average="micro", **options),
        "IoU": torchs.MulticlassJaccardIndex(average=None, **options),
        "Class_Accuracy": torchs.MulticlassAccuracy(average=None, **options),
    }
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    expected = {name: metric(*pair) for name, metric in theirs.items()}
    for name in ("IoU", "Class_Accuracy"):
        expected |= {f"{name}_{k}": value for k, value in enumerate(expected.pop(name))}
    counts = confusion(truth, prediction, classes)
    assert scores(counts) == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)
    assert mean_iou(counts) == scores(counts)["mIoU"]
    known = truth >= 0
    by_class = precision_recall_fscore_support(truth[known], prediction[known])[:3]
    for k in range(classes):
        found = class_scores(counts, k)
        assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx([row[k] for row in by_class])
        assert found["truth_share"] == np.mean(truth[known] == k)
        assert found["iou"] == iou(counts, k) == scores(counts)[f"IoU_{k}"]


def test_class_that_is_absent_is_none_never_zero():
    absent = {"IoU_1": None, "Class_Accuracy_1": None}
    names = ("mIoU", "IoU_0", "Class_Accuracy_0", "F1_Score", "Pixel_Accuracy")
    assert scores(DRY) == dict.fromkeys(names, 1.0) | absent
    assert class_scores(DRY) == dict.fromkeys(("iou", "precision", "recall", "f1"), None) | {"truth_share": 0.0}
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
    names, pooled = metrics.pool_by_event(counts, events)
    assert names == ["EMSR1", "EMSR2", "EMSR3"]
    assert pooled[1].tolist() == [[1800, 0], [200, 0]]
    assert [(entry["iou"], entry["n"], entry["of"]) for entry in metrics.which_iou(counts, events)] == [
        (900 / 1204, 4, "chips"),
        (pytest.approx(0.3), 3, "chips"),
        (pytest.approx(0.45), 2, "events"),
    ]
    assert [entry["iou"] for entry in metrics.which_iou(DRY[None], ["EMSR1"])] == [None, None, None]


def test_calibration_error_is_torchmetrics_and_best_threshold_that_of_counting_again_at_every_edge():
    """Over-confident probabilities of flood in 6 chips, some next to the edges of the bins."""
    rng = np.random.default_rng(5)
    probability = rng.beta(0.5, 1.5, (6, 2_000)).astype(np.float32)
    edges = np.linspace(0, 1, BINS + 1).astype(np.float32)
    near = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(1))])
    probability[0, : len(near)] = np.clip(near, 0, 1)
    probability = probability.astype(np.float64)
    truth = (rng.random(probability.shape) < 0.7 * probability + 0.05).astype(int)
    layers = (layer[:, None] for layer in (truth, (probability > 0.5).astype(int), probability))
    table = count(*layers, classes=2)
    histogram, confidence = table["histogram"], table["confidence"]
    for least in (0.0, 0.1):
        kept = probability >= least
        pair = torch.from_numpy(probability[kept]), torch.from_numpy(truth[kept])
        expected = float(torchs.BinaryCalibrationError(n_bins=10, norm="l1")(*pair))
        assert expected > 0.05
        assert metrics.calibration_error(histogram, confidence, least) == pytest.approx(expected, abs=1e-3)
    assert metrics.calibration_error(histogram[:0], confidence[:0]) is None
    recounted = [confusion(truth, probability >= n / BINS, 2) for n in range(BINS)]
    hits = histogram.sum(axis=0)[1, ::-1].cumsum()[::-1]
    assert hits.tolist() == [counts[1, 1] for counts in recounted]
    assert metrics.best_threshold(histogram) == int(np.argmax([iou(counts) for counts in recounted])) / BINS
