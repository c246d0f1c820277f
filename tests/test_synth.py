"""Generated data: the real reader takes it for its own, it is the same each time, and its parts agree."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
import zarr

from floodrepro.data import synth
from floodrepro.data.names import (
    AFTER,
    BEFORE,
    EVENT,
    IGNORE_INDEX,
    LABEL_DIR,
    NO_DATA,
    S1_BANDS,
    S2_BANDS,
    SPLITS,
    SUFFIXES,
    ChipId,
    mgrs_tile,
    split_file,
)
from floodrepro.data.synth import generate
from floodrepro.errors import DataError, UsageError

SMALL = {"events": 4, "chips": 18, "size": 32, "protocol": "v0", "seed": 7}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A data set of 4 events and 18 chips of 32 px, in the extracted layout."""
    root = tmp_path_factory.mktemp("ImpactMesh-Flood-small")
    return root, generate(root, **SMALL)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A data set of 6 events and 54 chips of 64 px, large enough for its shares to mean something."""
    root = tmp_path_factory.mktemp("ImpactMesh-Flood-demo")
    return root, generate(root, events=6, chips=54, size=64, protocol="v1", seed=1)


@pytest.fixture(scope="session")
def impactmesh_dataset():
    """The real reader; importing it takes about 15 s."""
    os.environ.setdefault("LIGHTLY_DID_VERSION_CHECK", "True")  # else terratorch 1.2.7's import asks the network
    from impactmesh.impactmesh_dataset import ImpactMeshDataset

    return ImpactMeshDataset


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def chips_of(root: Path, *splits: str) -> list[str]:
    return [chip for split in splits or SPLITS for chip in (root / "split" / split_file(split)).read_text().split()]


def read_zarr(root: Path, chip: str, modality: str) -> zarr.Group:
    path = root / "data" / modality / f"{chip}{SUFFIXES[modality]}"
    return zarr.open_consolidated(str(path), mode="r")


def read_tif(root: Path, chip: str, part: str) -> np.ndarray:
    with rasterio.open(root / "data" / part / f"{chip}{SUFFIXES[part]}") as source:
        return source.read(1)


def test_impactmesh_reads_generated_chips_as_its_own(small, impactmesh_dataset):
    root, _ = small
    for split in SPLITS:
        dataset = impactmesh_dataset(
            root / "data",
            split_file=root / "split" / split_file(split),
            label_grep=SUFFIXES[LABEL_DIR],
            no_data_replace=0,
        )
        assert dataset.samples == chips_of(root, split)
        for chip, sample in zip(dataset.samples, dataset, strict=False):
            # ImpactMesh's default transform puts time last but two: channels, time, height, width.
            assert {name: tuple(image.shape) for name, image in sample["image"].items()} == {
                "S2L2A": (12, 4, 32, 32),
                "S1RTC": (2, 4, 32, 32),
                "DEM": (1, 4, 32, 32),
            }
            assert all(image.isfinite().all() for image in sample["image"].values())
            assert np.array_equal(sample["mask"].squeeze().numpy(), read_tif(root, chip, LABEL_DIR))
            s1 = np.nan_to_num(read_zarr(root, chip, "S1RTC")["bands"][:].astype(np.float32), nan=0)
            assert np.array_equal(sample["image"]["S1RTC"].numpy(), s1.transpose(1, 0, 2, 3))


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_same_seed_gives_the_same_bytes(tmp_path, layout):
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        generate(tmp_path / name, **SMALL | {"seed": seed}, layout=layout)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert not set(digests(tmp_path / "one").values()) & set(digests(tmp_path / "other").values())


def test_large_chips_compress_to_the_same_bytes_each_time():
    # Chunks of many blosc blocks: the case in which a threaded encoder may store them in any order.
    rng = np.random.default_rng(0)
    bands = rng.normal(2000, 300, (4, 12, 256, 256)).astype(np.int16)
    [place] = synth._places(rng, "EMSR9001", 1, 1, 256)
    before = synth.blosc.use_threads
    files = {synth._zarr_zip(place, "S2L2A", bands, bands[:, 0] == NO_DATA, {}, {}) for _ in range(8)}
    assert len(files) == 1
    assert synth.blosc.use_threads == before


def test_adding_events_does_not_change_the_earlier_ones(tmp_path):
    options = {"size": 32, "protocol": "v0", "seed": 7}
    generate(tmp_path / "three", events=3, chips=6, **options)
    generate(tmp_path / "five", events=5, chips=10, **options)
    three, five = digests(tmp_path / "three" / "data"), digests(tmp_path / "five" / "data")
    assert three.items() < five.items()


def test_every_event_is_in_one_split_only(small):
    root, report = small
    events = {split: {ChipId.parse(chip).event for chip in chips_of(root, split)} for split in SPLITS}
    assert sum(map(len, events.values())) == len(set().union(*events.values())) == SMALL["events"]
    assert {split: len(found) for split, found in events.items()} == report.events


def test_every_listed_chip_has_its_four_files_and_there_are_no_others(small):
    root, report = small
    listed = chips_of(root)
    assert len(listed) == len(set(listed)) == sum(report.chips.values()) == SMALL["chips"]
    for part, suffix in SUFFIXES.items():
        assert {path.name for path in (root / "data" / part).iterdir()} == {f"{chip}{suffix}" for chip in listed}


@pytest.mark.parametrize(("events", "by_split"), [(3, (1, 1, 1)), (5, (3, 1, 1)), (8, (4, 2, 2)), (20, (12, 4, 4))])
def test_events_are_divided_about_60_20_20_and_chips_evenly(tmp_path, events, by_split):
    report = generate(tmp_path, events=events, chips=events + 2, size=32, protocol="v0", seed=0)
    assert tuple(report.events.values()) == by_split
    per_event = [ChipId.parse(chip).event for chip in chips_of(tmp_path)]
    assert {per_event.count(event) for event in per_event} == {1, 2}


def test_hub_archives_hold_the_same_bytes_as_the_extracted_files(small, tmp_path):
    extracted, _ = small
    generate(tmp_path, **SMALL, layout="hub")
    assert not (tmp_path / "data").exists()
    found = {}
    for split in SPLITS:
        assert (tmp_path / "split" / split_file(split)).read_bytes() == (
            extracted / "split" / split_file(split)
        ).read_bytes()
        assert {path.name for path in (tmp_path / split).iterdir()} == {f"{part}.tar" for part in SUFFIXES}
        for part, suffix in SUFFIXES.items():
            with tarfile.open(tmp_path / split / f"{part}.tar") as archive:
                members = archive.getmembers()
                assert [member.name for member in members] == sorted(
                    f"{part}/{chip}{suffix}" for chip in chips_of(tmp_path, split)
                )
                assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.isreg()) for m in members} == {
                    (0, 0, 0, 0o644, "", True)
                }
                found |= {m.name: hashlib.sha256(archive.extractfile(m).read()).hexdigest() for m in members}
    assert found == digests(extracted / "data")


def test_coordinates_agree_between_chip_id_zarr_and_tif(small):
    root, _ = small
    for name in chips_of(root):
        chip = ChipId.parse(name)
        with rasterio.open(root / "data" / "DEM" / f"{name}{SUFFIXES['DEM']}") as dem:
            crs, transform, bounds = dem.crs, dem.transform, dem.bounds
            assert (dem.count, dem.dtypes[0]) == (1, "int16")
        with rasterio.open(root / "data" / LABEL_DIR / f"{name}{SUFFIXES[LABEL_DIR]}") as mask:
            assert (mask.crs, mask.transform, mask.count, mask.dtypes[0]) == (crs, transform, 1, "int8")
        assert transform.a == -transform.e == 10
        zone, south = int(chip.tile[:2]), chip.tile[2] < "N"
        assert crs.to_epsg() == (32700 if south else 32600) + zone
        for modality in ("S2L2A", "S1RTC"):
            group = read_zarr(root, name, modality)
            x, y, attributes = group["x"][:], group["y"][:], group.attrs
            assert (x[0], y[0]) == (chip.easting, chip.northing) == (transform.c + 5, transform.f - 5)
            assert (x[-1], y[-1]) == (transform.c + 315, transform.f - 315)
            assert [float(edge) for edge in attributes["proj_bbox"].split(";")] == list(bounds)
            assert rasterio.crs.CRS.from_string(attributes["proj_code"]) == crs
            assert rasterio.crs.CRS.from_wkt(group["spatial_ref"].attrs["crs_wkt"]) == crs
            lon, lat = attributes["center_lon"], attributes["center_lat"]
            [easting], [northing] = rasterio.warp.transform("EPSG:4326", crs, [lon], [lat])
            assert (easting, northing) == pytest.approx(((x[0] + x[-1]) / 2, (y[0] + y[-1]) / 2), abs=0.1)
            assert (lat < 0) == south
            assert int((lon + 180) // 6) + 1 == zone
            assert chip.tile == mgrs_tile(zone, lat, int(easting), int(northing))


def test_chips_of_an_event_are_neighbours_of_one_scene(small):
    root, _ = small
    for split in SPLITS:
        corners = {}
        for chip in map(ChipId.parse, chips_of(root, split)):
            corners.setdefault(chip.event, set()).add((chip.easting // 320, chip.northing // 320))
        for cells in corners.values():
            assert all({(e + 1, n), (e - 1, n), (e, n + 1), (e, n - 1)} & cells for e, n in cells)


def test_zarr_files_are_as_the_data_set_describes_them(small):
    root, _ = small
    for name in chips_of(root, "test"):
        for modality, bands, dtype in (("S2L2A", S2_BANDS, "int16"), ("S1RTC", S1_BANDS, "float16")):
            path = root / "data" / modality / f"{name}{SUFFIXES[modality]}"
            with zipfile.ZipFile(path) as archive:
                assert ".zmetadata" in archive.namelist()
                assert archive.namelist() == sorted(archive.namelist())
                assert {(entry.compress_type, entry.date_time[0]) for entry in archive.infolist()} == {
                    (zipfile.ZIP_STORED, 1980)
                }
            group = read_zarr(root, name, modality)
            pixels = group["bands"]
            assert (pixels.shape, pixels.chunks, pixels.dtype) == (
                (4, len(bands), 32, 32),
                (1, len(bands), 32, 32),
                dtype,
            )
            assert pixels.compressor.cname == "lz4"
            assert tuple(group["band"][:]) == bands
            expected = {"bands", "band", "time", "x", "y", "spatial_ref", "nan_mask", "data_mask"}
            assert set(group) == expected | ({"SCL", "cloud_mask"} if modality == "S2L2A" else set())
            for key in group:
                assert len(group[key].attrs["_ARRAY_DIMENSIONS"]) == group[key].ndim
            times = np.array(group.attrs["datetime"].split(";"), "datetime64[s]")
            assert np.array_equal(times.astype(np.int64), group["time"][:])
            assert (np.diff(times) > np.timedelta64(0)).all()
        assert group["time"].attrs["units"] == "seconds since 1970-01-01"


def test_missing_pixels_and_clouds_are_marked_alike_everywhere(small):
    root, _ = small
    missing = {"S1RTC": 0, "S2L2A": 0}
    for name in chips_of(root):
        s1, s2, mask = read_zarr(root, name, "S1RTC"), read_zarr(root, name, "S2L2A"), read_tif(root, name, LABEL_DIR)
        for group, absent in ((s1, np.isnan(s1["bands"][:])), (s2, s2["bands"][:] == NO_DATA)):
            assert np.array_equal(absent.any(axis=1), absent.all(axis=1))
            assert np.array_equal(group["nan_mask"][:], absent.any(axis=1))
            assert np.array_equal(group["data_mask"][:], ~absent.any(axis=1))
        assert np.array_equal(s2["SCL"][:] == 0, s2["nan_mask"][:].astype(bool))
        assert np.array_equal(s2["cloud_mask"][:].astype(bool), np.isin(s2["SCL"][:], (8, 9)))
        cover = [float(value) for value in s2.attrs["eo_cloud_cover"].split(";")]
        assert cover == pytest.approx(100 * s2["cloud_mask"][:].mean(axis=(1, 2)), abs=0.06)
        assert (mask[s1["nan_mask"][EVENT].astype(bool)] == IGNORE_INDEX).all()
        missing["S1RTC"] += int(s1["nan_mask"][:].sum())
        missing["S2L2A"] += int(s2["nan_mask"][:].sum())
    assert all(missing.values()), "a data set of three events or more holds both kinds of missing pixels"


def test_radar_falls_at_the_event_where_the_mask_says_flood_and_recovers(demo):
    root, _ = demo
    flooded = {step: [] for step in (BEFORE, EVENT, AFTER)}
    for name in chips_of(root):
        flood = read_tif(root, name, LABEL_DIR) == 2
        bands = read_zarr(root, name, "S1RTC")["bands"][:].astype(np.float32)
        for step, pixels in flooded.items():
            pixels.append(bands[step][:, flood])
    vv_vh = {step: np.nanmean(np.concatenate(pixels, axis=1), axis=1) for step, pixels in flooded.items()}
    assert vv_vh[BEFORE] == pytest.approx((-10, -15.5), abs=1)
    assert vv_vh[EVENT] == pytest.approx((-15.5, -21.5), abs=1)
    assert vv_vh[AFTER] == pytest.approx((-11, -16.5), abs=1)


def test_flood_share_is_that_of_a_flood_and_some_chips_are_dry(demo):
    root, report = demo
    assert 0.10 < report.class_shares["flood water"] < 0.22
    assert 0.02 < report.class_shares["permanent water"] < 0.08
    dry = [name for name in chips_of(root) if not (read_tif(root, name, LABEL_DIR) == 2).any()]
    assert 0.1 < len(dry) / sum(report.chips.values()) < 0.6
    for split in SPLITS:
        assert not set(chips_of(root, split)) <= set(dry)


def test_smallest_data_set_holds_flood_in_every_split(tmp_path):
    for seed in range(8):
        root = tmp_path / str(seed)
        generate(root, events=3, chips=3, size=32, protocol="v0", seed=seed)
        for split in SPLITS:
            assert any((read_tif(root, name, LABEL_DIR) == 1).any() for name in chips_of(root, split))


def test_masks_hold_the_classes_of_their_protocol_and_tell_one_flood(small, tmp_path):
    v0, _ = small
    generate(tmp_path, **SMALL | {"protocol": "v1"})
    values = {0: set(), 1: set()}
    for name in chips_of(v0):
        binary, three = read_tif(v0, name, LABEL_DIR), read_tif(tmp_path, name, LABEL_DIR)
        values[0] |= set(np.unique(binary).tolist())
        values[1] |= set(np.unique(three).tolist())
        assert np.array_equal(binary, np.select([three == 2, three == IGNORE_INDEX], [1, IGNORE_INDEX], 0))
    assert values == {0: {-1, 0, 1}, 1: {-1, 0, 1, 2}}


def test_report_counts_what_lies_on_disk(small):
    root, report = small
    masks = np.stack([read_tif(root, name, LABEL_DIR) for name in chips_of(root)])
    assert report.ignored_share == pytest.approx((masks == IGNORE_INDEX).mean())
    assert report.class_shares["flood"] == pytest.approx((masks[masks >= 0] == 1).mean())
    assert sum(report.class_shares.values()) == pytest.approx(1)
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert report.as_dict()["root"] == str(root)


def test_progress_counts_up_to_the_number_of_chips(tmp_path):
    calls = []
    generate(tmp_path, **SMALL, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, SMALL["chips"]) for done in range(1, SMALL["chips"] + 1)]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("events", 2),
        ("events", 901),
        ("chips", 3),
        ("size", 40),
        ("size", 16),
        ("size", 528),
        ("protocol", "v2"),
        ("seed", -1),
        ("layout", "zip"),
    ],
)
def test_wrong_argument_is_named_by_its_flag(tmp_path, argument, value):
    with pytest.raises(UsageError, match=f"--{argument} is '?{value}"):
        generate(tmp_path / "new", **SMALL | {argument: value})
    assert not (tmp_path / "new").exists()


def test_all_wrong_arguments_are_reported_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"--events .*--chips .*--size"):
        generate(tmp_path / "new", **SMALL | {"events": 2, "chips": 1, "size": 0})


@pytest.mark.parametrize("held", ["data", "split", "train", "test"])
def test_data_set_is_never_overwritten(tmp_path, held):
    (tmp_path / held).mkdir()
    with pytest.raises(UsageError, match=held) as error:
        generate(tmp_path, **SMALL)
    assert error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == [held]


def test_other_files_in_the_folder_do_not_stand_in_the_way(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    generate(tmp_path, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_root_that_is_a_file_or_lies_under_one_is_a_data_error(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError) as error:
            generate(root, **SMALL)
        assert error.value.where
        assert error.value.fix


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_full_disk_is_a_data_error_and_leaves_no_split_file(tmp_path, monkeypatch, layout):
    def full(_path, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="No space left on device"):
        generate(tmp_path, **SMALL, layout=layout)
    assert not (tmp_path / "split").exists()
    assert not list(tmp_path.rglob("*.tar")) + list(tmp_path.rglob("*.zip"))


def test_chip_ids_survive_parse_and_str():
    for text in ("EMSR686_1_35TMF_x413905_y4537585", "EMSR9001_02_06SVH_x466095_y4297125"):
        assert str(ChipId.parse(text)) == text
    assert ChipId.parse("EMSR686_1_35TMF_x413905_y4537585") == ChipId("EMSR686", "1", "35TMF", 413905, 4537585)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "EMSR686_1_35TMF_x413905_y4537585\n",
        " EMSR686_1_35TMF_x413905_y4537585",
        "EMSR686_1_35TMF_x413905_y4537585_DEM.tif",
        "EMSR686_35TMF_x413905_y4537585",
        "emsr686_1_35TMF_x413905_y4537585",
        "EMSR686_1_61TMF_x413905_y4537585",
        "EMSR686_1_35IMF_x413905_y4537585",
        "EMSR686_1_35TMF_x0413905_y4537585",
        "EMSR686_1_35TMF_x-13905_y4537585",
        "../EMSR686_1_35TMF_x413905_y4537585",
        "EMSR٦_1_35TMF_x413905_y4537585",
    ],
)
def test_anything_else_is_not_a_chip_id(text):
    with pytest.raises(ValueError, match="not a chip id"):
        ChipId.parse(text)


def test_grid_squares_are_those_of_known_points():
    # The chip id that ImpactMesh documents; the Eiffel Tower, 31U DQ; the Sydney Opera House, 56H LH.
    assert mgrs_tile(35, 40.98, 413905, 4537585) == "35TMF"
    assert mgrs_tile(31, 48.858, 448252, 5411932) == "31UDQ"
    assert mgrs_tile(56, -33.857, 334897, 6252299) == "56HLH"


def test_names_need_no_numpy_and_generated_chips_no_torch():
    code = (
        "import sys, floodrepro.data.names; assert 'numpy' not in sys.modules;"
        "import floodrepro.data.synth, floodrepro.evaluation.baselines;"
        "assert not {'torch', 'terratorch', 'impactmesh'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
