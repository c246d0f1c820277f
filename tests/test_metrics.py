"""Scores and calibration from counts: by hand, and beside torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_recall_fscore_support
from torchmetrics import classification as torchs

from floodrepro.evaluation import metrics
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
def test_scores_are_those_of_scikit_learn(classes):
    """Under TerraTorch's names; with its own figures they are compared in tests/test_passes.py."""
    truth, prediction = random_pair(classes, seed=classes)
    counts, known = confusion(truth, prediction, classes), truth >= 0
    pair = truth[known], prediction[known]
    found, ious = scores(counts), jaccard_score(*pair, average=None)
    expected = {"mIoU": ious.mean(), "F1_Score": f1_score(*pair, average="macro")}
    expected["Pixel_Accuracy"] = np.mean(pair[0] == pair[1])
    precision, recall, f1, _ = precision_recall_fscore_support(*pair)
    for k in range(classes):
        expected |= {f"IoU_{k}": ious[k], f"Class_Accuracy_{k}": recall[k]}
        one = {"iou": ious[k], "precision": precision[k], "recall": recall[k], "f1": f1[k]}
        assert class_scores(counts, k) == pytest.approx(one | {"truth_share": np.mean(pair[0] == k)})
        assert iou(counts, k) == found[f"IoU_{k}"]
    assert found == pytest.approx(expected)
    assert mean_iou(counts) == found["mIoU"]


def test_class_that_is_absent_is_none_never_zero():
    absent = {"IoU_1": None, "Class_Accuracy_1": None}
    names = ("mIoU", "IoU_0", "Class_Accuracy_0", "F1_Score", "Pixel_Accuracy")
    assert scores(DRY) == dict.fromkeys(names, 1.0) | absent
    assert class_scores(DRY) == dict.fromkeys(("iou", "precision", "recall", "f1"), None) | {"truth_share": 0.0}
    alarm, missed = np.array([[99, 1], [0, 0]]), np.array([[90, 0], [10, 0]])
    assert (class_scores(alarm)["iou"], class_scores(alarm)["recall"]) == (0, None)
    assert (class_scores(missed)["recall"], class_scores(missed)["precision"]) == (0, None)
    assert set(scores(np.zeros((2, 2), np.int64)).values()) == {None}


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


def test_calibration_error_is_torchmetrics():
    """Of over-confident probabilities of flood in 6 chips."""
    rng = np.random.default_rng(5)
    probability = rng.beta(0.5, 1.5, (6, 2_000))
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
