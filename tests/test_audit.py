"""The audit names every planted fault by kind, and finds nothing wrong with generated chips."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml
import zarr

from floodrepro.data import audit as auditing
from floodrepro.data.audit import FIGURES, MANIFEST, audit
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import PROTOCOLS
from floodrepro.data.splits import check_data
from floodrepro.data.synth import VARIANTS, generate, zarr_zip
from floodrepro.errors import DataError
from test_splits import ids_of, recipe_of, split


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audit") / "data-set"
    generate(root, events=4, chips=8, size=64, protocol="v1", seed=5)
    return root


@pytest.fixture
def mine(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "mine"))


def first_chip(root: Path) -> str:
    return ids_of(root, "train")[0]


def rewrite(root: Path, chip: str, modality: str, change=lambda bands: bands, scl=True, **attributes: str) -> None:
    """Write a chip's zarr file anew, with other bands or attributes, or without its SCL."""
    path = root / "data" / modality / f"{chip}_{modality}.zarr.zip"
    held, arrays = Chips(root).extras(chip, modality, "bands", *["SCL"] * scl)
    path.write_bytes(zarr_zip(change(arrays.pop("bands")), arrays, held | attributes, VARIANTS["time"]))


def retouch(root: Path, chip: str, part: str, change) -> None:
    """Write a chip's GeoTIFF anew."""
    suffix = {"DEM": "_DEM.tif", "MASK": "_annotation_flood.tif"}[part]
    path = root / "data" / part / f"{chip}{suffix}"
    with rasterio.open(path) as file:
        values, profile = file.read(1), dict(file.profile)
    values, profile = change(values, profile)
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


def found_in(root: Path, **options) -> dict[str, dict]:
    manifest = audit(root, PROTOCOLS["v1"], jobs=1, **options)
    return {finding["check"]: finding for finding in manifest["findings"]}


@pytest.fixture(scope="session")
def manifest(clean) -> dict:
    """The audit of the clean chips, by two processes; table and file are beside them."""
    return audit(clean, PROTOCOLS["v1"], jobs=2)


def test_generated_chips_have_nothing_wrong_and_the_digests_that_a_run_has(clean, manifest):
    assert {finding["check"] for finding in manifest["findings"]} == {"shared events"}  # as version 1 has them
    kept = json.loads((clean / MANIFEST).read_text())
    state = check_data(recipe_of(clean, protocol="v1"), ("train", "val", "test"))
    assert {name: kept["digests"][name] for name in state.digests} == state.digests


def swapped(values, profile):
    return np.select([values == 2, values == 0], [0, 2], values).astype(np.int8), profile


def bands(modality: str, change=lambda bands: bands, **attributes: str):
    return lambda root, chip: rewrite(root, chip, modality, change, **attributes)


def raster(part: str, change):
    return lambda root, chip: retouch(root, chip, part, change)


def arrays(modality: str, **values: np.ndarray):
    """Write a zarr file of these arrays only in place of a chip's."""

    def write(root: Path, chip: str) -> None:
        attributes, _ = Chips(root).extras(chip, modality)
        with zarr.ZipStore(root / "data" / modality / f"{chip}_{modality}.zarr.zip", mode="w") as store:
            group = zarr.group(store=store)
            group.attrs.put(attributes)
            for name, array in values.items():
                group.array(name, array)
            zarr.consolidate_metadata(store)

    return write


APART, TURNED = "radar and optical event more than 5 days apart", "radar orbit changed between before and event"
STRANGE = "radar values that become inputs"
FAULTS = [  # severity, what the audit calls it, and what is done to a chip
    ("warning", "S2L2A: a date is missing", bands("S2L2A", datetime="2020-01-01;;2020-02-05;2020-02-10")),
    ("warning", "S1RTC: a date is missing", bands("S1RTC", datetime=";;;")),
    ("warning", "S2L2A: a date is there", bands("S2L2A", datetime="2020-01-01;2020-01-01;2020-02-05;2020-02-10")),
    ("warning", "S2L2A: dates out of order", bands("S2L2A", datetime="2020-02-01;NaT;2020-01-05;2020-01-01")),
    ("warning", APART, bands("S2L2A", datetime="2001-01-01;2001-01-02;2001-01-03+00:00;2001-01-04Z")),
    ("warning", TURNED, bands("S1RTC", sat_orbit_state="ascending;ascending;descending;ascending")),
    ("warning", STRANGE, bands("S1RTC", lambda bands: np.where(bands < -20, -9999, bands).astype("f2"))),
    ("error", STRANGE, bands("S1RTC", lambda bands: np.where(bands < -20, -np.inf, bands).astype("f2"))),
    ("error", "radar is linear", bands("S1RTC", lambda bands: 10 ** (bands.astype("f4") / 10))),
    ("error", "mask values", raster("MASK", lambda v, p: (v.view("u1"), p | {"dtype": "uint8", "nodata": 255}))),
    ("error", "DEM and MASK", raster("DEM", lambda v, p: (v, p | {"crs": "EPSG:32631"}))),
    ("error", "DEM is damaged", lambda root, chip: (root / "data" / "DEM" / f"{chip}_DEM.tif").write_bytes(b"II*")),
    ("error", "no DEM", lambda root, chip: (root / "data" / "DEM" / f"{chip}_DEM.tif").unlink()),
    ("error", "S2L2A: shape", bands("S2L2A", lambda bands: bands[:, :2])),
    ("error", "S1RTC: shape", bands("S1RTC", lambda bands: bands[:, :, :32])),
    ("error", "S1RTC: shape", bands("S1RTC", lambda bands: bands[:1])),
    ("error", "S1RTC: shape", arrays("S1RTC", bands=np.zeros((4, 64, 64), "f2"))),
    ("error", "S2L2A: shape", arrays("S2L2A", bands=np.zeros((4, 12, 0, 64), "i2"))),
    ("error", "S2L2A: dtype", arrays("S2L2A", bands=np.full((4, 12, 64, 64), "wet"))),
    ("error", "S2L2A is damaged", arrays("S2L2A")),
    ("error", "MASK: dtype", raster("MASK", lambda v, p: (v, p | {"dtype": "float64"}))),
    ("error", "MASK: shape", raster("MASK", lambda v, p: (v[:9], p | {"height": 9}))),
    ("error", "DEM: dtype", raster("DEM", lambda v, p: (v, p | {"dtype": "complex64"}))),
    ("warning", "SCL: shape", arrays("S2L2A", bands=np.ones((4, 12, 64, 64), "i2"), SCL=np.ones((64, 64), "u1"))),
]


@pytest.mark.parametrize(("severity", "kind", "change"), FAULTS)
def test_planted_fault_is_named_with_its_chip_and_what_is_right_can_be_drawn(
    mine, cli, tmp_path, severity, kind, change
):
    chip = first_chip(mine)
    change(mine, chip)
    [finding] = [f for check, f in found_in(mine, splits=["train"]).items() if check.startswith(kind)]
    assert finding["severity"] == severity
    assert chip in finding["message"]
    if kind.endswith(("shape", "dtype", "damaged")):
        shown = cli("data", "show", chip, "--root", mine, "--output", tmp_path / "chip.png")
        assert shown.code == 0, shown.err
        assert kind in shown.err


def test_unsigned_mask_and_a_chip_without_clouds_are_right_and_255_tells_where_it_often_comes_from(mine):
    chip, unsigned = first_chip(mine), {"dtype": "uint8", "nodata": None}
    rewrite(mine, chip, "S2L2A", scl=False)
    retouch(mine, chip, "MASK", lambda v, p: (np.maximum(v, 0), p | unsigned))
    assert set(found_in(mine)) == {"shared events"}
    retouch(mine, chip, "MASK", lambda v, p: (np.full(v.shape, 255, "u1"), p | unsigned))
    assert "-1 saved as uint8" in found_in(mine)["mask values"]["message"]


def test_swapped_classes_are_found_by_how_radar_falls(mine):
    for chip in Chips(mine).having("MASK"):
        retouch(mine, chip, "MASK", swapped)
    finding = found_in(mine)["no flood signature"]
    assert finding["severity"] == "error"
    assert "the mask is 0" in finding["message"]


def test_optical_offset_in_some_events_is_found(mine):
    lifted = ids_of(mine, "val")
    for chip in lifted:
        rewrite(mine, chip, "S2L2A", lambda bands: np.where(bands > 0, bands + 1000, bands).astype(np.int16))
    assert lifted[0].split("_")[0] in found_in(mine)["optical offset of 1000 in some events"]["message"]


def test_faults_of_split_files_are_findings_and_other_chips_are_still_read(mine):
    with split(mine, "val").open("a") as file:
        file.write(f"{ids_of(mine, 'val')[0]}\n")
    found = found_in(mine)
    assert "listed twice" in found["split file"]["message"]
    with split(mine, "train").open("a") as file:
        file.write(f"{ids_of(mine, 'test')[0]}\n")
    assert found_in(mine)["chip in two splits"]["severity"] == "error"


def test_only_the_splits_that_are_asked_for_are_read(mine):
    for split_name in ("train", "test"):
        for chip in ids_of(mine, split_name):
            (mine / "data" / "MASK" / f"{chip}_annotation_flood.tif").unlink()
    manifest = audit(mine, PROTOCOLS["v1"], splits=["val"], jobs=1)
    assert manifest["findings"] == []
    assert list(manifest["splits"]) == ["val"]
    assert audit(mine, PROTOCOLS["v1"], splits=["val"], limit=1, jobs=1)["splits"]["val"]["chips"] == 1


def test_statistics_are_those_of_the_valid_pixels_and_figures_of_each_split_event_and_timestep(clean, manifest):
    source, found = Chips(clean), manifest["bands"]["train"]["S1RTC"]
    radar = np.stack([source.bands(chip, "S1RTC") for chip in ids_of(clean, "train")]).astype(np.float64)
    assert found["mean"] == pytest.approx(np.nanmean(radar, axis=(0, 1, 3, 4)), abs=1e-3)
    assert found["std"] == pytest.approx(np.nanstd(radar, axis=(0, 1, 3, 4)), abs=1e-3)
    table = pq.read_table(clean / FIGURES).to_pandas()
    assert set(table["timestep"]) == {"month before", "before", "event", "after"}
    event = table[table["timestep"] == "event"]
    assert (event["cloud"] > table[table["timestep"] == "before"]["cloud"].to_numpy()).mean() > 0.5
    assert table["chips"].groupby([table["split"], table["event"]]).nunique().max() == 1
    assert table["share_of_mask_2"].between(0, 1).all()


def test_command_lists_findings_of_a_kind_in_a_line_and_fails_for_an_error(mine, cli):
    damaged = [*ids_of(mine, "train"), *ids_of(mine, "test")]
    for chip in damaged:
        (mine / "data" / "DEM" / f"{chip}_DEM.tif").write_bytes(b"")
    command = ("data", "audit", "--root", mine, "--jobs", "1", "--protocol", "v1")
    outcome = cli(*command)
    assert outcome.code == 1
    [line] = [line for line in outcome.out.splitlines() if "DEM is damaged" in line]
    assert line.startswith(f"error: DEM is damaged ({len(damaged)}): ")
    assert (line.count("EMSR") >= 3, line[-1]) == (True, "…")
    assert cli(*command, "--split", "val").code == 0
    assert cli(*command[:-2]).code == 2
    classless = cli(*command[:-1], "custom")
    assert (classless.code, "--config YAML" in classless.err) == (2, True)


def test_folder_that_cannot_be_written_is_told_before_anything_is_read(mine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(auditing.os, "access", lambda *_: False)  # root may write anywhere
        patch.setattr(auditing, "check_chip", None)
        with pytest.raises(DataError, match="read-only"):
            audit(mine, PROTOCOLS["v1"], jobs=1)


def test_stats_are_a_layer_and_show_draws_a_chip(mine, cli, tmp_path):
    manifest = audit(mine, PROTOCOLS["v1"], jobs=1)
    assert cli("data", "stats", "--root", mine, "--output", tmp_path / "layer.yaml").code == 0
    layer = yaml.safe_load((tmp_path / "layer.yaml").read_text())["data"]["init_args"]
    assert layer["means"]["S2L2A"] == manifest["bands"]["train"]["S2L2A"]["mean"]
    picture = tmp_path / "chip.png"
    shown = cli("data", "show", first_chip(mine), "--root", mine, "--output", picture)
    assert shown.code == 0, shown.err
    assert "S1RTC sat_relative_orbit: 81;81;81;81" in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli("data", "show", first_chip(mine), "--root", mine, "--output", picture).code == 2
    for flags in (("none", "--output", tmp_path / "new.png"), (first_chip(mine), "--output", tmp_path / "new.xyz")):
        outcome = cli("data", "show", "--root", mine, *flags)
        assert outcome.err.startswith("floodrepro: error: ")


def test_stats_of_a_damaged_audit_are_refused(tmp_path, cli):
    for content in ("", '{"bands": {"train": {"DEM": {"mean": 1}}}}', '{"bands": {"train": {}}}'):
        (tmp_path / MANIFEST).write_text(content)
        outcome = cli("data", "stats", "--root", tmp_path, "--output", tmp_path / "layer.yaml")
        assert (outcome.code, outcome.err.startswith("floodrepro: error: ")) == (2, True)
