"""Checks of a scene before the model runs: each wrong scene is refused in a line that says what is wrong."""

from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
import yaml

from conftest import save
from floodrepro.errors import DataError, UsageError
from floodrepro.mapping.reader import list_problems, water_of
from floodrepro.mapping.scene import read_scene
from map_scenes import CRS, LEFT, TOP, edit_pixels, make_scene

ORDER = [1, 2, 3, 7, 4, 5, 6, 8, 10, 11, 0, 9]  # all of 10 m first
SORTED = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 8]  # by file name
NAMES = ["B02", "B01", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]


@pytest.fixture
def scene(tmp_path):
    return make_scene(tmp_path / "s", 90, 80)


def edit(scene: Path, change):
    content = yaml.safe_load(scene.read_text())
    change(content)
    scene.write_text(yaml.safe_dump(content, sort_keys=False))


def swap(content):
    before, event = (content["S1RTC"][step] for step in ("before", "event"))
    before["time"], event["time"] = event["time"], before["time"]


def take_offset(content):
    del content["S2L2A"]["event"]["files"][0]["offset"]


def after_from(file: str):
    return lambda content: content["S1RTC"]["after"].update(files=file)


@pytest.mark.parametrize(
    "pixels, change, said",
    [
        (("s1_event.tif", lambda db: 10 ** (db / 10)), None, "dB, and the values look like linear power (median of VV"),
        (("s1_event.tif", lambda db: 1000 * 10 ** (db / 20)), None, "look like neither dB nor linear power"),
        (("s1_before.tif", lambda db: db[::-1]), None, "S1RTC.before: vh is stronger than vv in most pixels"),
        (None, swap, "S1RTC.before (2026-08-28) is not before S1RTC.event (2026-08-16): are the dates swapped?"),
        (None, lambda c: c["S2L2A"]["event"].update(time="2026-09-03"), "are 6.0 days apart (limit 5, --max-gap)"),
        (None, lambda c: c["S1RTC"]["before"].update(orbit=139), "S1RTC: orbit 139 before and 66 at the event"),
        (("s2_after.tif", lambda bands: bands[ORDER]), None, "is the order of bands"),
        (None, lambda c: c["S2L2A"]["after"]["files"][0].update(bands=NAMES), "calls itself b01, and is taken for B02"),
        (None, lambda c: c["S1RTC"]["event"].update(files=["s2_event.tif"]), "has 12 bands, 2 are named (vv, vh)"),
        (("s2_event.tif", lambda bands: bands + 1000), take_offset, "neither offset nor baseline is given"),
        (None, lambda c: c["S2L2A"]["event"]["files"][0].update(offset=-1000), "was it taken off already?"),
        (("s1_before.tif", lambda db: np.where(np.arange(80) < 10, -9999, db)), None, "are no radar (such as -9999)"),
        (("s1_event.tif", lambda db: np.where(np.arange(80) < 10, 0, db)), None, "12.5% of the pixels are no radar"),
        (("s2_event.tif", lambda bands: np.clip(bands / 40, 1, 255)), None, "no reflectance x 10,000"),
        (("dem.tif", lambda metres: metres * 100), None, "DEM: heights from 10000 to 10900 are no metres"),
        (("s2_event.tif", lambda bands: bands / 200), None, "no reflectance x 10,000"),
        (("dem.tif", lambda metres: np.where(np.arange(80) < 10, -9998, metres)), None, "if one is no data, say"),
        (("s1_event.tif", lambda db: db * 100), None, "look like neither dB nor linear power"),
        (
            ("s1_before.tif", lambda db: db * np.nan),
            None,
            "S1RTC.before: its files have no value in a sample of the area",
        ),
        (("s2_event.tif", lambda bands: bands[SORTED]), None, "B12 is brighter than B11"),
        (None, after_from("../s/s1_event.tif"), "event and S1RTC.after are the same file: "),
        (None, after_from("s1a_iw_20260828t051212.tif"), "S1RTC.after is said to be of 2026-09-09, and"),
        (None, lambda c: c.update(area={"box": [40, 40, 40.01, 40.01]}), "S1RTC.event: its files reach 0% of the area"),
        (None, lambda c: c["DEM"].update(files="corner.tif"), "DEM: its files reach 1% of the area (--min-seen 0.3)"),
    ],
)
def test_a_wrong_scene_is_named(scene, pixels, change, said):
    (scene.parent / "s1a_iw_20260828t051212.tif").symlink_to("s1_after.tif")
    save(scene.parent / "corner.tif", np.ones((1, 9, 9), np.float32))
    if pixels:
        edit_pixels(scene, *pixels)
    if change:
        edit(scene, change)
    found = list_problems(read_scene(scene), 5, 0.3)
    assert any(said in problem for problem in found), found


def test_files_that_show_one_of_several_polygons_are_no_problem(scene):
    squares = [shapely.box(LEFT + x, TOP - 800 + x, LEFT + x + 700, TOP - 100 + x) for x in (-10_000, 0, 30_000)]
    wkb = shapely.to_wkb(np.array(squares))
    pyogrio.raw.write(scene.with_name("area.gpkg"), wkb, [], [], crs=CRS, geometry_type="Polygon")
    edit(scene, lambda c: c.update(area={"file": "area.gpkg"}))
    assert list_problems(read_scene(scene), 5, 0.3) == []


def test_a_sound_scene_has_no_problems_but_in_feet_and_with_a_baseline_or_dark_pixels_it_needs_no_offset(scene):
    assert list_problems(read_scene(scene), 5, 0.3) == []
    for unit, problems in (("ft", 1), ("metre", 0)):
        with rasterio.open(scene.parent / "dem.tif", "r+") as raster:
            raster.units = (unit,)
        assert str(list_problems(read_scene(scene), 5, 0.3)).count(f"its heights are in {unit}") == problems
    edit(scene, lambda c: (take_offset(c), c["S1RTC"].update(nodata=-32768)))
    dates = {"before": ["vv", "vh", "x", "y"], "event": ["x", "y", "vv", "vh"]}  # in one file
    bands = [rasterio.open(scene.with_name(f"s1_{step}.tif")).read() for step in dates]
    file = save(scene.with_name("stack.tif"), np.concatenate(bands), nodata=np.nan).name
    edit(scene, lambda c: [c["S1RTC"][k].update(files=[{"raster": file, "bands": b}]) for k, b in dates.items()])
    assert list_problems(read_scene(scene), 5, 0.3) == []  # dark pixels have 300
    edit_pixels(scene, "s2_event.tif", lambda bands: bands + 1000)
    edit(scene, lambda c: c["S2L2A"]["event"]["files"][0].update(baseline="N0511"))
    assert list_problems(read_scene(scene), 5, 0.3) == []


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(S1=c.pop("S1RTC")), "unknown name 'S1'"),
        (lambda c: c["S1RTC"].update(event=["s1_event.tif"]), "S1RTC.event"),
        (lambda c: c["S2L2A"]["event"]["files"][0].update(baseline="newest"), "could not convert string to float"),
        (lambda c: c["S2L2A"]["event"]["files"][0].update(offset=1000), "0 or from -2000 to -1"),
        (lambda c: c["S1RTC"]["event"].update(files=None, raster="s1_event.tif"), "it has no 'files'"),
        (lambda c: c.update(area={"box": [350_000, 5_199_500, 350_500, 5_200_000]}), "it lies nowhere on Earth"),
        (lambda c: c.update(area={"box": [13.0, 46.9, 13.1]}), "expected 4, got 3"),
        (lambda c: c.update(area="A.geojson"), "this is no area: A.geojson"),
        (lambda c: c.update(area={"file": "layers.gpkg"}), r"2 layers \(one, two\)"),
        (lambda c: c.update(area={"file": "metres.geojson"}), "it lies nowhere on Earth(.|\n)*metres.geojson"),
        (lambda c: c.update(area={"fiel": "A.geojson"}), "unknown name 'fiel'"),
        (lambda c: c["S1RTC"].update(unit="amplitude"), "the unit 'amplitude' is not known"),
        (lambda c: c["S1RTC"]["event"].update(time="in August"), "'in August' is no time"),
        (lambda c: c["S1RTC"]["event"].update(files=[{"vv": "s1_event.tif"}]), "no file for band vh"),
        (lambda c: c.update(area={"file": "none.geojson"}), "the polygons cannot be read"),
        (lambda c: c.update(area={"file": "nan.geojson"}), "the polygons cannot be read"),
        (lambda c: c["S2L2A"]["event"].update(files=["two"]), "two files are named after B02: .*late_B02.tif"),
    ],
)
def test_a_scene_that_nobody_understands_is_bad_usage(scene, change, said):
    nowhere = '{"type": "Polygon", "coordinates": [[[NaN, 1], [2, 1], [2, 2], [NaN, 1]]]}'
    (scene.parent / "nan.geojson").write_text(nowhere)
    (scene.parent / "metres.geojson").write_text(shapely.to_geojson(shapely.box(LEFT, TOP - 400, LEFT + 300, TOP)))
    for name in ("one", "two"):
        how = {"layer": name, "append": name == "two", "crs": CRS, "geometry_type": "Polygon"}
        pyogrio.raw.write(
            scene.with_name("layers.gpkg"), shapely.to_wkb(np.array([shapely.Point(0, 0).buffer(1)])), [], [], **how
        )
    (scene.parent / "two").mkdir()
    for name in ("B02.qml", "early_B02.tif", "late_B02.tif"):
        (scene.parent / "two" / name).touch()
    edit(scene, change)
    with pytest.raises(UsageError, match=said):
        read_scene(scene)


def test_a_raster_that_is_cut_short_or_lies_nowhere_is_named_by_its_path(scene):
    file = scene.parent / "s2_before.tif"
    file.write_bytes(file.read_bytes()[:-9000])
    with pytest.raises(DataError, match="cannot be read") as cut_short:
        list_problems(read_scene(scene), 5, 0.3)
    assert cut_short.value.where == str(file)
    save(scene.parent / "s1_event.tif", np.zeros((2, 9, 9), np.float32), crs=None)
    with pytest.raises(DataError, match="gdal_edit") as nowhere:
        read_scene(scene)
    assert nowhere.value.where.endswith("s1_event.tif")


def test_what_lies_far_from_a_raster_is_missing_and_polygons_have_no_values(scene):
    edit(scene, lambda c: c.update(area={"box": [-170, 60, -169.9, 60.1]}))
    list_problems(far := read_scene(scene), 5, 0.3)
    with pytest.raises(UsageError, match="polygons have no values"):
        water_of(scene.with_name("truth.geojson"), far, 1)


def test_synth_writes_each_event_whole_and_in_two_crs(cli, tmp_path):
    cli("data", "synth", "--root", tmp_path / "c", "--events", 3, "--chips", 12, "--size", 32, "--scene").ok()
    scenes = sorted((tmp_path / "c" / "scenes").glob("*/scene.yaml"))
    assert len(scenes) == 3 and all(list_problems(read_scene(scene), 5, 0.3) == [] for scene in scenes)
    crs = []
    for scene in scenes[:2]:
        with rasterio.open(next(iter(read_scene(scene).acquisitions["S2L2A", 2].sources[0][0].values()))[0]) as file:
            crs.append(file.crs.to_string())
    assert crs[0].startswith("EPSG:32") and crs[1] == "EPSG:4326"
