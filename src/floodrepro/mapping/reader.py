"""Read a scene in fixed blocks of its grid, each once: plain windowed reads, one reprojection, a pool of threads.

GDAL approximates the transform within each call, so that a value would depend on the window that asks: the blocks are
fixed, and tiles are cut out of them. A WarpedVRT would warp whole blocks of all bands for each band that is read.
Blocks hold what a chip of the data set holds: int16 reflectance x 10,000, float16 dB, int16 metres.

T = timesteps, C = bands, H, W = rows and columns of a window or block.
"""

import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio import Affine, DatasetReader
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import geometry_mask
from rasterio.transform import array_bounds
from rasterio.warp import Resampling, reproject, transform_bounds
from rasterio.windows import Window
from rasterio.windows import transform as window_transform
from shapely.geometry import box

from floodrepro.data.protocols import NO_DATA
from floodrepro.mapping.scene import EVENT_STEP, SCL, Acquisition, Grid, Scene, Source, opened, read_polygons
from floodrepro.mapping.tiles import Array, Tile

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
    transform = window_transform(window, grid.transform)
    out = np.full((len(numbers), height, width), np.nan, np.float32)
    west, south, east, north = transform_bounds(
        grid.crs, raster.crs, *array_bounds(height, width, transform), densify_pts=21
    )
    corners = np.array([~raster.transform * xy for x in (west, east) for xy in ((x, south), (x, north))])
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
    places = {"src_transform": window_transform(part, raster.transform) * scale, "dst_transform": transform}
    places |= {"src_crs": raster.crs, "dst_crs": grid.crs, "src_nodata": np.nan, "dst_nodata": np.nan}
    reproject(values, out, resampling=Resampling[method], **places)
    return out


def read_source(a: Acquisition, source: Source, names: Sequence[str], grid: Grid, window: Window) -> Array:
    """Named bands of one source of an acquisition, (C, H, W) float32 in the file's unit; each file is opened once.

    Raises:
        DataError: A file cannot be read.
    """
    out = np.empty((len(names), int(window.height), int(window.width)), np.float32)
    for place in {source.bands[name][0] for name in names}:
        mine = [i for i, name in enumerate(names) if source.bands[name][0] == place]
        numbers = [source.bands[names[i]][1] for i in mine]
        method = RESAMPLING[SCL if names == [SCL] else a.sensor]
        with opened(place) as raster:
            out[mine] = read_window(raster, numbers, grid, window, a.facts["nodata"], method)
    return out


def chip_values(values: Array, a: Acquisition, offset: float | None) -> Array:
    """Values as a chip of the data set holds them; where a band is missing all are. *values* is used up."""
    missing = np.isnan(values).any(axis=0)
    if a.sensor == "S1RTC":
        if a.facts["unit"] == "power":
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


def is_missing(values: Array) -> Array:
    """Where chip values (C, ...) are missing, (...)."""
    first = values[0]
    return np.asarray(np.isnan(first) if first.dtype.kind == "f" else first == NO_DATA)


def read_block(a: Acquisition, names: Sequence[str], grid: Grid, window: Window) -> tuple[Array, Array]:
    """Chip values (C, H, W) of an acquisition and the cloud bits (H, W) of its SCL; the first valid pixel wins."""
    shape = int(window.height), int(window.width)
    dtype, missing = (np.float16, np.nan) if a.sensor == "S1RTC" else (np.int16, NO_DATA)
    out, bits = np.full((len(names), *shape), missing, dtype), np.zeros(shape, np.uint8)
    for source in a.sources:
        empty = is_missing(out)
        if not empty.any():
            break
        values = chip_values(read_source(a, source, names, grid, window), a, source.offset)
        out = np.where(empty, values, out)
        if SCL in source.bands and a.step == EVENT_STEP:
            classes = np.nan_to_num(read_source(a, source, [SCL], grid, window)[0]).astype(np.uint8)
            bits = np.where(empty & ~is_missing(values), _SCL_BITS[classes], bits)
    return out, bits


class Reader:
    """The blocks of a scene in a window of rows that moves down: a ring of rows, the next blocks being read ahead.

    Args:
        scene: What is read.
        bands: Names of the bands by modality, in the model's order.
        steps: Timesteps by modality, in the model's order.
        crop: Height of the windows that are cut out, in pixels.
    """

    def __init__(self, scene: Scene, bands: dict[str, list[str]], steps: dict[str, list[int]], crop: int) -> None:
        self.scene, self.bands, self.steps, grid = scene, bands, steps, scene.grid
        row_bytes = grid.width * (2 * sum(len(bands[m]) * len(steps[m]) for m in bands) + 1)
        slots = {height: -(-(crop - 1) // height) + 2 for height in (512, 256, 128, 64)}  # blocks held, one ahead
        self.block = next((h for h, count in slots.items() if h * count * row_bytes <= _BUDGET), 64)
        self._slots = slots[self.block]
        rows = self._slots * self.block
        self._held = {m: np.empty((len(steps[m]), len(bands[m]), rows, grid.width), np.int16) for m in bands}
        if "S1RTC" in bands:
            self._held["S1RTC"] = self._held["S1RTC"].view(np.float16)
        self._held["clouds"] = np.empty((1, 1, rows, grid.width), np.uint8)
        self._futures: dict[int, list[Future[None]]] = {}
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _THREADS))

    def hold(self, row: int, height: int) -> None:
        """Have these rows of the grid in memory, and forget what lies above them.

        Raises:
            DataError: A file cannot be read.
        """
        first, last = row // self.block, (row + height - 1) // self.block
        for index in range(first, min(last + 1, (self.scene.grid.height - 1) // self.block) + 1):
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
            return np.ones((height, self.scene.grid.width), bool)
        place = self.steps[modality].index(step)
        return is_missing(self.cut(modality, (row, 0, height, self.scene.grid.width), np.s_[place, :1]))

    def quality(self, row: int, height: int) -> tuple[Array, Array]:
        """Of rows that are held, (height, width of the grid): quality bits, and where the event was seen in the area.

        It is seen by the radar, or by the optical sensor without cloud, shadow and snow.
        """
        grid = self.scene.grid
        bits = self.cut("clouds", (row, 0, height, grid.width))[0, 0]
        bits |= np.uint8(NO_RADAR) * self.missing("S1RTC", EVENT_STEP, row, height)
        bits |= np.uint8(NO_OPTICAL) * self.missing("S2L2A", EVENT_STEP, row, height)
        bits |= np.uint8(NO_ELEVATION) * self.missing("DEM", 0, row, height)
        there = window_transform(Window(0, row, grid.width, height), grid.transform)
        bits |= np.uint8(OUTSIDE) * geometry_mask(self.scene.polygons, bits.shape, there)
        by_radar, by_optical = bits & NO_RADAR == 0, bits & (NO_OPTICAL | CLOUD | SHADOW | SNOW) == 0
        return bits, (by_radar | by_optical) & (bits & OUTSIDE == 0)

    def _begin(self, index: int) -> list[Future[None]]:
        """Start reading a row of blocks; what no file has, or no polygon meets, stays missing."""
        grid = self.scene.grid
        row, slot = index * self.block, index % self._slots * self.block
        height = min(self.block, grid.height - row)
        for name, held in self._held.items():
            held[:, :, slot : slot + height] = {"S1RTC": np.nan, "clouds": 0}.get(name, NO_DATA)
        futures = []
        for column in range(0, grid.width, _COLUMNS):
            window = Window(column, row, min(_COLUMNS, grid.width - column), height)
            bounds = array_bounds(height, int(window.width), window_transform(window, grid.transform))
            if not shapely.intersects(self.scene.polygons, box(*bounds)).any():
                continue
            for modality in self.bands:
                for step in self.steps[modality]:
                    if (modality, step) in self.scene.acquisitions:
                        futures.append(self._pool.submit(self._fill, modality, step, window, slot))
        return futures

    def _fill(self, modality: str, step: int, window: Window, slot: int) -> None:
        acquisition = self.scene.acquisitions[modality, step]
        values, clouds = read_block(acquisition, self.bands[modality], self.scene.grid, window)
        rows, columns = slice(slot, slot + values.shape[1]), window.toslices()[1]
        self._held[modality][self.steps[modality].index(step), :, rows, columns] = values
        if modality == "S2L2A" and step == EVENT_STEP:
            self._held["clouds"][0, 0, rows, columns] = clouds


class WaterMask:
    """Water that someone else has mapped, polygons or a raster: permanent water, or the truth of a flood.

    Args:
        path: Its file.
        grid: Of the map.
        value: What water is in a raster; None for all but 0.
    """

    def __init__(self, path: Path, grid: Grid, value: int | None = None) -> None:
        self._path, self._grid, self._value = path, grid, value
        vectors = (".geojson", ".json", ".gpkg", ".shp", ".fgb")
        self._polygons = read_polygons(path, grid.crs) if path.suffix.lower() in vectors else None

    def rows(self, row: int, height: int) -> tuple[Array, Array]:
        """Where there is water, and where the file knows: not at no-data and negative values of a raster.

        Raises:
            DataError: The raster cannot be read.
        """
        window = Window(0, row, self._grid.width, height)
        if self._polygons is not None:
            there = window_transform(window, self._grid.transform)
            water = geometry_mask(self._polygons, (height, self._grid.width), there, invert=True)
            return water, np.ones(water.shape, bool)
        with opened(str(self._path)) as raster:
            values = read_window(raster, [1], self._grid, window, (), "nearest")[0]
        known = values >= 0  # NaN is not
        return known & (values > 0 if self._value is None else values == self._value), known
