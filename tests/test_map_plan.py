"""`floodrepro map plan`: the real pystac-client against a STAC API on this machine."""

import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import numpy as np
import planetary_computer.sas
import planetary_computer.settings
import pytest
import rasterio
import rasterio.warp
import yaml

import stac_server
from floodrepro.data.protocols import S2_BANDS
from floodrepro.errors import FloodreproError
from floodrepro.mapping import plan
from floodrepro.mapping.scene import STEPS, opened, read_scene
from map_scenes import run
from stac_items import optical, radar, terrain
from stac_server import StacServer

EVENT = datetime(2026, 8, 26, tzinfo=UTC)
TODAY = datetime(2026, 9, 20, tzinfo=UTC)
BOX = (12.0, 47.8, 12.4, 48.1)
SWATH = (10.5, 46.9, 13.9, 48.9)
TILE = (11.6, 47.7, 13.1, 48.7)
RADAR_DAYS = (-70, -58, -46, -34, -22, -10, 2, 14)


def at(days, hour=5.2):
    return EVENT + timedelta(days=days, hours=hour)


def radar_series(days=RADAR_DAYS, where=SWATH, **more):
    return [radar(at(d), where, **more) for d in days]


def optical_series(days=range(-64, 25, 5), where=TILE, **more):
    return [optical(at(d, 10.1), where, **more) for d in days]


@pytest.fixture
def ask(cli, tmp_path, monkeypatch):
    """Run the command on items and give exit code, scene and what was printed."""

    def go(items, *flags, box=BOX, event="2026-08-26", today=TODAY, **server):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return today

        monkeypatch.setattr("floodrepro.cli.map.datetime", Clock)
        made = tmp_path / "scene.yaml"
        made.unlink(missing_ok=True)
        with StacServer(items, **server) as api:
            place = ["--box", *box] if box else []
            outcome = cli("map", "plan", *place, "--event", event, "--stac", api.url, "--output", made, *flags)
        scene = yaml.safe_load(made.read_text()) if made.exists() else None
        return outcome.code, scene, outcome.out + outcome.err, api

    return go


def days_of(scene, sensor):
    times = [scene[sensor][step].get("time") for step in STEPS]
    return [t and round((datetime.fromisoformat(t) - EVENT) / timedelta(days=1)) for t in times]


def ids(step):
    return [file["item"] for file in step["files"]]


NORMAL = [*radar_series(), *optical_series(), terrain(12, 47), terrain(12, 48)]


def test_four_dates_for_both_sensors_with_unsigned_links(ask):
    code, scene, said, _ = ask(NORMAL)
    assert code == 0, said
    assert days_of(scene, "S1RTC") == [-46, -10, 2, 14]
    assert days_of(scene, "S2L2A") == [-34, -4, 1, 6]
    file = scene["S1RTC"]["event"]["files"][0]
    assert file["vv"].endswith("iw-vv.rtc.tiff") and "?" not in file["vv"]
    assert [k for k in scene["S2L2A"]["event"]["files"][0] if k.startswith("B")] == list(S2_BANDS)
    assert scene["S1RTC"]["event"]["coverage"] == scene["S2L2A"]["event"]["coverage"] == 1
    assert len(scene["DEM"]["files"]) == 2


NO_RADAR = RADAR_DAYS[:-2]
TWO = [*radar_series(NO_RADAR, satellite="C"), *radar_series((-52, -40, -28, -16, -4), satellite="D")]
CORNER = radar_series((-71, -59, -47, -35, -23, -11, 1), where=(12.33, 46.9, 15, 48.9), orbit=143)  # 18 %
LATE = radar_series((-58, -34, -10, 14))
FAR = optical_series((-40, -34, -9, -4, 11))
OTHER_NAMES = optical_series()
for _item in OTHER_NAMES:
    _item["assets"]["coastal"] = _item["assets"].pop("B01")


@pytest.mark.parametrize(
    "radars, opticals, days, code, words",
    [
        # 6 days after the last of one satellite, 12 after that of the other
        (TWO, optical_series(), 1, 4, "next expected on 2026-08-28 (relative orbit 66, SENTINEL-1C); newest"),
        (radar_series(), optical_series(range(-64, 0, 5)), 3, 4, "no optical pass since 2026-08-26 yet; next expected"),
        (radar_series(NO_RADAR), optical_series(), -3, 4, "next expected on 2026-08-28"),  # the event is to come
        ([*radar_series(NO_RADAR), *CORNER], optical_series(), 1.5, 4, "2026-08-28 (relative orbit 66"),
        (
            radar_series(NO_RADAR),
            optical_series(),
            5,
            4,
            "in the catalogue: 2026-08-28; newest over the area: 2026-08-16",
        ),
        (radar_series(NO_RADAR), optical_series(), 300, 1, "came more than 45 days after the event"),
        (LATE, optical_series(), 25, 1, "the first radar pass came 14.2 days after the event (limit 12)"),
        (radar_series((-10, 2)), optical_series(), 25, 1, "no radar pass for month_before"),
        (radar_series(where=(12.3, 46.9, 15, 48.9)), optical_series(), 25, 1, "50% of the area (best 25%, 8 items)"),
        (radar_series(), FAR, 25, 1, "9.2 days apart (limit 5)"),
        ([], optical_series(), 25, 1, "0 items"),
        (radar_series(), OTHER_NAMES, 25, 1, "has no asset B01"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(ask, radars, opticals, days, code, words):
    found, scene, said, _ = ask([*radars, *opticals], today=at(days))
    assert (found, scene) == (code, None) and words in said


def test_limits_can_be_moved(ask):
    assert ask([*LATE, *optical_series()], "--radar-days", "15", "--max-gap", "9")[0] == 0
    assert ask([*radar_series(), *FAR], "--max-gap", "10")[0] == 0


def test_a_satellite_that_stopped_flying_is_not_expected():
    gone = radar_series((-70, -58, -46), satellite="A") + radar_series((-64, -52, -40, -28, -16, -4), satellite="C")
    due = plan.expected(plan.list_passes(gone, plan.Area(BOX), "S1RTC"), "S1RTC", EVENT, EVENT)
    assert {satellite for _, _, satellite in due} == {"SENTINEL-1C"}


WEST, EAST = (11.0, 47.7, 12.2, 48.7), (12.2, 47.7, 13.5, 48.7)
PARTIAL = radar_series((-71, -59, -47, -35, -23, -11, 1, 13), where=(12.12, 46.9, 15, 48.9), orbit=143)  # 70 %
ONE_SLICE = [i for i in radar_series() if "20260816" not in i["id"]] + [radar(at(-10), (10.5, 46.0, 13.9, 47.9))]
CLOUDS = {-4: 90, -9: 10, 1: 95, 6: 8}


@pytest.mark.parametrize(
    "items, flags, sensor, days",
    [
        (
            [*NORMAL, radar(at(0), SWATH, polarisations="VV"), radar(at(1), SWATH, polarisations="HH HV")],
            (),
            "S1RTC",
            None,
        ),
        # A pass whose slice is missing is passed over.
        ([*ONE_SLICE, *optical_series()], ("--min-coverage", 0.1), "S1RTC", [-58, -22, 2, 14]),
        # An earlier orbit that sees less loses, and so does one without history.
        ([*NORMAL, *PARTIAL], (), "S1RTC", None),
        ([*NORMAL, *radar_series((1, 13), orbit=143)], (), "S1RTC", None),
        ([*radar_series(), terrain(12, 47)], ("--sensors", "S1RTC"), "S1RTC", None),
        # The clearer day is taken, among equals the nearer one, and none beyond the limit.
        (
            [*radar_series(), *(optical(at(d, 10.1), TILE, cloud=CLOUDS.get(d, 12)) for d in range(-64, 25, 5))],
            *((), "S2L2A", [-39, -9, 6, 11]),
        ),
        (
            [*radar_series(), *(optical(at(d, 10.1), TILE, cloud=5 if d == 11 else 60) for d in range(-64, 25, 5))],
            *((), "S2L2A", [-34, -4, 1, 11]),
        ),
        # A day with one of two tiles loses to a day with both.
        (
            [
                *radar_series(),
                *optical_series(where=WEST),
                *optical_series({*range(-64, 25, 5)} - {1}, EAST, tile="33UVP"),
            ],
            *(("--min-coverage", 0.4), "S2L2A", [-34, -4, 6, 11]),
        ),
    ],
)
def test_the_four_dates_are_those_that_show_most(ask, items, flags, sensor, days):
    code, scene, said, _ = ask(items, *flags)
    assert code == 0, said
    assert days_of(scene, sensor) == (days or [-46, -10, 2, 14])
    assert {step["orbit"] for step in scene["S1RTC"].values() if "orbit" in step} == {66}


def test_slices_tiles_and_datastrips_of_one_pass_are_one_step(ask):
    north, south = (10.5, 47.95, 13.9, 49.5), (10.5, 46.0, 13.9, 47.95)
    slices = [radar(at(d, 5.2 + n / 144), w, slice_number=n) for d in RADAR_DAYS for n, w in enumerate((north, south))]
    tiles = [*optical_series(where=WEST, tile="32UQU", cloud=20)]
    tiles += [optical(at(d, 10.104), EAST, tile="33UUP", cloud=4) for d in range(-64, 25, 5)]
    code, scene, said, _ = ask([*slices, *tiles])
    assert code == 0, said
    radars, opticals = scene["S1RTC"]["event"], scene["S2L2A"]["event"]
    assert days_of(scene, "S1RTC") == [-46, -10, 2, 14] and len(ids(radars)) == 2
    assert [f["tile"] for f in opticals["files"]] == ["33UUP", "32UQU"]  # the clearer one first
    assert radars["coverage"] == opticals["coverage"] == 1 and opticals["cloud"] == pytest.approx(12, abs=0.1)
    parts = [
        optical(at(d, 10.1), (11.6, low, 13.1, low + 1), strip=n, made=timedelta(hours=4 + n))
        for d in (-34, -4, 1)
        for n, low in ((0, 46.95), (1, 47.95))
    ]
    code, scene, said, _ = ask([*radar_series(), *parts])
    assert code == 0 and len(ids(scene["S2L2A"]["event"])) == 2 and scene["S2L2A"]["event"]["coverage"] == 1


def test_all_pages_are_read_and_in_any_order_give_the_same_scene(ask):
    code, scene, _, api = ask(NORMAL[::-1], page=7)
    pages = [body for body in api.asked if body["collections"] == ["sentinel-2-l2a"]]
    assert code == 0 and len(pages) == 3 and [p.get("token") for p in pages] == [None, "7", "14"]
    assert scene | {"stac": None} == ask(NORMAL)[1] | {"stac": None}


def test_the_newer_processing_of_a_tile_is_taken(ask):
    old = optical_series(baseline="02.14", made=timedelta(hours=4))
    new = optical_series(baseline="05.00", made=timedelta(days=400))
    code, scene, _said, _ = ask([*radar_series(), *new, *old])
    assert code == 0 and {scene["S2L2A"][s]["files"][0]["baseline"] for s in STEPS} == {"05.00"}


FIJI = (179.6, -17.2, -179.6, -16.8)
SPLIT = {
    "type": "MultiPolygon",
    "coordinates": [
        [[[179.2, -17.3], [180, -17.3], [180, -16.2], [179.2, -16.2], [179.2, -17.3]]],
        [[[-180, -17.3], [-179.2, -17.3], [-179.2, -16.2], [-180, -16.2], [-180, -17.3]]],
    ],
}


@pytest.mark.parametrize(
    "box, tiles",
    [
        (FIJI, [SPLIT]),
        (FIJI, [(178.9, -17.3, 180.5, -16.2)]),
        (FIJI, [(178.9, -17.3, 180.1, -16.2), (-179.95, -17.3, -178.9, -16.2)]),
        ((-179.9, -17.2, -179.6, -16.8), [SPLIT]),
    ],
    ids=["split", "beyond", "the rest on the other side", "kept on the other side"],
)
def test_an_area_across_the_antimeridian_is_covered_by_footprints_of_any_form(ask, box, tiles):
    parts = [i for n, tile in enumerate(tiles) for i in optical_series(where=tile, tile=f"01KB{n}")]
    code, scene, said, _ = ask([*radar_series(where=(177.0, -18.0, 180.9, -16.0)), *parts], box=box)
    assert code == 0, said
    assert scene["S1RTC"]["event"]["coverage"] == scene["S2L2A"]["event"]["coverage"] == 1
    assert len(ids(scene["S2L2A"]["event"])) == len(tiles)


def test_a_busy_server_is_asked_again(ask):
    code, _, said, api = ask(NORMAL, refusals=[504, 429])
    assert code == 0, said
    assert len(api.asked) == 5


def test_an_area_that_cannot_be_read_is_bad_usage(cli, ask, tmp_path):
    empty = (
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[[1,2],[1,2],[1,2],[1,2]]]}',
    )
    for text in ("{", '{"type": "Point", "coordinates": [12, 48]}', *empty):
        (tmp_path / "aoi.geojson").write_text(text)
        code, scene, said, _ = ask(NORMAL, "--aoi", tmp_path / "aoi.geojson", box=None)
        assert (code, scene) == (2, None) and "aoi.geojson" in said


@pytest.mark.parametrize(
    "flags",
    [
        ("--stac", "nonsense"),
        ("--stac", "file:///etc/passwd"),
        *(("--box", *box) for box in [(0, 0, 0, 0), ("nan", 47, 13, 48), (12, 94, 13, 95), (12, 48, 13, 47)]),
        ("--output", "/dev/null/scene.yaml"),
        ("--min-coverage", "nan"),
    ],
)
def test_what_cannot_be_searched_is_bad_usage_before_a_server_is_asked(cli, tmp_path, flags):
    given = {"--box": BOX, "--event": ["2026-08-26"], "--stac": ["http://127.0.0.1:9"], "--output": [tmp_path / "s"]}
    given[flags[0]] = flags[1:]
    assert cli("map", "plan", *(word for name, words in given.items() for word in (name, *words))).code == 2


def test_no_password_or_signature_gets_into_a_scene(cli, tmp_path, monkeypatch):
    items, made = [*radar_series(), terrain(12, 47)], tmp_path / "scene.yaml"
    for item in items:
        for asset in item["assets"].values():
            asset["href"] += "?sig=SECRET"
    monkeypatch.setattr("floodrepro.cli.map.datetime", type("Clock", (), {"now": lambda _: TODAY}))
    with StacServer(items) as api:
        url = api.url.replace("//", "//user:SECRET@") + "?token=SECRET"
        flags = ("--box", *BOX, "--event", "2026-08-26", "--stac", url, "--output", made, "--sensors", "S1RTC")
        outcome = cli("map", "plan", *flags)
    assert outcome.code == 0, outcome.err
    assert "SECRET" not in made.read_text() + outcome.out + outcome.err
    outcome = cli("map", "plan", *flags[:-3], tmp_path / "other.yaml")
    assert outcome.code == 1 and "did not answer" in outcome.err and "SECRET" not in outcome.err


@pytest.mark.parametrize("href", ["file:///etc/passwd", "/vsicurl/http://127.0.0.1/x.tif", "./x.tif", "/etc/passwd"])
def test_links_are_whole_and_lead_to_servers(ask, href):
    items = [*radar_series(), terrain(12, 47)]
    items[-1]["assets"]["data"]["href"] = href
    code, scene, said, _ = ask(items, "--sensors", "S1RTC")
    assert (code, scene) == (1, None) and "does not lead to a server" in said
    items[-1]["links"] = [{"rel": "self", "href": "https://example.org/items/a.json"}]
    code, scene, said, _ = ask(items, "--sensors", "S1RTC")
    if href.startswith("file"):
        assert (code, scene) == (1, None)
    else:
        assert code == 0 and scene["DEM"]["files"][0]["data"].startswith("https://example.org/"), said


ODD = {"platform": None, "sat:relative_orbit": "none", "datetime": None, "eo:cloud_cover": "some"}


@pytest.mark.parametrize("name", [*ODD, "geometry", "assets"])
def test_an_item_that_lacks_what_is_read_of_it_is_named(name):
    item = radar(at(2), SWATH)
    if name in ODD:
        item["properties"][name] = ODD[name]
    else:
        item[name] = {"vv": {}}
    with pytest.raises(FloodreproError, match="an item cannot be used") as error:
        plan._checked(item, "S1RTC")
    assert error.value.where == item["id"]


def test_a_cloud_cover_of_null_counts_as_none_said(ask):
    items = [*radar_series(), *optical_series()]
    for item in items:
        item["properties"]["eo:cloud_cover"] = None
    code, scene, said, _ = ask(items)
    assert code == 0, said
    assert scene["S2L2A"]["event"]["cloud"] == 0


def test_a_server_that_keeps_refusing_and_one_that_is_down_are_errors_with_the_address(monkeypatch):
    with StacServer(NORMAL, refusals=[504] * 9) as api, pytest.raises(FloodreproError, match="did not answer"):
        plan.search(api.url, plan.Area(BOX), EVENT, ["S1RTC"], backoff=0.01)
    with pytest.raises(FloodreproError, match="did not answer") as error:
        plan.search(api.url, plan.Area(BOX), EVENT, ["S1RTC"], backoff=0.01)
    assert error.value.where == api.url


def test_an_address_that_is_no_stac_api_is_said_so(tmp_path):
    (tmp_path / "page").write_bytes(b"<html>maintenance</html>")
    with StacServer([], folder=tmp_path) as api, pytest.raises(FloodreproError, match="no STAC API"):
        plan.search(f"{api.root}/data/page", plan.Area(BOX), EVENT, ["S1RTC"])


def test_links_are_signed_only_in_blob_storage_and_right_before_opening(monkeypatch):
    with StacServer([]) as api:
        monkeypatch.setattr(planetary_computer.settings.Settings.get(), "sas_url", f"{api.root}/sas/v1/token")
        monkeypatch.setattr(planetary_computer.sas, "TOKEN_CACHE", {})
        tried = []
        monkeypatch.setattr("floodrepro.mapping.scene.rasterio.open", lambda place: nullcontext(tried.append(place)))
        link = radar(EVENT, SWATH)["assets"]["vv"]["href"]
        for place in (link, f"{api.root}/data/vv.tif"):
            with opened(place):
                pass
    assert tried[0].startswith(f"{link}?se=") and "sig=sentinel1-grd-rtc" in tried[0]
    assert tried[1:] == [f"{api.root}/data/vv.tif"]


def test_a_planned_scene_of_local_cogs_is_mapped_over_http(ask, tmp_path):
    files = subprocess.Popen(
        [sys.executable, stac_server.__file__, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    base = f"{files.stdout.readline().strip()}/data/"
    items = [*radar_series(base=base), *optical_series(base=base), terrain(12, 47, base), terrain(12, 48, base)]
    code, scene, said, _ = ask(items, box=(12.2, 47.9, 12.203, 47.902))
    assert code == 0, said
    steps = [scene[s][k] for s in plan.WORDS for k in STEPS] + [scene["DEM"]]
    hrefs = [v for step in steps for file in step["files"] for v in file.values() if str(v).startswith("http")]
    assert len(hrefs) == 4 * 2 + 4 * 13 + 1
    left, top = rasterio.warp.transform("EPSG:4326", "EPSG:32633", [12.199], [47.903])
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, round(left[0], -1), 0, -10, round(top[0], -1))}
    for href in hrefs:
        path = tmp_path / href.removeprefix(base)
        path.parent.mkdir(parents=True, exist_ok=True)
        value = 0.1 if path.name.endswith("vv.rtc.tiff") else 0.02 if path.name.endswith("vh.rtc.tiff") else 1200
        value = 4 if path.name.endswith("SCL.tif") else value
        with rasterio.open(path, "w", driver="COG", width=60, height=60, count=1, dtype="float32", **place) as out:
            out.write(np.full((1, 60, 60), value, "float32"))
    planned = read_scene(tmp_path / "scene.yaml")
    assert len(planned.acquisitions) == 9
    record = run(tmp_path / "scene.yaml", tmp_path / "map")
    files.communicate(timeout=10)
    assert record["shares_of_area"]["seen"] == 1 and record["scene"]["S1RTC"]["event"]["orbit"] == 66
