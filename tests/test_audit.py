"""The audit names every planted fault by kind, and finds nothing wrong with generated chips."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml

from conftest import save
from floodrepro.data import audit as auditing
from floodrepro.data.audit import FIGURES, MANIFEST, audit
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import PROTOCOLS, suffix_of
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


def rewrite(root: Path, chip: str, modality: str, change=lambda bands: bands, scl=True, **attributes: str) -> None:
    """Write a chip's zarr file anew, with other bands or attributes, or without its SCL."""
    path = root / "data" / modality / f"{chip}_{modality}.zarr.zip"
    held, arrays = Chips(root).extras(chip, modality, "bands", *["SCL"] * scl)
    path.write_bytes(zarr_zip(change(arrays.pop("bands")), arrays, held | attributes, VARIANTS["time"]))


def retouch(root: Path, chip: str, part: str, change) -> None:
    """Write a chip's GeoTIFF anew."""
    path = root / "data" / part / f"{chip}{suffix_of(PROTOCOLS['v1'], part)}"
    with rasterio.open(path) as file:
        values, profile = file.read(1), dict(file.profile)
    values, profile = change(values, profile)
    save(path, values, **profile)


def found_in(root: Path, **options) -> dict[str, dict]:
    return {finding["check"]: finding for finding in audit(root, PROTOCOLS["v1"], jobs=1, **options)["findings"]}


@pytest.fixture(scope="session")
def manifest(clean) -> dict:
    """The audit of the clean chips, by two threads; table and file are beside them."""
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


APART, TURNED = "radar and optical event more than 5 days apart", "radar orbit changed between before and event"
STRANGE, UNORDERED = "radar values that become inputs", "S2L2A: dates doubled or out of order"
FAULTS = [  # severity, what the audit calls it, and what is done to a chip
    ("warning", "S2L2A: a date is missing", bands("S2L2A", datetime="2015-12-06;;2016-01-09;2016-01-21")),
    ("warning", "S1RTC: a date is missing", bands("S1RTC", datetime=";;;")),
    ("warning", UNORDERED, bands("S2L2A", datetime="2015-12-06;2015-12-06;2016-01-09;2016-01-21")),
    ("warning", UNORDERED, bands("S2L2A", datetime="2015-12-06;2015-12-05;2016-01-09;2016-01-21")),
    ("warning", APART, bands("S2L2A", datetime="2001-01-01;2001-01-02;2001-01-03+00:00;2001-01-04Z")),
    ("warning", TURNED, bands("S1RTC", sat_orbit_state="ascending;ascending;descending;ascending")),
    ("warning", STRANGE, bands("S1RTC", lambda bands: np.where(bands < -20, -9999, bands).astype("f2"))),
    ("error", STRANGE, bands("S1RTC", lambda bands: np.where(bands < -20, -np.inf, bands).astype("f2"))),
    ("error", "radar is linear, not in dB", bands("S1RTC", lambda bands: 10 ** (bands.astype("f4") / 10))),
    ("error", "mask values", raster("MASK", lambda v, p: (v.view("u1") | 254, p | {"dtype": "uint8", "nodata": None}))),
    ("error", "DEM and MASK on different grids", raster("DEM", lambda v, p: (v, p | {"crs": "EPSG:32631"}))),
    ("error", "DEM is damaged", lambda root, chip: (root / "data" / "DEM" / f"{chip}_DEM.tif").write_bytes(b"II*")),
    ("error", "no DEM", lambda root, chip: (root / "data" / "DEM" / f"{chip}_DEM.tif").unlink()),
    ("error", "S2L2A: shape", bands("S2L2A", lambda bands: bands[:, :2])),
    ("error", "S1RTC: shape", bands("S1RTC", lambda bands: bands[:, :, :16])),
    ("error", "S1RTC: shape", bands("S1RTC", lambda bands: bands[:1])),
    ("error", "S2L2A: dtype", bands("S2L2A", lambda bands: bands.astype("f4"))),
    ("error", "MASK: dtype", raster("MASK", lambda v, p: (v, p | {"dtype": "float64"}))),
    ("error", "MASK: shape", raster("MASK", lambda v, p: (v[:9], p | {"height": 9}))),
    ("error", "DEM: dtype", raster("DEM", lambda v, p: (v, p | {"dtype": "complex64"}))),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """Thirty chips, and each fault in one of them, the first ones of train."""
    root = tmp_path_factory.mktemp("faulty")
    generate(root, events=3, chips=90, size=32, protocol="v0", seed=5)
    for chip, (_, _, change) in zip(ids_of(root, "train"), FAULTS, strict=False):
        change(root, chip)
    return root


def test_each_planted_fault_is_named_with_its_chip_and_nothing_else_is(faulty):
    found = audit(faulty, PROTOCOLS["v0"], splits=["train"], jobs=1)["findings"]
    planted = Counter((severity, kind) for severity, kind, _ in FAULTS)
    assert {(one["severity"], one["check"]): one["count"] for one in found} == planted
    said = {(one["severity"], one["check"]): one["message"] for one in found}
    for chip, (severity, kind, _) in zip(ids_of(faulty, "train"), FAULTS, strict=False):
        assert chip in said[severity, kind], kind


def test_what_is_right_of_a_chip_is_drawn_with_what_is_known_of_it(faulty, cli, tmp_path):
    listed, picture = ids_of(faulty, "train"), tmp_path / "chip.png"
    show = ("data", "show", "--root", faulty, "--output")
    shown = cli(*show, picture, listed[-1]).ok()
    assert "S1RTC sat_relative_orbit: 81;81;81;81" in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli(*show, picture, listed[-1]).code == 2
    for number, kind in [(number, kind) for number, (_, kind, _) in enumerate(FAULTS) if kind.endswith("dtype")]:
        shown = cli(*show, tmp_path / f"{number}.png", listed[number])
        assert (shown.code, kind in shown.err) == (0, True), shown.err
    assert cli(*show, tmp_path / "none.png", "none").err.startswith("floodrepro: error: there is nothing to draw")


def test_unsigned_mask_and_a_chip_without_clouds_are_right_and_255_tells_where_it_often_comes_from(mine):
    chip, unsigned = ids_of(mine, "train")[0], {"dtype": "uint8", "nodata": None}
    rewrite(mine, chip, "S2L2A", scl=False)
    retouch(mine, chip, "MASK", lambda v, p: (np.maximum(v, 0), p | unsigned))
    assert set(found_in(mine)) == {"shared events"}
    retouch(mine, chip, "MASK", lambda v, p: (np.full(v.shape, 255, "u1"), p | unsigned))
    assert "-1 saved as uint8" in found_in(mine)["mask values"]["message"]


def test_swapped_classes_and_an_optical_offset_in_some_events_are_found(mine):
    lifted = ids_of(mine, "val")
    for chip in lifted:
        rewrite(mine, chip, "S2L2A", lambda bands: np.where(bands > 0, bands + 1000, bands).astype(np.int16))
    for chip in Chips(mine).having("MASK"):
        retouch(mine, chip, "MASK", swapped)
    found = found_in(mine)
    assert found["no flood signature"]["severity"] == "error"
    assert "the mask is 0" in found["no flood signature"]["message"]
    assert lifted[0].split("_")[0] in found["optical offset of 1000 in some events"]["message"]


def test_only_the_splits_that_are_asked_for_are_read_and_a_chip_in_two_stops_all(mine):
    for split_name in ("train", "test"):
        for chip in ids_of(mine, split_name):
            (mine / "data" / "MASK" / f"{chip}_annotation_flood.tif").unlink()
    manifest = audit(mine, PROTOCOLS["v1"], splits=["val"], jobs=1)
    assert (manifest["findings"], list(manifest["splits"])) == ([], ["val"])
    assert audit(mine, PROTOCOLS["v1"], splits=["val"], limit=1, jobs=1)["splits"]["val"]["chips"] == 1
    assert json.loads((mine / "data-manifest.json").read_text()) == manifest  # that of a part lies beside it
    with split(mine, "train").open("a") as file:
        file.write(f"{ids_of(mine, 'val')[0]}\n")
    with pytest.raises(DataError, match="the same chips are in"):
        audit(mine, PROTOCOLS["v1"], jobs=1)


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
    assert line.count("EMSR") >= 3 and line.endswith(" more")
    assert cli(*command, "--split", "val").code == 0
    assert cli(*command[:-2]).code == 2
    classless = cli(*command[:-1], "custom")
    assert (classless.code, "--config YAML" in classless.err) == (2, True)


def test_folder_that_cannot_be_written_is_told_before_anything_is_read(clean, monkeypatch):
    monkeypatch.setattr(auditing.os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr(auditing, "check_chip", None)
    with pytest.raises(DataError, match="read-only"):
        audit(clean, PROTOCOLS["v1"], jobs=1)


def test_stats_are_a_layer_and_those_of_a_damaged_audit_are_refused(clean, manifest, cli, tmp_path):
    command = ("data", "stats", "--output", tmp_path / "layer.yaml", "--root")
    for content in ("", '{"bands": {"train": {"DEM": {"mean": 1}}}}', '{"bands": {"train": {}}}'):
        (tmp_path / MANIFEST).write_text(content)
        outcome = cli(*command, tmp_path)
        assert (outcome.code, outcome.err.startswith("floodrepro: error: ")) == (2, True)
    assert cli(*command, clean).code == 0
    layer = yaml.safe_load((tmp_path / "layer.yaml").read_text())["data"]["init_args"]
    assert layer["means"]["S2L2A"] == manifest["bands"]["train"]["S2L2A"]["mean"]
