"""Masks made by anyone else, in any CRS, become chip tables that are compared like a model's."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import array_bounds, from_bounds
from rasterio.warp import reproject, transform_bounds
from sklearn.metrics import confusion_matrix

from conftest import CHIPS, save
from floodrepro import recipe as recipes
from floodrepro.data.chips import Chips
from floodrepro.data.splits import read_events
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation.chip_table import BINS
from floodrepro.evaluation.masks import parse_values, tabulate_masks

SIZE = CHIPS["size"]


@pytest.fixture
def recipe(chips: Path) -> dict:
    demo = recipes.read_yaml(recipes.find("demo"))
    return recipes.fold([demo], [*recipes.data_overrides(chips, demo), "--data.init_args.protocol=v0"])


@pytest.fixture
def events(chips: Path) -> dict[str, str]:
    return read_events(chips / "split" / "impactmesh_flood_test.txt")


def rolled(chips: Path, chip: str) -> tuple[np.ndarray, dict]:
    """A mapper's mask and its place: the truth moved by two pixels, unlabelled as rest."""
    with rasterio.open(chips / "data" / "MASK" / f"{chip}_annotation_flood.tif") as source:
        place = {"crs": source.crs, "transform": source.transform}
        return np.roll(np.maximum(source.read(1), 0), 2, axis=1).astype(np.uint8), place


def expected(chips: Path, events: dict[str, str]) -> np.ndarray:
    """The confusion counts of those masks."""
    source = Chips(chips / "data")
    pairs = [(source.raster(chip, "MASK").ravel(), rolled(chips, chip)[0].ravel()) for chip in events]
    return np.stack([confusion_matrix(*pair, labels=[0, 1]) for pair in pairs])  # other labels are left out


@pytest.fixture
def folder(chips: Path, events: dict[str, str], tmp_path: Path) -> Path:
    for chip in events:
        values, like = rolled(chips, chip)
        save(tmp_path / "masks" / f"{chip}_pred.tif", values, **like)
    return tmp_path / "masks"


def test_masks_named_after_chips_are_counted_pixel_by_pixel(recipe, chips, events, folder):
    table = tabulate_masks(recipe, [folder], events, name="GFM")
    assert np.array_equal(table.counts, expected(chips, events))
    assert table.chips.tolist() == list(events)
    assert (table.name, table.histogram, table.unseen.sum()) == ("GFM", None, 0)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == SIZE**2).all()


def test_one_large_raster_in_another_crs_gives_the_same_table(recipe, chips, events, folder, tmp_path):
    """All chips of an event in one raster of longitude and latitude, fine enough that nearest finds each pixel."""
    rasters = []
    for event in sorted(set(events.values())):
        parts = [rolled(chips, chip) for chip in events if events[chip] == event]
        crs = parts[0][1]["crs"]
        boxes = np.array([array_bounds(SIZE, SIZE, like["transform"]) for _, like in parts])
        box = transform_bounds(crs, "EPSG:4326", *boxes.min(axis=0)[:2], *boxes.max(axis=0)[2:])
        width, height = (int((box[k + 2] - box[k]) / 1e-5) for k in (0, 1))
        place = {"crs": "EPSG:4326", "transform": from_bounds(*box, width, height)}
        large = np.full((height, width), 255, np.uint8)
        for values, like in parts:
            here = {"src_transform": like["transform"], "src_crs": crs, "init_dest_nodata": False, "dst_nodata": 255}
            reproject(values, large, **here, dst_transform=place["transform"], dst_crs=place["crs"])
        rasters.append(save(tmp_path / "large" / f"{event}.tif", large, **place, nodata=255, compress="deflate"))
    near = tabulate_masks(recipe, rasters, events, name="large")
    exact = tabulate_masks(recipe, [folder], events, name="folder")
    assert near.unseen.sum() == 0
    assert np.abs(near.counts - exact.counts).sum() <= 0.002 * exact.counts.sum()


def test_no_data_is_not_counted_and_its_share_is_told(recipe, chips, events, folder, capsys):
    chip = next(iter(events))
    values, like = rolled(chips, chip)
    values[:, : SIZE // 2] = 255
    save(folder / f"{chip}_pred.tif", values, **like, nodata=255)
    table = tabulate_masks(recipe, [folder], events, name="GFM")
    assert 0 < table.unseen[0] <= SIZE**2 // 2
    assert table.unseen[1:].sum() == 0
    assert "1 of 3 chips are not whole; where no-data is 0, --values 0=rest,1=flood" in capsys.readouterr().err
    whole = tabulate_masks(recipe, [folder], events, name="GFM", values="0=0,1=1,255=rest")  # named: a class
    assert whole.unseen.sum() == 0


def test_values_are_mapped_by_name_and_unknown_ones_are_refused(recipe, chips, events, folder):
    for chip in events:
        values, like = rolled(chips, chip)
        save(folder / f"{chip}_pred.tif", np.where(values == 1, 5, 7).astype(np.uint8), **like)
    with pytest.raises(DataError, match=r"holds 5|holds 7"):
        tabulate_masks(recipe, [folder], events, name="GFM")
    table = tabulate_masks(recipe, [folder], events, name="GFM", values="5=flood, 7=rest")
    assert np.array_equal(table.counts, expected(chips, events))
    assert parse_values("1=1,0=none", ["rest", "flood"]) == {1: 1, 0: -1}
    for text in ("1=water", "flood", "a=flood", "1=flood,1=rest"):
        with pytest.raises(UsageError, match="--values"):
            parse_values(text, ["rest", "flood"])


@pytest.mark.parametrize(("scale", "kind"), [(1.0, np.float32), (100.0, np.uint8)])
def test_probabilities_keep_their_histogram(recipe, chips, events, tmp_path, scale, kind):
    for chip in events:
        values, like = rolled(chips, chip)
        save(tmp_path / "p" / f"{chip}_prob.tif", (scale * np.where(values == 1, 0.75, 0.25)).astype(kind), **like)
    table = tabulate_masks(recipe, [tmp_path / "p"], events, name="U-Net", scale=scale)
    filled = np.flatnonzero(table.histogram.sum(axis=(0, 1)))
    assert filled.tolist() == [int(0.25 * BINS), int(0.75 * BINS)]
    assert np.array_equal(table.histogram[:, :, filled[1]], table.counts[:, :, 1])
    right = np.trace(table.counts, axis1=1, axis2=2)
    wrong = table.counts.sum(axis=(1, 2)) - right
    assert table.squared_error == pytest.approx(0.25**2 * right + 0.75**2 * wrong)
    if scale != 1:
        with pytest.raises(DataError, match="expected 0 to 1"):
            tabulate_masks(recipe, [tmp_path / "p"], events, name="U-Net", scale=1.0)


def test_masks_that_cannot_be_used_are_named(recipe, chips, events, tmp_path):
    values, like = rolled(chips, next(iter(events)))
    far = like | {"transform": rasterio.Affine(10, 0, 200000, 0, -10, 1000000)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.tif").write_bytes(b"II*\0 no raster")
    (tmp_path / "cut.tif").write_bytes(save(tmp_path / "whole.tif", values, **like).read_bytes()[:-99])
    for name in ("other", "third"):
        save(tmp_path / "two" / f"{next(iter(events))}_{name}.tif", values, **like)
    for masks, says in (
        (tmp_path / "empty", "there are no masks here"),
        (save(tmp_path / "far.tif", values, **far), "no mask covers any of the 3 chips"),
        (tmp_path / "two", f"two masks are named after {next(iter(events))}"),
        (tmp_path / "damaged.tif", "a mask cannot be read"),
        (tmp_path / "cut.tif", "a mask cannot be read"),
    ):
        with pytest.raises(DataError, match=says):
            tabulate_masks(recipe, [masks], events, name="x")
