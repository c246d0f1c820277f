"""The data module: what reaches the model equals stock impactmesh and TerraTorch, to the bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
import zarr
from albumentations.augmentations.geometric import functional as geometric
from impactmesh.impactmesh_datamodule import ImpactMeshDataModule

from conftest import CHIPS, save
from floodrepro import recipe as recipes
from floodrepro.data.datamodule import FloodDataModule, apply_symmetry, draw_symmetry
from floodrepro.data.samplers import ShuffledByEpoch
from floodrepro.data.synth import VARIANTS, generate, zarr_zip
from floodrepro.errors import DataError
from test_splits import ids_of, split

DATA = recipes.read_yaml(recipes.find("demo"))["data"]["init_args"]


def trainer(stage: str, epoch: int = 0) -> SimpleNamespace:
    """What both data modules ask of a trainer: which stage it is in, the epoch, and the device."""
    stages = {"training": "fit", "validating": "validate", "testing": "test", "predicting": "predict"}
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch, completed=0))
    epochs = {"epoch_progress": progress, "epoch_loop": SimpleNamespace(batch_progress=progress)}
    return SimpleNamespace(
        **{name: stage == one for name, one in stages.items()},
        **{"sanity_checking": False, "current_epoch": epoch, "world_size": 1, "global_rank": 0},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        fit_loop=SimpleNamespace(restarting=False, **epochs),
    )


def arguments(chips: Path, **changes) -> dict:
    paths = {f"{name}_split": str(split(chips, name)) for name in ("train", "val", "test")}
    given = {"means": DATA["means"], "stds": DATA["stds"], "data_root": str(chips / "data"), **paths}
    return {"predict_split": paths["test_split"], "batch_size": 2, **given, **changes}


def ours(chips: Path, stage: str = "test", epoch: int = 0, **changes) -> FloodDataModule:
    module = FloodDataModule(**{"protocol": "v0", "seed": 5} | arguments(chips, **changes))
    module.trainer = trainer(stage, epoch)
    module.setup(stage)
    return module


def stock(chips: Path, stage: str = "test", **changes) -> ImpactMeshDataModule:
    module = ImpactMeshDataModule(**{"no_data_replace": 0} | arguments(chips, **changes), disaster_type="flood")
    module.trainer = trainer(stage)
    module.setup(stage)
    return module


def batches(module, stage: str = "test") -> list:
    loader = getattr(module, f"{'train' if stage == 'fit' else stage}_dataloader")()
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for mine, theirs in zip(first, second, strict=True):
        assert mine["image"].keys() == theirs["image"].keys()
        for modality, image in theirs["image"].items():
            found = mine["image"][modality]
            assert found.dtype == image.dtype == torch.float32
            assert torch.equal(found, image), modality
        if "mask" in theirs:
            assert torch.equal(mine["mask"], theirs["mask"])
            assert mine["mask"].dtype == theirs["mask"].dtype
        # impactmesh 0.1.2 names the DEM, 0.2.0 the mask: the chip is the same.
        chips = [Path(name).name.removesuffix("_DEM.tif") for name in mine["filename"]]
        assert all(Path(name).name.startswith(f"{chip}_") for chip, name in zip(chips, theirs["filename"], strict=True))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """The same chips as in `chips`, in the hub's layout; impactmesh would take this path for wildfire data."""
    root = tmp_path_factory.mktemp("tars") / "firefly"
    generate(root, **CHIPS, layout="hub")
    return root


@pytest.fixture(scope="module")
def spoilt(chips: Path, tmp_path_factory) -> Path:
    """Chips with every kind of missing value: -9999 in S2 and DEM, NaN and infinities in S1."""
    root = Path(shutil.copytree(chips, tmp_path_factory.mktemp("spoilt") / "ImpactMesh-Flood"))
    for modality, values in {"S2L2A": [-9999], "S1RTC": [np.nan, np.inf, -np.inf, -9999]}.items():
        for path in (root / "data" / modality).iterdir():
            group = zarr.open_group(str(path), mode="r")
            bands = group["bands"][...]
            for i, value in enumerate(values):
                bands[i % 4, i % 2, i : i + 9, 5:20] = value
            path.write_bytes(zarr_zip(bands, {}, dict(group.attrs), VARIANTS["time"]))
    for path in (root / "data" / "DEM").iterdir():
        with rasterio.open(path, "r+") as file:
            height = file.read(1)
            height[3:9, 4:30] = -9999
            file.write(height, 1)
    return root


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("validate", {}),
        ("predict", {}),
        ("test", {}),
        ("test", {"modalities": ["S2L2A", "DEM"]}),
        ("test", {"modalities": ["DEM"]}),
        ("test", {"timesteps": [1, 2], "no_data_replace": 0.5}),  # which int16 cannot hold
        ("test", {"timesteps": [2, 0, 1]}),
        ("test", {"timesteps": [2]}),
        ("test", {"timesteps": [3, 2, 1, 0]}),  # as many as on disk: impactmesh keeps the order on disk
        ("test", {"modalities": ["S1RTC", "DEM"], "timesteps": [2, 3]}),
    ],
)
def test_missing_values_and_any_modalities_and_timesteps_equal_stock_to_the_bit(spoilt, stage, changes):
    name = stage.removesuffix("idate")
    mine = batches(ours(spoilt, stage, **changes), name)
    assert_same(mine, batches(stock(spoilt, stage, **changes), name))
    assert all(torch.isfinite(image).all() for batch in mine for image in batch["image"].values())


def test_every_layout_gives_stocks_tensors_and_tars_the_same(tmp_path):
    arguments = {"events": 4, "chips": 10, "size": 32, "protocol": "v0", "seed": 4, "variants": list(VARIANTS)}
    generate(tmp_path / "plain", **arguments)
    generate(tmp_path / "hub", **arguments, layout="hub")
    reference = batches(stock(tmp_path / "plain"))
    assert_same(batches(ours(tmp_path / "plain")), reference)
    assert_same(batches(ours(tmp_path / "hub")), reference)


def test_training_chips_are_stocks_turned_by_the_element_drawn_for_them(chips):
    module = ours(chips, "fit", epoch=3)
    plain = ours(chips, "validate", val_split=arguments(chips)["train_split"], batch_size=1)
    upright = {batch.chips[0]: batch for batch in batches(plain, "val")}
    turned = 0
    for batch in batches(module, "fit"):
        for i, chip in enumerate(batch.chips):
            element = draw_symmetry(5, 3, chip)
            turned += element != 0
            for modality, image in upright[chip]["image"].items():
                assert torch.equal(batch["image"][modality][i], apply_symmetry(element, image[0]))
            assert torch.equal(batch["mask"][i], apply_symmetry(element, upright[chip]["mask"][0]))
    assert turned > 0


def test_tensors_do_not_depend_on_the_number_of_workers_and_the_global_generator_is_left_alone(tars):
    """What loaders took from it would be missing in dropout, and how much depends on the number of workers."""
    before, module = torch.get_rng_state(), ours(tars, "fit")
    reference = batches(module, "fit")
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(batches(ours(tars, "fit", num_workers=2), "fit"), reference)


def test_order_of_training_chips_changes_with_seed_and_epoch_and_repeats():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ShuffledByEpoch(20, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(20))
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 0) != order(1, 0)


@pytest.mark.parametrize(("symmetry", "element"), list(enumerate(("e", "r90", "r180", "r270", "v", "hvt", "h", "t"))))
def test_each_symmetry_is_one_of_albumentations(symmetry, element):
    image = np.arange(5 * 5 * 3, dtype=np.int16).reshape(5, 5, 3)
    found = apply_symmetry(symmetry, torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0)
    assert np.array_equal(found.numpy(), geometric.d4(image, element))
    with pytest.raises(ValueError, match="square"):
        apply_symmetry(max(symmetry, 1), torch.zeros(4, 6))
    assert apply_symmetry(0, torch.zeros(4, 6)).shape == (4, 6)


def test_symmetries_are_uniform_and_depend_on_seed_epoch_and_chip_only():
    """Chi-square with 7 degrees of freedom stays below 24.3 in 99.9 % of uniform draws (NIST/SEMATECH 1.3.6.7.4)."""
    names = [f"EMSR{i}_1_35TMF_x{i}_y1" for i in range(8000)]
    drawn = [draw_symmetry(42, 0, name) for name in names]
    assert sum((drawn.count(symmetry) - 1000) ** 2 / 1000 for symmetry in range(8)) < 24.3
    assert drawn == [draw_symmetry(42, 0, name) for name in reversed(names)][::-1]
    assert drawn != [draw_symmetry(42, 1, name) for name in names] != [draw_symmetry(43, 0, name) for name in names]


def test_so_many_damaged_chips_are_left_out_and_recorded(own_chips):
    listed = ids_of(own_chips, "train")
    for chip in listed[:2]:
        (own_chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").write_bytes(b"PK")
    module = ours(own_chips, "validate", val_split=arguments(own_chips)["train_split"], skip_damaged=2, batch_size=4)
    read = [chip for batch in batches(module, "val") for chip in batch.chips]
    assert read == listed[2:]
    assert set(module.failed_chips) == set(listed[:2])
    with pytest.raises(DataError, match="damaged"):
        batches(ours(own_chips, "validate", val_split=arguments(own_chips)["train_split"], skip_damaged=1), "val")


def test_infinite_and_unrecognised_no_data_are_named_at_the_first_read(spoilt, capsys):
    module = ours(spoilt)
    batches(module)
    batches(module)
    listed = ids_of(spoilt, "test")
    assert set(module.odd_chips) == set(listed)
    said = capsys.readouterr().err
    assert [said.count(f"the radar of {chip} holds") for chip in listed] == [1, 1, 1]
    assert "infinite" in said and "-10000" in said


def test_optical_and_radar_work_without_elevation(tars, tmp_path):
    root = Path(shutil.copytree(tars, tmp_path / "tars"))
    for tar in root.glob("*/DEM.tar"):
        tar.unlink()
    found = batches(ours(root, modalities=["S2L2A", "S1RTC"]))
    for mine, theirs in zip(found, batches(ours(tars)), strict=True):
        assert mine["image"].keys() == {"S2L2A", "S1RTC"}
        assert torch.equal(mine["image"]["S2L2A"], theirs["image"]["S2L2A"])
        assert all("_annotation_flood.tif" in name for name in mine["filename"])


def test_mask_value_and_size_of_a_chip_that_do_not_fit_are_named(own_chips):
    odd, small = ids_of(own_chips, "test")[:2]
    save(own_chips / "data" / "DEM" / f"{small}_DEM.tif", np.zeros((16, 32), np.int16))
    with pytest.raises(DataError, match=rf"DEM of {small} is \(16, 32\) int16, of other chips \(32, 32\)"):
        batches(ours(own_chips))
    with rasterio.open(own_chips / "data" / "MASK" / f"{odd}_annotation_flood.tif", "r+") as file:
        mask = file.read(1)
        mask[0, 0] = 2
        file.write(mask, 1)
    with pytest.raises(DataError, match=rf"mask of {odd} holds \[2\], expected \[-1, 0, 1\]") as error:
        batches(ours(own_chips))
    assert "v1-binary" in error.value.fix


def test_custom_label_map_and_split_with_events_give_a_batch_without_further_arguments_of_the_model(own_chips):
    reference = batches(ours(own_chips))
    split(own_chips, "test").write_text("".join(f"{chip},storm\n" for chip in ids_of(own_chips, "test")))
    own = {"protocol": "custom", "class_names": ["wet", "dry"], "label_map": [1, 0]}
    for mine, plain in zip(batches(ours(own_chips, **own)), reference, strict=True):
        assert torch.equal(mine["mask"], torch.where(plain["mask"] == -1, -1, 1 - plain["mask"]))
        assert set(mine) == {"image", "mask", "filename"}
        assert [Path(name).name for name in mine["filename"]] == [f"{chip}_DEM.tif" for chip in mine.chips]


@pytest.mark.parametrize("change", [{"means": None}, {"stds": {"DEM": [0.0]}}, {"stds": {"DEM": [1.0, 1.0]}}])
def test_statistics_that_are_missing_or_zero_or_of_other_bands_are_refused(chips, change):
    changes = {key: values and DATA[key] | values for key, values in change.items()}
    with pytest.raises(ValueError, match=r"means|stds"):
        ours(chips, **changes)
    with pytest.raises(ValueError, match="batch_size 0"):
        ours(chips, batch_size=0)


@pytest.mark.slow
def test_process_that_fails_with_workers_ends(chips, tmp_path):
    """multiprocessing sends SIGTERM to workers at exit, which they ignore, and waits for them."""
    script = tmp_path / "fails.py"
    script.write_text(
        "from floodrepro.data.datamodule import FloodDataModule\n"
        f"module = FloodDataModule(**{arguments(chips, num_workers=1, protocol='v0')!r})\n"
        "module.setup('test')\n"
        "left = iter(module.test_dataloader())\n"
        "next(left)\n"
        "raise SystemExit(7)\n"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, script], env=environment, timeout=200, check=False).returncode == 7
