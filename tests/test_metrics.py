"""Scores of each class from counts: by hand, and beside torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, precision_recall_fscore_support
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from floodrepro.evaluation.metrics import confusion, iou, mean_iou, per_class, scores

HAND = np.array([[50, 10], [5, 35]])  # flood: 35 hits, 10 false alarms, 5 misses
DRY = np.array([[100, 0], [0, 0]])


def random_pair(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, 3_000)
    return truth, np.where(rng.random(3_000) < 0.6, truth, rng.integers(0, classes, 3_000))


def test_scores_of_each_class_by_hand():
    found = per_class(HAND)
    assert found["iou"].tolist() == [50 / 65, 35 / 50]
    assert found["f1"].tolist() == [100 / 115, 70 / 85]
    assert found["precision"].tolist() == [50 / 55, 35 / 45]
    assert found["recall"].tolist() == found["accuracy"].tolist() == [50 / 60, 35 / 40]
    assert iou(HAND, 1) == 35 / 50
    assert mean_iou(HAND) == pytest.approx((50 / 65 + 35 / 50) / 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_each_class_are_those_of_torchmetrics_and_scikit_learn(classes):
    truth, prediction = random_pair(classes, seed=classes)
    found = per_class(confusion(truth, prediction, classes))
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    for key, metric in (("iou", MulticlassJaccardIndex), ("f1", MulticlassF1Score), ("accuracy", MulticlassAccuracy)):
        assert found[key] == pytest.approx(metric(classes, average=None)(*pair).numpy(), abs=1e-6)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, prediction)
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(f1)
    assert found["iou"] == pytest.approx(jaccard_score(truth, prediction, average=None))


def test_dry_chip_predicted_dry_is_undefined_not_zero():
    found = per_class(DRY)
    assert np.isnan(iou(DRY, 1))
    assert all(np.isnan(found[key][1]) for key in found)
    assert found["iou"][0] == 1
    assert mean_iou(DRY) == 1  # over the classes that are there, as torchmetrics' macro


def test_dry_chip_with_a_false_alarm_scores_zero():
    found = per_class(np.array([[99, 1], [0, 0]]))
    assert found["iou"][1] == found["precision"][1] == 0
    assert np.isnan(found["recall"][1])


def test_missed_flood_has_recall_zero_and_no_precision():
    found = per_class(np.array([[90, 0], [10, 0]]))
    assert found["recall"][1] == found["iou"][1] == 0
    assert np.isnan(found["precision"][1])


def test_without_a_counted_pixel_nothing_is_defined():
    empty = np.zeros((2, 2), np.int64)
    assert np.isnan(mean_iou(empty))
    assert all(np.isnan(values).all() for values in per_class(empty).values())


def test_many_chips_at_once_give_what_each_gives_alone():
    stack = np.stack([confusion(*random_pair(3, seed), 3) for seed in range(6)]).reshape(2, 3, 3, 3)
    stack[0, 1] = 0
    for place in np.ndindex(2, 3):
        assert np.array_equal(iou(stack, 2)[place], iou(stack[place], 2), equal_nan=True)
        assert np.array_equal(mean_iou(stack)[place], mean_iou(stack[place]), equal_nan=True)
        for key, values in per_class(stack).items():
            assert np.array_equal(values[place], per_class(stack[place])[key], equal_nan=True)


def test_agrees_with_the_scores_that_terratorch_reports():
    counts = confusion(*random_pair(3, seed=9), 3)
    reported = scores(counts)
    assert mean_iou(counts) == pytest.approx(reported["mIoU"])
    assert np.mean(per_class(counts)["f1"]) == pytest.approx(reported["F1_Score"])
    assert iou(counts, 2) == pytest.approx(reported["IoU_2"])


def test_counts_that_are_no_confusion_matrix_are_refused():
    with pytest.raises(ValueError, match="two axes of K classes"):
        per_class(np.zeros((4, 2, 3), np.int64))
    for k in (-1, 2):
        with pytest.raises(ValueError, match="classes 0 to 1"):
            iou(HAND, k)
