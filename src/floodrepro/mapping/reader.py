"""Read a scene in fixed blocks of its grid, each once, in a pool of threads; find what is wrong with it in a sample.

GDAL approximates the transform within each call, so that a value would depend on the window that asks: the blocks are
fixed, and tiles are cut out of them. A WarpedVRT would warp whole blocks of all bands for each band that is read.
Blocks hold what a chip of the data set holds: int16 reflectance x 10,000, float16 dB, int16 metres.

T = timesteps, C = bands, H, W = rows and columns of a window or block.
"""

import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio import Affine, DatasetReader, windows
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import geometry_mask
from rasterio.warp import Resampling, reproject, transform_bounds
from rasterio.windows import Window

from floodrepro.console import public
from floodrepro.data.protocols import BEFORE, EVENT, IGNORE_INDEX, NO_DATA, S1_BANDS, S2_BANDS
from floodrepro.errors import DataError, UsageError
from floodrepro.mapping import scene as scenes
from floodrepro.mapping.scene import BANDS, DEGREES, SCL, Acquisition, Array, Bands, Grid, Scene

RESAMPLING = {"S2L2A": "bilinear", "S1RTC": "bilinear", "DEM": "bilinear", SCL: "nearest"}  # radar: in the file's unit
_NAMES = ("no radar at the event", "no optical at the event", "cloud", "cloud shadow", "snow", "no elevation")
QUALITY = {name: 1 << bit for bit, name in enumerate([*_NAMES, "outside the area", "another date missing"])}
NO_RADAR, NO_OPTICAL, CLOUD, SHADOW, SNOW, NO_ELEVATION, OUTSIDE, NO_OTHER = QUALITY.values()
# Sen2Cor's classes: Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD, table of SCL values.
_SCL_BITS = np.zeros(256, np.uint8)
_SCL_BITS[[8, 9, 10]], _SCL_BITS[3], _SCL_BITS[11] = CLOUD, SHADOW, SNOW
# GDAL says so of the arrays in memory that rasterio 1.4 hands to it.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
Water = Callable[[Window], Array]
_MISSING = {"S1RTC": NO_RADAR, "S2L2A": NO_OPTICAL, "DEM": NO_ELEVATION}
_GAP = {"S1RTC": np.float16(np.nan), "S2L2A": np.int16(NO_DATA), "DEM": np.int16(NO_DATA)}  # a missing chip value
_COLUMNS, _THREADS = 1024, 8  # of a block; a thread holds about 70 MB
_BUDGET = 1.25 * 2**30  # bytes of blocks that are held at once
# Of the sample: pixels of a window, windows along each side, and so many pixels that speckle does not decide.
_WINDOW, _ALONG, _FEW = 256, 3, 1000
# Gamma naught of land and water in VV: the data set's mean is -10 dB, calm water -25, cities above 0.
_DB = (-32.0, 4.0)
_NO_RADAR = (-60.0, 1e6)  # what lies outside is neither dB nor linear power
_PRODUCT = re.compile(r"\b(?:S[12][A-D]|T\d\d[A-Z]{3})[_-]\S*?(20\d{6}T\d{6})", re.IGNORECASE)  # sensing comes first
_OFFSET = 1000  # baseline 04.00 of Sentinel-2 adds it (microsoft/PlanetaryComputer#134)


def read_window(
    raster: DatasetReader, numbers: Sequence[int], grid: Grid, window: Window, no_data: Sequence[float], method: str
) -> Array:
    """Bands of a raster in a window of the grid, (C, H, W) float32 in the file's unit, NaN where there is none."""
    height, width = int(window.height), int(window.width)
    out = np.full((len(numbers), height, width), np.nan, np.float32)
    bounds = transform_bounds(grid.crs, raster.crs, *windows.bounds(window, grid.transform), densify_pts=21)
    corners = np.array([~raster.transform * (x, y) for x in bounds[::2] for y in bounds[1::2]])
    if not np.isfinite(corners).all():  # so far from the raster that its CRS has no such place
        return out
    low, high = corners.min(axis=0), corners.max(axis=0)  # (column, row), whichever way the raster is turned
    # Pixels around the window: a kernel looks two away, in the coarser of the two grids.
    margin = 3 + math.ceil(2 * max(*(high - low) / (width, height), 1))
    first = np.clip(low - margin, 0, raster.shape[::-1]).astype(int).tolist()
    last = np.clip(high + margin, 0, raster.shape[::-1]).astype(int).tolist()
    part = Window.from_slices((first[1], last[1]), (first[0], last[0]))
    if not part.height or not part.width:
        return out
    declared = {value for value in raster.nodatavals if value is not None}
    # Pixels of less than a quarter of the grid's are joined as they are read, by what knows the file's no-data alone.
    step = max(1, int(min(part.height / height, part.width / width) // 2))
    join = "average" if method != "nearest" and declared.issuperset(no_data) else "nearest"
    shape = len(numbers), math.ceil(part.height / step), math.ceil(part.width / step)
    values = raster.read(list(numbers), window=part, out_shape=shape, resampling=Resampling[join]).astype(np.float32)
    values[np.isinf(values) | np.isin(values, np.array([*declared, *no_data], np.float32))] = np.nan
    scale = Affine.scale(part.width / shape[2], part.height / shape[1])
    places = {"src_transform": windows.transform(part, raster.transform) * scale, "src_crs": raster.crs}
    places |= {"dst_transform": windows.transform(window, grid.transform), "dst_crs": grid.crs}
    # Without a gap the values are the same bit for bit, in three fifths of the time.
    gap = np.nan if np.isnan(values).any() else None
    places |= {"src_nodata": gap, "dst_nodata": gap, "init_dest_nodata": gap is not None}
    reproject(values, out, resampling=Resampling[method], **places)
    return out


def read_source(a: Acquisition, bands: Bands, names: Sequence[str], grid: Grid, window: Window) -> Array:
    """Named bands of one source of an acquisition, (C, H, W) float32 in the file's unit; each file is opened once."""
    out = np.empty((len(names), int(window.height), int(window.width)), np.float32)
    method = RESAMPLING[SCL if SCL in names else a.sensor]
    for place in {bands[name][0] for name in names}:
        mine = {i: bands[name][1] for i, name in enumerate(names) if bands[name][0] == place}
        with scenes.opened(place) as raster:
            out[list(mine)] = read_window(raster, list(mine.values()), grid, window, a.said["nodata"], method)
    return out


def _chip_values(values: Array, a: Acquisition, offset: float | None) -> Array:
    """Values as a chip of the data set holds them; where a band is missing all are. *values* is used up."""
    missing = np.isnan(values).any(axis=0)
    if a.sensor != "S1RTC":
        values += offset or 0
        np.clip(np.rint(values, out=values), NO_DATA + 1, np.iinfo(np.int16).max, out=values)
    elif a.said["unit"] == "power":
        missing |= (values <= 0).any(axis=0)
        np.log10(values, out=values, where=~missing)
        values *= 10
    values[:, missing] = _GAP[a.sensor]
    return values.astype(_GAP[a.sensor].dtype)


def _is_missing(values: Array) -> Array:
    """Where chip values (C, ...) are missing, (...)."""
    return np.asarray(np.isnan(values[0]) | (values[0] == NO_DATA))


def is_seen(bits: Array) -> Array:
    """Where quality bits say that the radar saw the event, or the optical sensor without cloud, shadow and snow."""
    by_radar, by_optical = bits & NO_RADAR == 0, bits & (NO_OPTICAL | CLOUD | SHADOW | SNOW) == 0
    return np.asarray((by_radar | by_optical) & (bits & OUTSIDE == 0))


class Reader:
    """The blocks of a scene below a window of *crop* rows that moves down; the next row of blocks is read ahead.

    Timesteps by modality are in the model's order. `bits` are the quality bits of the rows that are held, (H, W).
    """

    def __init__(self, scene: Scene, steps: dict[str, list[int]], crop: int) -> None:
        self.steps, self._scene, self._crop = steps, scene, crop
        row_bytes = scene.width * (2 * sum(len(steps[m]) * len(BANDS[m]) for m in steps) + 1)
        rows = (_BUDGET / row_bytes - crop) / 2  # beyond a tile's own: its last block is not used up, and one is ahead
        self.block = next(block for block in (512, 256, 128, 64) if block <= max(rows, 64))
        self._blocks: dict[int, tuple[dict[str, Array], list[Future[None]]]] = {}  # by their row of blocks
        self._held: list[tuple[dict[str, Array], slice]] = []  # blocks, and which of their rows a tile has
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _THREADS))

    def hold(self, row: int) -> None:
        """Have a row of tiles in memory, and forget what lies above it."""
        height = min(self._crop, self._scene.height - row)
        first, last = row // self.block, (row + height - 1) // self.block
        self._held, self._blocks = [], {index: block for index, block in self._blocks.items() if index >= first}
        for index in range(first, min(last + 1, (self._scene.height - 1) // self.block) + 1):
            if index not in self._blocks:
                self._blocks[index] = self._begin(index)
        try:
            for future in [future for index in range(first, last + 1) for future in self._blocks[index][1]]:
                future.result()
        except BaseException:  # Ctrl-C too: the process would wait for all that is still to be read
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        tops = {index: row - index * self.block for index in range(first, last + 1)}
        self._held = [(self._blocks[i][0], slice(max(top, 0), top + height)) for i, top in tops.items()]
        place = windows.transform(Window(0, row, self._scene.width, height), self._scene.transform)
        self.bits = self.cut("clouds")[0, 0]
        self.bits |= np.uint8(OUTSIDE) * geometry_mask(self._scene.polygons, self.bits.shape, place)
        for modality, bit in _MISSING.items():
            if modality not in self.steps:
                self.bits |= np.uint8(bit)
                continue
            for step, values in zip(self.steps[modality], self.cut(modality, part=np.s_[:, :1]), strict=True):
                of_event = step == EVENT or modality == "DEM"
                self.bits |= np.uint8(bit if of_event else NO_OTHER) * _is_missing(values)

    def cut(self, modality: str, columns: slice = np.s_[:], part: Any = ...) -> Array:
        """Values of a modality, or *part* of its T and C, in the rows that are held, (T, C, H, W)."""
        return np.concatenate([block[modality][part][..., rows, columns] for block, rows in self._held], axis=-2)

    def picture(self, height: int) -> Array:
        """The event in red, green and blue (3, H, W), 0 to 255: optical where it is clear, else VV in grey."""
        bits = self.bits[:height]
        colours, hidden = np.zeros((3, *bits.shape), np.float32), bits & (NO_OPTICAL | CLOUD | SHADOW) > 0
        if "S2L2A" in self.steps:
            rgb = np.s_[self.steps["S2L2A"].index(EVENT), 3:0:-1]  # B04, B03, B02
            colours[:] = 0.085 * self.cut("S2L2A", part=rgb)[:, :height]  # 3000 is white
        if "S1RTC" in self.steps:
            vv = self.cut("S1RTC", part=np.s_[self.steps["S1RTC"].index(EVENT), 0])[:height].astype(np.float32)
            np.copyto(colours, 10.2 * (vv + 25), where=hidden & (bits & NO_RADAR == 0))  # -25 dB is black, 0 dB white
        unknown = NO_RADAR | NO_OPTICAL
        colours[:, (bits & OUTSIDE > 0) | (bits & unknown == unknown)] = 211  # light grey
        return np.clip(colours, 0, 255, out=colours)

    def _begin(self, index: int) -> tuple[dict[str, Array], list[Future[None]]]:
        """Start reading a row of blocks; what no file has, or no polygon meets, stays missing."""
        row, futures = index * self.block, list[Future[None]]()
        size = height, width = min(self.block, self._scene.height - row), self._scene.width
        out = {m: np.full((len(steps), len(BANDS[m]), *size), _GAP[m]) for m, steps in self.steps.items()}
        out["clouds"] = np.zeros((1, 1, *size), np.uint8)
        for column in range(0, width, _COLUMNS):
            window = Window(column, row, min(_COLUMNS, width - column), height)
            block = shapely.box(*windows.bounds(window, self._scene.transform))
            if shapely.intersects(self._scene.polygons, block).any():
                there = [a for (m, step), a in self._scene.acquisitions.items() if step in self.steps.get(m, ())]
                futures += [self._pool.submit(self._fill, a, window, out) for a in there]
        return out, futures

    def _fill(self, a: Acquisition, window: Window, block: dict[str, Array]) -> None:
        """Read a block of an acquisition: the first valid pixel of its sources wins, with the cloud bits of its SCL."""
        columns = window.toslices()[1]
        out = block[a.sensor][self.steps[a.sensor].index(a.step), ..., columns]
        clouds = block["clouds"][0, 0, :, columns]
        for bands, offset in a.sources:
            values = _chip_values(read_source(a, bands, BANDS[a.sensor], self._scene, window), a, offset)
            new = _is_missing(out) & ~_is_missing(values)
            np.copyto(out, values, where=new)
            if SCL in bands and a.step == EVENT:
                classes = read_source(a, bands, (SCL,), self._scene, window)[0]
                clouds[new] = _SCL_BITS[np.nan_to_num(classes[new]).astype(np.uint8)]
            if not _is_missing(out).any():
                break


def water_of(path: Path, grid: Grid, value: int | None = None) -> Water:
    """A function that finds water that someone else has mapped in a window of a grid, (H, W).

    It gives 1 for water (*value*, or all but 0), 0 for none, `IGNORE_INDEX` where a raster has no data or is negative.
    Raises `DataError` where a raster cannot be read or, without a *value*, does not say what 255 is, and `UsageError`
    for polygons that cannot be read or are given a *value*.
    """
    is_vector = path.suffix.lower() in (".geojson", ".json", ".gpkg", ".shp", ".fgb")
    if is_vector and value is not None:
        raise UsageError("polygons have no values", where="--truth-value", fix="leave it out")
    polygons = scenes.read_polygons(path, grid.crs) if is_vector else None

    def find(window: Window) -> Array:
        if polygons is not None:
            place, size = windows.transform(window, grid.transform), (int(window.height), int(window.width))
            return np.asarray(geometry_mask(polygons, size, place, invert=True).astype(np.int8))
        with scenes.opened(str(path)) as raster:
            values = read_window(raster, [1], grid, window, (), "nearest")[0]
            if value is None and raster.nodata is None and raster.dtypes[0] == "uint8" and (values == 255).any():
                fix = "gdal_edit.py -a_nodata 255 says no data; --truth-value 255 flood; or give it another value"
                raise DataError("255 may be water or no data, and the file does not say so", where=path, fix=fix)
        return np.where(values >= 0, values > 0 if value is None else values == value, IGNORE_INDEX)  # NaN is not >= 0

    if polygons is None and value is None:  # what is wrong is told before a model runs
        for window in windows.subdivide(Window(0, 0, grid.width, grid.height), _COLUMNS, _COLUMNS):
            find(window)
    return find


def list_problems(scene: Scene, max_gap: float, min_seen: float) -> list[str]:
    """All problems of a scene: dates, orbits, places, and what a sample of windows says of units, orders and offsets.

    The event passes of radar and optical may lie *max_gap* days apart; the files of each date have to reach a share
    *min_seen* of the area.
    """
    problems, check = list(_dates(scene, max_gap)), {"S1RTC": _radar, "S2L2A": _optical, "DEM": _terrain}
    area = shapely.union_all(scene.polygons)
    for a in scene.acquisitions.values():
        found = [_bands(a, bands) for bands, _ in a.sources]
        if not any(found):
            parts = [(_reached(a, bands, scene), bands, {"offset": offset}) for bands, offset in a.sources]
            share = shapely.union_all([part for part, *_ in parts]).area / area.area
            if not share or round(share, 2) < min_seen:  # edges that were brought to another CRS differ a little
                edges = ", ".join(f"{edge:.2f}" for edge in shapely.bounds(scenes.to_crs(area, scene.crs, DEGREES)))
                told = f"its files reach {share:.0%} of the area (--min-seen {min_seen:g})"
                found.append(f"{told}, which lies at {edges}")
            samples = [(_sample(a, bands, scene, part), a.said | said) for part, bands, said in parts if part.area]
            # Fewer pixels are a corner, of which the shares of map.json tell.
            if samples and not any(values.size for values, _ in samples):
                found.append("its files have no value in a sample of the area")
            found += [check[a.sensor](values, said) for values, said in samples if values.shape[1] >= _FEW]
        problems += [f"{a.name}: {public(problem)}" for problem in found if problem]
    return problems


def _dates(scene: Scene, max_gap: float) -> Iterator[str]:
    timed = [a for a in scene.acquisitions.values() if a.time]
    for a, b in itertools.pairwise(timed):  # by sensor, each in order of steps
        if a.sensor == b.sensor and a.time >= b.time:
            yield f"{a.name} ({a.time:%F}) is not before {b.name} ({b.time:%F}): are the dates swapped?"
    used = [(a, [bands[name] for bands, _ in a.sources for name in BANDS[a.sensor]]) for a in timed]
    for (a, some), (b, others) in itertools.combinations(used, 2):
        files = [{(os.path.realpath(place), number) for place, number in entries} for entries in (some, others)]
        if files[0] & files[1]:
            yield f"{a.name} and {b.name} are the same file: {min(some)[0]}"
    for a, entries in used:  # products are named after the time of sensing; 180 degrees from Greenwich days differ
        stamps = _PRODUCT.findall(" ".join(Path(place).name for place, _ in entries))
        if stamps and all(abs(scenes.parse_time(stamp, a.name) - a.time).days for stamp in stamps):
            yield f"{a.name} is said to be of {a.time:%F}, and its files' names say {stamps[0]}"
    radar, optical = (scene.acquisitions.get((sensor, EVENT)) for sensor in ("S1RTC", "S2L2A"))
    before = scene.acquisitions.get(("S1RTC", BEFORE))
    was, now = (a.said.get("orbit") if a else None for a in (before, radar))
    if was and now and str(was) != str(now):
        yield f"S1RTC: orbit {was} before and {now} at the event: what changed may be the view alone"
    if radar and optical and (gap := abs((radar.time - optical.time).total_seconds()) / 86_400) > max_gap:
        yield f"the event passes of radar and optical are {gap:.1f} days apart (limit {max_gap:g}, --max-gap)"


def _bands(a: Acquisition, bands: Bands) -> str | None:
    """Whether each raster has the bands that it is said to have, by number and, where it tells them, name and unit."""
    for place in dict.fromkeys(place for place, _ in bands.values()):
        listed = {name: number for name, (where, number) in bands.items() if where == place}
        with scenes.opened(place) as raster:
            if raster.count != max(listed.values()):
                named = f"{max(listed.values())} are named ({', '.join(listed)})"
                return f"{place} has {raster.count} bands, {named}: name all of them in 'bands'"
            for name, number in listed.items():
                said = (raster.descriptions[number - 1] or "").lower()
                if said in (band.lower() for band in BANDS[a.sensor]) and said != name.lower():
                    return f"band {number} of {place} calls itself {said}, and is taken for {name}"
            unit = raster.units[0] or "m"
            if a.sensor == "DEM" and not re.fullmatch("m|met(er|re)s?", unit, re.IGNORECASE):
                return f"{place} says that its heights are in {unit}: convert them to metres"
    return None


def _reached(a: Acquisition, bands: Bands, scene: Scene) -> Any:
    """The part of the area, in the grid's CRS, within the outline of a source, whatever its pixels are."""
    with scenes.opened(bands[BANDS[a.sensor][0]][0]) as raster:
        try:
            area = shapely.make_valid(scenes.to_crs(scene.polygons, scene.crs, raster.crs))
            outline = scenes.footprint(raster)
            if raster.crs.is_geographic:  # an area across 180 degrees goes on to 181
                outline |= shapely.transform(outline, lambda xy: xy + np.array([360, 0]))
            part = shapely.intersection(area, outline)
            part = scenes.to_crs(part[shapely.area(part) > 0], raster.crs, scene.crs)
            return shapely.union_all(shapely.make_valid(part))
        except ValueError:  # the area has no place in the raster's CRS, or nothing is in both
            return shapely.Polygon()


def _sample(a: Acquisition, bands: Bands, scene: Scene, part: Any) -> Array:
    """Pixels (C, N) that miss no band, in the file's unit, of windows spread over a part of the area."""
    size = width, height = min(_WINDOW, scene.width), min(_WINDOW, scene.height)
    west, south, east, north = shapely.bounds(part)
    spread = itertools.product(np.linspace(west, east, _ALONG), np.linspace(south, north, _ALONG))
    inside = shapely.get_coordinates(shapely.point_on_surface(shapely.get_parts(part)[: _ALONG**2]))
    corners = np.array([~scene.transform * tuple(xy) for xy in [*spread, *inside]]) - np.array(size) / 2
    places = np.unique(np.clip(corners, 0, (scene.width - width, scene.height - height)).astype(int), axis=0).tolist()
    parts = [read_source(a, bands, BANDS[a.sensor], scene, Window(*place, width, height)) for place in places]
    values = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return values[:, ~np.isnan(values).any(axis=0)]


def _radar(values: Array, said: dict[str, Any]) -> str | None:
    strange = (values < _NO_RADAR[0]) | (values > _NO_RADAR[1]) | (values == 0)  # that dB hit 0 by chance is as rare
    if 0.001 < (share := strange.any(axis=0).mean()) < 0.5:  # less may be speckle, more another unit
        odd = values[strange]
        return f"{share:.1%} of the pixels are no radar (such as {odd[abs(odd).argmax()]:g}): say 'nodata: [...]'"
    middle = float(np.median(values[0]))
    is_db = _DB[0] < middle < _DB[1] and (values < 0).mean() > 0.5
    unit, is_power = said["unit"], (values >= 0).all() and _DB[0] < 10 * np.log10(max(middle, 1e-9)) < _DB[1]
    if not (is_power if unit == "power" else is_db):
        looks = "dB" if is_db else "linear power" if is_power else "neither dB nor linear power"
        return f"the unit is said to be {unit}, and the values look like {looks} (median of VV {middle:.4g})"
    if (values[1] > values[0]).mean() > 0.5:
        return f"{S1_BANDS[1]} is stronger than {S1_BANDS[0]} in most pixels: are the two swapped?"
    return None


def _optical(values: Array, said: dict[str, Any]) -> str | None:
    lowest, offset = np.quantile(values, 0.01), said["offset"]
    if not 255 < np.quantile(values, 0.99) <= 30_000:  # of a picture in 8 bits; clouds and snow reach 20,000
        return f"values up to {values.max():.5g} are no reflectance x 10,000; if one is no data, say 'nodata: [0, ...]'"
    if offset is None and lowest > 0.9 * _OFFSET:
        fix = f"say 'offset: -{_OFFSET}' (baseline 04.00 and later) or 'offset: 0'"
        return f"neither offset nor baseline is given, and the darkest pixels have {lowest:.0f}: {fix}"
    if offset and lowest + offset < -0.25 * _OFFSET:  # where it belongs, the darkest pixels come near 0
        return f"an offset of {offset:g} leaves {lowest + offset:.0f} in the darkest pixels: was it taken off already?"
    level = {name: max(np.median(values[S2_BANDS.index(name)]) + (offset or 0), 1) for name in ("B07", "B08", "B8A")}
    for name in ("B08", "B07"):
        if abs(np.log(level["B8A"] / level[name])) > 0.7:
            return f"B8A and {name}, neighbours in the spectrum, differ by half: is the order of bands {S2_BANDS}?"
    short, long = (max(np.median(values[S2_BANDS.index(name)]) + (offset or 0), 100) for name in ("B11", "B12"))
    if long > 1.3 * short:
        return f"B12 is brighter than B11, which it hardly is on any ground: is the order of bands {S2_BANDS}?"
    return None


def _terrain(values: Array, _: dict[str, Any]) -> str | None:
    lowest, highest = values.min(), values.max()
    told = f"heights from {lowest:.0f} to {highest:.0f} are no metres; if one is no data, say 'nodata: [...]'"
    return told if lowest < -500 or highest > 9000 else None
