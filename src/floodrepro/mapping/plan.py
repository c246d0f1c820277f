"""Write the scene of a flood: ask a STAC API and choose four passes of each sensor.

A pass is a step of scene.yaml: its `coverage` is the share of the area inside the footprints, an upper bound of what
the pixels cover, `cloud` percent of that by the figures of whole tiles; `files` are listed least cloud first.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import shapely
from shapely.geometry import box, shape

from floodrepro.console import public
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.mapping.scene import BANDS, SCL, STEPS

DAY = timedelta(days=1)
Item = dict[str, Any]
Pass = dict[str, Any]
_CYCLE = {"S1RTC": 12 * DAY, "S2L2A": 10 * DAY}  # one satellite's exact repeat; a second one flies half-way between
_ALIKE = 0.05  # a share of the area too small to be worth another orbit or day
_WORDS = {"S1RTC": "radar", "S2L2A": "optical"}
_COLLECTIONS = {"S1RTC": "sentinel-1-rtc", "S2L2A": "sentinel-2-l2a", "DEM": "cop-dem-glo-30"}
# The borders of Planetary Computer's radar hold 0: microsoft/PlanetaryComputer#307, #493.
_PIXELS: dict[str, dict[str, Any]] = {"S1RTC": {"unit": "power", "nodata": [-32768, 0]}, "S2L2A": {"nodata": [0]}}
_LOOK_BACK, _LOOK_AHEAD = 90 * DAY, 45 * DAY  # what is searched: a month before `before`, and an `after`
_WINDOW = {"S1RTC": _LOOK_AHEAD, "S2L2A": 15 * DAY}  # how far the other dates may lie from what they are to be near
_MOST = 10_000  # items of a sensor
_ODD = (KeyError, TypeError, AttributeError, RecursionError)  # what comes of an answer that is no STAC
_BACKOFF = 1  # second, doubled from one attempt to the next


class NoPassYet(FloodreproError):
    """No pass over the area since the event is in the catalogue: exit code 4."""

    exit_code = 4


class Area:
    """Where a flood is looked for, by polygons in degrees that are in one piece across 180; `whole` is projected."""

    def __init__(self, parts: Any) -> None:
        self._parts, self._bounds = parts, shapely.total_bounds(parts)
        self.whole = shapely.union_all(self.project(parts))

    def project(self, geometry: Any) -> Any:
        """Geometries in Lambert's equal-area projection around the area; what is split at 180 or beyond it is whole."""
        east = 180 - (self._bounds[0] + self._bounds[2]) / 2
        moved = shapely.transform(geometry, lambda x, y: ((x + east) % 360, np.sin(np.radians(y))), interleaved=False)
        return shapely.make_valid(moved)

    def search_shape(self) -> Any:
        """A simple shape within ±180 degrees that the footprint of every item over the area intersects."""
        west, south, east, north = self._bounds
        if max(-west, east) < 170:
            return shapely.union_all(self._parts).convex_hull
        # Planetary Computer keeps a footprint across 180 in one piece that goes beyond ±180, where a search may not
        # reach (microsoft/PlanetaryComputer#296): ask on both sides of it, from wherever the area is.
        west, east = min(west % 360, 179.99), max(east % 360 - 360, -179.99)
        return shapely.union_all([box(west, south, 180, north), box(-180, south, east, north)])


def search(url: str, area: Area, event: datetime) -> dict[str, list[Item]]:
    """Every item over the area by sensor, from 90 days before the event to 45 after it; terrain of any date.

    Raises:
        UsageError: pystac-client is missing.
        FloodreproError: The server cannot be reached, keeps refusing, or is no STAC API.
    """
    try:
        import pystac_client as stac
        from urllib3 import Retry
    except ImportError as error:
        raise UsageError("map plan needs pystac-client", fix="pip install 'floodrepro[stac]'") from error
    # By default pystac-client does not repeat a POST: the first 429 or 504 would end the search (pystac-client#520).
    again = (429, 500, 502, 503, 504)
    retry = Retry(5, connect=2, backoff_factor=_BACKOFF, status_forcelist=again, allowed_methods=None)
    window = f"{event - _LOOK_BACK:%Y-%m-%dT%H:%M:%SZ}/{event + _LOOK_AHEAD:%Y-%m-%dT%H:%M:%SZ}"
    where, found = json.loads(shapely.to_geojson(area.search_shape())), {}
    try:
        client = stac.Client.open(url, stac_io=stac.stac_api_io.StacApiIO(max_retries=retry, timeout=60))
        for sensor, collection in _COLLECTIONS.items():
            dates = None if sensor == "DEM" else window
            asked = client.search(collections=[collection], intersects=where, datetime=dates, limit=100)
            items: dict[str, Item] = {}
            for page in asked.pages_as_dicts():
                new = {item["id"]: item for item in page["features"] if item["id"] not in items}
                if not new or len(items) > _MOST:  # a server may give the same page without end
                    break
                items |= new
            if len(items) > _MOST:
                raise ValueError(f"it has more than {_MOST:,} items of {collection}; a smaller area has fewer")
            found[sensor] = list(items.values())
    except (stac.exceptions.APIError, stac.errors.ClientTypeError, ValueError, OSError, *_ODD) as error:
        told = f"the STAC API cannot be asked: {public(str(error))[:300]}"
        raise FloodreproError(told, where=public(url), fix="try again, or --stac with its landing page") from error
    return found


def make_scene(
    items: Mapping[str, Sequence[Item]], area: Area, event: datetime, today: datetime, limits: Mapping[str, float]
) -> dict[str, Any]:
    """What scene.yaml says of event, sensors and terrain.

    *limits* are max_days that an event pass may come late, max_gap days between the two, and min_coverage, the least
    share of the area that a pass sees.

    Raises:
        NoPassYet: A sensor has not passed since the event.
        FloodreproError: It passed too late, sees too little, has no history, or the two lie too far apart.
    """
    scene: dict[str, Any] = {"event": f"{event:%Y-%m-%dT%H:%MZ}"}
    late, gap = limits["max_days"] * DAY, limits["max_gap"] * DAY
    for sensor, word in _WORDS.items():
        dual = [item for item in items[sensor] if sensor != "S1RTC" or {"vv", "vh"} <= set(item["assets"])]
        passes = _passes(dual, area, sensor)
        found = [p for p in passes if p["coverage"] >= limits["min_coverage"]]
        if not found:
            best = max((p["coverage"] for p in passes), default=0)
            told = f"covers {limits['min_coverage']:.0%} of the area (best {best:.0%}, {len(items[sensor])} items)"
            fix = f"cut the area, lower --min-coverage, or see that the server has {_COLLECTIONS[sensor]}"
            raise FloodreproError(f"no {word} pass {told}", fix=fix)
        if sensor == "S1RTC":
            chosen = _choose_orbit(found, event, late)
        else:
            chosen = _choose(found, sensor, event, _time(scene["S1RTC"]["event"]), late, gap)
        if not chosen:
            raise _too_late(sensor, found, event, today, late)
        if missing := [step for step in STEPS[:3] if not chosen[step]]:
            raise FloodreproError(f"no {word} pass for {', '.join(missing)}", fix="write scene.yaml by hand")
        scene[sensor] = _PIXELS[sensor] | {step: chosen[step] or {"missing": True} for step in STEPS}
    apart = abs(_time(scene["S1RTC"]["event"]) - _time(scene["S2L2A"]["event"])) / DAY
    if apart > limits["max_gap"]:
        told = f"the event passes of radar and optical are {apart:.1f} days apart (limit {limits['max_gap']:g})"
        raise FloodreproError(told, fix=f"--max-gap {apart + 1:.0f} if the water stood as long")
    terrain = _pass_of(items["DEM"], area, "DEM")
    return scene | ({"DEM": {"unit": "m", "files": terrain["files"]}} if terrain else {})


def _passes(items: Iterable[Item], area: Area, sensor: str) -> list[Pass]:
    """The passes over the area, oldest first: radar slices of one relative orbit, optical tiles of one morning."""
    # An hour holds the slices of a pass, six hours a morning's optical orbits; a UTC day would end within a pass
    # near 180 degrees.
    gap = timedelta(hours=1 if sensor == "S1RTC" else 6)
    groups: dict[int, list[list[Item]]] = {}
    for item in sorted(items, key=_sensed):
        of_orbit = groups.setdefault(item["properties"]["sat:relative_orbit"] if sensor == "S1RTC" else 0, [])
        if of_orbit and _sensed(item) - _sensed(of_orbit[-1][-1]) < gap:
            of_orbit[-1].append(item)
        else:
            of_orbit.append([item])
    found = [_pass_of(group, area, sensor) for of_orbit in groups.values() for group in of_orbit]
    return sorted((p for p in found if p), key=lambda p: p["time"])


def _pass_of(items: Iterable[Item], area: Area, sensor: str) -> Pass | None:
    """The pass that items are of; None if they see nothing of the area (a search asks with a simpler shape)."""

    def number(item: Item, name: str) -> float:
        value = float(item["properties"].get(name) or 0)
        return 0 if math.isnan(value) else value

    def order(item: Item) -> tuple[float, float, str]:
        """Least cloud first; of two processings of one scene the newer one."""
        return number(item, "eo:cloud_cover"), -number(item, "s2:processing_baseline"), item["id"]

    kept, seen, clear = [], shapely.Polygon(), 0.0
    for item in sorted(items, key=order):
        part = area.project(shape(item["geometry"])).intersection(area.whole)
        if part.area > 0:
            kept.append(item)
            clear += (1 - number(item, "eo:cloud_cover") / 100) * part.difference(seen).area
            seen = seen.union(part)
    if not kept:
        return None
    first = min(kept, key=_sensed)
    facts = first["properties"]
    found = {"time": f"{_sensed(first):%Y-%m-%dT%H:%M:%SZ}", "satellite": facts["platform"].upper()}
    found |= {"orbit": facts.get("sat:relative_orbit"), "direction": facts.get("sat:orbit_state")}
    found["coverage"] = round(min(seen.area / area.whole.area, 1), 3)
    if sensor == "S2L2A":
        found["cloud"] = round(100 * max(1 - clear / seen.area, 0), 1)
    return found | {"files": [_links(sensor, item) for item in kept]}


def _links(sensor: str, item: Item) -> dict[str, Any]:
    """One entry under `files`: the item, what its pixels need, and an unsigned link for each band."""
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else BANDS[sensor]
    if absent := [name for name in names if name not in item["assets"]]:
        fix = "use a STAC API with Planetary Computer's names"
        raise FloodreproError(f"{item['id']} has no asset {', '.join(absent)}", fix=fix)
    hrefs = {name: public(item["assets"][name]["href"]) for name in names}
    if local := [href for href in hrefs.values() if not href.startswith(("http://", "https://"))]:
        raise FloodreproError(f"{item['id']} lies at {local[0][:100]!r}, which is no web address", fix="another --stac")
    known = {"tile": "s2:mgrs_tile", "baseline": "s2:processing_baseline", "cloud": "eo:cloud_cover"}
    facts = {key: item["properties"][name] for key, name in known.items() if item["properties"].get(name) is not None}
    return {"item": item["id"], **facts} | hrefs


def _choose(
    found: Sequence[Pass], sensor: str, event: datetime, aim: datetime, late: timedelta, gap: timedelta
) -> dict[str, Pass | None] | None:
    """Four passes by step, or None where none came within *late* of the event; its pass is within *gap* of the aim.

    Each is the clearest in its window; of those within 5 points of the clearest, the one nearest to the aim (event),
    to the event (before), to 30 days before `before` (month_before), to the event pass (after).
    """

    def clearest(low: datetime, high: datetime, aim: datetime) -> Pass | None:
        there = [(p["coverage"] * (1 - p.get("cloud", 0) / 100), p) for p in found if low <= _time(p) < high]
        alike = [p for clear, p in there if clear >= max(share for share, _ in there) - _ALIKE]
        # Whole days, because 30 days lie half-way between two passes of a 12-day cycle: the earlier one then.
        return min(alike, key=lambda p: (round(abs(_time(p) - aim) / DAY), p["time"]), default=None)

    end, past = event + late, _WINDOW[sensor]
    this = clearest(max(event, aim - gap), min(end, aim + gap), aim) or clearest(event, end, aim)
    if this is None:
        return None
    before, month_before = clearest(event - past, event, event), None
    if before:
        month = _time(before) - 30 * DAY
        month_before = clearest(month - past, min(month + past, _time(before)), month)
    after = clearest(_time(this) + DAY / 4, _time(this) + past, _time(this))
    return {"month_before": month_before, "before": before, "event": this, "after": after}


def _choose_orbit(found: Sequence[Pass], event: datetime, late: timedelta) -> dict[str, Pass | None] | None:
    """Four radar passes of one relative orbit: of those that see most of the area, the one that came first."""

    def reach(plan: Mapping[str, Pass | None]) -> float:
        return min(float(p["coverage"]) for step, p in plan.items() if p and step != "after")

    orbits = [[p for p in found if p["orbit"] == orbit] for orbit in sorted({p["orbit"] for p in found})]
    plans = [plan for own in orbits if (plan := _choose(own, "S1RTC", event, event, late, late))]
    plans = [plan for plan in plans if plan["month_before"]] or plans  # one without history only where none has it
    near = [plan for plan in plans if reach(plan) >= max(map(reach, plans)) - _ALIKE]
    return min(near, key=lambda plan: plan["event"]["time"], default=None)  # type: ignore[index]


def _too_late(sensor: str, found: Sequence[Pass], event: datetime, today: datetime, late: timedelta) -> FloodreproError:
    """The error that says when the next pass is expected, or how late the first one came."""
    word, cycle, newest = _WORDS[sensor], _CYCLE[sensor], _time(found[-1])
    if newest >= event or today >= event + _LOOK_AHEAD:
        waits = [f"{(_time(p) - event) / DAY:.1f}" for p in found if _time(p) >= event] or ["more than 45"]
        told = f"the first {word} pass came {waits[0]} days after the event (limit {late / DAY:g})"
        return FloodreproError(told, fix="allow more with --max-days, if the water stood as long")
    due = []
    # A satellite repeats its orbits exactly; one that has not been seen for two cycles is taken to be gone.
    for (orbit, satellite), last in {(p["orbit"], p["satellite"]): _time(p) for p in found}.items():
        if newest - last <= 2 * cycle:
            first = max(1, math.ceil((event - last) / cycle))
            until = (max(event, today) + cycle - last) // cycle
            due += [(last + n * cycle, orbit, satellite) for n in range(first, until + 1)]
    time, orbit, satellite = min(d for d in due if d[0] >= today)
    told = f"no {word} pass since {event:%F} yet; next expected on {time:%F} (relative orbit {orbit}, {satellite})"
    if missed := [f"{time:%F}" for time, _, _ in sorted(due) if time < today]:
        told += f"; expected by now and not in the catalogue: {', '.join(missed)}"
    told += f"; newest over the area: {newest:%F}"
    return NoPassYet(told, fix="run it again a day or more after that date: a catalogue lags behind the satellites")


def _sensed(item: Item) -> datetime:
    """When an item was sensed (UTC)."""
    return datetime.fromisoformat(item["properties"]["datetime"]).astimezone(UTC)


def _time(p: Pass) -> datetime:
    return datetime.fromisoformat(p["time"])
