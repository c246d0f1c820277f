"""Write the scene of a flood: ask a STAC API and choose four passes of each sensor.

A pass is an entry of scene.yaml: `time` (UTC), `satellite`, relative `orbit`, `direction`, `coverage` (share of the
area inside the footprints, an upper bound of what the pixels cover), of the optical sensor `cloud` (percent of that, by
the figures of whole tiles), and `files`, least cloud first: the first valid pixel wins.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import shapely
import shapely.errors
from shapely.geometry import box, shape

from floodrepro.errors import FloodreproError, UsageError
from floodrepro.mapping.scene import BANDS, DEGREES, SCL, STEPS, in_one_piece, read_polygons, to_crs

DAY = timedelta(days=1)
CYCLE = {"S1RTC": 12 * DAY, "S2L2A": 10 * DAY}  # one satellite's exact repeat; a second one flies half-way between
ALIKE = 0.05  # a share of the area too small to be worth another orbit or day
PLANETARY_COMPUTER = "https://planetarycomputer.microsoft.com/api/stac/v1"
WORDS = {"S1RTC": "radar", "S2L2A": "optical"}
Item = dict[str, Any]
Pass = dict[str, Any]
_COLLECTIONS = {"S1RTC": "sentinel-1-rtc", "S2L2A": "sentinel-2-l2a", "DEM": "cop-dem-glo-30"}
# The borders of Planetary Computer's radar hold 0: microsoft/PlanetaryComputer#307, #493.
_PIXELS: dict[str, dict[str, Any]] = {"S1RTC": {"unit": "power", "nodata": [-32768, 0]}, "S2L2A": {"nodata": [0]}}
_LOOK_BACK, _LOOK_AHEAD = 90 * DAY, 45 * DAY  # what is searched: a month before `before`, and an `after`


class NoPassYet(FloodreproError):
    """No pass over the area since the event is in the catalogue: exit code 4."""

    exit_code = 4


class Area:
    """Where a flood is looked for.

    Args:
        source: A file of polygons, or a box (west, south, east, north) in degrees; across 180 its west is greater.

    Attributes:
        whole: All of it, in metres in a local equal-area projection.

    Raises:
        UsageError: The file cannot be read or holds no polygon, or the box is none.
    """

    def __init__(self, source: Path | Sequence[float]) -> None:
        if not isinstance(source, Path):
            west, south, east, north = source
            if not (-180 <= west <= 180 and -180 <= east <= 180 and west != east and -90 <= south < north <= 90):
                raise UsageError("the box is none", where=str(source), fix="west south east north, in degrees")
        self._parts = read_polygons(source) if isinstance(source, Path) else in_one_piece([box(*source)])
        west, south, east, north = shapely.total_bounds(self._parts)
        self._local = f"+proj=laea +lat_0={(south + north) / 2} +lon_0={(west + east) / 2} +datum=WGS84 +units=m"
        self.whole = shapely.union_all([self.project(part) for part in self._parts])
        if not self.whole.area > 0:
            raise UsageError("the area is empty", where=str(source))

    def project(self, geometry: Any) -> Any:
        """A geometry in metres; one split at 180, drawn around it or going beyond it all become the same."""
        return shapely.make_valid(to_crs(shapely.segmentize(in_one_piece(geometry), 0.1), DEGREES, self._local))

    def search_shape(self) -> Any:
        """A simple shape within ±180 degrees that the footprint of every item over the area intersects."""
        west, south, east, north = shapely.total_bounds(self._parts)
        if max(-west, east) < 170:
            return shapely.union_all(self._parts).convex_hull
        # Planetary Computer keeps a footprint across 180 in one piece that goes beyond ±180, where a search may not
        # reach (microsoft/PlanetaryComputer#296): ask on both sides of it, from wherever the area is.
        longitudes = shapely.get_coordinates(self._parts)[:, 0] % 360
        west, east = min(longitudes.min(), 179.99), max(longitudes.max() - 360, -179.99)
        return shapely.union_all([box(west, south, 180, north), box(-180, south, east, north)])


def search(url: str, area: Area, event: datetime, sensors: Iterable[str], backoff: float = 1) -> dict[str, list[Item]]:
    """Every item over the area, from 90 days before the event to 45 after it; terrain of any date.

    Raises:
        UsageError: This is no address of a server.
        FloodreproError: The server cannot be reached, keeps refusing, is no STAC API, or has other items.
    """
    shown = public(url)
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UsageError("this is no address of a STAC API", where=shown, fix="--stac https://…")
    try:
        import pystac_client as stac
        from urllib3 import Retry
    except ImportError as error:
        raise UsageError("map plan needs pystac-client", fix="pip install 'floodrepro[stac]'") from error
    # By default pystac-client does not repeat a POST: the first 429 or 504 would end the search (pystac-client#520).
    again = (429, 500, 502, 503, 504)
    retry = Retry(5, connect=2, backoff_factor=backoff, status_forcelist=again, allowed_methods=None)
    window = f"{event - _LOOK_BACK:%Y-%m-%dT%H:%M:%SZ}/{event + _LOOK_AHEAD:%Y-%m-%dT%H:%M:%SZ}"
    where, found = json.loads(shapely.to_geojson(area.search_shape())), {}
    try:
        client = stac.Client.open(url, stac_io=stac.stac_api_io.StacApiIO(max_retries=retry, timeout=60))
        for sensor in sensors:
            dates = None if sensor == "DEM" else window
            pages = client.search(collections=[_COLLECTIONS[sensor]], intersects=where, datetime=dates, limit=100)
            found[sensor] = list({_checked(item, sensor)["id"]: item for item in pages.items_as_dicts()}.values())
    except stac.exceptions.APIError as error:
        told = str(error)
        for secret in filter(None, (urlsplit(url).query, urlsplit(url).netloc.rpartition("@")[0])):
            told = told.replace(secret, "…")
        raise FloodreproError(f"the server did not answer: {told[:300]}", where=shown, fix="try again") from error
    except (stac.errors.ClientTypeError, ValueError) as error:
        fix = "--stac is the address of its landing page"
        told = str(error).replace(url, shown)
        raise FloodreproError(f"this is no STAC API: {told}", where=shown, fix=fix) from error
    return found


def public(link: str) -> str:
    """A link without user, password, query and fragment: signatures and tokens stand there."""
    parts = urlsplit(link)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _checked(item: Item, sensor: str) -> Item:
    """An item that says all that is read of it.

    Raises:
        FloodreproError: It does not.
    """
    try:
        str(item["id"]), _sensed(item), shape(item["geometry"]), _cloud(item), _baseline(item)
        item["properties"]["platform"].upper()
        if sensor == "S1RTC":
            int(item["properties"]["sat:relative_orbit"])
        [asset["href"] for asset in item["assets"].values()]
    except (KeyError, TypeError, ValueError, AttributeError, shapely.errors.ShapelyError) as error:
        fix, where = "use a STAC API with items as Planetary Computer has them", str(item.get("id"))
        raise FloodreproError(f"an item cannot be used: {error!r}", where=where, fix=fix) from error
    return item


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
    for sensor in [s for s in WORDS if s in items]:
        word, days = WORDS[sensor], limits[f"{WORDS[sensor]}_days"] * DAY
        dual = [item for item in items[sensor] if sensor != "S1RTC" or {"vv", "vh"} <= set(item["assets"])]
        passes = list_passes(dual, area, sensor)
        found = [p for p in passes if p["coverage"] >= limits["min_coverage"]]
        if not found:
            best = max((p["coverage"] for p in passes), default=0)
            told = f"covers {limits['min_coverage']:.0%} of the area (best {best:.0%}, {len(items[sensor])} items)"
            fix = f"cut the area, lower --min-coverage, or see that the server has {_COLLECTIONS[sensor]}"
            raise FloodreproError(f"no {word} pass {told}", fix=fix)
        if sensor == "S1RTC":
            chosen = _choose_orbit(found, event, days)
        else:
            aim = _time(scene["S1RTC"]["event"]) if "S1RTC" in scene else event
            chosen = choose(found, event, aim, days, days, limits["max_gap"] * DAY)
        if not chosen:
            raise _too_late(sensor, found, event, today, days)
        if missing := [step for step in STEPS[:3] if not chosen[step]]:
            raise FloodreproError(f"no {word} pass for {', '.join(missing)}", fix="--sensors leaves a sensor out")
        scene[sensor] = _PIXELS[sensor] | {step: chosen[step] or {"missing": True} for step in STEPS}
    times = [_time(scene[sensor]["event"]) for sensor in WORDS if sensor in scene]
    if (gap := (max(times) - min(times)) / DAY) > limits["max_gap"]:
        told = f"the event passes of radar and optical are {gap:.1f} days apart (limit {limits['max_gap']:g})"
        raise FloodreproError(told, fix=f"--max-gap {gap + 1:.0f} if the water stood as long, or --sensors S1RTC")
    terrain = make_pass(items["DEM"], area, "DEM")
    return scene | ({"DEM": {"unit": "m", "files": terrain["files"]}} if terrain else {})


def list_passes(items: Iterable[Item], area: Area, sensor: str) -> list[Pass]:
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
    found = [make_pass(group, area, sensor) for of_orbit in groups.values() for group in of_orbit]
    return sorted((p for p in found if p), key=lambda p: p["time"])


def make_pass(items: Iterable[Item], area: Area, sensor: str) -> Pass | None:
    """The pass that items are of; None if they see nothing of the area (a search asks with a simpler shape).

    Raises:
        FloodreproError: An item has not the assets that Planetary Computer's have.
    """

    def order(item: Item) -> tuple[float, float, str]:
        """Least cloud first; of two processings of one scene the newer one."""
        return _cloud(item), -_baseline(item), item["id"]

    kept, seen, clear = [], shapely.Polygon(), 0.0
    for item in sorted(items, key=order):
        part = area.project(shape(item["geometry"])).intersection(area.whole)
        if part.area > 0:
            kept.append(item)
            clear += (1 - order(item)[0] / 100) * part.difference(seen).area
            seen = seen.union(part)
    if not kept:
        return None
    first = min(kept, key=_sensed)["properties"]
    found = {"time": f"{_sensed({'properties': first}):%Y-%m-%dT%H:%M:%SZ}", "satellite": first["platform"].upper()}
    found |= {"orbit": first.get("sat:relative_orbit"), "direction": first.get("sat:orbit_state")}
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
    known = {"tile": "s2:mgrs_tile", "baseline": "s2:processing_baseline", "cloud": "eo:cloud_cover"}
    facts = {key: item["properties"][name] for key, name in known.items() if item["properties"].get(name) is not None}
    return {"item": item["id"], **facts} | {name: _link(item, name) for name in names}


def _link(item: Item, name: str) -> str:
    """The link of a band, whole and without signatures.

    Raises:
        FloodreproError: It does not lead to a server.
    """
    page = next((link["href"] for link in item.get("links", []) if link.get("rel") == "self"), "")
    link = public(urljoin(page, item["assets"][name]["href"]))
    if urlsplit(link).scheme not in ("http", "https", "s3"):
        raise FloodreproError(f"the link of {name} does not lead to a server: {link}", where=item["id"])
    return link


def choose(
    found: Sequence[Pass], event: datetime, aim: datetime, late: timedelta, past: timedelta, gap: timedelta
) -> dict[str, Pass | None] | None:
    """Four passes by step, or None where none came within *late* of the event.

    Each is the clearest in its window; of those within 5 points of the clearest, the one nearest to the aim (event),
    to the event (before), to 30 days before `before` (month_before), to the event pass (after). The event pass is
    within *gap* of the aim if one is; windows of the others are *past* long.
    """

    def clearest(low: datetime, high: datetime, aim: datetime) -> Pass | None:
        there = [(p["coverage"] * (1 - p.get("cloud", 0) / 100), p) for p in found if low <= _time(p) < high]
        alike = [p for clear, p in there if clear >= max(share for share, _ in there) - ALIKE]
        # Whole days, because 30 days lie half-way between two passes of a 12-day cycle: the earlier one then.
        return min(alike, key=lambda p: (round(abs(_time(p) - aim) / DAY), p["time"]), default=None)

    end = event + late
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
    plans = [plan for own in orbits if (plan := choose(own, event, event, late, _LOOK_AHEAD, late))]
    plans = [plan for plan in plans if plan["month_before"]] or plans  # one without history only where none has it
    near = [plan for plan in plans if reach(plan) >= max(map(reach, plans)) - ALIKE]
    return min(near, key=lambda plan: plan["event"]["time"], default=None)  # type: ignore[index]


def expected(found: Sequence[Pass], sensor: str, since: datetime, today: datetime) -> list[tuple[datetime, int, str]]:
    """Time, relative orbit and satellite of the passes that exact repeats predict, up to one cycle from today.

    A satellite that has not been seen here for two cycles is taken to be gone.
    """
    cycle, end = CYCLE[sensor], max(since, today) + CYCLE[sensor]
    due = []
    for (orbit, satellite), last in {(p["orbit"], p["satellite"]): _time(p) for p in found}.items():
        if _time(found[-1]) - last <= 2 * cycle:
            first = max(1, math.ceil((since - last) / cycle))
            due += [(last + n * cycle, orbit, satellite) for n in range(first, (end - last) // cycle + 1)]
    return sorted(due)


def _too_late(sensor: str, found: Sequence[Pass], event: datetime, today: datetime, late: timedelta) -> FloodreproError:
    """The error that says when the next pass is expected, or how late the first one came."""
    word = WORDS[sensor]
    if _time(found[-1]) >= event or today >= event + _LOOK_AHEAD:
        waits = [f"{(_time(p) - event) / DAY:.1f}" for p in found if _time(p) >= event] or ["more than 45"]
        told = f"the first {word} pass came {waits[0]} days after the event (limit {late / DAY:g})"
        return FloodreproError(told, fix=f"allow more with --{word}-days, if the water stood as long")
    due = expected(found, sensor, event, today)
    time, orbit, satellite = next(d for d in due if d[0] >= today)
    told = f"no {word} pass since {event:%F} yet; next expected on {time:%F} (relative orbit {orbit}, {satellite})"
    if missed := [f"{time:%F}" for time, _, _ in due if time < today]:
        told += f"; expected by now and not in the catalogue: {', '.join(missed)}"
    told += f"; newest over the area: {found[-1]['time'][:10]}"
    return NoPassYet(told, fix="run it again a day or more after that date: a catalogue lags behind the satellites")


def _sensed(item: Item) -> datetime:
    """When an item was sensed (UTC)."""
    return datetime.fromisoformat(item["properties"]["datetime"]).astimezone(UTC)


def _cloud(item: Item) -> float:
    """Percent of an item under cloud; 0 where it does not say."""
    return float(item["properties"].get("eo:cloud_cover") or 0)


def _baseline(item: Item) -> float:
    """The processing baseline of an item; 0 where it does not say."""
    return float(item["properties"].get("s2:processing_baseline") or 0)


def _time(p: Pass) -> datetime:
    return datetime.fromisoformat(p["time"])
