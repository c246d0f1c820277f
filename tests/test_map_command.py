"""`floodrepro map` from the command line, with TerraMind's own network and random weights."""

import json

import numpy as np
import pytest
import rasterio
import torch
import yaml

from floodrepro.cli.model import parse
from floodrepro.data.synth import write_scene
from floodrepro.evaluation import chip_table
from floodrepro.mapping.reader import Reader
from floodrepro.mapping.scene import read_scene
from map_scenes import make_scene, save

FLAGS = ("--crop", 32, "--min-seen", 0, "--max-gap", 9)


@pytest.fixture(scope="session")
def random_weights(cli, chips, tmp_path_factory):
    """The demo's network as it is before training, as a checkpoint beside its recipe."""
    from floodrepro import recipe as recipes
    from floodrepro.training.terratorch_cli import RecipeCLI, without_files

    folder = tmp_path_factory.mktemp("weights")
    recipe = RecipeCLI([recipes.find("demo")], recipes.data_overrides(chips, recipes.read_yaml(recipes.find("demo"))))
    without_files(recipe.config)
    recipe.build()
    (folder / "net.yaml").write_text(recipes.to_yaml(recipe.recipe))
    state = recipe.model.state_dict()
    state["model.head.head.2.bias"] = state["model.head.head.2.bias"] + torch.tensor([0.0, 0.05])
    torch.save({"state_dict": state}, folder / "net.ckpt")
    return folder / "net.ckpt"


def event_chips(chips, event=0):
    ids = sorted(p.name.removesuffix("_DEM.tif") for p in (chips / "data" / "DEM").glob("*.tif"))
    events = sorted({chip.split("_")[0] for chip in ids})
    return [chip for chip in ids if chip.split("_")[0] == events[event]]


def class_of(folder, name="class"):
    with rasterio.open(folder / f"{name}.tif") as file:
        return file.read(1).astype(int)


@pytest.fixture(scope="session")
def mapped(cli, chips, random_weights, tmp_path_factory):
    """A generated event of three chips, mapped; the scene lies in ../scene."""
    root = tmp_path_factory.mktemp("mapped")
    scene = write_scene(chips, event_chips(chips, 1), root / "scene")
    outcome = cli("map", "--ckpt", random_weights, "--scene", scene, "--output", root / "map", *FLAGS)
    assert outcome.code == 0, outcome.err
    return root / "map"


def test_a_scene_of_one_chip_gives_the_classes_of_predict(cli, chips, random_weights, tmp_path):
    chip = event_chips(chips)[0]
    (tmp_path / "one.txt").write_text(chip)
    flags = ("--data.init_args.predict_split", tmp_path / "one.txt")
    outcome = cli("predict", "--ckpt", random_weights, "--output", tmp_path / "masks", *flags)
    assert outcome.code == 0, outcome.err
    scene = write_scene(chips, [chip], tmp_path / "scene")
    outcome = cli("map", "--ckpt", random_weights, "--scene", scene, "--output", tmp_path / "map", "--min-seen", 0)
    assert outcome.code == 0, outcome.err
    with rasterio.open(next((tmp_path / "masks").glob("*.tif"))) as file:
        predicted, place = file.read(1), (file.crs, file.transform)
    with rasterio.open(tmp_path / "map" / "class.tif") as file:
        classes = file.read(1)
        assert place == (file.crs, file.transform)
    seen = classes != 255
    assert seen.mean() > 0.5 and np.array_equal(classes[seen], predicted[seen]) and len(np.unique(classes[seen])) == 2


def test_over_the_same_tiles_the_classes_are_those_of_terratorchs_tiled_inference(random_weights, mapped):
    """Its padding moves all tiles by delta, 8 px where a patch has 16, and the model sees something else."""
    from terratorch.tasks.tiled_inference import tiled_inference

    from floodrepro.mapping.network import Network
    from floodrepro.training.checkpoint import read_checkpoint

    scene = read_scene(mapped.parent / "scene" / "scene.yaml")
    network = Network(parse([random_weights.with_suffix(".yaml")], []), read_checkpoint(random_weights))
    reader = Reader(scene, network.bands, network.steps, scene.grid.height)
    reader.hold(0, scene.grid.height)
    whole = {m: network._image(reader.cut(m, (0, 0, *class_of(mapped).shape))[None]) for m in network.bands}
    with torch.inference_mode():
        images = network._data.aug({"image": whole})["image"]
        tiles = {"crop": 32, "stride": 26, "delta": 0, "padding": False}
        logits = tiled_inference(lambda batch: network._task(batch).output, images, **tiles)[0]
    classes, seen = class_of(mapped), class_of(mapped) != 255
    assert (classes == logits.argmax(dim=0).numpy())[seen].mean() >= 0.99


def test_the_chips_of_a_scene_lie_where_they_were(chips, mapped):
    with rasterio.open(mapped / "class.tif") as whole:
        for chip in event_chips(chips, 1):
            with rasterio.open(chips / "data" / "DEM" / f"{chip}_DEM.tif") as file:
                part = whole.read(1, window=whole.window(*file.bounds))
            assert part.shape == (32, 32) and (part != 255).any()
    record = json.loads((mapped / "map.json").read_text())
    assert record["names"] == ["rest", "flood"] and record["filled"] == record["problems"] == []
    assert 0.7 < record["shares_of_area"]["seen"] <= 0.75  # three chips in a square of four


def test_an_export_of_a_fire_recipe_maps_as_its_checkpoint_and_says_so(cli, random_weights, mapped, tmp_path):
    recipe = yaml.safe_load(random_weights.with_suffix(".yaml").read_text())
    recipe["data"]["init_args"] |= {"protocol": "custom", "class_names": ["burned", "rest"], "positive_class": 0}
    (tmp_path / "fire.yaml").write_text(yaml.safe_dump(recipe))
    export = ("export", "--ckpt", random_weights, "--config", tmp_path / "fire.yaml", "--output", tmp_path / "pair")
    outcome = cli(*export, "--no-card")
    assert outcome.code == 0, outcome.err
    scene = mapped.parent / "scene" / "scene.yaml"
    outcome = cli("map", "--export", tmp_path / "pair", "--scene", scene, "--output", tmp_path / "map", *FLAGS)
    assert outcome.code == 0, outcome.err
    assert np.array_equal(class_of(tmp_path / "map"), class_of(mapped))
    record = json.loads((tmp_path / "map" / "map.json").read_text())
    assert (record["names"], record["positive"]) == (["burned", "rest"], 0) and record["polygons"]


def test_bf16_maps_nearly_as_fp32_on_a_cpu_one_tile_at_a_time(cli, random_weights, mapped, tmp_path):
    scene = mapped.parent / "scene" / "scene.yaml"
    command = ("map", "--ckpt", random_weights, "--scene", scene, "--output", tmp_path / "map", "--precision", "bf16")
    outcome = cli(*command, *FLAGS)
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "map" / "map.json").read_text())
    assert (record["precision"], record["batch"]) == ("bf16-mixed", 1)
    one, other = (class_of(folder, "probability") for folder in (mapped, tmp_path / "map"))
    seen = one != 255
    assert np.array_equal(seen, other != 255) and 0 < abs(one - other)[seen].max() <= 10  # 4 points of 250


def test_optical_bands_of_20_m_in_degrees_map_nearly_the_same(cli, chips, random_weights, mapped, tmp_path):
    scene = write_scene(chips, event_chips(chips, 1), tmp_path / "scene", mixed=True)
    outcome = cli("map", "--ckpt", random_weights, "--scene", scene, "--output", tmp_path / "map", *FLAGS)
    assert outcome.code == 0, outcome.err
    one, other = class_of(mapped), class_of(tmp_path / "map")
    both = (one != 255) & (other != 255)
    assert both.mean() > 0.7 and (one == other)[both].mean() > 0.8


def test_a_lacking_date_and_problems_stop_a_map_and_are_recorded_on_request(cli, random_weights, tmp_path):
    scene = make_scene(tmp_path / "s", 40, 40)
    command = ("map", "--ckpt", random_weights, "--scene", scene, "--output", tmp_path / "m", "--crop", 32)
    scene.write_text(scene.read_text().replace("    files:\n    - s1_after.tif\n", "    missing: true\n"))
    outcome = cli(*command)
    assert outcome.code == 1 and "the scene lacks S1RTC.after" in outcome.err and "--missing zero" in outcome.err
    scene.write_text(scene.read_text().replace("unit: dB", "unit: power"))
    outcome = cli(*command, "--missing", "zero")
    assert outcome.code == 1 and "problems of the scene, listed above: 3" in outcome.err
    assert not (tmp_path / "m").exists()
    outcome = cli(*command, "--missing", "zero", "--anyway")  # negative power is no power: nothing of the radar is left
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "m" / "map.json").read_text())
    assert record["filled"] == ["S1RTC.after"] and len(record["problems"]) == 3


def test_too_little_seen_is_exit_code_1_with_the_share(cli, chips, random_weights, mapped):
    scene = mapped.parent / "scene" / "scene.yaml"
    flags = ("--crop", 32, "--min-seen", 0.8, "--max-gap", 9)
    outcome = cli("map", "--ckpt", random_weights, "--scene", scene, "--output", mapped, *flags)
    assert outcome.code == 1 and "% of the area was seen (--min-seen 0.8; " in outcome.err


def test_a_map_is_compared_with_a_truth_as_a_chip_table(cli, mapped, tmp_path):
    truth = mapped.parent / "scene" / "truth.tif"
    flags = ("--truth-value", 1, "--output", tmp_path / "check.parquet", "--format", "json")
    outcome = cli("map", "check", "--map", mapped, "--truth", truth, *flags)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    with rasterio.open(truth) as file:
        water = file.read(1)
    classes = class_of(mapped)
    counted = (water >= 0) & (classes != 255)
    hits = ((water == 1) & (classes == 1) & counted).sum()
    assert result["iou"] == pytest.approx(hits / (((water == 1) | (classes == 1)) & counted).sum())
    assert result["recall"] == pytest.approx(hits / ((water == 1) & counted).sum())
    assert result["seen_share"] == pytest.approx(counted.sum() / (water >= 0).sum())
    table = chip_table.read_table(tmp_path / "check.parquet")
    assert table.counts.sum() == table.histogram.sum() == counted.sum() > table.squared_error.sum()
    outcome = cli("map", "check", "--map", mapped, "--truth", mapped / "water.gpkg", "--format", "json")
    assert outcome.code == 0 and json.loads(outcome.out)["iou"] > 0.99


def test_what_cannot_be_compared_is_an_error(cli, mapped, tmp_path):
    truth = mapped.parent / "scene" / "truth.tif"
    water = np.ones((1, 40, 40), np.uint8)
    save(tmp_path / "nowhere.tif", water, crs=None)
    save(tmp_path / "elsewhere.tif", water, transform=rasterio.Affine(10, 0, 600_000, 0, -10, 9_000_000))
    record = (mapped / "map.json").read_text()
    for name, text in {"empty": "", "other": "[]", "alone": record, "bare": '{"identity": 1}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "map.json").write_text(text)
    cases = [(tmp_path / name, truth) for name in ("empty", "other", "alone", "bare", "none")]
    cases += [(mapped, tmp_path / "nowhere.tif"), (mapped, tmp_path / "elsewhere.tif")]
    for folder, known, *flags in [*cases, (mapped, truth, "--truth-value", 77)]:
        outcome = cli("map", "check", "--map", folder, "--truth", known, *flags)
        assert outcome.code == 1 and len(outcome.report) >= 2 and "Traceback" not in outcome.err, (folder, known)
    outcome = cli("map", "check", "--map", mapped, "--truth", truth, "--output", truth / "t.parquet")
    assert outcome.code == 2 and "there is no such folder" in outcome.err


def test_a_network_that_predicts_nan_maps_nothing(cli, random_weights, tmp_path):
    content = torch.load(random_weights, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("running_var"))
    content["state_dict"][name][0] = -1.0  # finite, but its root is NaN
    torch.save(content, tmp_path / "nan.ckpt")
    scene = make_scene(tmp_path / "s", 40, 40)
    flags = ("--config", random_weights.with_suffix(".yaml"), "--output", tmp_path / "m", "--crop", 32)
    outcome = cli("map", "--ckpt", tmp_path / "nan.ckpt", "--scene", scene, *flags)
    assert outcome.code == 1 and "not finite" in outcome.err and not (tmp_path / "m" / "class.tif").exists()


def test_flags_that_cannot_be_carried_out_are_bad_usage(cli, random_weights, mapped):
    scene = mapped.parent / "scene" / "scene.yaml"
    assert cli("map", "--ckpt", random_weights).code == 2
    assert cli("map", "--scene", scene, "--output", "x").code == 2
    flags = ("--scene", scene, "--output", "x", "--crop", 33, "--max-gap", 9)
    assert cli("map", "--ckpt", random_weights, *flags).code == 2
    outcome = cli("map", "--ckpt", random_weights, *flags[:4], "--permanent", "none.tif")
    assert outcome.code == 2 and "none.tif" in outcome.err and "loading" not in outcome.err


@pytest.mark.parametrize("flag", ["--threshold", "--min-seen", "--max-gap", "--min-hectares"])
def test_numbers_out_of_range_are_bad_usage(cli, flag):
    for value in ("nan", "-1", "inf", "many"):
        outcome = cli("map", flag, value)
        assert outcome.code == 2 and f"{flag}: " in outcome.err
