"""Read a scene in fixed blocks of its grid, each once: plain windowed reads, one reprojection, a pool of threads.

GDAL approximates the transform within each call, so that a value would depend on the window that asks: the blocks are
fixed, and tiles are cut out of them. A WarpedVRT would warp whole blocks of all bands for each band that is read.
Blocks hold what a chip of the data set holds: int16 reflectance x 10,000, float16 dB, int16 metres.

T = timesteps, C = bands, H, W = rows and columns of a window or block.
"""

import functools
import math
import os
import warnings
from collections.abc import Sequence
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

from floodrepro.data.protocols import NO_DATA
from floodrepro.errors import UsageError
from floodrepro.mapping.scene import EVENT_STEP, SCL, Acquisition, Array, Grid, Scene, Source, opened, read_polygons

Tile = tuple[int, int, int, int]  # first row, first column, rows, columns
RESAMPLING = {"S2L2A": "bilinear", "S1RTC": "bilinear", "DEM": "bilinear", SCL: "nearest"}  # radar: in the file's unit
_NAMES = ("no radar at the event", "no optical at the event", "cloud", "cloud shadow", "snow", "no elevation")
QUALITY = {name: 1 << bit for bit, name in enumerate([*_NAMES, "outside the area"])}
NO_RADAR, NO_OPTICAL, CLOUD, SHADOW, SNOW, NO_ELEVATION, OUTSIDE = QUALITY.values()
# Sen2Cor's classes: Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD, table of SCL values.
_SCL_BITS = np.zeros(256, np.uint8)
_SCL_BITS[[8, 9, 10]], _SCL_BITS[3], _SCL_BITS[11] = CLOUD, SHADOW, SNOW
# GDAL says so of the arrays in memory that rasterio 1.4 hands to it.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
_COLUMNS, _THREADS = 1024, 8  # of a block; a thread holds about 70 MB
_BUDGET = 1.25 * 2**30  # bytes of blocks that are held at once


def read_window(
    raster: DatasetReader, numbers: Sequence[int], grid: Grid, window: Window, no_data: Sequence[float], method: str
) -> Array:
    """Bands of a raster in a window of the grid, (C, H, W) float32 in the file's unit, NaN where there is none."""
    height, width = int(window.height), int(window.width)
    out = np.full((len(numbers), height, width), np.nan, np.float32)
    bounds = windows.bounds(window, grid.transform)
    west, south, east, north = transform_bounds(grid.crs, raster.crs, *bounds, densify_pts=21)
    corners = np.array([~raster.transform * xy for x in (west, east) for xy in ((x, south), (x, north))])
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
    for value in declared.union(no_data):
        values[values == np.float32(value)] = np.nan
    values[np.isinf(values)] = np.nan
    scale = Affine.scale(part.width / shape[2], part.height / shape[1])
    places = {"src_transform": windows.transform(part, raster.transform) * scale, "src_crs": raster.crs}
    places |= {"dst_transform": windows.transform(window, grid.transform), "dst_crs": grid.crs}
    reproject(values, out, resampling=Resampling[method], src_nodata=np.nan, dst_nodata=np.nan, **places)
    return out


def read_source(a: Acquisition, source: Source, names: Sequence[str], grid: Grid, window: Window) -> Array:
    """Named bands of one source of an acquisition, (C, H, W) float32 in the file's unit; each file is opened once."""
    out = np.empty((len(names), int(window.height), int(window.width)), np.float32)
    method = RESAMPLING[SCL if names == [SCL] else a.sensor]
    for place in {source.bands[name][0] for name in names}:
        mine = [i for i, name in enumerate(names) if source.bands[name][0] == place]
        with opened(place) as raster:
            out[mine] = read_window(raster, [source.bands[names[i]][1] for i in mine], grid, window, a.nodata, method)
    return out


def _chip_values(values: Array, a: Acquisition, offset: float | None) -> Array:
    """Values as a chip of the data set holds them; where a band is missing all are. *values* is used up."""
    missing = np.isnan(values).any(axis=0)
    if a.sensor == "S1RTC":
        if a.unit == "power":
            missing |= (values <= 0).any(axis=0)
            np.log10(values, out=values, where=~missing)
            values *= 10
        values[:, missing] = np.nan
        return values.astype(np.float16)
    values[:, missing] = 0
    values += offset or 0
    np.clip(np.rint(values, out=values), NO_DATA + 1, np.iinfo(np.int16).max, out=values)
    whole = values.astype(np.int16)
    whole[:, missing] = NO_DATA
    return whole


def _is_missing(values: Array) -> Array:
    """Where chip values (C, ...) are missing, (...)."""
    first = values[0]
    return np.asarray(np.isnan(first) if first.dtype.kind == "f" else first == NO_DATA)


class Reader:
    """The blocks of a scene in a window of rows that moves down: a ring of rows, the next blocks being read ahead.

    Bands and timesteps by modality are in the model's order; *crop* is the height of the windows that are cut out.
    """

    def __init__(self, scene: Scene, bands: dict[str, list[str]], steps: dict[str, list[int]], crop: int) -> None:
        self.bands, self.steps, self._scene, self._grid = bands, steps, scene, scene.grid
        row_bytes = self._grid.width * (2 * sum(len(bands[m]) * len(steps[m]) for m in bands) + 1)
        slots = {height: -(-(crop - 1) // height) + 2 for height in (512, 256, 128, 64)}  # blocks held, one ahead
        self.block = next((h for h, count in slots.items() if h * count * row_bytes <= _BUDGET), 64)
        self._slots = slots[self.block]
        rows = self._slots * self.block
        self._held = {m: np.empty((len(steps[m]), len(bands[m]), rows, self._grid.width), np.int16) for m in bands}
        if "S1RTC" in bands:
            self._held["S1RTC"] = self._held["S1RTC"].view(np.float16)
        self._held["clouds"] = np.empty((1, 1, rows, self._grid.width), np.uint8)
        self._futures: dict[int, list[Future[None]]] = {}
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _THREADS))

    def hold(self, row: int, height: int) -> None:
        """Have these rows of the grid in memory, and forget what lies above them."""
        first, last = row // self.block, (row + height - 1) // self.block
        for index in range(first, min(last + 1, (self._grid.height - 1) // self.block) + 1):
            if index not in self._futures:
                self._futures[index] = self._begin(index)
        try:
            for index in range(first, last + 1):
                for future in self._futures[index]:
                    future.result()
                self._futures[index] = []
        except BaseException:  # Ctrl-C too: the process would wait for all that is still to be read
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def cut(self, name: str, tile: Tile, part: Any = ...) -> Array:
        """Values of a modality, or *part* of its T and C, in rows that are held, (T, C, H, W)."""
        row, column, height, width = tile
        held = self._held[name][part][..., column : column + width]
        return np.asarray(held.take(range(row, row + height), axis=-2, mode="wrap"))

    def missing(self, modality: str, step: int, row: int, height: int) -> Array:
        """Where a modality has nothing at a timestep in rows that are held, (height, width of the grid)."""
        if modality not in self.bands:
            return np.ones((height, self._grid.width), bool)
        place = self.steps[modality].index(step)
        return _is_missing(self.cut(modality, (row, 0, height, self._grid.width), np.s_[place, :1]))

    def quality(self, row: int, height: int) -> tuple[Array, Array]:
        """Of rows that are held, (height, width of the grid): quality bits, and where the event was seen in the area.

        It is seen by the radar, or by the optical sensor without cloud, shadow and snow.
        """
        window = Window(0, row, self._grid.width, height)
        bits = self.cut("clouds", (row, 0, height, self._grid.width))[0, 0]
        bits |= np.uint8(NO_RADAR) * self.missing("S1RTC", EVENT_STEP, row, height)
        bits |= np.uint8(NO_OPTICAL) * self.missing("S2L2A", EVENT_STEP, row, height)
        bits |= np.uint8(NO_ELEVATION) * self.missing("DEM", 0, row, height)
        place = windows.transform(window, self._grid.transform)
        bits |= np.uint8(OUTSIDE) * geometry_mask(self._scene.polygons, bits.shape, place)
        by_radar, by_optical = bits & NO_RADAR == 0, bits & (NO_OPTICAL | CLOUD | SHADOW | SNOW) == 0
        return bits, (by_radar | by_optical) & (bits & OUTSIDE == 0)

    def _begin(self, index: int) -> list[Future[None]]:
        """Start reading a row of blocks; what no file has, or no polygon meets, stays missing."""
        row, slot = index * self.block, index % self._slots * self.block
        height = min(self.block, self._grid.height - row)
        for name, held in self._held.items():
            held[:, :, slot : slot + height] = {"S1RTC": np.nan, "clouds": 0}.get(name, NO_DATA)
        futures = []
        for column in range(0, self._grid.width, _COLUMNS):
            window = Window(column, row, min(_COLUMNS, self._grid.width - column), height)
            block = shapely.box(*windows.bounds(window, self._grid.transform))
            if shapely.intersects(self._scene.polygons, block).any():
                wanted = [(m, step) for m in self.bands for step in self.steps[m]]
                there = [self._scene.acquisitions[key] for key in wanted if key in self._scene.acquisitions]
                futures += [self._pool.submit(self._fill, a, window, slot) for a in there]
        return futures

    def _fill(self, a: Acquisition, window: Window, slot: int) -> None:
        """Read a block of an acquisition: the first valid pixel of its sources wins, with the cloud bits of its SCL."""
        rows, columns = slice(slot, slot + window.height), window.toslices()[1]
        out = self._held[a.sensor][self.steps[a.sensor].index(a.step), :, rows, columns]
        clouds = self._held["clouds"][0, 0, rows, columns]
        for source in a.sources:
            values = read_source(a, source, self.bands[a.sensor], self._grid, window)
            values = _chip_values(values, a, source.offset)
            new = _is_missing(out) & ~_is_missing(values)
            out[:, new] = values[:, new]
            if SCL in source.bands and a.step == EVENT_STEP:
                classes = read_source(a, source, [SCL], self._grid, window)[0]
                clouds[new] = _SCL_BITS[np.nan_to_num(classes[new]).astype(np.uint8)]
            if not _is_missing(out).any():
                break


@functools.lru_cache(1)
def _polygons(path: Path, modified: int, crs: Any) -> Any:
    """A file's polygons on a map's grid; the rows of a map ask for them over and over."""
    return read_polygons(path, crs)


def read_water(path: Path, grid: Grid, row: int, height: int, value: int | None = None) -> tuple[Array, Array]:
    """Water that someone else has mapped: where it is in rows of a grid, (height, width), and where the file knows.

    A raster does not know at no-data and negative values; *value* is what water is in it, None for all but 0.
    """
    window = Window(0, row, grid.width, height)
    if path.suffix.lower() in (".geojson", ".json", ".gpkg", ".shp", ".fgb"):
        if value is not None:
            raise UsageError("polygons have no values", where="--truth-value", fix="leave it out")
        place = windows.transform(window, grid.transform)
        polygons = _polygons(path, path.stat().st_mtime_ns if path.exists() else 0, grid.crs)
        water = geometry_mask(polygons, (height, grid.width), place, invert=True)
        return water, np.ones_like(water)
    with opened(str(path)) as raster:
        values = read_window(raster, [1], grid, window, (), "nearest")[0]
    known = values >= 0  # NaN is not
    return known & (values > 0 if value is None else values == value), known
