"""fit, validate, test and predict with TerraTorch's own data modules and a Prithvi backbone without weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from floodrepro.evaluation import chip_table

SIZE, BANDS = 64, ["BLUE", "GREEN", "RED", "NIR_BROAD", "SWIR_1", "SWIR_2"]
NAMES = [f"{place}_{n}_S2Hand" for place in ("Ghana", "India") for n in (1001, 1002)]


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": SIZE, "width": SIZE, "dtype": values.dtype}
    transform = rasterio.Affine(10, 0, 500000, 0, -10, 1000000)
    with rasterio.open(path, "w", **profile, crs="EPSG:32630", transform=transform, nodata=-9999) as target:
        target.write(values)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes of thirteen bands in Sen1Floods11's layout; one pixel of the first has no data at all."""
    root, rng = tmp_path_factory.mktemp("sen1floods11"), np.random.default_rng(0)
    hand = root / "v1.1" / "data" / "flood_events" / "HandLabeled"
    for name in NAMES:
        image = rng.integers(0, 4_000, (13, SIZE, SIZE)).astype(np.int16)
        if name == NAMES[0]:
            image[:, 3, 5] = -9999
        write(hand / "S2Hand" / f"{name}.tif", image)
        label = name.replace("S2Hand", "LabelHand")
        write(hand / "LabelHand" / f"{label}.tif", rng.integers(-1, 2, (1, SIZE, SIZE)).astype(np.int16))
    for split in ("train", "valid", "test"):
        path = root / "v1.1" / "splits" / "flood_handlabeled" / f"flood_{split}_data.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name.removesuffix('_S2Hand')}\n" for name in NAMES))
    return root


def sen1floods11(root: Path) -> dict:
    arguments = {"data_root": str(root), "batch_size": 3, "num_workers": 0, "bands": BANDS}
    return {"class_path": "terratorch.datamodules.Sen1Floods11NonGeoDataModule", "init_args": arguments}


def generic(root: Path) -> dict:
    hand = root / "v1.1" / "data" / "flood_events" / "HandLabeled"
    bands = [f"B{n}" for n in range(13)]
    arguments = {"batch_size": 3, "num_workers": 0, "num_classes": 2, "dataset_bands": bands, "output_bands": bands[:6]}
    arguments |= {f"{split}_data_root": str(hand / "S2Hand") for split in ("train", "val", "test", "predict")}
    arguments |= {f"{split}_label_data_root": str(hand / "LabelHand") for split in ("train", "val", "test")}
    arguments |= {"img_grep": "*_S2Hand.tif", "label_grep": "*_LabelHand.tif", "no_label_replace": -1}
    arguments |= {"means": [0.0] * 6, "stds": [1.0] * 6, "no_data_replace": 0}
    return {"class_path": "terratorch.datamodules.GenericNonGeoSegmentationDataModule", "init_args": arguments}


@pytest.mark.parametrize("data", [sen1floods11, generic])
def test_any_data_module_is_trained_validated_tested_and_predicted(cli, data, root: Path, tmp_path: Path):
    model_args = {"backbone": "prithvi_eo_v2_tiny_tl", "backbone_pretrained": False, "backbone_bands": BANDS}
    model_args |= {"backbone_num_frames": 1, "necks": [{"name": "ReshapeTokensToImage"}], "decoder": "FCNDecoder"}
    model_args |= {"num_classes": 2, "decoder_num_convs": 1}
    task = {"model_factory": "EncoderDecoderFactory", "model_args": model_args, "loss": "ce", "ignore_index": -1}
    task["plot_on_val"] = False  # terratorch 1.2.7 cannot plot a validation sample of Sen1Floods11
    recipe = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", "max_epochs": 1},
        "data": data(root),
        "model": {"class_path": "terratorch.tasks.SemanticSegmentationTask", "init_args": task},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    fitted = cli("fit", "--config", path, "--runs-root", tmp_path, "--name", "run", "--format", "json")
    assert fitted.code == 0, fitted.err
    record = json.loads(fitted.out)
    assert (record["status"], record["epochs"], record["epoch_times"][0]["steps"]) == ("finished", 1, 1)
    assert "at the end of each epoch only" in fitted.err
    arguments = ("--ckpt", tmp_path / "run" / "checkpoints" / "best.ckpt", "--format", "json")
    validated = cli("validate", *arguments)
    assert validated.code == 0, validated.err
    tested = cli("test", *arguments)
    assert tested.code == 0, tested.err
    assert tested.err.count("each file counts as an event of its own") == 1
    result = json.loads(tested.out)
    table = chip_table.read_table(Path(result["tables"]["test"]))
    assert table.chips.tolist() == table.events.tolist() == NAMES
    assert result["disagreement"] <= 1e-6
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == SIZE**2).all()
    predicted = cli("predict", *arguments, "--output", tmp_path / "p", "--probabilities")
    assert predicted.code == 0, predicted.err
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == sorted(
        f"{name}_{kind}.tif" for name in NAMES for kind in ("pred", "prob")
    )
    with rasterio.open(tmp_path / "p" / f"{NAMES[0]}_pred.tif") as mask:
        values = mask.read(1)
        assert (mask.crs.to_epsg(), mask.nodata) == (32630, -1)
    assert np.argwhere(values == -1).tolist() == [[3, 5]]  # the one pixel without data
    assert cli("test", *arguments, "--split", "val").code == 2
