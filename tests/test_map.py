"""A whole scene to a map: the same values wherever a tile lies, whatever the size, and whenever it was killed."""

import json
import multiprocessing
import os
import shutil
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyogrio
import pytest
import rasterio
import rasterio.shutil
import shapely
import yaml
from filelock import FileLock
from matplotlib.image import imread
from rasterio import Affine
from rasterio.windows import Window
from scipy import ndimage

from conftest import files_of, save
from floodrepro.errors import DataError, RunFolderError
from floodrepro.mapping import mapper
from floodrepro.mapping.mapper import starts, strips
from floodrepro.mapping.reader import NO_OPTICAL, NO_OTHER, NO_RADAR, OUTSIDE, Reader, read_window
from floodrepro.mapping.scene import read_scene, to_crs
from map_scenes import CRS, LEFT, TOP, RadarNetwork, edit_pixels, lake, make_scene, read, run, run_without_room


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scene of 150 x 180 px, and its map."""
    folder = tmp_path_factory.mktemp("made")
    scene = make_scene(folder / "s", 150, 180)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapper, "_CHUNK", 7)  # polygons reach across
        run(scene, folder / "m")
    return scene, folder / "m"


@pytest.mark.parametrize("height, width", [(1, 1), (3, 1200), (130, 65)])
def test_a_raster_of_any_size_is_mapped_whole_with_overviews(tmp_path, height, width):
    record = run(make_scene(tmp_path / "s", height, width), tmp_path / "m")
    assert record["km2"]["seen"] == pytest.approx(height * width * 1e-4) and record["shares_of_area"]["seen"] == 1
    for name, no_data in (("class", 255), ("probability", 255), ("quality", None)):
        with rasterio.open(tmp_path / "m" / f"{name}.tif") as file:
            assert file.shape == (height, width) and bool(file.overviews(1)) == (width > 512)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.nodata == no_data
            assert (file.crs, file.transform) == (CRS, Affine(10, 0, LEFT, 0, -10, TOP))
            assert (file.colorinterp[0].name == "palette") == (name == "class")


def test_a_strip_holds_the_weighted_mean_of_its_tiles():
    rng = np.random.default_rng(0)
    values = rng.random((2, 90, 70)).astype(np.float32)

    def predict(row):
        return [(column, values[:, row : row + 32, column : column + 32]) for column in starts(70, 32, 20)]

    out = np.concatenate([p for _, p in strips(predict, (2, 90, 70), 32, 20)], axis=1)
    assert np.allclose(out, values, atol=1e-6)
    rest = [p for _, p in strips(predict, (2, 90, 70), 32, 20, first_row=47)]  # stopped within the strip from 40 on
    assert np.array_equal(np.concatenate(rest, axis=1), out[:, 40:])


class EdgeNetwork(RadarNetwork):
    """Looks at the mean of 9 x 9 pixels and, as a convolution does, takes what lies beyond its tile for 0."""

    def probabilities(self, chips):
        radar = [s1.copy() for s1 in chips["S1RTC"]]
        for s1 in radar:
            s1[2, 0] = ndimage.uniform_filter(s1[2, 0].astype(np.float32), 9, mode="constant")
        return super().probabilities(chips | {"S1RTC": radar})


def test_the_class_is_wrong_no_more_often_within_8_px_of_a_seam_than_elsewhere(tmp_path):
    scene, truth, wrong = make_scene(tmp_path / "s", 168, 168), lake(168, 168), {}
    for name, sizes in {"map": (64, 52), "one tile": (192, 192), "side by side": (64, 64)}.items():
        run(scene, tmp_path / name, EdgeNetwork(), crop=sizes[0], stride=sizes[1])
        wrong[name] = (read(tmp_path / name, "class") == 1) != truth
    edges = np.array([52, 64, 104, 116])  # where tiles begin and end
    near = np.abs(np.arange(168) + 0.5 - edges[:, None]).min(axis=0) < 8
    near = near[:, None] | near
    by_seams = {name: values[near].mean() / wrong["one tile"][near].mean() for name, values in wrong.items()}
    elsewhere = wrong["map"][~near].mean() / wrong["one tile"][~near].mean()
    assert by_seams["map"] <= elsewhere, (by_seams, elsewhere)
    assert by_seams["side by side"] > 1.2  # what the network does to seams by itself


def test_blocks_hold_the_values_of_the_files_bit_for_bit(tmp_path, monkeypatch):
    scene = read_scene(make_scene(tmp_path, 150, 190))
    monkeypatch.setattr("floodrepro.mapping.reader._COLUMNS", 64)
    reader = Reader(scene, RadarNetwork.steps, 100)
    reader.block = 64  # seams of blocks everywhere
    reader.hold(30)
    with rasterio.open(tmp_path / "s2_event.tif") as s2, rasterio.open(tmp_path / "s1_before.tif") as s1:
        assert np.array_equal(reader.cut("S2L2A", np.s_[5:155])[2], s2.read()[:, 30:130, 5:155])
        assert np.array_equal(reader.cut("S1RTC", np.s_[5:155])[1], s1.read()[:, 30:130, 5:155].astype(np.float16))


def test_a_raster_may_lie_south_up_and_its_infinite_values_are_missing(tmp_path):
    grid = read_scene(make_scene(tmp_path, 50, 40))
    values = np.random.default_rng(0).random((1, 50, 40)).astype(np.float32)
    values[0, 3, 4] = np.inf
    save(tmp_path / "flipped.tif", values[:, ::-1], transform=Affine(10, 0, LEFT, 0, 10, TOP - 500))
    with rasterio.open(tmp_path / "flipped.tif") as raster:
        out = read_window(raster, [1], grid, Window(2, 1, 30, 40), [], "bilinear")
    assert np.array_equal(np.argwhere(np.isnan(out[0])), [[2, 2]])
    assert np.array_equal(np.nan_to_num(out), np.where(np.isinf(values), 0, values)[:, 1:41, 2:32])


@pytest.mark.parametrize("no_data", [[], [7]])  # a value that the file does not declare must not be averaged
def test_a_raster_much_finer_than_the_grid_is_not_read_pixel_by_pixel(tmp_path, no_data):
    grid = read_scene(make_scene(tmp_path, 50, 40))
    heights = np.tile(np.arange(0, 80, 0.1, dtype=np.float32), (1, 1000, 1))  # 1 m to the east is 0.2 m up
    save(tmp_path / "dem.tif", heights, transform=Affine(0.5, 0, LEFT, 0, -0.5, TOP), nodata=-9999, compress="deflate")
    with rasterio.open(tmp_path / "dem.tif") as raster:
        tracemalloc.start()
        out = read_window(raster, [1], grid, Window(0, 0, 40, 50), no_data, "bilinear")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert abs(out[0, :, 1:-1] - (np.arange(1, 39) * 2 + 1)).max() < 0.6 and peak < heights.nbytes / 10


def test_power_is_read_as_decibels_and_an_offset_is_taken_off(tmp_path):
    plain, other = make_scene(tmp_path / "a", 40, 40), make_scene(tmp_path / "b", 40, 40)
    text = other.read_text().replace("unit: dB", "unit: power\n  nodata: [0]").replace("offset: 0", "baseline: '05.11'")
    other.write_text(text)
    edit_pixels(other, "s1_*.tif", lambda db: 10 ** (db / 10))
    edit_pixels(other, "s2_*.tif", lambda bands: bands + 1000)
    run(plain, tmp_path / "m1")
    run(other, tmp_path / "m2")
    assert np.array_equal(read(tmp_path / "m1", "class"), read(tmp_path / "m2", "class"))


def test_the_first_source_with_a_pixel_wins_and_gaps_are_told_from_dry(tmp_path):
    scene = make_scene(tmp_path / "s", 60, 60)
    with rasterio.open(tmp_path / "s" / "s1_event.tif") as raster:
        rest = raster.read()[:, :, 20:40]
    save(tmp_path / "s" / "rest.tif", rest, transform=Affine(10, 0, LEFT + 200, 0, -10, TOP))
    edit_pixels(scene, "s1_event.tif", lambda db: np.where(np.arange(60) < 20, db, np.nan))
    edit_pixels(scene, "s2_event.tif", lambda bands: np.where(np.arange(60)[:, None] < 50, bands, 0))
    edit_pixels(scene, "s1_after.tif", lambda db: np.where(np.arange(60) < 15, np.nan, db))
    scene.write_text(scene.read_text().replace("- s1_event.tif", "- s1_event.tif\n    - rest.tif"))
    record = run(scene, tmp_path / "m")
    classes, quality = read(tmp_path / "m", "class"), read(tmp_path / "m", "quality")
    assert (quality[:, 40:] & NO_RADAR).all() and not (quality[:, :40] & NO_RADAR).any()
    assert (quality[50:] & NO_OPTICAL).all() and not (quality[:50] & NO_OPTICAL).any()
    assert (quality[:, :15] & NO_OTHER).all() and not (quality[:, 15:] & NO_OTHER).any()
    assert (classes[50:, 40:] == 255).all() and (classes[:50] != 255).all() and (classes[:, :40] != 255).all()
    assert record["shares_of_area"]["no radar at the event"] == pytest.approx(1 / 3)
    assert record["shares_of_area"]["seen"] == pytest.approx(1 - 200 / 3600)


def test_clouds_hide_what_only_the_optical_sensor_saw_in_a_folder_of_bands(tmp_path):
    scene, bands = make_scene(tmp_path / "s", 40, 40), tmp_path / "s" / "bands"
    bands.mkdir()
    classes = np.full((1, 40, 40), 4, np.uint8)
    classes[:, :10], classes[:, 10:20], classes[:, 20:30] = 9, 3, 11
    save(bands / "T33UUP_SCL_20m.tif", classes)
    with rasterio.open(tmp_path / "s" / "s2_event.tif") as raster:
        for number, name in enumerate(raster.descriptions, 1):
            save(bands / f"T33UUP_{name}.tif", raster.read([number]))
    content = yaml.safe_load(scene.read_text())
    content["S2L2A"]["event"]["files"] = [{"raster": "bands", "offset": 0}]
    content["S1RTC"]["event"] = {"missing": True}
    scene.write_text(yaml.safe_dump(content))
    record = run(scene, tmp_path / "m")
    assert (read(tmp_path / "m", "class")[:30] == 255).all() and (read(tmp_path / "m", "class")[30:] != 255).all()
    shares = record["shares_of_area"]
    assert [shares[n] for n in ("cloud", "cloud shadow", "snow", "no radar at the event")] == [0.25, 0.25, 0.25, 1]


def test_an_area_of_several_polygons_is_mapped_and_nothing_else(tmp_path):
    squares = [shapely.box(LEFT + x, TOP - y - 300, LEFT + x + 300, TOP - y) for x, y in ((100, 100), (1000, 900))]
    wkb, kind = shapely.to_wkb(np.array(squares)), {"crs": CRS, "geometry_type": "Polygon"}
    pyogrio.raw.write(tmp_path / "area.gpkg", wkb, [], [], **kind)
    pyogrio.raw.write(tmp_path / "one.gpkg", wkb[:1], [], [], **kind)
    styles = {"layer": "layer_styles", "append": True, "geometry_type": None}
    pyogrio.raw.write(tmp_path / "area.gpkg", None, [np.array(["x"], object)], ["style"], **styles)
    record = run(make_scene(tmp_path / "s", 150, 150, area={"file": "../area.gpkg"}), tmp_path / "m")
    quality = read(tmp_path / "m", "quality")
    assert quality.shape == (110, 120) and record["km2"]["area"] == pytest.approx(0.18, abs=0.001)
    assert (read(tmp_path / "m", "class") == 255).sum() == (quality & OUTSIDE > 0).sum() == 110 * 120 - 1800
    (tmp_path / "m" / "map.json").write_text(json.dumps(record | {"weights": {"file": "w.pt"}}))
    table = mapper.compare_map(tmp_path / "m", tmp_path / "one.gpkg", None)  # all of the area was seen
    assert (table.counts.sum(), table.unseen.sum(), table.ignored.sum()) == (1800, 0, 110 * 120 - 1800)


def test_a_box_in_degrees_chooses_its_utm_zone_and_a_large_raster_gets_no_row_more_than_its_footprint(tmp_path):
    scene = read_scene(make_scene(tmp_path, 20, 20, area={"box": [13.0, 46.9, 13.1, 47.0]}))
    assert scene.crs == CRS and scene.transform.c % 10 == scene.transform.f % 10 == 0
    south = read_scene(make_scene(tmp_path, 20, 20, area={"box": [179.9, -17.0, 180.1, -16.9]}))
    assert south.crs.to_epsg() in (32760, 32701) and south.width < 2500
    for name, width, top in (("s1", 20, TOP), ("s2", 9, TOP + 50_000)):
        place = Affine(10_000, 0, LEFT, 0, -10_000, top)
        save(tmp_path / f"{name}.tif", np.zeros((2, 20, width), np.float32), transform=place)
    (tmp_path / "scene.yaml").write_text("S1RTC: {event: {time: 2026-08-28, files: s1.tif}}")
    assert read_scene(tmp_path / "scene.yaml")[-2:] == (20_000, 20_000)
    (tmp_path / "scene.yaml").write_text("S1RTC: {event: {time: 2026-08-28, files: [s1.tif, s2.tif]}}")
    assert read_scene(tmp_path / "scene.yaml")[-2:] == (25_000, 20_000)


def water(folder: Path):
    """Polygons, km² and mean probabilities."""
    meta, _, wkb, (_, km2, mean) = pyogrio.raw.read(folder / "water.gpkg")
    assert meta["crs"] == CRS and shapely.is_valid(shapely.from_wkb(wkb)).all()
    return shapely.from_wkb(wkb), km2, mean


def test_polygons_are_whole_across_strips_with_area_and_mean_probability(made):
    shapes, km2, mean = water(made[1])
    flood, probability = (read(made[1], name) for name in ("class", "probability"))
    labels, count = ndimage.label(flood == 1)
    assert len(shapes) == count and km2.sum() == pytest.approx((flood == 1).sum() * 1e-4)
    assert np.allclose(shapely.area(shapes) / 1e6, km2)
    assert np.allclose(np.sort(ndimage.mean(probability / 250, labels, range(1, count + 1))), np.sort(mean))


def test_permanent_water_is_kept_apart(tmp_path):
    scene = make_scene(tmp_path / "s", 100, 100)
    river = np.zeros((1, 100, 100), np.uint8)
    river[:, :, 77:84] = 1
    save(tmp_path / "river.tif", river)
    options = {"names": ["rest", "flood", "permanent water"], "permanent": 2}
    record = run(scene, tmp_path / "m", permanent_file=str(tmp_path / "river.tif"), **options)
    assert (read(tmp_path / "m", "class")[:, 77:84] == 2).all()
    assert record["km2"]["permanent water"] == pytest.approx(0.07)
    assert set(pyogrio.raw.read(tmp_path / "m" / "water.gpkg")[3][0]) == {"flood"}
    save(tmp_path / "river.tif", river * 255)
    with pytest.raises(DataError, match="255 may be water or no data"):
        run(scene, tmp_path / "other", permanent_file=str(tmp_path / "river.tif"), **options)
    assert not (tmp_path / "other").exists()


def test_a_threshold_moves_the_class_and_small_polygons_are_left_out_on_request(made, tmp_path):
    scene, folder = made
    run(scene, tmp_path / "m", threshold=0.9, min_hectares=10.0)
    probability, classes = read(folder, "probability"), read(tmp_path / "m", "class")
    assert np.array_equal(probability, read(tmp_path / "m", "probability"))
    assert np.array_equal(read(folder, "class") == 1, probability > 125)
    assert np.array_equal(classes[probability != 225] == 1, probability[probability != 225] > 225)
    sizes = np.bincount(ndimage.label(classes == 1)[0].ravel())[1:]
    assert 0 < len(water(tmp_path / "m")[1]) == (sizes >= 1000).sum() < len(sizes)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(made, tmp_path):
    codes = []
    while not (tmp_path / "killed" / "map.json").exists() and len(codes) < 40:
        process = multiprocessing.get_context("fork").Process(target=run, args=(made[0], tmp_path / "killed"))
        process.start()
        process.join(0.1 * 1.4 ** len(codes))  # later and later: each attempt gets further
        process.kill()
        process.join()
        codes.append(process.exitcode)
    run(made[0], tmp_path / "killed")
    assert codes.count(-signal.SIGKILL) >= 3 and files_of(made[1]) == files_of(tmp_path / "killed")


@pytest.mark.faults
def test_a_full_disk_is_an_error_and_with_room_the_same_command_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    def fails_with(*rooms):
        # A thread of GDAL that ends here may hold a lock, which would stay shut in a process that is forked meanwhile.
        given = (made[0], tmp_path / "m", rooms)
        process = multiprocessing.get_context("spawn").Process(target=run_without_room, args=given)
        process.start()
        process.join()
        assert process.exitcode == 0

    fails_with(50, 20_000, 150_000)  # what was begun, the first strip and a later one
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(mapper, "_finish", lambda *_: 1 / 0)  # all strips are there
        run(made[0], tmp_path / "m")
    sizes = [(made[1] / name).stat().st_size for name in ("probability.tif", "water.gpkg", "quicklook.png")]
    assert sizes == sorted(sizes)
    fails_with(sizes[0] - 500, sizes[1] // 2, sizes[2] - 500)
    run(made[0], tmp_path / "m")
    assert files_of(made[1]) == files_of(tmp_path / "m")


def test_a_finished_map_is_left_as_it_is_and_another_one_is_refused(made, tmp_path, monkeypatch):
    scene, folder = made
    before = files_of(folder)
    run(scene, folder)
    assert files_of(folder) == before
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(mapper, "_map_rows", lambda *_: 1 / 0)
        run(scene, tmp_path / "begun")
    for there in (folder, tmp_path / "begun"):
        with pytest.raises(RunFolderError, match="other files, weights or options"):
            run(scene, there, threshold=0.7)
    with pytest.raises(RunFolderError, match="not empty"):
        run(scene, tmp_path)


def test_another_area_or_permanent_water_under_the_same_name_is_another_map(tmp_path, monkeypatch):
    def draw(width):
        area = to_crs(shapely.box(LEFT, TOP - 400, LEFT + width, TOP), CRS, "EPSG:4326")
        (tmp_path / "a.geojson").write_text(shapely.to_geojson(area))

    draw(300)
    river = save(tmp_path / "river.tif", np.ones((1, 40, 40), np.uint8))
    scene = make_scene(tmp_path / "s", 40, 40, area={"file": "../a.geojson"})
    options = {"names": ["rest", "flood", "water"], "permanent": 2, "permanent_file": str(river)}
    run(scene, tmp_path / "m", **options)
    monkeypatch.chdir(tmp_path)
    run(Path("s/scene.yaml"), Path("m"), **options)  # the same from another folder
    draw(295)
    with pytest.raises(RunFolderError, match="other files"):
        run(scene, tmp_path / "m", **options)
    draw(300)
    rasterio.shutil.copy(tmp_path / "s" / "dem.tif", tmp_path / "s" / "dem.vrt", driver="VRT")
    scene.write_text(scene.read_text().replace("dem.tif", "dem.vrt"))
    run(scene, tmp_path / "vrt", **options)
    os.utime(tmp_path / "s" / "dem.tif", (1, 1))  # what a VRT is made of
    with pytest.raises(RunFolderError, match="other files"):
        run(scene, tmp_path / "vrt", **options)


def test_another_process_a_file_in_the_way_and_too_small_a_disk_are_errors(tmp_path, monkeypatch):
    scene, work = make_scene(tmp_path / "s", 40, 40), tmp_path / "m" / ".map-in-progress"
    work.mkdir(parents=True)
    with FileLock(work / "lock"), pytest.raises(RunFolderError, match="another map is being made"):
        run(scene, tmp_path / "m")
    (work / "begun.json").write_text("[]")
    with pytest.raises(RunFolderError, match="record is damaged"):
        run(scene, tmp_path / "m")
    (work / "begun.json").unlink()
    (work / "layers.raw").write_bytes(bytes(7 * 40 * 40))  # of nobody knows which map
    assert run(scene, tmp_path / "m") == run(scene, tmp_path / "fresh")
    with pytest.raises(RunFolderError, match="cannot be written"):
        run(scene, scene)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 40 * 40 - 1))
    with pytest.raises(RunFolderError, match="40 x 40 pixels take"):
        run(scene, tmp_path / "large")


def test_the_quicklook_is_a_picture_of_the_event_and_map_json_says_what_was_made_of_what(made):
    picture = imread(made[1] / "quicklook.png")
    assert picture.shape[1] > 1000 and len(np.unique(picture[..., 0])) > 50
    record = json.loads((made[1] / "map.json").read_text())
    assert {"weights", "scene", "grid", "resampling", "threshold", "crop", "km2", "shares_of_area"} <= record.keys()
