"""fit, validate, test and predict with TerraTorch's own data modules and a Prithvi backbone without weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from conftest import PLACE, save
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.metrics import scores
from terratorch_runs import generic

SIZE, BANDS = 32, ["BLUE", "GREEN", "RED", "NIR_BROAD", "SWIR_1", "SWIR_2"]


def sen1floods11(root: Path) -> dict:
    """Prithvi without weights on four scenes of thirteen bands; one pixel of the first has no data at all."""
    hand, rng = root / "v1.1" / "data" / "flood_events" / "HandLabeled", np.random.default_rng(0)
    splits = root / "v1.1" / "splits" / "flood_handlabeled"
    splits.mkdir(parents=True)
    names = [f"{place}_{n}" for place in ("Ghana", "India") for n in (1001, 1002)]
    for name in names:
        image = rng.integers(0, 4_000, (13, SIZE, SIZE)).astype(np.int16)
        if name == names[0]:
            image[:, 3, 5] = -9999
        save(hand / "S2Hand" / f"{name}_S2Hand.tif", image, nodata=-9999)
        label = rng.integers(-1, 2, (1, SIZE, SIZE)).astype(np.int16)
        save(hand / "LabelHand" / f"{name}_LabelHand.tif", label, nodata=-9999)
    for split in ("train", "valid", "test"):
        (splits / f"flood_{split}_data.txt").write_text("\n".join(names) + "\n")
    model_args = {"backbone": "prithvi_eo_v2_tiny_tl", "backbone_pretrained": False, "backbone_bands": BANDS}
    model_args |= {"backbone_num_frames": 1, "necks": [{"name": "ReshapeTokensToImage"}], "decoder": "FCNDecoder"}
    model_args |= {"num_classes": 2, "decoder_num_convs": 1}
    task = {"model_factory": "EncoderDecoderFactory", "model_args": model_args, "loss": "ce", "ignore_index": -1}
    task["plot_on_val"] = False  # terratorch 1.2.7 cannot plot a validation sample of Sen1Floods11
    data = {"data_root": str(root), "batch_size": 2, "num_workers": 0, "bands": BANDS}
    return {
        "trainer": {"accelerator": "cpu"},
        "data": {"class_path": "terratorch.datamodules.Sen1Floods11NonGeoDataModule", "init_args": data},
        "model": {"class_path": "terratorch.tasks.SemanticSegmentationTask", "init_args": task},
    }


@pytest.mark.parametrize(("made", "steps"), [(sen1floods11, 2), (generic, 6)])
def test_any_data_module_is_trained_validated_tested_and_predicted(cli, made, steps, tmp_path: Path):
    recipe = made(tmp_path)
    recipe["trainer"] |= {"precision": "32-true", "max_epochs": 1}
    names = sorted(path.stem for kind in ("S2Hand", "image") for path in tmp_path.rglob(f"*_{kind}.tif"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    fitted = cli("fit", "--config", path, "--runs-root", tmp_path, "--name", "run", "--format", "json").ok()
    record = json.loads(fitted.out)
    assert (record["status"], record["progress"]["epochs"], record["epoch_times"][0]["steps"]) == ("finished", 1, steps)
    assert "at the end of each epoch only" in fitted.err
    arguments = ("--ckpt", tmp_path / "run" / "checkpoints" / "best.ckpt", "--format", "json")
    cli("validate", *arguments).ok()
    tested = cli("test", *arguments).ok()
    assert tested.err.count("each file counts as an event of its own") == 1
    result = json.loads(tested.out)
    table = chip_table.read_table(Path(result["tables"]["test"]))
    assert table.chips.tolist() == table.events.tolist() == names
    ours = scores(table.counts.sum(axis=0))
    assert ours == pytest.approx({name: result["metrics"][f"test/{name}"] for name in ours}, abs=1e-6)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == SIZE**2).all()
    cli("predict", *arguments, "--output", tmp_path / "p", "--probabilities").ok()
    wanted = {f"{name}_{kind}.tif" for name in names for kind in ("pred", "prob")}
    assert {p.name for p in (tmp_path / "p").iterdir()} == wanted
    with rasterio.open(tmp_path / "p" / f"{names[0]}_pred.tif") as mask:
        values = mask.read(1)
        assert (mask.crs, mask.nodata) == (PLACE["crs"], -1)
    assert np.argwhere(values == -1).tolist() == [[3, 5]]  # the one pixel without data
    assert cli("test", *arguments, "--split", "val").code == 2
