"""Reference predictors on planted chips: thresholds come from the training split, tables are like any model's."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr

from conftest import save
from floodrepro.data.protocols import IGNORE_INDEX, LABEL_DIR, PROTOCOLS, suffix_of
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import ChipTable, read_table, refuse_to_compare
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import class_scores

TRAIN, TEST = "EMSR9001_1_35TMF_x413905_y4537585", "EMSR9002_1_35TMF_x413905_y4537585"


def write_chip(root: Path, chip: str, falls: list, mask: list) -> None:
    """A chip of one row whose VV and VH are -10 and -15 dB at each timestep but for `falls` (VV, VH) at the event."""
    bands = np.empty((4, 2, 1, len(mask)), np.float16)
    bands[:, 0], bands[:, 1] = -10, -15
    bands[2, :, 0] -= np.array(falls, np.float16).T
    path = root / "data" / "S1RTC" / f"{chip}{suffix_of(PROTOCOLS['v0'], 'S1RTC')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zarr.ZipStore(str(path), mode="w") as store:
        zarr.group(store).array("bands", bands)
        zarr.consolidate_metadata(store)
    path = root / "data" / LABEL_DIR / f"{chip}{suffix_of(PROTOCOLS['v0'], LABEL_DIR)}"
    save(path, np.array([mask], np.int8), crs="EPSG:32635", transform=rasterio.Affine(10, 0, 413900, 0, -10, 4537590))


def model_on(chip: str, truth: list) -> ChipTable:
    """The table of a model that is right everywhere."""
    batch = count(np.array([[truth]]), np.maximum([[truth]], 0), classes=2)
    metadata = {"split": "test", "protocol": "v0", "class_names": ["rest", "flood"]}
    return ChipTable.of_batches([(chip, chip.split("_")[0])], [batch], metadata)


@pytest.fixture
def planted(tmp_path: Path) -> tuple[dict, ChipTable]:
    """On the training chip VV falls by more than 4 dB exactly in flood; VH tells flood from a dark field as well."""
    dark_field = (9, 2)
    write_chip(tmp_path, TRAIN, [(3.8, 3), (4.2, 6), (8, 6), (0, 0), dark_field, (-2, 0)], [0, 1, 1, 0, 0, 0])
    truth = [1, 1, 0, 0, 0, IGNORE_INDEX]
    write_chip(tmp_path, TEST, [(5, 7), (1, 0), dark_field, (0, 0), (3, 1), (20, 20)], truth)
    for name, chip in (("train", TRAIN), ("test", TEST)):
        (tmp_path / f"{name}.txt").write_text(f"{chip}\n")
    splits = {f"{name}_split": str(tmp_path / f"{name}.txt") for name in ("train", "test")}
    arguments = {"protocol": "v0", "data_root": str(tmp_path / "data"), **splits}
    recipe = {"data": {"class_path": "floodrepro.data.datamodule.FloodDataModule", "init_args": arguments}}
    return recipe, model_on(TEST, truth)


def test_thresholds_are_chosen_on_the_training_split_and_tables_lie_beside_the_models(planted, tmp_path: Path):
    recipe, table = planted
    paths = write_baselines(recipe, table, tmp_path / "evaluation")
    assert list(paths) == ["everything", "nothing", "vv-drop", "vv-vh-change"]
    found = {name: read_table(tmp_path / "evaluation" / "baselines" / "test" / f"{name}.parquet") for name in paths}
    assert all(refuse_to_compare(one, table) is one.histogram is None for one in found.values())
    assert [one.name for one in found.values()] == list(paths)
    assert class_scores(found["everything"].counts[0])["recall"] == 1
    assert class_scores(found["nothing"].counts[0])["iou"] == 0
    drop, change = found["vv-drop"], found["vv-vh-change"]
    assert drop.metadata["detail"] == "VV falls by more than 4 dB; chosen on 1 training chips"
    assert drop.counts[0].tolist() == [[2, 1], [1, 1]]  # the dark field is a false alarm
    assert "VH at the event is below -1" in change.metadata["detail"]
    assert change.counts[0].tolist() == [[3, 0], [1, 1]]  # VH knows the field


def test_baselines_of_the_same_chips_are_kept_and_of_another_truth_made_again(planted, tmp_path: Path):
    recipe, table = planted
    path = write_baselines(recipe, table, tmp_path)["vv-drop"]
    before = path.stat().st_mtime_ns
    write_baselines(recipe, table, tmp_path)
    assert path.stat().st_mtime_ns == before
    write_chip(tmp_path, TEST, [(np.nan, 9), (9990, 9), (9, 9)], [1, 0, 1])  # missing is not flood
    write_baselines(recipe, model_on(TEST, [1, 0, 1]), tmp_path)
    assert read_table(path).counts[0].tolist() == [[1, 0], [1, 1]]


def test_without_sound_radar_images_the_two_that_need_none_are_left_and_it_is_told_why(planted, tmp_path, capsys):
    recipe, table = planted

    def warning(recipe: dict) -> str:
        assert list(write_baselines(recipe, table, tmp_path / "tables")) == ["everything", "nothing"]
        return capsys.readouterr().err

    assert "the radar baselines are left out" in warning({"data": {"class_path": "terratorch.X", "init_args": {}}})
    write_chip(tmp_path, TEST, [(0, 0)], [2])
    assert f"the mask of {TEST} holds [2]" in warning(recipe)
