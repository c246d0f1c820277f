"""`floodrepro map` from the command line, with TerraMind's own network and random weights."""

import json

import numpy as np
import pytest
import rasterio
import torch
import yaml

from conftest import save
from floodrepro import recipe as recipes
from floodrepro.cli.model import parse
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import NO_DATA
from floodrepro.data.synth import draw_event, generate, write_scene
from floodrepro.evaluation import chip_table
from floodrepro.mapping.reader import Reader
from floodrepro.mapping.scene import read_scene
from map_scenes import make_scene, read

FLAGS = ("--crop", 32, "--max-gap", 9)


@pytest.fixture(scope="session")
def random_weights(chips, tmp_path_factory):
    """The demo's network as it is before training, as a checkpoint beside its recipe."""
    from floodrepro.training.terratorch_cli import without_files

    folder = tmp_path_factory.mktemp("weights")
    recipe = parse([recipes.find("demo")], recipes.data_overrides(chips, recipes.read_yaml(recipes.find("demo"))))
    without_files(recipe.config)
    recipe.build()
    (folder / "net.yaml").write_text(recipes.to_yaml(recipe.recipe))
    state = recipe.model.state_dict()
    state["model.head.head.2.bias"] = state["model.head.head.2.bias"] + torch.tensor([0.0, 0.05])
    torch.save({"state_dict": state}, folder / "net.ckpt")
    return folder / "net.ckpt"


@pytest.fixture(scope="session")
def made(cli, random_weights):
    """Run a command that has to succeed; map with the random weights where it is given flags of map alone."""

    def go(*words):
        words = words if str(words[0])[0] != "-" else ("map", "--ckpt", random_weights, "--min-seen", 0, *words)
        return cli(*words).ok()

    return go


@pytest.fixture(scope="session")
def drawn():
    """An event, its number is 1, two chips wide and high; of the fourth one nothing was seen."""
    scene = draw_event(seed=1, event=1, chips=4, size=32, values=2)
    for part, missing in {"S1RTC": np.nan, "S2L2A": NO_DATA, "SCL": 0, "DEM": NO_DATA, "MASK": -1}.items():
        scene[part][..., 32:, 32:] = missing
    return scene


@pytest.fixture(scope="session")
def mapped(drawn, made, tmp_path_factory):
    """The drawn event, mapped; scene.yaml lies beside it."""
    root = tmp_path_factory.mktemp("mapped")
    made("--scene", write_scene(drawn, 1, root), "--output", root / "map", *FLAGS)
    return root / "map"


def test_a_scene_of_one_chip_gives_the_classes_of_predict(made, random_weights, tmp_path):
    generate(tmp_path, events=3, chips=3, size=32, protocol="v0", seed=1, scenes=True)
    (tmp_path / "one.txt").write_text(next(chip for chip in Chips(tmp_path).having("DEM") if "EMSR9001" in chip))
    flags = ("--data.init_args.predict_split", tmp_path / "one.txt", "--data.init_args.predict_data_root", tmp_path)
    made("predict", "--ckpt", random_weights, "--output", tmp_path / "masks", *flags)
    made("--scene", tmp_path / "scenes" / "EMSR9001" / "scene.yaml", "--output", tmp_path / "map")
    with (
        rasterio.open(next((tmp_path / "masks").glob("*.tif"))) as one,
        rasterio.open(tmp_path / "map" / "class.tif") as other,
    ):
        predicted, classes = one.read(1), other.read(1)
        assert (one.crs, one.transform) == (other.crs, other.transform)
    seen = classes != 255
    assert seen.mean() > 0.5 and np.array_equal(classes[seen], predicted[seen]) and len(np.unique(classes[seen])) == 2


def test_over_the_same_tiles_the_classes_are_those_of_terratorchs_tiled_inference(random_weights, mapped):
    """Its padding moves all tiles by delta, 8 px where a patch has 16, and the model sees something else."""
    from terratorch.tasks.tiled_inference import tiled_inference

    from floodrepro.mapping.mapper import Network
    from floodrepro.training.checkpoint import read_checkpoint

    scene = read_scene(mapped.with_name("scene.yaml"))
    network = Network(parse([random_weights.with_suffix(".yaml")], []), read_checkpoint(random_weights))
    reader = Reader(scene, network.steps, scene.height)
    reader.hold(0)
    whole = {m: network._image(reader.cut(m)[None]) for m in network.steps}
    with torch.inference_mode():
        images = network._data.aug({"image": whole})["image"]
        tiles = {"crop": 32, "stride": 26, "delta": 0, "padding": False}
        logits = tiled_inference(lambda batch: network._task(batch).output, images, **tiles)[0]
    classes, seen = read(mapped), read(mapped) != 255
    assert (classes == logits.argmax(dim=0).numpy())[seen].mean() >= 0.99
    record = json.loads((mapped / "map.json").read_text())
    assert record["names"] == ["rest", "flood"] and record["filled"] == record["problems"] == []
    assert record["shares_of_area"]["seen"] == pytest.approx(seen.mean()) and 0.7 < seen.mean() <= 0.75  # three of four


def test_an_export_of_a_fire_recipe_maps_as_its_checkpoint_and_says_so(made, random_weights, mapped, tmp_path):
    recipe = yaml.safe_load(random_weights.with_suffix(".yaml").read_text())
    recipe["data"]["init_args"] |= {"protocol": "custom", "class_names": ["burned", "rest"], "positive_class": 0}
    (tmp_path / "fire.yaml").write_text(yaml.safe_dump(recipe))
    export = ("export", "--ckpt", random_weights, "--config", tmp_path / "fire.yaml", "--output", tmp_path / "pair")
    made(*export, "--no-card")
    where = ("--scene", mapped.with_name("scene.yaml"), "--output", tmp_path / "map")
    made("map", "--export", tmp_path / "pair", *where, "--min-seen", 0, *FLAGS)
    assert np.array_equal(read(tmp_path / "map"), read(mapped))
    record = json.loads((tmp_path / "map" / "map.json").read_text())
    assert (record["names"], record["positive"]) == (["burned", "rest"], 0) and record["polygons"]


def test_bf16_maps_nearly_as_fp32_on_a_cpu_one_tile_at_a_time(made, mapped, tmp_path):
    made("--scene", mapped.with_name("scene.yaml"), "--output", tmp_path / "map", "--precision", "bf16", *FLAGS)
    record = json.loads((tmp_path / "map" / "map.json").read_text())
    assert (record["precision"], record["batch"]) == ("bf16-mixed", 1)
    one, other = (read(folder, "probability") for folder in (mapped, tmp_path / "map"))
    seen = one != 255
    assert np.array_equal(seen, other != 255) and 0 < abs(one - other)[seen].max() <= 10  # 4 points of 250


def test_optical_bands_of_20_m_in_degrees_map_nearly_the_same(drawn, made, mapped, tmp_path):
    made("--scene", write_scene(drawn, 1, tmp_path / "scene", mixed=True), "--output", tmp_path / "map", *FLAGS)
    one, other = read(mapped), read(tmp_path / "map")
    both = (one != 255) & (other != 255)
    assert both.mean() > 0.7 and (one == other)[both].mean() > 0.8


def test_a_lacking_date_and_problems_stop_a_map_and_are_recorded_on_request(cli, made, random_weights, tmp_path):
    scene = make_scene(tmp_path / "s", 40, 40)
    command = ("map", "--ckpt", random_weights, "--scene", scene, "--output", tmp_path / "m", "--crop", 32)
    scene.write_text(scene.read_text().replace("    files:\n    - s1_after.tif\n", "    missing: true\n"))
    outcome = cli(*command)
    assert outcome.code == 1 and "the scene lacks S1RTC.after" in outcome.err and "--missing zero" in outcome.err
    scene.write_text(scene.read_text().replace("unit: dB", "unit: power"))
    outcome = cli(*command, "--missing", "zero")
    assert outcome.code == 1 and "problems of the scene, listed above: 3" in outcome.err
    assert not (tmp_path / "m").exists()
    done = made(*command, "--missing", "zero", "--anyway")  # negative power is no power: nothing of the radar is left
    record = json.loads((tmp_path / "m" / "map.json").read_text())
    assert record["filled"] == ["S1RTC.after"] and "lacks S1RTC.after, filled" in done.err
    assert len(record["problems"]) == 3


def test_too_little_seen_is_exit_code_1_with_the_share(cli, random_weights, mapped):
    flags = ("--scene", mapped.with_name("scene.yaml"), "--output", mapped, "--min-seen", 0.8, *FLAGS)
    outcome = cli("map", "--ckpt", random_weights, *flags)
    assert outcome.code == 1 and "% of the area was seen (--min-seen 0.8; " in outcome.err


def test_a_map_is_compared_with_a_truth_as_a_chip_table(made, mapped, tmp_path):
    truth = mapped.with_name("truth.tif")
    check = ("map", "check", "--map", mapped, "--format", "json")
    result = json.loads(made(*check, "--truth", truth, "--truth-value", 1, "--output", tmp_path / "t.parquet").out)
    with rasterio.open(truth) as file:
        water = file.read(1)
    classes = read(mapped)
    counted = (water >= 0) & (classes != 255)
    hits = ((water == 1) & (classes == 1) & counted).sum()
    assert result["iou"] == pytest.approx(hits / (((water == 1) | (classes == 1)) & counted).sum())
    assert result["recall"] == pytest.approx(hits / ((water == 1) & counted).sum())
    assert result["seen_share"] == pytest.approx(counted.sum() / (water >= 0).sum())
    table = chip_table.read_table(tmp_path / "t.parquet")
    assert table.counts.sum() == table.histogram.sum() == counted.sum() > table.squared_error.sum()
    assert json.loads(made(*check, "--truth", mapped / "water.gpkg").out)["iou"] > 0.99


def test_what_cannot_be_compared_is_an_error(cli, mapped, tmp_path):
    truth = mapped.with_name("truth.tif")
    save(tmp_path / "elsewhere.tif", np.ones((1, 40, 40), np.uint8), transform=rasterio.Affine(10, 0, 6e5, 0, -10, 9e6))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "map.json").write_text((mapped / "map.json").read_text())
    with rasterio.open(truth) as file:
        save(tmp_path / "wet.tif", file.read(), transform=file.transform, crs=file.crs, nodata=0)  # as QGIS declares it
    cases = [(tmp_path / "none", truth), (tmp_path / "alone", truth), (mapped, tmp_path / "elsewhere.tif")]
    cases.append((mapped, tmp_path / "wet.tif"))
    for folder, known, *flags in [*cases, (mapped, truth, "--truth-value", 77)]:
        outcome = cli("map", "check", "--map", folder, "--truth", known, *flags)
        assert outcome.code == 1 and len(outcome.report) >= 2 and "Traceback" not in outcome.err, (folder, known)


def test_a_network_that_predicts_nan_maps_nothing(cli, random_weights, tmp_path):
    content = torch.load(random_weights, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("running_var"))
    content["state_dict"][name][0] = -1.0  # finite, but its root is NaN
    torch.save(content, tmp_path / "nan.ckpt")
    flags = ("--config", random_weights.with_suffix(".yaml"), "--output", tmp_path / "m", "--crop", 32)
    outcome = cli("map", "--ckpt", tmp_path / "nan.ckpt", "--scene", make_scene(tmp_path / "s", 40, 40), *flags)
    assert outcome.code == 1 and "not finite" in outcome.err and not (tmp_path / "m" / "class.tif").exists()


def test_flags_that_cannot_be_carried_out_are_bad_usage(cli, random_weights, mapped):
    flags = ("--scene", mapped.with_name("scene.yaml"), "--output", "x", "--crop", 33, "--max-gap", 9)
    assert cli("map", "--ckpt", random_weights).code == 2
    assert cli("map", *flags[:4]).code == 2
    assert cli("map", "--ckpt", random_weights, *flags).code == 2
    outcome = cli("map", "--ckpt", random_weights, *flags[:4], "--permanent", "none.tif")
    assert outcome.code == 2 and "none.tif" in outcome.err and "loading" not in outcome.err
    for number in ("nan", "-1", "inf", "many"):
        outcome = cli("map", "--min-hectares", number)
        assert outcome.code == 2 and "--min-hectares: " in outcome.err
