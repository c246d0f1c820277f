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
from floodrepro.mapping.area import Area
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


def test_same_items_in_any_order_give_the_same_bytes(ask, tmp_path):
    ask(NORMAL)
    first = (tmp_path / "scene.yaml").read_bytes()
    ask(NORMAL[::-1], page=7)
    # Only the address of the server differs.
    second = (tmp_path / "scene.yaml").read_bytes()
    assert [a for a in first.splitlines() if b"stac:" not in a] == [b for b in second.splitlines() if b"stac:" not in b]


def test_no_radar_pass_yet_is_exit_code_4_and_names_the_next_of_two_satellites(ask):
    radars = radar_series((-70, -58, -46, -34, -22, -10), satellite="C") + radar_series(
        (-52, -40, -28, -16, -4), satellite="D"
    )
    code, scene, said, _ = ask([*radars, *optical_series()], today=at(1))
    assert (code, scene) == (4, None)
    assert "next expected on 2026-08-28 (relative orbit 66, SENTINEL-1C)" in said  # 6 days after D's, 12 after C's
    assert "not in the catalogue" not in said


def test_no_optical_pass_yet_is_exit_code_4_as_well(ask):
    code, _, said, _ = ask([*radar_series(), *optical_series(range(-64, 0, 5))], today=at(3))
    assert (
        code == 4 and "no optical pass since 2026-08-26 yet; next expected on 2026-09-01" in said
    )  # the last, plus 10 days


def test_an_event_that_is_still_to_come_is_exit_code_4(ask):
    code, _, said, _ = ask([*radar_series(RADAR_DAYS[:-2]), *optical_series()], today=at(-3))
    assert code == 4 and "next expected on 2026-08-28" in said


def test_a_pass_that_sees_a_corner_is_no_pass_yet(ask):
    corner = radar_series((-71, -59, -47, -35, -23, -11, 1), where=(12.33, 46.9, 15, 48.9), orbit=143)  # 18 %
    code, _, said, _ = ask([*radar_series(RADAR_DAYS[:-2]), *corner, *optical_series()], today=at(1.5))
    assert code == 4 and "next expected on 2026-08-28 (relative orbit 66" in said


def test_a_pass_that_should_be_in_the_catalogue_is_named(ask):
    code, _, said, _ = ask([*radar_series(RADAR_DAYS[:-2]), *optical_series()], today=at(5))
    assert code == 4
    assert "next expected on 2026-09-09" in said and "not in the catalogue: 2026-08-28" in said
    assert "newest over the area: 2026-08-16" in said


def test_a_satellite_that_stopped_flying_is_not_expected():
    area = Area(BOX)
    gone = radar_series((-70, -58, -46), satellite="A") + radar_series((-64, -52, -40, -28, -16, -4), satellite="C")
    due = plan.expected(plan.list_passes(gone, area, "S1RTC"), "S1RTC", EVENT, EVENT)
    assert {satellite for _, _, satellite in due} == {"SENTINEL-1C"}


def test_an_old_event_without_a_pass_is_an_error_and_not_a_promise(ask):
    code, _, said, _ = ask([*radar_series(RADAR_DAYS[:-2]), *optical_series()], today=at(300))
    assert code == 1 and "more than 45 days after the event" in said


def test_a_first_pass_after_the_limit_is_refused_with_its_delay(ask):
    code, _, said, _ = ask([*radar_series((-58, -34, -10, 14)), *optical_series()])
    assert (
        code == 1
        and "the first radar pass came 14.2 days after the event (limit 12)" in said
        and "--radar-days" in said
    )
    assert ask([*radar_series((-58, -34, -10, 14)), *optical_series()], "--radar-days", "15", "--max-gap", "9")[0] == 0


def test_single_polarised_items_are_left_out_and_counted(ask):
    items = [*radar_series(), radar(at(0), SWATH, polarisations="VV"), radar(at(1), SWATH, polarisations="HH HV")]
    code, scene, _said, _ = ask([*items, *optical_series()])
    assert code == 0 and days_of(scene, "S1RTC")[2] == 2


def test_two_slices_of_one_pass_are_one_step(ask):
    north, south = (10.5, 47.95, 13.9, 49.5), (10.5, 46.0, 13.9, 47.95)
    slices = [
        radar(at(d, 5.2 + 25 / 3600 * n), w, slice_number=n)
        for d in RADAR_DAYS
        for n, w in enumerate((north, south), 1)
    ]
    code, scene, said, _ = ask([*slices, *optical_series()])
    assert code == 0, said
    assert days_of(scene, "S1RTC") == [-46, -10, 2, 14]
    assert len(ids(scene["S1RTC"]["event"])) == 2 and scene["S1RTC"]["event"]["coverage"] == 1


def test_a_pass_whose_slice_is_missing_is_passed_over(ask):
    items = [i for i in radar_series() if not i["id"].startswith("S1A_IW_GRDH_1SDV_20260816")]
    items.append(radar(at(-10), (10.5, 46.0, 13.9, 47.9)))  # a third of the area
    code, scene, _, _ = ask([*items, *optical_series()], "--min-coverage", "0.1")
    assert code == 0 and days_of(scene, "S1RTC") == [-58, -22, 2, 14]


def test_an_earlier_orbit_that_sees_less_loses(ask):
    partial = radar_series((-71, -59, -47, -35, -23, -11, 1, 13), where=(12.12, 46.9, 15, 48.9), orbit=143)  # 70 %
    code, scene, _said, _ = ask([*radar_series(), *partial, *optical_series()])
    assert code == 0
    assert {scene["S1RTC"][step]["orbit"] for step in STEPS} == {66}


def test_an_orbit_without_history_loses_to_one_with(ask):
    code, scene, _, _ = ask([*radar_series(), *radar_series((1, 13), orbit=143), *optical_series()])
    assert code == 0 and scene["S1RTC"]["event"]["orbit"] == 66


def test_no_history_at_all_is_refused_by_the_step_that_is_missing(ask):
    code, _, said, _ = ask([*radar_series((-10, 2)), *optical_series()])
    assert code == 1 and "no radar pass for month_before" in said


def test_too_little_of_the_area_is_refused_with_the_best_share(ask):
    code, _, said, _ = ask([*radar_series(where=(12.3, 46.9, 15, 48.9)), *optical_series()])
    assert code == 1 and "no radar pass covers 50% of the area (best 25%, 8 items)" in said


def test_the_clearer_day_is_taken_and_among_equals_the_nearer_one(ask):
    clouds = {-4: 90, -9: 10, 1: 95, 6: 8}
    items = [optical(at(d, 10.1), TILE, cloud=clouds.get(d, 12)) for d in range(-64, 25, 5)]
    code, scene, said, _ = ask([*radar_series(), *items])
    assert code == 0, said
    assert days_of(scene, "S2L2A") == [-39, -9, 6, 11]
    assert scene["S2L2A"]["event"]["cloud"] == 8


def test_a_clearer_day_beyond_the_limit_loses_to_a_cloudy_one_within_it(ask):
    items = [optical(at(d, 10.1), TILE, cloud=5 if d == 11 else 60) for d in range(-64, 25, 5)]
    code, scene, _, _ = ask([*radar_series(), *items])
    assert code == 0 and days_of(scene, "S2L2A")[2] == 1


def test_an_optical_pass_too_far_from_the_radar_is_refused_unless_allowed(ask):
    items = [*radar_series(), *optical_series((-40, -34, -9, -4, 11))]
    code, _, said, _ = ask(items)
    assert code == 1 and "9.2 days apart (limit 5)" in said and "--max-gap 10" in said
    assert ask(items, "--max-gap", "10")[0] == 0


def test_one_sensor_alone_can_be_planned(ask):
    code, scene, _, _ = ask(radar_series(), "--sensors", "S1RTC")
    assert code == 0 and "S2L2A" not in scene


def test_all_pages_are_read(ask):
    code, scene, _, api = ask(NORMAL, page=7)
    pages = [body for method, body in api.asked if body["collections"] == ["sentinel-2-l2a"]]
    assert code == 0 and len(pages) == 3 and [p.get("token") for p in pages] == [None, "7", "14"]
    assert {method for method, _ in api.asked} == {"POST"}
    assert days_of(scene, "S2L2A") == [-34, -4, 1, 6]


def test_the_newer_processing_of_a_tile_is_taken(ask):
    old = optical_series(baseline="02.14", made=timedelta(hours=4))
    new = optical_series(baseline="05.00", made=timedelta(days=400))
    code, scene, _said, _ = ask([*radar_series(), *new, *old])
    assert code == 0 and {scene["S2L2A"][s]["files"][0]["baseline"] for s in STEPS} == {"05.00"}


def test_two_datastrips_of_one_tile_are_both_kept(ask):
    north, south = (11.6, 47.95, 13.1, 48.7), (11.6, 47.7, 13.1, 47.95)
    halves = [
        optical(at(d, 10.1), w, strip=n, made=timedelta(hours=4 + n))
        for d in range(-64, 25, 5)
        for n, w in enumerate((north, south))
    ]
    code, scene, _, _ = ask([*radar_series(), *halves])
    assert code == 0 and len(ids(scene["S2L2A"]["event"])) == 2 and scene["S2L2A"]["event"]["coverage"] == 1


def test_an_area_on_two_tiles_is_mosaicked_from_one_day(ask):
    west = optical_series(where=(11.0, 47.7, 12.2, 48.7), tile="32UQU", cloud=20)
    east = [
        optical(at(d, 10.1 + 14 / 3600), (12.2, 47.7, 13.5, 48.7), tile="33UUP", cloud=4) for d in range(-64, 25, 5)
    ]
    code, scene, _, _ = ask([*radar_series(), *west, *east])
    event = scene["S2L2A"]["event"]
    assert code == 0 and [f["tile"] for f in event["files"]] == ["33UUP", "32UQU"]  # the clearer one first
    assert event["coverage"] == 1 and event["cloud"] == pytest.approx(12, abs=0.1)


def test_a_day_with_one_of_two_tiles_loses_to_a_day_with_both(ask):
    west = optical_series(where=(11.0, 47.7, 12.2, 48.7), tile="32UQU")
    east = [optical(at(d, 10.1), (12.2, 47.7, 13.5, 48.7), tile="33UUP") for d in range(-64, 25, 5) if d != 1]
    code, scene, _, _ = ask([*radar_series(), *west, *east], "--min-coverage", "0.4")
    assert code == 0 and days_of(scene, "S2L2A")[2] == 6


FIJI = (179.6, -17.2, -179.6, -16.8)
SPLIT = {
    "type": "MultiPolygon",
    "coordinates": [
        [[[179.2, -17.3], [180, -17.3], [180, -16.2], [179.2, -16.2], [179.2, -17.3]]],
        [[[-180, -17.3], [-179.2, -17.3], [-179.2, -16.2], [-180, -16.2], [-180, -17.3]]],
    ],
}
AROUND = {
    "type": "Polygon",
    "coordinates": [[[179.2, -17.3], [-179.2, -17.3], [-179.2, -16.2], [179.2, -16.2], [179.2, -17.3]]],
}


@pytest.mark.parametrize("tile", [SPLIT, (178.9, -17.3, 180.5, -16.2)], ids=["split", "beyond"])
def test_an_area_across_the_antimeridian_is_covered_by_footprints_of_any_form(ask, tile):
    beyond = radar_series(where=(178.0, -18.0, 180.9, -16.0))
    code, scene, said, _ = ask([*beyond, *optical_series(where=tile)], box=FIJI)
    assert code == 0, said
    assert scene["S1RTC"]["event"]["coverage"] == scene["S2L2A"]["event"]["coverage"] == 1


def test_items_beyond_180_that_do_not_reach_back_to_it_are_found(ask):
    near, far = (
        optical_series(where=(178.9, -17.3, 180.1, -16.2)),
        [optical(at(d, 10.11), (-179.95, -17.3, -178.9, -16.2), tile="01KBB") for d in range(-64, 25, 5)],
    )
    code, scene, said, _ = ask([*radar_series(where=(178.0, -18.0, 180.9, -16.0)), *near, *far], box=FIJI)
    assert code == 0, said
    assert scene["S2L2A"]["event"]["coverage"] == 1 and len(ids(scene["S2L2A"]["event"])) == 2


def test_an_item_kept_on_the_other_side_of_180_is_found(ask):
    beyond = radar_series(where=(177.0, -18.0, 180.9, -16.0))
    code, scene, said, _ = ask([*beyond, *optical_series(where=SPLIT)], box=(-179.9, -17.2, -179.6, -16.8))
    assert code == 0, said
    assert scene["S1RTC"]["event"]["coverage"] == 1


@pytest.mark.parametrize("refusals", [[429], [504, 429, 503]])
def test_a_busy_server_is_asked_again(ask, monkeypatch, refusals):
    code, _, said, api = ask(NORMAL, refusals=refusals)
    assert code == 0, said
    assert len(api.asked) == 3 + len(refusals)


def test_a_server_without_the_collection_is_said_so(ask):
    code, _, said, _ = ask(optical_series())
    assert code == 1 and "0 items" in said and "sentinel-1-rtc" in said


def test_a_server_with_other_asset_names_is_refused(ask):
    items = optical_series()
    for item in items:
        item["assets"]["coastal"] = item["assets"].pop("B01")
    code, _, said, _ = ask([*radar_series(), *items])
    assert code == 1 and "has no asset B01" in said


def test_an_area_that_cannot_be_read_is_bad_usage(cli, ask, tmp_path):
    for text in ("{", '{"type": "Point", "coordinates": [12, 48]}'):
        (tmp_path / "aoi.geojson").write_text(text)
        code, scene, said, _ = ask(NORMAL, "--aoi", tmp_path / "aoi.geojson", box=None)
        assert (code, scene) == (2, None) and "aoi.geojson" in said


def test_a_server_that_keeps_refusing_and_one_that_is_down_are_errors_with_the_address(monkeypatch):
    with StacServer(NORMAL, refusals=[504] * 9) as api, pytest.raises(FloodreproError, match="did not answer"):
        plan.search(api.url, Area(BOX), EVENT, ["S1RTC"], backoff=0.01)
    with pytest.raises(FloodreproError, match="did not answer") as error:
        plan.search(api.url, Area(BOX), EVENT, ["S1RTC"], backoff=0.01)
    assert error.value.where == api.url


def test_an_address_that_is_no_stac_api_is_said_so(tmp_path):
    (tmp_path / "page").write_bytes(b"<html>maintenance</html>")
    with StacServer([], folder=tmp_path) as api, pytest.raises(FloodreproError, match="no STAC API"):
        plan.search(f"{api.root}/data/page", Area(BOX), EVENT, ["S1RTC"])


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
