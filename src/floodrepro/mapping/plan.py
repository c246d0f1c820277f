"""Write the scene of a flood: ask a STAC API and choose four passes of each sensor.

A pass is a step of scene.yaml: `days` are counted from the event, `coverage` is the share of the area inside the
footprints (in degrees; what the pixels cover may be less), `cloud` percent of that by the figures of whole tiles;
`files` are listed least cloud first. An area is an array of polygons in degrees.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import shapely
from shapely.geometry import shape

from floodrepro.console import public
from floodrepro.data.protocols import STEPS
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.mapping.scene import LAYERS

DAY = timedelta(days=1)
Item = dict[str, Any]
Pass = dict[str, Any]
_CYCLE = {"S1RTC": 12, "S2L2A": 10}  # days of one satellite's exact repeat; a second one flies half-way between
_ALIKE = 0.05  # a share of the area too small to be worth another orbit or day
_WORDS = {"S1RTC": "radar", "S2L2A": "optical"}
_COLLECTIONS = {"S1RTC": "sentinel-1-rtc", "S2L2A": "sentinel-2-l2a", "DEM": "cop-dem-glo-30"}
# The borders of Planetary Computer's radar hold 0: microsoft/PlanetaryComputer#307, #493.
_PIXELS: dict[str, dict[str, Any]] = {"S1RTC": {"unit": "power", "nodata": [-32768, 0]}, "S2L2A": {"nodata": [0]}}
_LOOK_BACK, _LOOK_AHEAD = 90, 45  # days that are searched: a month before `before`, and an `after`
_WINDOW = {"S1RTC": _LOOK_AHEAD, "S2L2A": 15}  # days: how far the other dates may lie from what they are to be near
_MOST = 10_000  # items of a sensor
_ODD = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what comes of an answer that is no STAC
_BACKOFF = 1  # second, doubled from one attempt to the next


class NoPassYet(FloodreproError):
    """No pass over the area since the event is in the catalogue: exit code 4."""

    exit_code = 4


def search(url: str, area: Any, event: datetime) -> dict[str, list[Item]]:
    """Every item over the area by sensor, from 90 days before the event to 45 after it; terrain of any date.

    Raises `FloodreproError` where the server cannot be reached, keeps refusing, or is no STAC API.
    """
    try:
        import pystac_client as stac
        from urllib3 import Retry
    except ImportError as error:
        raise UsageError("map plan needs pystac-client", fix="pip install 'floodrepro[stac]'") from error
    # By default pystac-client does not repeat a POST: the first 429 or 504 would end the search (pystac-client#520).
    again = (429, 500, 502, 503, 504)
    retry = Retry(5, connect=2, backoff_factor=_BACKOFF, status_forcelist=again, allowed_methods=None)
    window = (event - _LOOK_BACK * DAY, event + _LOOK_AHEAD * DAY)
    where, found = json.loads(shapely.to_geojson(shapely.union_all(area).convex_hull)), dict[str, list[Item]]()
    try:
        client = stac.Client.open(url, stac_io=stac.stac_api_io.StacApiIO(max_retries=retry, timeout=60))
        for sensor, collection in _COLLECTIONS.items():
            about = {"collections": [collection], "intersects": where, "datetime": None if sensor == "DEM" else window}
            items: dict[str, Item] = {}
            for n, item in enumerate(client.search(**about, limit=100, max_items=_MOST).items_as_dicts(), 1):
                items[item["id"]] = item
                if n == _MOST or n > 2 * len(items) + 100:  # a server may give the same page without end
                    raise ValueError(f"it has {_MOST:,} items of {collection} or more, or repeats them; cut the area")
            found[sensor] = list(items.values())
    except (stac.exceptions.APIError, stac.errors.ClientTypeError, OSError, *_ODD) as error:
        told = f"the STAC API cannot be asked: {public(str(error))[:300]}"
        raise FloodreproError(told, where=public(url), fix="try again, or --stac with its landing page") from error
    return found


def make_scene(
    items: Mapping[str, Sequence[Item]], area: Any, event: datetime, today: datetime, limits: Mapping[str, float]
) -> dict[str, Any]:
    """What scene.yaml says of event, sensors and terrain.

    *limits* are max_days that an event pass may come late, max_gap days between the two where there is a choice, and
    min_coverage, the least share of the area that a pass sees. Raises `NoPassYet` where a sensor has not passed since
    the event, and `FloodreproError` where it passed too late, sees too little, or has no history.
    """
    scene: dict[str, Any] = {"event": f"{event:%Y-%m-%dT%H:%MZ}"}
    aim, near = 0.0, limits["max_days"]  # the radar pass that comes first, and the optical one nearest to it
    for sensor, word in _WORDS.items():
        passes = _passes(items[sensor], area, sensor, event)
        found = [p for p in passes if p["coverage"] >= limits["min_coverage"]]
        if not found:
            best = max((p["coverage"] for p in passes), default=0)
            told = f"covers {limits['min_coverage']:.0%} of the area (best {best:.0%}, {len(items[sensor])} items)"
            fix = f"cut the area, lower --min-coverage, or see that the server has {_COLLECTIONS[sensor]}"
            raise FloodreproError(f"no {word} pass {told}", fix=fix)
        if not (chosen := _choose(found, sensor, limits["max_days"], aim, near)):
            raise _too_late(sensor, found, event, (today - event) / DAY, limits["max_days"])
        if missing := [step for step in STEPS[:3] if not chosen[step]]:
            raise FloodreproError(f"no {word} pass for {', '.join(missing)}", fix="write scene.yaml by hand")
        scene[sensor] = _PIXELS[sensor] | {step: chosen[step] or {"missing": True} for step in STEPS}
        aim, near = scene["S1RTC"]["event"]["days"], limits["max_gap"]
    terrain = _pass_of(items["DEM"], area, "DEM", event)
    return scene | ({"DEM": {"unit": "m", "files": terrain["files"]}} if terrain else {})


def _passes(items: Sequence[Item], area: Any, sensor: str, event: datetime) -> list[Pass]:
    """The passes over the area, oldest first: radar slices of one relative orbit, optical tiles of one morning."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        if sensor == "S2L2A" or {"vv", "vh"} <= item["assets"].keys():
            # A day of local solar time: no pass crosses its midnight, as near 180 degrees it may cross that of UTC.
            day = (_sensed(item) + shapely.total_bounds(area)[0] / 360 * DAY).date()
            orbit = int(item["properties"]["sat:relative_orbit"]) if sensor == "S1RTC" else None
            groups.setdefault((day, orbit), []).append(item)
    found = [_pass_of(group, area, sensor, event) for group in groups.values()]
    return sorted((p for p in found if p), key=lambda p: p["time"])


def _pass_of(items: Sequence[Item], area: Any, sensor: str, event: datetime) -> Pass | None:
    """The pass that items are of; None if they see nothing of the area (a search asks with a simpler shape)."""
    whole, kept, seen, clear = shapely.union_all(area), list[Item](), shapely.Polygon(), 0.0
    newest = sorted(items, key=lambda item: (item["properties"].get("s2:processing_baseline", ""), item["id"]))[::-1]
    for item in sorted(newest, key=_cloud):  # of two processings of one scene the newer one
        part = shapely.make_valid(shape(item["geometry"])).intersection(whole)
        if part.area > 0:
            kept.append(item)
            clear += (1 - _cloud(item) / 100) * part.difference(seen).area
            seen = seen.union(part)
    if not kept:
        return None
    first = min(kept, key=_sensed)
    facts = first["properties"]
    found = {"time": f"{_sensed(first):%Y-%m-%dT%H:%M:%SZ}", "days": round((_sensed(first) - event) / DAY, 3)}
    found |= {"satellite": facts["platform"].upper(), "orbit": facts.get("sat:relative_orbit")}
    found["coverage"] = round(min(seen.area / whole.area, 1), 3)
    if sensor == "S2L2A":
        found["cloud"] = round(100 * max(1 - clear / seen.area, 0), 1)
    return found | {"files": [_links(sensor, item) for item in kept]}


def _links(sensor: str, item: Item) -> dict[str, Any]:
    """One entry under `files`: the item, what its pixels need, and an unsigned link for each band."""
    known = {"tile": "s2:mgrs_tile", "baseline": "s2:processing_baseline", "cloud": "eo:cloud_cover"}
    facts = {key: item["properties"][name] for key, name in known.items() if item["properties"].get(name) is not None}
    hrefs = {name: public(item["assets"][name]["href"]) for name in LAYERS[sensor]}
    if local := [href for href in hrefs.values() if not href.startswith(("http://", "https://"))]:
        raise FloodreproError(f"{item['id']} lies at {local[0][:100]!r}, which is no web address", fix="another --stac")
    return {"item": item["id"], **facts} | hrefs


def _choose(found: Sequence[Pass], sensor: str, late: float, aim: float, near: float) -> dict[str, Any] | None:
    """Four passes by step, or None where none came within *late* of the event; if one can be, it is *near* the aim.

    Each is the clearest in its window; of those within 5 points of the clearest, the one nearest to the aim (event),
    to the event (before), to 30 days before `before` (month_before), to the event pass (after). Those of the radar are
    of one relative orbit: of the orbits that see most of the area, the one that came first.
    """

    def clearest(own: Sequence[Pass], low: float, high: float, aim: float) -> Pass | None:
        clear = [(p["coverage"] * (1 - p.get("cloud", 0) / 100), p) for p in own if low <= p["days"] < high]
        alike = [p for share, p in clear if share >= max(share for share, _ in clear) - _ALIKE]
        # Whole days, because 30 days lie half-way between two passes of a 12-day cycle: the earlier one then.
        return min(alike, key=lambda p: (round(abs(p["days"] - aim)), p["days"]), default=None)

    window, plans = _WINDOW[sensor], list[dict[str, Any]]()
    for orbit in sorted({p["orbit"] for p in found}) if sensor == "S1RTC" else [None]:
        own = [p for p in found if orbit in (None, p["orbit"])]
        this = clearest(own, max(0, aim - near), min(late, aim + near), aim) or clearest(own, 0, late, aim)
        if this:
            before = clearest(own, -window, 0, 0)
            latest = (before or this)["days"]
            month_before = clearest(own, latest - 30 - window, min(latest - 30 + window, latest), latest - 30)
            after = clearest(own, this["days"] + 0.25, this["days"] + window, this["days"])
            plans.append({"month_before": month_before, "before": before, "event": this, "after": after})
    plans = [plan for plan in plans if plan["month_before"]] or plans  # one without history only where none has it
    reach = [min(p["coverage"] for step, p in plan.items() if p and step != "after") for plan in plans]
    near_best = [plan for plan, share in zip(plans, reach, strict=True) if share >= max(reach) - _ALIKE]
    return min(near_best, key=lambda plan: plan["event"]["days"], default=None)


def _too_late(sensor: str, found: Sequence[Pass], event: datetime, today: float, late: float) -> FloodreproError:
    """The error that says when the next pass is expected, or how late the first one came; *today* in days after it."""
    word, cycle, newest = _WORDS[sensor], _CYCLE[sensor], found[-1]["days"]
    if newest >= 0 or today >= _LOOK_AHEAD:
        waits = [f"{p['days']:.1f}" for p in found if p["days"] >= 0] or [f"more than {_LOOK_AHEAD}"]
        told = f"the first {word} pass came {waits[0]} days after the event (limit {late:g})"
        return FloodreproError(told, fix="allow more with --max-days, if the water stood as long")
    # A satellite repeats its orbits exactly; one that has not been seen for two cycles is taken to be gone.
    latest = {(p["orbit"], p["satellite"]): p["days"] for p in found if p["days"] >= newest - 2 * cycle}
    due = sorted((last + n * cycle, *which) for which, last in latest.items() for n in range(1, 15))
    day, orbit, satellite = next(passage for passage in due if passage[0] >= max(today, 0))
    told = f"no {word} pass since {event:%F} yet; next expected on {event + day * DAY:%F}"
    told += f" (relative orbit {orbit}, {satellite})"
    if missed := [f"{event + day * DAY:%F}" for day, _, _ in due if 0 <= day < today]:
        told += f"; expected by now and not in the catalogue: {', '.join(missed)}"
    told += f"; newest over the area: {event + newest * DAY:%F}"
    return NoPassYet(told, fix="run it again a day or more after that date: a catalogue lags behind the satellites")


def _sensed(item: Item) -> datetime:
    return datetime.fromisoformat(item["properties"]["datetime"]).astimezone(UTC)


def _cloud(item: Item) -> float:
    percent = float(item["properties"].get("eo:cloud_cover") or 0)
    return percent if 0 <= percent <= 100 else 0.0  # NaN is not known either
