"""Evidence that needs torch, made from a real run, and what the four checks say of it, sound and spoilt."""

import json
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
import zarr

from floodrepro import recipe as recipes
from floodrepro.data.datamodule import FloodDataModule
from floodrepro.data.names import BEFORE, EVENT
from floodrepro.errors import CheckpointError, TableError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.measured import build_on_cpu, panels, weights
from floodrepro.evaluation.tabulate import run_test
from floodrepro.publishing import measured as publishing
from floodrepro.publishing.export import export
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.starting_point import record_starting_point
from floodrepro.verification.check import Evidence
from floodrepro.verification.checks import load_back as load_back_check
from floodrepro.verification.checks import panels as panels_check
from floodrepro.verification.checks import round_trip as round_trip_check
from floodrepro.verification.checks import weights as weights_check
from verification_fixtures import all_ignored, chip_ids, make_table, thresholds

VARIANCE = "decoder.decoder.blocks.2.conv1.1.running_var"
FILTERS = "decoder.decoder.blocks.2.conv1.0.weight"


def judged(check, run, **measured):
    """What a check says of a measurement, once it has been through JSON."""
    kept = json.loads(json.dumps(measured, allow_nan=False))
    recipe, record = recipes.read(run.recipe), run.read_record()
    return check.check(Evidence(run=run, record=record, recipe=recipe, measured=kept, thresholds=thresholds()))


def changed_recipe(run, path: Path, change) -> Path:
    recipe = recipes.read(run.recipe)
    change(recipe)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fresh(trained):
    """The task as its training found it: on a CPU the seed alone decides."""
    return build_on_cpu(trained.recipe).model


@pytest.fixture(scope="module")
def start(fresh, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("start") / "checkpoints" / "start.json"
    record_starting_point(fresh, path)
    return path


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    digest = trained.read_record()["data_digest"]
    folder = tmp_path_factory.mktemp("export")
    return export(trained.best, recipes.read(trained.recipe), folder, "pair", digest)


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory):
    """Of the training split: it has more chips than one batch, so that those shown are in other company there."""
    tested = run_test(RecipeCLI([trained.recipe]), trained.best, split="train", folder=tmp_path_factory.mktemp("table"))
    return chip_table.read(tested.tables["train"])


def test_fit_records_what_it_started_from(trained, start):
    assert trained.starting_point.read_bytes() == start.read_bytes()


def test_trained_weights_are_sound_and_all_of_them_have_moved(trained, start):
    found = weights.measure(trained.recipe, trained.best, start)
    answer = judged(weights_check, trained, weights=found)
    assert answer.status == "pass", answer.reason
    assert (found["tensors"], found["parameters"]) == (216, 13_992_066)
    assert (found["trained"], found["frozen"], found["unmoved"]) == (161, 0, [])
    assert "has moved" in answer.claim


def plant_nan(state):
    state[f"model.{FILTERS}"][3, 2, 1, 0] = float("nan")
    return FILTERS


def plant_nan_in_a_buffer(state):
    state[f"model.{VARIANCE}"][5] = float("nan")
    return VARIANCE


def plant_half_precision(state):
    state[f"model.{FILTERS}"] = state[f"model.{FILTERS}"].half()
    return FILTERS


def plant_missing_tensor(state):
    del state[f"model.{FILTERS}"]
    return FILTERS


def plant_stray_tensor(state):
    state["model.stray.weight"] = torch.zeros(2)
    return "stray.weight"


def plant_other_shape(state):
    state[f"model.{VARIANCE}"] = torch.ones(3)
    return VARIANCE


PLANTS = (
    *(plant_nan, plant_nan_in_a_buffer, plant_half_precision),
    *(plant_missing_tensor, plant_stray_tensor, plant_other_shape),
)


@pytest.mark.parametrize("plant", PLANTS)
def test_spoilt_tensor_fails_and_is_named(trained, tmp_path: Path, plant):
    content = torch.load(trained.best, weights_only=True)
    name = plant(content["state_dict"])
    torch.save(content, tmp_path / "spoilt.ckpt")
    found = weights.measure(trained.recipe, tmp_path / "spoilt.ckpt", None)
    answer = judged(weights_check, trained, weights=found)
    assert answer.status == "fail"
    assert name in answer.reason
    assert any(value.ok is False for value in answer.values)
    kinds = {entry["kind"] for entry in found["not_finite"]}
    assert kinds == {plant_nan: {"parameter"}, plant_nan_in_a_buffer: {"buffer"}}.get(plant, set())


def test_layer_that_never_moved_is_named(trained, fresh, start, tmp_path: Path):
    content = torch.load(trained.best, weights_only=True)
    content["state_dict"][f"model.{FILTERS}"] = fresh.model.state_dict()[FILTERS]
    torch.save(content, tmp_path / "stuck.ckpt")
    answer = judged(weights_check, trained, weights=weights.measure(trained.recipe, tmp_path / "stuck.ckpt", start))
    assert answer.status == "fail"
    assert answer.reason == f"never moved from where they started: {FILTERS}"


def test_layer_that_the_recipe_froze_need_not_move(trained, fresh, tmp_path: Path):
    fresh.model.get_parameter(FILTERS).requires_grad = False
    try:
        record_starting_point(fresh, tmp_path / "start.json")
        torch.save(fresh.model.state_dict(), tmp_path / "fresh.pt")
    finally:
        fresh.model.get_parameter(FILTERS).requires_grad = True
    found = weights.measure(trained.recipe, tmp_path / "fresh.pt", tmp_path / "start.json")
    assert found["frozen"] == 1
    assert len(found["unmoved"]) == found["trained"] == 160
    assert FILTERS not in found["unmoved"]


def test_without_a_starting_point_the_claim_is_smaller(trained, tmp_path: Path):
    found = weights.measure(trained.recipe, trained.best, tmp_path / "start.json")
    answer = judged(weights_check, trained, weights=found)
    assert answer.status == "pass"
    assert "moved" not in answer.claim
    assert "unknown" in answer.notes[0]


@pytest.mark.parametrize("content", ["{", '{"schema": 0}', "another model"])
def test_starting_point_that_cannot_be_used_is_an_error(trained, start, tmp_path: Path, content):
    if content == "another model":
        content = start.read_text().replace(FILTERS, "elsewhere.weight")
    (tmp_path / "start.json").write_text(content)
    with pytest.raises(CheckpointError, match="starting point"):
        weights.measure(trained.recipe, trained.best, tmp_path / "start.json")


def test_exported_pair_predicts_the_same_in_plain_terratorch(trained, pair):
    found = publishing.measure_load_back(trained.recipe, trained.best, pair.config, pair.weights)
    answer = judged(load_back_check, trained, load_back=found)
    assert answer.status == "pass", answer.reason
    assert [chip["name"] for chip in found["chips"]] == ["noise", "zeros", "flood scene"]
    assert found["through"] == "safetensors"


def test_pair_with_other_statistics_predicts_otherwise_also_through_a_twin(trained, pair, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(publishing, "_READS_SAFETENSORS", (99, 0))  # as on torch 2.9
    config = Path(shutil.copy(pair.config, tmp_path / "pair.yaml"))
    recipe = recipes.read(config)
    recipe["data"]["init_args"]["means"]["S1RTC"] = [-9.871, -15.993]  # impactmesh 0.2.0's
    config.write_text(yaml.safe_dump(recipe))
    found = publishing.measure_load_back(trained.recipe, trained.best, config, pair.weights)
    answer = judged(load_back_check, trained, load_back=found)
    assert found["through"] == "pt"
    assert answer.status == "fail"
    assert "logits differ" in answer.reason
    assert "twin" in answer.notes[0]


def test_pair_of_another_decoder_does_not_load(trained, pair, tmp_path: Path):
    config = Path(shutil.copy(pair.config, tmp_path / "pair.yaml"))
    recipe = recipes.read(config)
    recipe["model"]["init_args"]["model_args"]["decoder_channels"] = [128, 64, 32, 16]
    config.write_text(yaml.safe_dump(recipe))
    with pytest.raises(CheckpointError, match="does not load"):
        publishing.measure_load_back(trained.recipe, trained.best, config, pair.weights)


def test_exported_tensors_are_the_checkpoints_and_tampered_headers_are_refused(trained, pair):
    found = publishing.measure_round_trip(trained.best, pair.weights)
    answer = judged(round_trip_check, trained, round_trip=found)
    assert answer.status == "pass", answer.reason
    assert found["tensors"] == 216
    assert found["untampered_accepted"]
    assert len(found["refused"]) == 5
    assert all(found["refused"].values())
    assert found["weights"]["sha256"] == pair.sha256
    assert "data_digest" in found["metadata"]


def test_one_flipped_bit_of_the_data_is_found(trained, pair, tmp_path: Path):
    content = bytearray(pair.weights.read_bytes())
    content[-1000] ^= 1
    spoilt = tmp_path / "spoilt.safetensors"
    spoilt.write_bytes(content)
    found = publishing.measure_round_trip(trained.best, spoilt)
    answer = judged(round_trip_check, trained, round_trip=found)
    assert answer.status == "fail"
    assert len(found["altered"]) == 1
    assert found["altered"][0] in answer.reason


@pytest.mark.parametrize("key", ["recipe_sha256", "source_sha256", "data_digest"])
def test_metadata_that_names_another_source_is_found(trained, pair, tmp_path: Path, key):
    content = bytearray(pair.weights.read_bytes())
    place = content.index(f'"{key}":"'.encode()) + len(key) + 4
    content[place] = ord("1" if content[place] == ord("0") else "0")
    spoilt = tmp_path / "spoilt.safetensors"
    spoilt.write_bytes(content)
    answer = judged(round_trip_check, trained, round_trip=publishing.measure_round_trip(trained.best, spoilt))
    assert answer.status == "fail"
    assert key in answer.reason


def test_file_with_a_damaged_header_is_no_evidence(trained, pair, tmp_path: Path):
    content = pair.weights.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    spoilt = tmp_path / "spoilt.safetensors"
    spoilt.write_bytes(struct.pack("<Q", length - 1) + content[8:])
    with pytest.raises(CheckpointError, match="damaged"):
        publishing.measure_round_trip(trained.best, spoilt)


def test_panels_are_predicted_as_in_the_table_and_written_with_the_same_bytes(trained, table, tmp_path: Path):
    found = panels.measure(trained.recipe, trained.best, table, tmp_path / "one")
    again = panels.measure(trained.recipe, trained.best, table, tmp_path / "two")
    assert found == again
    assert (tmp_path / "one" / "panels.npz").read_bytes() == (tmp_path / "two" / "panels.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one" / "panels.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    answer = judged(panels_check, trained, panels=found)
    assert answer.status == "pass", answer.reason
    assert found["same_device"]
    assert [panel["differing_pixels"] for panel in found["panels"]] == [0, 0, 0]
    assert [plot.kind for plot in answer.plots] == ["panels"]


def test_panels_show_what_is_on_the_disk(trained, table, chips, tmp_path: Path):
    found = panels.measure(trained.recipe, trained.best, table, tmp_path)
    arrays = np.load(tmp_path / "panels.npz")
    assert float(arrays["metres_per_pixel"]) == 10.0
    assert arrays["class_names"].tolist() == ["rest", "flood"]
    for place, panel in enumerate(found["panels"]):
        assert panel["kind"] in arrays["titles"][place]
        assert f"event {panel['event']}" in arrays["titles"][place]
        with rasterio.open(chips / "data" / "MASK" / f"{panel['chip']}_annotation_flood.tif") as mask:
            assert np.array_equal(arrays["truth"][place], mask.read(1))
        prefix = {part: str(chips / "data" / part / f"{panel['chip']}_{part}.zarr.zip") for part in ("S2L2A", "S1RTC")}
        with zarr.ZipStore(prefix["S1RTC"], mode="r") as store:
            radar = zarr.open_group(store, mode="r")["bands"][...].astype(np.float32)
        with zarr.ZipStore(prefix["S2L2A"], mode="r") as store:
            optical = zarr.open_group(store, mode="r")["bands"][...]
        for name, step in (("before", BEFORE), ("event", EVENT)):
            assert np.array_equal(arrays[f"{name}_vv"][place], radar[step, 0], equal_nan=True)  # dB, not logged again
            for colour, band in enumerate((3, 2, 1)):  # B04, B03, B02
                order = np.argsort(optical[step, band], axis=None)
                shown = arrays[f"{name}_rgb"][place, ..., colour].ravel()[order].astype(int)
                assert (np.diff(shown) >= 0).all()
                assert shown[-1] > shown[0]


def swap_timesteps(run, path: Path, monkeypatch) -> Path:
    image = FloodDataModule._image

    def swapped(module, raw, elements):
        return image(module, raw[:, [0, EVENT, BEFORE, 3]] if raw.shape[1] == 4 else raw, elements)

    monkeypatch.setattr(FloodDataModule, "_image", swapped)
    return run.recipe


def take_other_statistics(run, path: Path, monkeypatch) -> Path:
    def change(recipe):
        recipe["data"]["init_args"]["stds"]["S1RTC"] = [4.028, 3.899]  # impactmesh 0.2.0's

    return changed_recipe(run, path, change)


@pytest.mark.parametrize("plant", [swap_timesteps, take_other_statistics])
def test_panels_of_another_input_than_the_tables_are_found(trained, table, tmp_path: Path, monkeypatch, plant):
    recipe = plant(trained, tmp_path / "recipe.yaml", monkeypatch)
    found = panels.measure(recipe, trained.best, table, tmp_path)
    answer = judged(panels_check, trained, panels=found)
    assert answer.status == "fail"
    assert "predicted otherwise than in the chip table" in answer.reason


def test_dry_chip_is_shown_and_an_fp16_recipe_is_looked_at_on_a_cpu(trained, own_chips, tmp_path: Path):
    chip = (own_chips / "split" / "impactmesh_flood_test.txt").read_text().split()[0]
    with rasterio.open(own_chips / "data" / "MASK" / f"{chip}_annotation_flood.tif", "r+") as mask:
        mask.write(np.zeros_like(mask.read(1)), 1)

    def change(recipe):
        data = recipe["data"]["init_args"]
        data["data_root"] = str(own_chips / "data")

    recipe = changed_recipe(trained, tmp_path / "recipe.yaml", change)
    tested = run_test(RecipeCLI([recipe]), trained.best, folder=tmp_path)
    half = changed_recipe(
        trained, tmp_path / "half.yaml", lambda it: (change(it), it["trainer"].update(precision="16-mixed"))
    )
    found = panels.measure(half, trained.best, chip_table.read(tested.tables["test"]), tmp_path)
    dry = found["panels"][-1]
    assert (dry["kind"], dry["chip"]) == ("dry", chip)
    assert dry["predicted_flood_share"] > 0
    assert dry["differing_pixels"] == 0
    assert "no flood in truth" in np.load(tmp_path / "panels.npz")["titles"][-1]


def test_best_median_worst_and_the_wettest_dry_chip_are_chosen_by_rule():
    table = make_table(events=1, chips_per_event=7, dry_events=0)
    counts = np.zeros_like(table.counts)
    hits = [50, 90, 10, 0, 0, 0, 70]
    for row, right in enumerate(hits):
        counts[row] = [[900, 0], [100 - right, right]]
    counts[3] = [[995, 5], [0, 0]]  # dry, with false alarms
    counts[4] = [[1000, 0], [0, 0]]  # dry, and predicted dry
    counts[5] = [[995, 0], [0, 5]]  # right, but with less flood than counts
    ids = chip_ids(1, 7)
    made_up = replace(table, counts=counts)
    chosen = panels.choose(made_up)
    assert {kind: table.chips[row] for kind, row in chosen.items()} == {
        "best": ids[1],
        "median": ids[0],
        "worst": ids[2],
        "dry": ids[3],
    }
    wet = made_up.subset(ids[:2])
    assert list(panels.choose(wet)) == ["best", "worst"]
    assert list(panels.choose(wet.subset(ids[:1]))) == ["best"]


def test_table_of_another_checkpoint_or_without_a_counted_pixel_gives_no_panels(trained, table, tmp_path: Path):
    other = table.subset(table.chips.tolist(), checkpoint={"name": "best.ckpt", "sha256": "0" * 64})
    with pytest.raises(TableError, match="another checkpoint"):
        panels.measure(trained.recipe, trained.best, other, tmp_path)
    with pytest.raises(TableError, match="ignored"):
        panels.measure(trained.recipe, trained.best, all_ignored(table), tmp_path)
    assert list(tmp_path.iterdir()) == []
