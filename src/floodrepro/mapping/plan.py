"""Write the scene of a flood: ask a STAC API and choose four passes of each sensor."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import shapely
from shapely.geometry import shape

from floodrepro.errors import FloodreproError, UsageError
from floodrepro.mapping.area import Area
from floodrepro.mapping.scene import BANDS, SCL, STEPS

DAY = timedelta(days=1)
CYCLE = {"S1RTC": 12 * DAY, "S2L2A": 10 * DAY}  # one satellite's exact repeat; a second one flies half-way between
ALIKE = 0.05  # a share of the area too small to be worth another orbit or day
Item = dict[str, Any]
PLANETARY_COMPUTER = "https://planetarycomputer.microsoft.com/api/stac/v1"
WORDS = {"S1RTC": "radar", "S2L2A": "optical"}
_COLLECTIONS = {"S1RTC": "sentinel-1-rtc", "S2L2A": "sentinel-2-l2a", "DEM": "cop-dem-glo-30"}
_PIXELS: dict[str, dict[str, Any]] = {
    "S1RTC": {"unit": "power", "nodata": [-32768, 0]},  # borders hold 0: microsoft/PlanetaryComputer#307, #493
    "S2L2A": {"nodata": [0]},
    "DEM": {"unit": "m"},
}
_LOOK_BACK, _LOOK_AHEAD = 90 * DAY, 45 * DAY  # what is searched: a month before `before`, and an `after`


@dataclass(frozen=True)
class Pass:
    """One flight over the area.

    Args:
        items: Least cloud first: the first valid pixel wins.
        time: When it began (UTC).
        orbit: Relative orbit.
        satellite: Such as SENTINEL-1A.
        coverage: Share of the area inside the footprints, an upper bound of what the pixels cover.
        clear: Share of the area inside the footprints and not under cloud, by the figures of whole tiles.
    """

    items: tuple[Item, ...]
    time: datetime
    orbit: int
    satellite: str
    coverage: float
    clear: float


Steps = dict[str, Pass | None]


def _order(item: Item) -> tuple[float, float, str]:
    """Least cloud first; of two processings of one scene the newer one."""
    return cloud(item), -float(item["properties"].get("s2:processing_baseline", 0)), item["id"]


def sensed(item: Mapping[str, Any]) -> datetime:
    """When an item was sensed (UTC)."""
    return datetime.fromisoformat(item["properties"]["datetime"]).astimezone(UTC)


def cloud(item: Mapping[str, Any]) -> float:
    """The share of an item's tile under cloud; 0 for radar."""
    return float(item["properties"].get("eo:cloud_cover", 0)) / 100


def shares(items: Iterable[Mapping[str, Any]], area: Area) -> tuple[float, float]:
    """The share of the area that lies inside the items' footprints, and the clear share."""
    seen, clear = shapely.Polygon(), 0.0
    for item in items:
        footprint = area.project(shape(item["geometry"]))
        new = footprint.difference(seen).intersection(area.whole)
        clear += (1 - cloud(item)) * new.area / area.whole.area
        seen = seen.union(footprint)
    return min(seen.intersection(area.whole).area / area.whole.area, 1.0), clear


def over_area(items: Iterable[Item], area: Area) -> list[Item]:
    """The items that see some of the area; a search returns others too, because it asks with a simpler shape."""
    return [item for item in items if area.project(shape(item["geometry"])).intersection(area.whole).area > 0]


def list_passes(items: Iterable[Item], area: Area, sensor: str) -> list[Pass]:
    """The passes over the area, oldest first: radar slices of one relative orbit, optical tiles of one morning."""
    # An hour holds the slices of a pass, six hours a morning's optical orbits; a UTC day would end within a pass
    # near 180 degrees.
    track, gap = sensor == "S1RTC", timedelta(hours=1 if sensor == "S1RTC" else 6)
    groups: list[list[Item]] = []
    for item in sorted(items, key=lambda i: (track * i["properties"]["sat:relative_orbit"], sensed(i))):
        last = groups[-1][-1] if groups else item
        same = not track or last["properties"]["sat:relative_orbit"] == item["properties"]["sat:relative_orbit"]
        if groups and same and sensed(item) - sensed(last) < gap:
            groups[-1].append(item)
        else:
            groups.append([item])
    found = []
    for group in groups:
        over = sorted(over_area(group, area), key=_order)
        if over:
            first = min(over, key=sensed)
            p = first["properties"]
            found.append(
                Pass(tuple(over), sensed(first), p["sat:relative_orbit"], p["platform"].upper(), *shares(over, area))
            )
    return sorted(found, key=lambda p: p.time)


def choose_radar(found: Sequence[Pass], event: datetime, days: float) -> Steps | None:
    """Four passes of one relative orbit, or None where no orbit passed within *days* of the event.

    event: the first pass on or after it. before: the last one before it. month_before: the one nearest to 30 days
    before `before`. after: the next one after the event pass, if there is one. Of the orbits whose coverage (the least
    of the first three) is within 5 points of the best, the one that came first is taken.
    """
    plans = []
    for orbit in sorted({p.orbit for p in found}):
        own = [p for p in found if p.orbit == orbit]
        own = [p for p in own if p.coverage > max(q.coverage for q in own) / 2]  # not a pass that lost its slices
        before, since = [p for p in own if p.time < event], [p for p in own if p.time >= event]
        if since and since[0].time - event <= days * DAY:
            steps: Steps = dict.fromkeys(STEPS)
            steps["event"], steps["after"] = since[0], since[1] if len(since) > 1 else None
            if before:
                steps["before"], month = before[-1], before[-1].time - 30 * DAY
                # Whole days, because 30 days lie half-way between two passes of a 12-day cycle: the earlier one then.
                steps["month_before"] = min(before[:-1], key=lambda p: round(abs(p.time - month) / DAY), default=None)
            reach = min(p.coverage for key, p in steps.items() if p and key != "after")
            plans.append((steps["month_before"] is not None, reach, since[0].time, steps))
    plans = [plan for plan in plans if plan[0]] or plans  # an orbit without history only where no other has one
    best = max((reach for _, reach, _, _ in plans), default=0)
    near = [(time, steps) for _, reach, time, steps in plans if reach >= best - ALIKE]
    return min(near, key=lambda plan: plan[0])[1] if near else None


def choose_optical(
    found: Sequence[Pass], event: datetime, radar: datetime | None, days: float, gap: float
) -> Steps | None:
    """Four optical passes, or None where none came within *days* of the event.

    Each is the clearest in its window; of those within 5 points of the clearest, the one nearest to the radar's event
    pass (event), to the event (before), to 30 days before `before` (month_before), to the event pass (after). The event
    pass is within *gap* days of the radar's, if one is.
    """

    def clearest(low: datetime, high: datetime, aim: datetime) -> Pass | None:
        there = [p for p in found if low <= p.time < high]
        best = max((p.clear for p in there), default=0)
        return min((p for p in there if p.clear >= best - ALIKE), key=lambda p: abs(p.time - aim), default=None)

    window, near, aim = days * DAY, gap * DAY, radar or event
    steps: Steps = dict.fromkeys(STEPS)
    close = clearest(max(event, aim - near), min(event + window, aim + near), aim)
    steps["event"] = this = close or clearest(event, event + window, aim)
    if this is None:
        return None
    steps["before"] = before = clearest(event - window, event, event)
    if before:
        month = before.time - 30 * DAY
        steps["month_before"] = clearest(month - window, min(month + window, before.time), month)
    steps["after"] = clearest(this.time + DAY / 4, this.time + window, this.time)
    return steps


def expected(found: Sequence[Pass], sensor: str, since: datetime, today: datetime) -> list[tuple[datetime, int, str]]:
    """Time, relative orbit and satellite of the passes that exact repeats predict, up to one cycle from today.

    A satellite that has not been seen here for two cycles is taken to be gone.
    """
    cycle, end = CYCLE[sensor], max(since, today) + CYCLE[sensor]
    due = []
    for (orbit, satellite), last in {(p.orbit, p.satellite): p.time for p in found}.items():
        if found[-1].time - last <= 2 * cycle:
            first = max(1, math.ceil((since - last) / cycle))
            due += [(last + n * cycle, orbit, satellite) for n in range(first, (end - last) // cycle + 1)]
    return sorted(due)


class NoPassYet(FloodreproError):
    """No pass over the area since the event is in the catalogue: exit code 4."""

    exit_code = 4


def search(url: str, area: Area, event: datetime, sensors: Iterable[str], backoff: float = 1) -> dict[str, list[Item]]:
    """Every item over the area, from 90 days before the event to 45 after it; terrain of any date.

    Raises:
        FloodreproError: The server cannot be reached, keeps refusing, or is no STAC API.
    """
    try:
        from pystac_client import Client
        from pystac_client.errors import ClientTypeError
        from pystac_client.exceptions import APIError
        from pystac_client.stac_api_io import StacApiIO
        from urllib3 import Retry
    except ImportError as error:
        raise UsageError("map plan needs pystac-client", fix="pip install 'floodrepro[stac]'") from error
    # By default pystac-client does not repeat a POST: the first 429 or 504 would end the search (pystac-client#520).
    again = (429, 500, 502, 503, 504)
    retry = Retry(5, connect=2, backoff_factor=backoff, status_forcelist=again, allowed_methods=None)
    window = f"{event - _LOOK_BACK:%Y-%m-%dT%H:%M:%SZ}/{event + _LOOK_AHEAD:%Y-%m-%dT%H:%M:%SZ}"
    where, found = json.loads(shapely.to_geojson(area.search_shape())), {}
    try:
        client = Client.open(url, stac_io=StacApiIO(max_retries=retry, timeout=60))
        for sensor in sensors:
            dates = None if sensor == "DEM" else window
            pages = client.search(collections=[_COLLECTIONS[sensor]], intersects=where, datetime=dates, limit=100)
            found[sensor] = list({item["id"]: item for item in pages.items_as_dicts()}.values())
    except APIError as error:
        raise FloodreproError(f"the server did not answer: {str(error)[:300]}", where=url, fix="try again") from error
    except (ClientTypeError, ValueError) as error:
        fix = "--stac is the address of its landing page"
        raise FloodreproError(f"this is no STAC API: {error}", where=url, fix=fix) from error
    return found


def make_scene(
    items: Mapping[str, Sequence[Item]], area: Area, event: datetime, today: datetime, limits: Mapping[str, float]
) -> dict[str, Any]:
    """What scene.yaml says of event, sensors and terrain, and notes on the choice.

    Args:
        items: By sensor, and of the terrain model.
        area: Where.
        event: When the flood began.
        today: Now.
        limits: radar_days and optical_days that an event pass may come late, max_gap days between the two, and
            min_coverage, the least share of the area that a pass sees.

    Raises:
        NoPassYet: A sensor has not passed since the event.
        FloodreproError: It passed too late, sees too little, has no history, or the two lie too far apart.
    """
    scene: dict[str, Any] = {"event": f"{event:%Y-%m-%dT%H:%MZ}"}
    notes: list[str] = []
    events: dict[str, datetime] = {}
    for sensor in [s for s in WORDS if s in items]:
        chosen = _choose(sensor, items[sensor], area, event, today, events.get("S1RTC"), limits)
        events[sensor] = chosen["event"].time
        scene[sensor] = {"collection": _COLLECTIONS[sensor]} | _PIXELS[sensor]
        scene[sensor] |= {s: _entry(sensor, chosen[s]) if s in chosen else {"missing": True} for s in STEPS}
        notes.append(f"{WORDS[sensor]}: event pass {(events[sensor] - event) / DAY:.1f} days after the event")
    if len(events) == 2:
        gap = abs(events["S1RTC"] - events["S2L2A"]) / DAY
        scene["radar_optical_gap_days"] = round(gap, 2)
        if gap > limits["max_gap"]:
            raise FloodreproError(
                f"the event passes of radar and optical are {gap:.1f} days apart (limit {limits['max_gap']:g})",
                fix=f"--max-gap {gap + 1:.0f} if the water stood as long, or --sensors S1RTC",
            )
    tiles = sorted(over_area(items["DEM"], area), key=lambda i: i["id"])
    if tiles:
        scene["DEM"] = {"collection": _COLLECTIONS["DEM"]} | _PIXELS["DEM"]
        scene["DEM"]["files"] = [_links("DEM", tile) for tile in tiles]
    if shares(tiles, area)[0] < 0.99:
        notes.append("DEM: no tile for a part of the area: open sea, or a country that is withheld")
    return scene | {"notes": notes}


def _choose(
    sensor: str,
    items: Sequence[Item],
    area: Area,
    event: datetime,
    today: datetime,
    radar: datetime | None,
    limits: Mapping[str, float],
) -> dict[str, Pass]:
    """The passes of one sensor by step (`after` may be missing); *radar* is the time of its event pass."""
    word, days = WORDS[sensor], limits["radar_days" if sensor == "S1RTC" else "optical_days"]
    dual = [i for i in items if sensor != "S1RTC" or {"vv", "vh"} <= set(i["assets"])]
    seen = list_passes(dual, area, sensor)
    found = [p for p in seen if p.coverage >= limits["min_coverage"]]
    if not found:
        best = max((p.coverage for p in seen), default=0)
        raise FloodreproError(
            f"no {word} pass covers {limits['min_coverage']:.0%} of the area (best {best:.0%}, {len(items)} items)",
            fix=f"cut the area, lower --min-coverage, or see that the server has {_COLLECTIONS[sensor]}",
        )
    if sensor == "S1RTC":
        steps = choose_radar(found, event, days)
    else:
        steps = choose_optical(found, event, radar, days, limits["max_gap"])
    if not steps and found[-1].time < event and today < event + _LOOK_AHEAD:
        raise _no_pass_yet(seen, found, sensor, event, today)
    if not steps:
        waits = [f"{(p.time - event) / DAY:.1f}" for p in found if p.time >= event] or ["more than 45"]
        raise FloodreproError(
            f"the first {word} pass came {waits[0]} days after the event (limit {days:g})",
            fix=f"allow more with --{word}-days, if the water stood as long",
        )
    if missing := [step for step in STEPS[:3] if not steps[step]]:
        raise FloodreproError(f"no {word} pass for {', '.join(missing)}", fix="--sensors leaves a sensor out")
    return {step: p for step, p in steps.items() if p}


def _no_pass_yet(
    seen: Sequence[Pass], found: Sequence[Pass], sensor: str, event: datetime, today: datetime
) -> NoPassYet:
    """The error that says when the next pass is expected; *seen* has passes with too little of the area as well."""
    due = expected(found, sensor, event, today)
    time, orbit, satellite = next(d for d in due if d[0] >= today)
    told = f"no {WORDS[sensor]} pass since {event:%Y-%m-%d} yet; next expected on {time:%Y-%m-%d}"
    told += f" (relative orbit {orbit}, {satellite})"
    if part := [f"{p.time:%Y-%m-%d} ({p.coverage:.0%})" for p in seen if p.time >= event]:
        told += f"; with a part of the area: {', '.join(part)}, see --min-coverage"
    if late := [f"{time:%Y-%m-%d}" for time, _, _ in due if time < today]:
        told += f"; expected by now and not in the catalogue: {', '.join(late)}"
    told += f"; newest over the area: {found[-1].time:%Y-%m-%d}"
    return NoPassYet(told, fix="run it again a day or more after that date: a catalogue lags behind the satellites")


def _entry(sensor: str, p: Pass) -> dict[str, Any]:
    """One step of a sensor, as scene.yaml has it."""
    facts: dict[str, Any] = {"time": f"{p.time:%Y-%m-%dT%H:%M:%SZ}", "satellite": p.satellite, "orbit": p.orbit}
    facts |= {"direction": p.items[0]["properties"]["sat:orbit_state"], "coverage": round(p.coverage, 3)}
    if sensor == "S2L2A":
        facts["cloud"] = round(100 * max(1 - p.clear / p.coverage, 0), 1)
    return facts | {"files": [_links(sensor, item) for item in p.items]}


def _links(sensor: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """One entry under `files`: the item, what its pixels need, and an unsigned link for each band."""
    p, facts = item["properties"], {"item": item["id"]}
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else BANDS[sensor]
    if absent := [name for name in names if name not in item["assets"]]:
        raise FloodreproError(
            f"{item['id']} has no asset {', '.join(absent)}", fix="use a STAC API with Planetary Computer's names"
        )
    if sensor == "S2L2A":
        facts |= {"tile": p["s2:mgrs_tile"], "baseline": p["s2:processing_baseline"], "cloud": 100 * cloud(item)}
    return facts | {name: item["assets"][name]["href"] for name in names}
