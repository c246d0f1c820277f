"""`floodrepro map plan`: the real pystac-client against a STAC API on this machine."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import planetary_computer.sas
import planetary_computer.settings
import pytest
import rasterio
import rasterio.warp
import yaml

import stac_server
from conftest import save
from floodrepro.data.protocols import S2_BANDS
from floodrepro.errors import DataError
from floodrepro.mapping import plan
from floodrepro.mapping.scene import STEPS, opened, read_scene
from map_scenes import run
from stac_server import OPTICAL_DAYS, RADAR_DAYS, StacServer, at, optical, optical_series, radar, radar_series, terrain

TODAY = at(25, hour=0)
BOX = (12.0, 47.8, 12.4, 48.1)
WEST, EAST = (11.0, 47.7, 12.2, 48.7), (12.2, 47.7, 13.5, 48.7)
VALUES = {"vv.rtc.tiff": 0.1, "vh.rtc.tiff": 0.02, "SCL.tif": 4}
NORMAL = [*radar_series(), *optical_series(), terrain(12, 47), terrain(12, 48)]
USUAL = optical_series()
NO_RADAR, OPTICAL_BEFORE = radar_series(RADAR_DAYS[:-2]), optical_series(range(-64, 0, 5))
TWO = radar_series(RADAR_DAYS[:-2], satellite="C") + radar_series((-52, -40, -28, -16, -4), satellite="D")
GONE = radar_series((-70, -58, -46), satellite="A") + radar_series((-64, -52, -40, -28, -16, -4), satellite="C")
CORNER = radar_series((-71, -59, -47, -35, -23, -11, 1), where=(12.33, 46.9, 15, 48.9), orbit=143)  # 18 %
LATE = radar_series((-58, -34, -10, 14))
OTHER_NAMES = optical_series()
for _item in OTHER_NAMES:
    _item["assets"]["coastal"] = _item["assets"].pop("B01")
PARTIAL = radar_series((-71, -59, -47, -35, -23, -11, 1, 13), where=(12.12, 46.9, 15, 48.9), orbit=143)  # 70 %
ONE_SLICE = [i for i in radar_series() if "20260816" not in i["id"]] + [radar(at(-10), (10.5, 46.0, 13.9, 47.9))]
SINGLE = [radar(at(0), bands="vv"), radar(at(1), bands="hh hv")]
CLOUDS = [optical(at(d, 10.1), cloud={-4: 90, -9: 10, 1: 95, 6: 8}.get(d, 12)) for d in OPTICAL_DAYS]
ONE_CLEAR = [optical(at(d, 10.1), cloud=5 if d == 11 else 60) for d in OPTICAL_DAYS]
HALF = optical_series(where=WEST) + optical_series({*OPTICAL_DAYS} - {1}, EAST, tile="33UVP")


@pytest.fixture
def ask(cli, tmp_path, monkeypatch):
    """Run the command on items, which ends with *code*, and give the scene and what was printed."""

    def go(items, *flags, box=BOX, code=0, today=TODAY, **server):
        monkeypatch.setattr("floodrepro.cli.map.datetime", type("Clock", (), {"now": lambda _: today}))
        made = tmp_path / "scene.yaml"
        made.unlink(missing_ok=True)
        with StacServer(items, **server) as api:
            place = ["--box", *box] if box else []
            outcome = cli("map", "plan", *place, "--event", "2026-08-26", "--stac", api.url, "--output", made, *flags)
        assert (outcome.code, made.exists()) == (code, code == 0), outcome.err
        return yaml.safe_load(made.read_text()) if made.exists() else None, outcome.out + outcome.err, api

    return go


def days_of(scene, sensor):
    return [days and round(days) for days in (scene[sensor][step].get("days") for step in STEPS)]


def test_four_dates_for_both_sensors_with_unsigned_links(ask):
    scene, _, _ = ask(NORMAL)
    assert days_of(scene, "S1RTC") == [-46, -10, 2, 14]
    assert days_of(scene, "S2L2A") == [-34, -4, 1, 6]
    file = scene["S1RTC"]["event"]["files"][0]
    assert file["vv"].endswith("iw-vv.rtc.tiff") and "?" not in file["vv"]
    assert [k for k in scene["S2L2A"]["event"]["files"][0] if k.startswith("B")] == list(S2_BANDS)
    assert scene["S1RTC"]["event"]["coverage"] == scene["S2L2A"]["event"]["coverage"] == 1
    assert len(scene["DEM"]["files"]) == 2


@pytest.mark.parametrize(
    "items, days, code, words",
    [
        # 6 days after the last of one satellite, 12 after that of the other, and none of one that stopped flying
        (TWO + USUAL, 1, 4, "next expected on 2026-08-28 (relative orbit 66, SENTINEL-1C); newest"),
        (GONE + USUAL, 0, 4, "next expected on 2026-09-03 (relative orbit 66, SENTINEL-1C); newest"),
        (radar_series() + OPTICAL_BEFORE, 3, 4, "no optical pass since 2026-08-26 yet; next expected"),
        (NO_RADAR + USUAL, -3, 4, "next expected on 2026-08-28"),  # the event is to come
        (NO_RADAR + CORNER + USUAL, 1.5, 4, "2026-08-28 (relative orbit 66"),
        (NO_RADAR + USUAL, 5, 4, "in the catalogue: 2026-08-28; newest over the area: 2026-08-16"),
        (NO_RADAR + USUAL, 300, 1, "came more than 45 days after the event"),
        (LATE + USUAL, 25, 1, "the first radar pass came 14.2 days after the event (limit 12)"),
        (radar_series((-10, 2)) + USUAL, 25, 1, "no radar pass for month_before"),
        (radar_series(where=(12.3, 46.9, 15, 48.9)) + USUAL, 25, 1, "50% of the area (best 25%, 8 items)"),
        (radar_series() + OTHER_NAMES, 25, 1, "an item cannot be used: KeyError('B01')"),
        (radar_series(orbit=None) + USUAL, 25, 1, "an item cannot be used: TypeError"),
        (radar_series()[:1] * 200, 25, 1, "or repeats them"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(ask, items, days, code, words):
    assert words in ask(items, today=at(days), code=code)[1]


@pytest.mark.parametrize(
    "items, flags, sensor, days",
    [
        (NORMAL + SINGLE, (), "S1RTC", [-46, -10, 2, 14]),
        (LATE + USUAL, ("--max-days", "15"), "S1RTC", [-34, -10, 14, None]),
        # A pass whose slice is missing is passed over.
        (ONE_SLICE + USUAL, ("--min-coverage", 0.1), "S1RTC", [-58, -22, 2, 14]),
        # An earlier orbit that sees less loses, and so does one without history.
        (NORMAL + PARTIAL, (), "S1RTC", [-46, -10, 2, 14]),
        (NORMAL + radar_series((1, 13), orbit=143), (), "S1RTC", [-46, -10, 2, 14]),
        # The clearer day is taken, among equals the nearer one, and none beyond the limit.
        (radar_series() + CLOUDS, (), "S2L2A", [-39, -9, 6, 11]),
        (radar_series() + ONE_CLEAR, (), "S2L2A", [-34, -4, 1, 11]),
        (radar_series() + optical_series(cloud=float("nan")), (), "S2L2A", [-34, -4, 1, 6]),
        # A day with one of two tiles loses to a day with both.
        (radar_series() + HALF, ("--min-coverage", 0.4), "S2L2A", [-34, -4, 6, 11]),
    ],
)
def test_the_four_dates_are_those_that_show_most(ask, items, flags, sensor, days):
    scene, _, _ = ask(items, *flags)
    assert days_of(scene, sensor) == days
    assert {step["orbit"] for step in scene["S1RTC"].values() if "orbit" in step} == {66}


def test_slices_and_tiles_of_one_pass_are_one_step(ask):
    north, south = (10.5, 47.95, 13.9, 49.5), (10.5, 46.0, 13.9, 47.95)
    slices = [radar(at(d, 5.2 + n / 144), where) for d in RADAR_DAYS for n, where in enumerate((north, south))]
    tiles = optical_series(where=WEST, tile="32UQU", cloud=20)
    tiles += [optical(at(d, 10.104), EAST, tile="33UUP", cloud=4) for d in OPTICAL_DAYS]
    scene, _, _ = ask([*slices, *tiles])
    radars, opticals = scene["S1RTC"]["event"], scene["S2L2A"]["event"]
    assert days_of(scene, "S1RTC") == [-46, -10, 2, 14] and len(radars["files"]) == 2
    assert [f["tile"] for f in opticals["files"]] == ["33UUP", "32UQU"]  # the clearer one first
    assert radars["coverage"] == opticals["coverage"] == 1 and opticals["cloud"] == pytest.approx(12, abs=0.2)


def test_all_pages_are_read_in_any_order_for_the_same_scene_and_a_busy_server_is_asked_again(ask):
    scene, _, api = ask(NORMAL[::-1], page=7)
    pages = [body for body in api.asked if body["collections"] == ["sentinel-2-l2a"]]
    assert [p.get("token") for p in pages] == [None, "7", "14"]
    assert scene | {"stac": None} == ask(NORMAL)[0] | {"stac": None}
    assert len(ask(NORMAL, refusals=[504, 429])[2].asked) == 5


def test_the_newer_processing_of_a_tile_is_taken(ask):
    scene, _, _ = ask([*radar_series(), *optical_series(baseline="05.00"), *optical_series(baseline="02.14")])
    assert {scene["S2L2A"][step]["files"][0]["baseline"] for step in STEPS} == {"05.00"}


def test_an_area_without_polygons_is_bad_usage(ask, tmp_path):
    (tmp_path / "aoi.geojson").write_text('{"type": "Point", "coordinates": [12, 48]}')
    assert "aoi.geojson" in ask(NORMAL, "--aoi", tmp_path / "aoi.geojson", box=None, code=2)[1]


@pytest.mark.parametrize(
    "flags",
    [
        *(("--box", *box) for box in [(0, 0, 0, 0), ("nan", 47, 13, 48), (12, 94, 13, 95)]),
        ("--event", "in August"),
        ("--output", "/dev/null/scene.yaml"),
    ],
)
def test_what_cannot_be_searched_is_bad_usage_before_a_server_is_asked(cli, tmp_path, flags):
    given = {"--box": BOX, "--event": ["2026-08-26"], "--stac": ["http://127.0.0.1:9"], "--output": [tmp_path / "s"]}
    given[flags[0]] = flags[1:]
    assert cli("map", "plan", *(word for name, words in given.items() for word in (name, *words))).code == 2


def test_no_password_or_signature_gets_into_a_scene(ask):
    for item in (items := copy.deepcopy(NORMAL)):
        for asset in item["assets"].values():
            asset["href"] += "?sig=SECRET"
    with StacServer(items) as api:
        scene, said, _ = ask([], "--stac", api.url.replace("//", "//user:SECRET@") + "?token=SECRET")
    refused = ask([], "--stac", "http://user:SECRET@127.0.0.1:9/stac?token=SECRET", code=1)
    with pytest.raises(DataError) as unread, opened("/vsicurl/http://user:SECRET@127.0.0.1:9/a.tif?sig=SECRET"):
        pass
    assert "SECRET" not in f"{scene}{said}{refused[1]}{unread.value}"


def test_a_server_that_keeps_refusing_is_down_or_no_stac_api_is_an_error_with_the_address(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_BACKOFF", 0.01)
    (tmp_path / "page").write_bytes(b"<html>maintenance</html>")
    with StacServer(NORMAL, refusals=[504] * 9, folder=tmp_path) as api:
        said = {url: ask([], "--stac", url, code=1)[1] for url in (api.url, f"{api.root}/data/page", "nonsense")}
    said[api.root] = ask([], "--stac", api.root, code=1)[1]
    assert all("the STAC API cannot be asked" in text and f"where: {url}" in text for url, text in said.items())


def test_links_to_files_and_answers_that_are_no_stac_are_errors_without_a_traceback(ask, monkeypatch):
    for item in (items := copy.deepcopy(NORMAL)):
        item["assets"] = {name: {"href": "/etc/passwd"} for name in item["assets"]}
    assert "is no web address" in ask(items, code=1)[1]
    plain, odd = stac_server.Handler.reply, {}
    monkeypatch.setattr(stac_server.Handler, "reply", lambda self, content, *more: plain(self, content | odd, *more))
    for odd["features"] in (5, [5], [{}]):
        assert "Traceback" not in ask(NORMAL, code=1)[1]


def test_links_are_signed_only_in_blob_storage_and_right_before_opening(monkeypatch):
    with StacServer([]) as api:
        monkeypatch.setattr(planetary_computer.settings.Settings.get(), "sas_url", f"{api.root}/sas/v1/token")
        monkeypatch.setattr(planetary_computer.sas, "TOKEN_CACHE", {})
        tried = []
        raster = SimpleNamespace(crs="EPSG:4326")
        monkeypatch.setattr("floodrepro.mapping.scene.rasterio.open", lambda p: tried.append(p) or nullcontext(raster))
        link = radar(at(0))["assets"]["vv"]["href"]
        for place in (link, f"{api.root}/data/vv.tif"):
            with opened(place):
                pass
    assert tried[0].startswith(f"{link}?se=") and "sig=sentinel1-grd-rtc" in tried[0]
    assert tried[1:] == [f"{api.root}/data/vv.tif"]


def test_a_planned_scene_of_local_cogs_is_mapped_over_http(ask, tmp_path):
    command, pipe = [sys.executable, stac_server.__file__, str(tmp_path)], subprocess.PIPE
    files = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    base = f"{files.stdout.readline().strip()}/data/"
    items = [*radar_series(base=base), *optical_series(base=base), terrain(12, 47, base), terrain(12, 48, base)]
    scene, _, _ = ask(items, box=(12.2, 47.9, 12.203, 47.902))
    steps = [scene[s][k] for s in ("S1RTC", "S2L2A") for k in STEPS] + [scene["DEM"]]
    hrefs = [v for step in steps for file in step["files"] for v in file.values() if str(v).startswith("http")]
    assert len(hrefs) == 4 * 2 + 4 * 13 + 1
    left, top = rasterio.warp.transform("EPSG:4326", "EPSG:32633", [12.199], [47.903])
    corner = rasterio.Affine(10, 0, round(left[0], -1), 0, -10, round(top[0], -1))
    for path in (tmp_path / href.removeprefix(base) for href in hrefs):
        value = next((value for end, value in VALUES.items() if path.name.endswith(end)), 1200)
        save(path, np.full((60, 60), value, "float32"), transform=corner, driver="COG")
    assert len(read_scene(tmp_path / "scene.yaml").acquisitions) == 9
    record = run(tmp_path / "scene.yaml", tmp_path / "map")
    files.communicate(timeout=10)
    assert record["shares_of_area"]["seen"] == 1 and record["scene"]["S1RTC"]["event"]["orbit"] == 66
