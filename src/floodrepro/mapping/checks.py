"""What can be wrong with a scene, looked at before the model runs: one line for each problem."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
from rasterio.coords import disjoint_bounds
from rasterio.transform import array_bounds
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from floodrepro.console import public
from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.mapping.reader import read_source
from floodrepro.mapping.scene import BANDS, EVENT_STEP, Acquisition, Array, Bands, Grid, Scene, opened

_WINDOW, _ALONG = 256, 3  # pixels of a window of the sample, and windows along each side
_FEW = 1000  # pixels: of fewer, speckle decides
# Gamma naught of land and water in VV: the data set's mean is -10 dB, calm water -25, cities above 0.
_DB = (-32.0, 4.0)
_NO_RADAR = (-60.0, 1e6)  # what lies outside is neither dB nor linear power
_OFFSET = 1000  # baseline 04.00 of Sentinel-2 adds it (microsoft/PlanetaryComputer#134)


def list_problems(scene: Scene, max_gap: float) -> list[str]:
    """All problems of a scene: dates, orbits, and what a sample of windows says of units, orders and offsets.

    The event passes of radar and optical may lie *max_gap* days apart.
    """
    problems = list(_dates(scene, max_gap))
    for a in scene.acquisitions.values():
        if all(_lies_outside(bands, scene) for bands, _ in a.sources):
            problems.append(f"{a.name}: its files do not reach into the area")
        for bands, offset in a.sources:
            if problem := _bands(a, bands) or _values(a, bands, offset, scene):
                problems.append(f"{a.name}: {public(problem)}")
    return problems


def _dates(scene: Scene, max_gap: float) -> Iterator[str]:
    timed = [a for a in scene.acquisitions.values() if a.time]
    for a, b in itertools.pairwise(timed):  # by sensor, each in order of steps
        if a.sensor == b.sensor and a.time >= b.time:
            yield f"{a.name} ({a.time:%F}) is not before {b.name} ({b.time:%F}): are the dates swapped?"
    radar, optical = (scene.acquisitions.get((sensor, EVENT_STEP)) for sensor in ("S1RTC", "S2L2A"))
    before = scene.acquisitions.get(("S1RTC", EVENT_STEP - 1))
    was, now = (a.said.get("orbit") if a else None for a in (before, radar))
    if was and now and was != now:
        yield f"S1RTC: orbit {was} before and {now} at the event: what changed may be the view alone"
    if radar and optical and (gap := abs((radar.time - optical.time).total_seconds()) / 86_400) > max_gap:
        yield f"the event passes of radar and optical are {gap:.1f} days apart (limit {max_gap:g}, --max-gap)"


def _lies_outside(bands: Bands, scene: Scene) -> bool:
    with opened(next(iter(bands.values()))[0]) as raster:
        there = transform_bounds(raster.crs, scene.crs, *raster.bounds)
    return bool(disjoint_bounds(there, array_bounds(scene.height, scene.width, scene.transform)))


def _bands(a: Acquisition, bands: Bands) -> str | None:
    """Whether each raster has the bands that it is said to have, by number and, where it tells them, name and unit."""
    for place in dict.fromkeys(place for place, _ in bands.values()):
        listed = {name: number for name, (where, number) in bands.items() if where == place}
        with opened(place) as raster:
            if raster.count != max(listed.values()):
                return f"{place} has {raster.count} bands, {max(listed.values())} are named ({', '.join(listed)})"
            for name, number in listed.items():
                said = (raster.descriptions[number - 1] or "").lower()
                if said in (band.lower() for band in BANDS[a.sensor]) and said != name.lower():
                    return f"band {number} of {place} calls itself {said}, and is taken for {name}"
            unit = raster.units[0] or "m"
            if a.sensor == "DEM" and not re.fullmatch("m|met(er|re)s?", unit, re.IGNORECASE):
                return f"{place} says that its heights are in {unit}: convert them to metres"
    return None


def _values(a: Acquisition, bands: Bands, offset: float | None, grid: Grid) -> str | None:
    """What windows spread over the grid say, by pixels (C, N) in the file's unit that miss no band."""
    width, height = min(_WINDOW, grid.width), min(_WINDOW, grid.height)
    columns, rows = np.linspace(0, (grid.width - width, grid.height - height), _ALONG, dtype=int).T
    windows = [Window(column, row, width, height) for row in np.unique(rows) for column in np.unique(columns)]
    parts = [read_source(a, bands, BANDS[a.sensor], grid, window) for window in windows]
    values = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.shape[1] < _FEW:
        return None  # it may see a corner only; the shares of map.json tell
    if a.sensor == "S1RTC":
        return _radar(values, a.said["unit"])
    if a.sensor == "S2L2A":
        return _optical(values, offset)
    lowest, highest = values.min(), values.max()
    return f"heights from {lowest:.0f} to {highest:.0f} are no metres" if lowest < -500 or highest > 9000 else None


def _radar(values: Array, unit: str) -> str | None:
    strange = (values < _NO_RADAR[0]) | (values > _NO_RADAR[1])
    if (share := strange.any(axis=0).mean()) > 0.001:  # less may be speckle
        odd = values[strange]
        return f"{share:.1%} of the pixels are no radar (such as {odd[abs(odd).argmax()]:g}): say 'nodata: [...]'"
    middle = float(np.median(values[0]))
    is_db = _DB[0] < middle < _DB[1] and (values < 0).mean() > 0.5
    is_power = (values >= 0).all() and _DB[0] < 10 * np.log10(max(middle, 1e-9)) < _DB[1]
    if not (is_power if unit == "power" else is_db):
        looks = "dB" if is_db else "linear power" if is_power else "neither dB nor linear power"
        return f"the unit is said to be {unit}, and the values look like {looks} (median of VV {middle:.4g})"
    if (values[1] > values[0]).mean() > 0.5:
        return f"{S1_BANDS[1]} is stronger than {S1_BANDS[0]} in most pixels: are the two swapped?"
    return None


def _optical(values: Array, offset: float | None) -> str | None:
    lowest = np.quantile(values, 0.01)
    if not 20 < np.quantile(values, 0.99) <= 30_000:  # clouds and snow reach 20,000
        return f"values up to {values.max():.4g} are no reflectance x 10,000"
    if offset is None and lowest > 0.9 * _OFFSET:
        fix = f"say 'offset: -{_OFFSET}' (baseline 04.00 and later) or 'offset: 0'"
        return f"neither offset nor baseline is given, and the darkest pixels have {lowest:.0f}: {fix}"
    values = values + (offset or 0)
    if offset and (below := (values < 0).mean()) > 0.2:
        return f"an offset of {offset:g} leaves {below:.0%} of the values below 0: was it taken off already?"
    level = {name: max(np.median(values[S2_BANDS.index(name)]), 1) for name in ("B07", "B08", "B8A")}
    for name in ("B08", "B07"):
        if abs(np.log(level["B8A"] / level[name])) > 0.4:
            return f"B8A and {name}, neighbours in the spectrum, differ by half: is the order of bands {S2_BANDS}?"
    return None
