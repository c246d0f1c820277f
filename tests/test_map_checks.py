"""Checks of a scene before the model runs: each wrong scene is refused in a line that says what is wrong."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

from floodrepro.errors import DataError, UsageError
from floodrepro.mapping.checks import list_problems
from floodrepro.mapping.scene import read_scene
from map_scenes import make_scene


@pytest.fixture
def scene(tmp_path):
    return make_scene(tmp_path, 90, 80)


def edit(scene: Path, change):
    content = yaml.safe_load(scene.read_text())
    change(content)
    scene.write_text(yaml.safe_dump(content, sort_keys=False))


def edit_pixels(scene: Path, pattern: str, change):
    for file in scene.parent.glob(pattern):
        with rasterio.open(file, "r+") as raster:
            raster.write(change(raster.read()).astype(raster.dtypes[0]))


def problem(scene: Path) -> str:
    [found] = list_problems(read_scene(scene), 5)
    return found


def test_a_right_scene_has_no_problem(scene):
    assert list_problems(read_scene(scene), 5) == []


def test_radar_in_another_unit_than_said_is_named(scene):
    edit_pixels(scene, "s1_event.tif", lambda db: 10 ** (db / 10))
    said = "S1RTC.event: the unit is said to be dB, and the values look like linear power (median of VV 0.09"
    assert problem(scene).startswith(said)


def test_decibels_called_power_and_amplitudes_are_named(scene):
    edit(scene, lambda c: c["S1RTC"].update(unit="power"))
    assert all("look like dB" in p for p in list_problems(read_scene(scene), 5))
    edit_pixels(scene, "s1_*.tif", lambda db: 1000 * 10 ** (db / 20))
    assert all("neither dB nor linear power" in p for p in list_problems(read_scene(scene), 5))


def test_swapped_vv_and_vh_are_named(scene):
    edit_pixels(scene, "s1_before.tif", lambda db: db[::-1])
    assert problem(scene) == "S1RTC.before: vh is stronger than vv in most pixels: are the two swapped?"


def test_swapped_dates_are_named(scene):
    def swap(content):
        radar = content["S1RTC"]
        radar["before"]["time"], radar["event"]["time"] = radar["event"]["time"], radar["before"]["time"]

    edit(scene, swap)
    found = list_problems(read_scene(scene), 5)
    assert found[0] == "S1RTC.before (2026-08-28) is not before S1RTC.event (2026-08-16): are the dates swapped?"
    edit(scene, lambda c: (swap(c), c.update(event="2026-08-29")))
    assert all("wrong side of the event (2026-08-29)" in p for p in list_problems(read_scene(scene), 5))


def test_event_passes_too_far_apart_are_named(scene):
    edit(scene, lambda c: c["S2L2A"]["event"].update(time="2026-09-03"))
    assert problem(scene).startswith("the event passes of radar and optical are 6.0 days apart (limit 5")
    assert list_problems(read_scene(scene), 6) == []


def test_another_orbit_before_than_at_the_event_is_named(scene):
    edit(scene, lambda c: c["S1RTC"]["before"].update(orbit=139))
    assert problem(scene) == "S1RTC: orbit 139 before and 66 at the event: what changed may be the view alone"


def test_bands_in_another_order_are_named_by_level_and_by_description(scene):
    order = [1, 2, 3, 7, 4, 5, 6, 8, 10, 11, 0, 9]  # all of 10 m first
    edit_pixels(scene, "s2_after.tif", lambda bands: bands[order])
    assert "is the order of bands" in problem(scene)
    edit(
        scene,
        lambda c: c["S2L2A"]["after"]["files"][0].update(
            bands=["B02", "B01"] + [f"B{n:02d}" for n in range(3, 9)] + ["B8A", "B09", "B11", "B12"]
        ),
    )
    assert "calls itself b01, and is taken for B02" in problem(scene)


def test_too_many_bands_are_named(scene):
    edit(scene, lambda c: c["S1RTC"]["event"].update(files=["s2_event.tif"]))
    assert "s2_event.tif has 12 bands, 2 are named (vv, vh)" in problem(scene)


def test_a_file_without_offset_or_baseline_is_judged_by_its_level(scene):
    edit(scene, lambda c: c["S2L2A"]["event"]["files"][0].pop("offset"))
    assert list_problems(read_scene(scene), 5) == []  # dark pixels have 300
    edit_pixels(scene, "s2_event.tif", lambda bands: bands + 1000)
    assert "neither offset nor baseline is given" in problem(scene) and "'offset: -1000'" in problem(scene)
    edit(scene, lambda c: c["S2L2A"]["event"]["files"][0].update(baseline="05.11"))
    assert list_problems(read_scene(scene), 5) == []
    edit_pixels(scene, "s2_event.tif", lambda bands: bands - 1000)
    assert "was it taken off already?" in problem(scene)


def test_reflectance_from_0_to_1_and_heights_in_centimetres_are_named(scene):
    edit_pixels(scene, "dem.tif", lambda metres: metres * 100)
    assert problem(scene) == "DEM: heights from 10000 to 10900 are no metres"
    edit_pixels(scene, "dem.tif", lambda centimetres: centimetres / 100)
    edit_pixels(scene, "s2_event.tif", lambda bands: bands / 200)
    assert "no reflectance x 10,000" in problem(scene)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(S1=c.pop("S1RTC")), "unknown key 'S1'"),
        (lambda c: c["S1RTC"].update(unit="amplitude"), "unknown unit 'amplitude' of S1RTC"),
        (lambda c: c["S1RTC"]["event"].pop("time"), "'files' and 'time' are needed"),
        (lambda c: c["S1RTC"]["event"].update(time="in August"), "'in August' is no time"),
        (lambda c: c["S1RTC"]["event"].update(files=[{"vv": "s1_event.tif"}]), "no file for band vh"),
        (lambda c: c["S1RTC"]["event"].update(files=[{"raster": "s1_event.tif", "ofset": 0}]), "unknown band or key"),
        (lambda c: c.update(area={"file": "none.geojson"}), "the polygons cannot be read"),
    ],
)
def test_a_scene_that_nobody_understands_is_bad_usage(scene, change, said):
    edit(scene, change)
    with pytest.raises(UsageError, match=said):
        read_scene(scene)


def test_a_raster_that_is_missing_or_cut_short_is_named_by_its_path(scene):
    file = scene.parent / "s2_before.tif"
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(DataError) as error:
        list_problems(read_scene(scene), 5)
    assert error.value.where == str(file)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list_problems(read_scene(scene), 5)


def test_bands_may_be_files_in_a_folder(scene):
    folder = scene.parent / "bands"
    folder.mkdir()
    with rasterio.open(scene.parent / "s2_event.tif") as source:
        for number, name in enumerate(source.descriptions, 1):
            profile = source.profile | {"count": 1}
            with rasterio.open(folder / f"T33UUP_20260827_{name}.tif", "w", **profile) as file:
                file.write(source.read([number]))
    edit(scene, lambda c: c["S2L2A"]["event"].update(files=[{"raster": "bands", "offset": 0}]))
    assert list_problems(read_scene(scene), 5) == []
    assert np.unique([n for _, n in read_scene(scene).acquisitions["S2L2A", 2].sources[0].bands.values()]) == [1]


def test_synth_writes_each_event_whole_and_in_two_crs(cli, tmp_path):
    outcome = cli("data", "synth", "--root", tmp_path / "c", "--events", 3, "--chips", 12, "--size", 32, "--scene")
    assert outcome.code == 0, outcome.err
    scenes = sorted((tmp_path / "c" / "scenes").glob("*/scene.yaml"))
    assert len(scenes) == 3 and all(list_problems(read_scene(scene), 5) == [] for scene in scenes)
    crs = []
    for scene in scenes[:2]:
        with rasterio.open(next(iter(read_scene(scene).acquisitions["S2L2A", 2].sources[0].bands.values()))[0]) as file:
            crs.append(file.crs.to_string())
    assert crs[0].startswith("EPSG:32") and crs[1] == "EPSG:4326"
