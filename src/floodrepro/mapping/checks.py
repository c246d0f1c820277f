"""What can be wrong with a scene, looked at before the model runs: one line for each problem."""

import itertools
from collections.abc import Sequence

import numpy as np
from rasterio.windows import Window

from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.mapping.reader import gdal, read_source, source_offset
from floodrepro.mapping.scene import BANDS, EVENT_STEP, STEPS, Acquisition, Scene, Source, opened
from floodrepro.mapping.tiles import Array

_WINDOW, _ALONG = 256, 3  # pixels of a window of the sample, and windows along each side
# Gamma naught of land and water in VV: the data set's mean is -10 dB, calm water -25, cities above 0.
_DB = (-32.0, 4.0)
_OFFSET = 1000  # baseline 04.00 of Sentinel-2 adds it (microsoft/PlanetaryComputer#134)
_DAY = 86_400


def list_missing(scene: Scene, modalities: Sequence[str], steps: Sequence[int]) -> list[str]:
    """Names of the dates and sensors that the model looks at and the scene does not have."""
    wanted = [(m, step) for m in modalities for step in ([0] if m == "DEM" else steps)]
    return ["DEM" if m == "DEM" else f"{m}.{STEPS[s]}" for m, s in wanted if (m, s) not in scene.acquisitions]


def list_problems(scene: Scene, max_gap: float) -> list[str]:
    """All problems of a scene: dates, orbits, and what a sample of windows says of units, orders and offsets.

    Args:
        scene: What is looked at.
        max_gap: Days that the event passes of radar and optical may lie apart.

    Raises:
        DataError: A file cannot be read.
    """
    problems = _dates(scene, max_gap)
    for acquisition in scene.acquisitions.values():
        for source in acquisition.sources:
            if problem := _bands(scene, acquisition, source) or _values(scene, acquisition, source):
                problems.append(f"{acquisition.name}: {problem}")
    return problems


def _dates(scene: Scene, max_gap: float) -> list[str]:
    problems = []
    events = {}
    for sensor in ("S1RTC", "S2L2A"):
        found = [scene.acquisitions[sensor, step] for step in range(len(STEPS)) if (sensor, step) in scene.acquisitions]
        times = [(a.time, a) for a in found if a.time]
        problems += [
            f"{a.name} ({earlier:%Y-%m-%d}) is not before {b.name} ({later:%Y-%m-%d}): are the dates swapped?"
            for (earlier, a), (later, b) in itertools.pairwise(times)
            if earlier >= later
        ]
        for time, a in times:
            if scene.event and (time < scene.event) != (a.step < EVENT_STEP):
                problems.append(
                    f"{a.name} ({time:%Y-%m-%d}) is on the wrong side of the event ({scene.event:%Y-%m-%d})"
                )
            if a.step == EVENT_STEP:
                events[sensor] = time
        views = {a.step: [a.facts.get("orbit"), a.facts.get("direction")] for a in found}
        before, event = views.get(EVENT_STEP - 1, []), views.get(EVENT_STEP, [])
        if sensor == "S1RTC" and any(b and e and b != e for b, e in zip(before, event, strict=False)):
            one, other = (" ".join(str(part) for part in view if part) for view in (before, event))
            problems.append(f"S1RTC: orbit {one} before and {other} at the event: what changed may be the view alone")
    if len(events) == 2 and (gap := abs((events["S1RTC"] - events["S2L2A"]).total_seconds()) / _DAY) > max_gap:
        problems.append(
            f"the event passes of radar and optical are {gap:.1f} days apart (limit {max_gap:g}, --max-gap)"
        )
    return problems


def _bands(scene: Scene, acquisition: Acquisition, source: Source) -> str | None:
    """Whether each raster has the bands that it is said to have, by number and, where it names them, by name."""
    for place in dict.fromkeys(place for place, _ in source.bands.values()):
        listed = {name: number for name, (where, number) in source.bands.items() if where == place}
        with gdal(), opened(place, sign=scene.sign) as raster:
            if raster.count != max(listed.values()):
                return f"{place} has {raster.count} bands, {max(listed.values())} are named ({', '.join(listed)})"
            names = {name.lower() for name in BANDS[acquisition.sensor]}
            for name, number in listed.items():
                said = (raster.descriptions[number - 1] or "").lower()
                if said in names and said != name.lower():
                    return f"band {number} of {place} calls itself {said}, and is taken for {name}"
    return None


def _sample(scene: Scene, sensor: str, source: Source) -> Array:
    """Values (C, pixels) in the file's unit of windows spread over the grid, without pixels that miss a band."""
    grid, parts = scene.grid, []
    for row in np.unique(np.linspace(0, max(grid.height - _WINDOW, 0), _ALONG).astype(int)):
        for column in np.unique(np.linspace(0, max(grid.width - _WINDOW, 0), _ALONG).astype(int)):
            window = Window(column, row, min(_WINDOW, grid.width), min(_WINDOW, grid.height))
            with gdal():
                parts.append(read_source(scene, sensor, source, BANDS[sensor], window).reshape(len(BANDS[sensor]), -1))
    values = np.concatenate(parts, axis=1)
    return values[:, ~np.isnan(values).any(axis=0)]


def _values(scene: Scene, acquisition: Acquisition, source: Source) -> str | None:
    values = _sample(scene, acquisition.sensor, source)
    if not values.size:
        return None  # it may see a corner only; the shares of map.json tell
    check = {"S1RTC": _radar, "S2L2A": _optical, "DEM": _terrain}[acquisition.sensor]
    return check(values, scene.units[acquisition.sensor], source)


def _radar(values: Array, unit: str, source: Source) -> str | None:
    middle = float(np.median(values[0]))
    is_db = _DB[0] < middle < _DB[1] and (values < 0).mean() > 0.5
    is_power = (values >= 0).all() and _DB[0] < 10 * np.log10(max(middle, 1e-9)) < _DB[1]
    if not (is_power if unit == "power" else is_db):
        looks = "dB" if is_db else "linear power" if is_power else "neither dB nor linear power"
        return f"the unit is said to be {unit}, and the values look like {looks} (median of VV {middle:.4g})"
    if (values[1] > values[0]).mean() > 0.5:
        return f"{S1_BANDS[1]} is stronger than {S1_BANDS[0]} in most pixels: are the two swapped?"
    return None


def _optical(values: Array, unit: str, source: Source) -> str | None:
    lowest = float(np.quantile(values, 0.01))
    if np.quantile(values, 0.99) <= 20:
        return f"values up to {values.max():.4g} are no reflectance x 10,000"
    if not {"offset", "baseline"} & source.facts.keys() and lowest > 0.9 * _OFFSET:
        return (
            f"neither offset nor baseline is given, and the darkest pixels have {lowest:.0f}: "
            f"say 'offset: -{_OFFSET}' (baseline 04.00 and later) or 'offset: 0'"
        )
    offset = source_offset(source)
    if offset < 0 and (below := (values + offset < 0).mean()) > 0.2:
        return f"an offset of {offset:g} leaves {below:.0%} of the values below 0: was it taken off already?"
    red_edge, near, narrow = (values[S2_BANDS.index(name)] + offset for name in ("B07", "B08", "B8A"))
    for name, other in (("B08", near), ("B07", red_edge)):
        if abs(np.log(max(np.median(narrow), 1) / max(np.median(other), 1))) > 0.4:
            return (
                f"B8A and {name}, neighbours in the spectrum, differ by half: are the bands in the order of {S2_BANDS}?"
            )
    return None


def _terrain(values: Array, unit: str, source: Source) -> str | None:
    lowest, highest = float(values.min()), float(values.max())
    if lowest < -500 or highest > 9000:
        return f"heights from {lowest:.0f} to {highest:.0f} are no metres"
    return None
