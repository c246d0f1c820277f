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
PLANETARY_COMPUTER = "https://planetarycomputer.microsoft.com/api/stac/v1"
WORDS = {"S1RTC": "radar", "S2L2A": "optical"}
Item = dict[str, Any]
Steps = dict[str, "Pass | None"]
_COLLECTIONS = {"S1RTC": "sentinel-1-rtc", "S2L2A": "sentinel-2-l2a", "DEM": "cop-dem-glo-30"}
_LOOK_BACK, _LOOK_AHEAD = 90 * DAY, 45 * DAY  # what is searched: a month before `before`, and an `after`


class NoPassYet(FloodreproError):
    """No pass over the area since the event is in the catalogue: exit code 4."""

    exit_code = 4


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


def sensed(item: Item) -> datetime:
    """When an item was sensed (UTC)."""
    return datetime.fromisoformat(item["properties"]["datetime"]).astimezone(UTC)


def make_pass(items: Iterable[Item], area: Area) -> Pass | None:
    """The pass that items are of; None if they see nothing of the area (a search asks with a simpler shape)."""

    def order(item: Item) -> tuple[float, float, str]:
        """Least cloud first; of two processings of one scene the newer one."""
        p = item["properties"]
        return p.get("eo:cloud_cover", 0), -float(p.get("s2:processing_baseline", 0)), item["id"]

    kept, seen, clear = [], shapely.Polygon(), 0.0
    for item in sorted(items, key=order):
        part = area.project(shape(item["geometry"])).intersection(area.whole)
        if part.area > 0:
            kept.append(item)
            clear += (1 - order(item)[0] / 100) * part.difference(seen).area / area.whole.area
            seen = seen.union(part)
    if not kept:
        return None
    facts = min(kept, key=sensed)["properties"]
    orbit, satellite = facts.get("sat:relative_orbit", 0), facts["platform"].upper()
    coverage = min(seen.area / area.whole.area, 1.0)
    return Pass(tuple(kept), min(map(sensed, kept)), orbit, satellite, coverage, clear)


def list_passes(items: Iterable[Item], area: Area, sensor: str) -> list[Pass]:
    """The passes over the area, oldest first: radar slices of one relative orbit, optical tiles of one morning."""
    # An hour holds the slices of a pass, six hours a morning's optical orbits; a UTC day would end within a pass
    # near 180 degrees.
    gap = timedelta(hours=1 if sensor == "S1RTC" else 6)
    groups: dict[int, list[list[Item]]] = {}
    for item in sorted(items, key=sensed):
        of_orbit = groups.setdefault(item["properties"]["sat:relative_orbit"] if sensor == "S1RTC" else 0, [])
        if of_orbit and sensed(item) - sensed(of_orbit[-1][-1]) < gap:
            of_orbit[-1].append(item)
        else:
            of_orbit.append([item])
    found = [make_pass(group, area) for of_orbit in groups.values() for group in of_orbit]
    return sorted((p for p in found if p), key=lambda p: p.time)


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
    near = [plan for plan in plans if plan[1] >= max(reach for _, reach, _, _ in plans) - ALIKE]
    return min(near, key=lambda plan: plan[2])[3] if near else None


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
    close = clearest(max(event, aim - near), min(event + window, aim + near), aim)
    this = close or clearest(event, event + window, aim)
    if this is None:
        return None
    before, month_before = clearest(event - window, event, event), None
    if before:
        month = before.time - 30 * DAY
        month_before = clearest(month - window, min(month + window, before.time), month)
    after = clearest(this.time + DAY / 4, this.time + window, this.time)
    return {"month_before": month_before, "before": before, "event": this, "after": after}


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
    """What scene.yaml says of event, sensors and terrain.

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
    events: dict[str, datetime] = {}
    for sensor in [s for s in WORDS if s in items]:
        found = _usable(sensor, items[sensor], area, limits["min_coverage"])
        if sensor == "S1RTC":
            chosen = choose_radar(found, event, limits["radar_days"])
        else:
            chosen = choose_optical(found, event, events.get("S1RTC"), limits["optical_days"], limits["max_gap"])
        if not chosen:
            raise _too_late(sensor, found, event, today, limits[f"{WORDS[sensor]}_days"])
        if missing := [step for step in STEPS[:3] if not chosen[step]]:
            raise FloodreproError(
                f"no {WORDS[sensor]} pass for {', '.join(missing)}", fix="--sensors leaves a sensor out"
            )
        # The borders of Planetary Computer's radar hold 0: microsoft/PlanetaryComputer#307, #493.
        scene[sensor] = {"unit": "power", "nodata": [-32768, 0]} if sensor == "S1RTC" else {"nodata": [0]}
        scene[sensor] |= {s: _entry(sensor, p) if (p := chosen[s]) else {"missing": True} for s in STEPS}
        events[sensor] = datetime.fromisoformat(scene[sensor]["event"]["time"])
    gap = (max(events.values()) - min(events.values())) / DAY
    if gap > limits["max_gap"]:
        raise FloodreproError(
            f"the event passes of radar and optical are {gap:.1f} days apart (limit {limits['max_gap']:g})",
            fix=f"--max-gap {gap + 1:.0f} if the water stood as long, or --sensors S1RTC",
        )
    if terrain := make_pass(items["DEM"], area):
        scene["DEM"] = {"unit": "m", "files": [_links("DEM", tile) for tile in terrain.items]}
    return scene


def _usable(sensor: str, items: Sequence[Item], area: Area, min_coverage: float) -> list[Pass]:
    """The passes that see enough of the area, in all bands."""
    whole = [i for i in items if sensor != "S1RTC" or {"vv", "vh"} <= set(i["assets"])]
    passes = list_passes(whole, area, sensor)
    found = [p for p in passes if p.coverage >= min_coverage]
    if not found:
        best = max((p.coverage for p in passes), default=0)
        raise FloodreproError(
            f"no {WORDS[sensor]} pass covers {min_coverage:.0%} of the area (best {best:.0%}, {len(items)} items)",
            fix=f"cut the area, lower --min-coverage, or see that the server has {_COLLECTIONS[sensor]}",
        )
    return found


def _too_late(sensor: str, found: Sequence[Pass], event: datetime, today: datetime, days: float) -> FloodreproError:
    """The error that says when the next pass is expected, or how late the first one came."""
    word = WORDS[sensor]
    if found[-1].time >= event or today >= event + _LOOK_AHEAD:
        waits = [f"{(p.time - event) / DAY:.1f}" for p in found if p.time >= event] or ["more than 45"]
        return FloodreproError(
            f"the first {word} pass came {waits[0]} days after the event (limit {days:g})",
            fix=f"allow more with --{word}-days, if the water stood as long",
        )
    due = expected(found, sensor, event, today)
    time, orbit, satellite = next(d for d in due if d[0] >= today)
    told = f"no {word} pass since {event:%Y-%m-%d} yet; next expected on {time:%Y-%m-%d}"
    told += f" (relative orbit {orbit}, {satellite})"
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


def _links(sensor: str, item: Item) -> dict[str, Any]:
    """One entry under `files`: the item, what its pixels need, and an unsigned link for each band."""
    facts: dict[str, Any] = {"item": item["id"]}
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else BANDS[sensor]
    if absent := [name for name in names if name not in item["assets"]]:
        raise FloodreproError(
            f"{item['id']} has no asset {', '.join(absent)}", fix="use a STAC API with Planetary Computer's names"
        )
    if sensor == "S2L2A":
        p = item["properties"]
        facts |= {"tile": p["s2:mgrs_tile"], "baseline": p["s2:processing_baseline"], "cloud": p["eo:cloud_cover"]}
    return facts | {name: item["assets"][name]["href"] for name in names}
