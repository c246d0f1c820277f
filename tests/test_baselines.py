"""Confusion counts, scores as torchmetrics has them, and reference predictors on planted chips."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import zarr
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassJaccardIndex

from floodrepro.data.names import IGNORE_INDEX, LABEL_DIR, SUFFIXES, split_file
from floodrepro.data.synth import generate
from floodrepro.errors import DataError
from floodrepro.evaluation.baselines import V1_TO_BINARY, evaluate_baselines
from floodrepro.evaluation.metrics import confusion, scores

TRAIN, TEST = "EMSR9001_1_35TMF_x413905_y4537585", "EMSR9002_1_35TMF_x413905_y4537585"


def write_chip(root: Path, chip: str, vv_change: list, mask: list) -> None:
    """A chip of one row whose VV is -10 dB at each timestep but for `vv_change` dB at the event."""
    change, truth = np.array([vv_change], np.float16), np.array([mask], np.int8)
    bands = np.full((4, 2, *change.shape), -10, np.float16)
    bands[2, 0] += change
    path = root / "S1RTC" / f"{chip}{SUFFIXES['S1RTC']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zarr.ZipStore(str(path), mode="w") as store:
        zarr.group(store).array("bands", bands)
        zarr.consolidate_metadata(store)
    path = root / LABEL_DIR / f"{chip}{SUFFIXES[LABEL_DIR]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": 1, "height": 1, "width": truth.shape[1], "dtype": "int8"}
    transform = rasterio.Affine(10, 0, 413900, 0, -10, 4537590)
    with rasterio.open(path, "w", **profile, crs="EPSG:32635", transform=transform) as target:
        target.write(truth, 1)


@pytest.fixture
def planted(tmp_path):
    """Two chips; on the training chip a fall of more than 4 dB is flood without an error."""
    write_chip(tmp_path, TRAIN, [-3.8, -4.2, -8, 0, 1, -2], [0, 1, 1, 0, 0, 0])
    write_chip(tmp_path, TEST, [-5, -1, -9, 0, -3, -20], [1, 1, 0, 0, 0, IGNORE_INDEX])
    (tmp_path / "train.txt").write_text(f"{TRAIN}\n")
    (tmp_path / "test.txt").write_text(f"{TEST}\n")
    return {"data_root": tmp_path, "train_split": tmp_path / "train.txt", "test_split": tmp_path / "test.txt"}


def as_torchmetrics(truth, prediction, num_classes):
    options = {"num_classes": num_classes, "ignore_index": IGNORE_INDEX}
    metrics = {
        "mIoU": MulticlassJaccardIndex(average="macro", **options),
        "F1_Score": MulticlassF1Score(average="macro", **options),
        "Pixel_Accuracy": MulticlassAccuracy(average="micro", **options),
    }
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    found = {name: float(metric(*pair)) for name, metric in metrics.items()}
    per_class = MulticlassJaccardIndex(average=None, **options)(*pair)
    return found | {f"IoU_{k}": float(value) for k, value in enumerate(per_class)}


def test_counts_have_truth_in_rows_and_drop_ignored_pixels():
    truth = np.array([[0, 0, 1], [1, 1, -1]], np.int8)
    prediction = np.array([[0, 1, 1], [0, 0, 1]])
    assert confusion(truth, prediction, 2).tolist() == [[1, 1], [2, 1]]
    assert confusion(truth, prediction, 2).dtype == np.int64
    assert confusion(truth, prediction == 1, 3).tolist() == [[1, 1, 0], [2, 1, 0], [0, 0, 0]]
    assert confusion(np.where(truth < 0, 9, truth), prediction, 2, ignore_index=9).tolist() == [[1, 1], [2, 1]]


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([0, 1], [0, 1, 1], "differ in shape"),
        ([0, 2], [0, 1], r"truth holds \[2\]"),
        ([0, -9], [0, 1], r"truth holds \[-9\]"),
        ([0, 1], [0, 2], r"prediction holds \[2\]"),
        ([0, 1], [-1, 1], r"prediction holds \[-1\]"),
    ],
)
def test_pixels_that_are_no_class_are_an_error_not_a_count(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        confusion(np.array(truth), np.array(prediction), 2)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_torchmetrics(num_classes, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, num_classes, (3, 40, 40))
    guess = rng.integers(0, num_classes, truth.shape)
    prediction = np.where(rng.random(truth.shape) < 0.7, np.maximum(truth, 0), guess)
    found = scores(confusion(truth, prediction, num_classes))
    assert found == pytest.approx(as_torchmetrics(truth, prediction, num_classes), abs=1e-6)


@pytest.mark.parametrize(
    ("truth", "prediction"),
    [
        ([0, 0, 0], [0, 0, 0]),  # flood in neither: it counts 0 by itself and is left out of the means
        ([1, 1, -1], [1, 1, 0]),
        ([0, 0, 0], [0, 1, 0]),  # flood only predicted
        ([0, 1, 1], [0, 0, 0]),  # flood only in the truth
        ([0, 0, 0], [1, 1, 1]),
        ([-1, -1], [0, 1]),  # nothing to count
    ],
)
def test_absent_classes_are_treated_as_torchmetrics_treats_them(truth, prediction):
    truth, prediction = np.array(truth), np.array(prediction)
    expected = as_torchmetrics(truth, prediction, 2)
    assert scores(confusion(truth, prediction, 2)) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_scores_have_exactly_the_names_that_terratorch_reports():
    assert list(scores(np.eye(2, dtype=np.int64))) == ["mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy"]


def test_threshold_is_chosen_on_the_training_split_and_applied_to_the_test_split(planted):
    everything, nothing, drop = evaluate_baselines(**planted)
    assert [b.name for b in (everything, nothing, drop)] == ["everything flooded", "nothing flooded", "VV drop"]
    assert drop.detail == "VV drop > 4.0 dB, chosen on the training split"
    assert drop.counts.tolist() == [[2, 1], [1, 1]]
    assert drop.scores["IoU_1"] == pytest.approx(1 / 3)
    assert everything.counts.tolist() == [[0, 3], [0, 2]]
    assert nothing.counts.tolist() == [[3, 0], [2, 0]]


def test_smallest_fall_wins_a_tie(planted):
    drop = evaluate_baselines(**planted, thresholds=(7.0, 3.0, 2.5, 3.5))[-1]
    assert "2.5 dB" in drop.detail


def test_missing_radar_pixels_are_not_flooded(planted):
    write_chip(planted["data_root"], TEST, [np.nan, np.nan, -9], [1, 0, 1])
    assert evaluate_baselines(**planted)[-1].counts.tolist() == [[1, 0], [1, 1]]


def test_three_class_masks_are_read_through_a_label_map(planted):
    write_chip(planted["data_root"], TRAIN, [-3.8, -4.2, -8, 0], [0, 2, 2, 1])
    write_chip(planted["data_root"], TEST, [-9, -9, 0, 0], [2, 1, 2, IGNORE_INDEX])
    assert evaluate_baselines(**planted, label_map=V1_TO_BINARY)[-1].counts.tolist() == [[0, 1], [1, 1]]


def test_mask_value_that_the_label_map_does_not_know_is_an_error(planted):
    write_chip(planted["data_root"], TEST, [0, 0], [0, 2])
    with pytest.raises(DataError, match="the mask holds 2") as error:
        evaluate_baselines(**planted)
    assert TEST in error.value.where


def test_missing_or_damaged_files_are_named(planted):
    root = planted["data_root"]
    radar = root / "S1RTC" / f"{TEST}{SUFFIXES['S1RTC']}"
    radar.write_bytes(radar.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read the radar file") as error:
        evaluate_baselines(**planted)
    assert error.value.where == str(radar)
    radar.unlink()
    with pytest.raises(DataError, match="missing"):
        evaluate_baselines(**planted)
    (root / LABEL_DIR / f"{TEST}{SUFFIXES[LABEL_DIR]}").unlink()
    with pytest.raises(DataError, match="cannot read the mask"):
        evaluate_baselines(**planted)
    (root / "test.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no chip"):
        evaluate_baselines(**planted)
    (root / "test.txt").unlink()
    with pytest.raises(DataError, match="cannot read the split file"):
        evaluate_baselines(**planted)


def test_chip_whose_parts_differ_in_size_is_an_error(planted):
    write_chip(planted["data_root"], TRAIN, [0, 0], [0, 0])
    radar = planted["data_root"] / "S1RTC"
    (radar / f"{TRAIN}{SUFFIXES['S1RTC']}").replace(radar / f"{TEST}{SUFFIXES['S1RTC']}")
    write_chip(planted["data_root"], TRAIN, [0, -9], [0, 1])
    with pytest.raises(DataError, match="pixels") as error:
        evaluate_baselines(**planted)
    assert error.value.where == TEST


def test_threshold_on_generated_chips_sees_the_flood_but_not_well(tmp_path):
    generate(tmp_path, events=5, chips=45, size=64, protocol="v0", seed=42)
    splits = {f"{split}_split": tmp_path / "split" / split_file(split) for split in ("train", "test")}
    everything, nothing, drop = evaluate_baselines(tmp_path / "data", **splits)
    assert nothing.scores["IoU_1"] == 0
    assert 0.05 < everything.scores["IoU_1"] < 0.3
    assert max(0.3, everything.scores["IoU_1"] + 0.1) < drop.scores["IoU_1"] < 0.6
    assert everything.counts.sum() == nothing.counts.sum() == drop.counts.sum()
