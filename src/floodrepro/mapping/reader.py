"""Read a scene in fixed blocks of its grid, each once: plain windowed reads, one reprojection, a pool of threads.

GDAL approximates the transform within each call, so that a value would depend on the window that asks: the blocks are
fixed, and tiles are cut out of them. A WarpedVRT would warp whole blocks of all bands for each band that is read.
Blocks hold what a chip of the data set holds: int16 reflectance x 10,000, float16 dB, int16 metres.

T = timesteps, C = bands, H, W = rows and columns of a window or block.
"""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from rasterio import DatasetReader
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.features import geometry_mask
from rasterio.transform import array_bounds
from rasterio.warp import Resampling, reproject, transform_bounds
from rasterio.windows import Window, from_bounds
from rasterio.windows import transform as window_transform
from shapely.geometry import box

from floodrepro.data.protocols import NO_DATA
from floodrepro.errors import DataError
from floodrepro.mapping.area import read_polygons
from floodrepro.mapping.scene import EVENT_STEP, SCL, Acquisition, Grid, Scene, Source, opened
from floodrepro.mapping.tiles import Array

RESAMPLING = {"S2L2A": "bilinear", "S1RTC": "bilinear", "DEM": "bilinear", SCL: "nearest"}  # radar: in the file's unit
NO_RADAR, NO_OPTICAL, CLOUD, SHADOW, SNOW, NO_ELEVATION, OUTSIDE = (1 << bit for bit in range(7))
QUALITY = {
    "no radar at the event": NO_RADAR,
    "no optical at the event": NO_OPTICAL,
    "cloud": CLOUD,
    "cloud shadow": SHADOW,
    "snow": SNOW,
    "no elevation": NO_ELEVATION,
    "outside the area": OUTSIDE,
}
# Sen2Cor's classes: Sentinel-2 Products Specification Document, S2-PDGS-TAS-DI-PSD, table of SCL values.
_SCL_BITS = np.zeros(256, np.uint8)
_SCL_BITS[[8, 9, 10]], _SCL_BITS[3], _SCL_BITS[11] = CLOUD, SHADOW, SNOW
# GDAL says so of the arrays in memory that rasterio 1.4 hands to it.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
_COLUMNS, _THREADS = 1024, 8  # of a block; a thread holds about 70 MB
_BUDGET = 1.25 * 2**30  # bytes of blocks that are held at once
_VECTORS = (".geojson", ".json", ".gpkg", ".shp", ".fgb")
Rows = dict[str, Array]


@contextmanager
def gdal() -> Iterator[None]:
    """GDAL's settings for reading: a small cache, and links that are asked for again where a server is busy."""
    with rasterio.Env(GDAL_CACHEMAX=128, GDAL_HTTP_MAX_RETRY=5, GDAL_HTTP_RETRY_DELAY=1, VSI_CACHE=True):
        yield


def read_window(
    raster: DatasetReader, numbers: Sequence[int], grid: Grid, window: Window, no_data: Sequence[float], method: str
) -> Array:
    """Bands of a raster in a window of the grid, (C, H, W) float32 in the file's unit, NaN where there is none."""
    height, width = int(window.height), int(window.width)
    transform = window_transform(window, grid.transform)
    out = np.full((len(numbers), height, width), np.nan, np.float32)
    bounds = transform_bounds(grid.crs, raster.crs, *array_bounds(height, width, transform), densify_pts=21)
    there = from_bounds(*bounds, raster.transform)
    # Pixels around the window: a kernel looks two away, in the coarser of the two grids.
    margin = 2 + math.ceil(2 * max(there.height / height, there.width / width, 1))
    row, column = max(int(there.row_off) - margin, 0), max(int(there.col_off) - margin, 0)
    end_row = min(math.ceil(there.row_off + there.height) + margin, raster.height)
    end_column = min(math.ceil(there.col_off + there.width) + margin, raster.width)
    if end_row <= row or end_column <= column:
        return out
    part = Window(column, row, end_column - column, end_row - row)
    values = raster.read(list(numbers), window=part).astype(np.float32)
    for value in {*no_data, *(v for v in raster.nodatavals if v is not None)}:
        values[values == np.float32(value)] = np.nan
    reproject(
        values,
        out,
        src_transform=window_transform(part, raster.transform),
        src_crs=raster.crs,
        src_nodata=np.nan,
        dst_transform=transform,
        dst_crs=grid.crs,
        dst_nodata=np.nan,
        resampling=Resampling[method],
    )
    return out


def read_source(scene: Scene, sensor: str, source: Source, names: Sequence[str], window: Window) -> Array:
    """Named bands of one source, (C, H, W) float32 in the file's unit; each file is opened once."""
    out = np.empty((len(names), int(window.height), int(window.width)), np.float32)
    for place in dict.fromkeys(source.bands[name][0] for name in names):
        mine = [i for i, name in enumerate(names) if source.bands[name][0] == place]
        numbers = [source.bands[names[i]][1] for i in mine]
        try:
            with opened(place, sign=scene.sign) as raster:
                method = RESAMPLING[SCL if names == [SCL] else sensor]
                out[mine] = read_window(raster, numbers, scene.grid, window, scene.no_data[sensor], method)
        except (RasterioError, IndexError) as error:
            raise DataError(f"the raster cannot be read: {str(error)[:200]}", where=place) from error
    return out


def chip_values(sensor: str, values: Array, unit: str, offset: float) -> Array:
    """Values as a chip of the data set holds them; where a band is missing all are. *values* is used up."""
    missing = np.isnan(values).any(axis=0)
    if sensor == "S1RTC":
        if unit == "power":
            missing |= (values <= 0).any(axis=0)
            np.log10(values, out=values, where=~missing)
            values *= 10
        values[:, missing] = np.nan
        return values.astype(np.float16)
    values[:, missing] = 0
    values += offset
    np.clip(np.rint(values, out=values), NO_DATA + 1, np.iinfo(np.int16).max, out=values)
    whole = values.astype(np.int16)
    whole[:, missing] = NO_DATA
    return whole


def is_missing(values: Array) -> Array:
    """Where chip values (C, ...) are missing, (...)."""
    first = values[0]
    return np.asarray(np.isnan(first) if first.dtype.kind == "f" else first == NO_DATA)


def read_block(scene: Scene, acquisition: Acquisition, names: Sequence[str], window: Window) -> tuple[Array, Array]:
    """Chip values (C, H, W) of an acquisition and the cloud bits (H, W) of its SCL; the first valid pixel wins."""
    out = scl = None
    for source in acquisition.sources:
        with gdal():
            raw = read_source(scene, acquisition.sensor, source, names, window)
            unit, offset = scene.units[acquisition.sensor], source_offset(source)
            values = chip_values(acquisition.sensor, raw, unit, offset)
            classes = np.zeros(raw.shape[1:], np.float32)
            if SCL in source.bands and acquisition.step == EVENT_STEP:
                classes = np.nan_to_num(read_source(scene, acquisition.sensor, source, [SCL], window)[0])
        if out is None or scl is None:
            out, scl = values, classes
        else:
            better = is_missing(out) & ~is_missing(values)
            out, scl = np.where(better, values, out), np.where(better, classes, scl)
        if not is_missing(out).any():
            break
    assert out is not None and scl is not None
    return out, _SCL_BITS[scl.astype(np.uint8)]


def source_offset(source: Source) -> float:
    """What is added to optical values: as the file says, or by its processing baseline."""
    baseline = source.facts.get("baseline")
    # From baseline 04.00 on, 1000 is added to every pixel but no-data (microsoft/PlanetaryComputer#134).
    return float(source.facts.get("offset", -1000 if baseline and float(baseline) >= 4 else 0))


@dataclass
class Reader:
    """The blocks of a scene, row by row, from top to bottom.

    Args:
        scene: What is read.
        bands: Names of the bands by modality, in the model's order.
        steps: Timesteps in the model's order.
        crop: Height of the windows that are cut out, in pixels.
    """

    scene: Scene
    bands: dict[str, list[str]]
    steps: list[int]
    crop: int
    _held: dict[int, Rows] = field(default_factory=dict)
    _coming: dict[int, list[Future[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Choose the height of a block by the width of the grid, so that memory is bounded."""
        grid = self.scene.grid
        each = {m: len(b) * (1 if m == "DEM" else len(self.steps)) * 2 for m, b in self.bands.items()}
        row_bytes = grid.width * (sum(each.values()) + 1)

        fits = {h: int(_BUDGET // (h * row_bytes)) - (self.crop - 2) // h - 2 for h in (512, 256, 128, 64)}
        self.block = next((h for h, ahead in fits.items() if ahead >= 0), 64)
        self._ahead = min(max(fits[self.block], 0), 1)
        self._pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _THREADS))

    def hold(self, row: int, height: int) -> None:
        """Have these rows of the grid in memory, and forget what lies above them.

        Raises:
            DataError: A file cannot be read.
        """
        first, last = row // self.block, (row + height - 1) // self.block
        for index in [i for i in self._held if i < first]:
            del self._held[index], self._coming[index]
        for index in range(first, min(last + self._ahead, (self.scene.grid.height - 1) // self.block) + 1):
            if index not in self._held:
                self._begin(index)
        try:
            for index in range(first, last + 1):
                for future in self._coming[index]:
                    future.result()
        except BaseException:  # Ctrl-C too: the process would wait for all that is still to be read
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def cut(self, name: str, tile: tuple[int, int, int, int], part: Any = ...) -> Array:
        """Values of a modality, or *part* of its T and C, in rows that are held, (T, C, H, W).

        A tile is its first row and column, and its numbers of rows and columns.
        """
        row, column, height, width = tile
        parts = []
        for index in range(row // self.block, (row + height - 1) // self.block + 1):
            start = index * self.block
            rows = slice(max(row - start, 0), min(row + height - start, self.block))
            parts.append(self._held[index][name][part][..., rows, column : column + width])
        return np.concatenate(parts, axis=-2)

    def missing(self, modality: str, step: int, row: int, height: int) -> Array:
        """Where a modality has nothing at one of its timesteps in rows that are held, (height, width of the grid)."""
        return is_missing(self.cut(modality, (row, 0, height, self.scene.grid.width), np.s_[step : step + 1, :1])[0])

    def quality(self, row: int, height: int) -> Array:
        """Quality bits (height, width of the grid) of rows that are held."""
        grid = self.scene.grid
        bits = self.cut("clouds", (row, 0, height, grid.width))[0, 0].astype(np.uint8)
        for modality, bit in (("S1RTC", NO_RADAR), ("S2L2A", NO_OPTICAL), ("DEM", NO_ELEVATION)):
            if modality in self.bands:
                step = 0 if modality == "DEM" else self.steps.index(EVENT_STEP)
                bits |= np.uint8(bit) * self.missing(modality, step, row, height)
        if self.scene.polygons is not None:
            there = window_transform(Window(0, row, grid.width, height), grid.transform)
            bits |= np.uint8(OUTSIDE) * geometry_mask(self.scene.polygons, (height, grid.width), there)
        return np.asarray(bits)

    def seen(self, quality: Array) -> Array:
        """Where the event was seen inside the area: by the radar, or by the optical sensor without cloud or snow."""
        seen = np.zeros(quality.shape, bool)
        if "S1RTC" in self.bands:
            seen |= quality & NO_RADAR == 0
        if "S2L2A" in self.bands:
            seen |= quality & (NO_OPTICAL | CLOUD | SHADOW | SNOW) == 0
        return np.asarray(seen & (quality & OUTSIDE == 0))

    def _begin(self, index: int) -> None:
        """Start reading a row of blocks; what no file has, or no polygon meets, stays missing."""
        grid = self.scene.grid
        row, height = index * self.block, min(self.block, grid.height - index * self.block)
        held: Rows = {"clouds": np.zeros((1, 1, height, grid.width), np.uint8)}
        for modality, names in self.bands.items():
            shape = (1 if modality == "DEM" else len(self.steps), len(names), height, grid.width)
            held[modality] = np.full(shape, *((np.nan, np.float16) if modality == "S1RTC" else (NO_DATA, np.int16)))
        self._held[index], self._coming[index] = held, []
        for column in range(0, grid.width, _COLUMNS):
            window = Window(column, row, min(_COLUMNS, grid.width - column), height)
            bounds = array_bounds(height, int(window.width), window_transform(window, grid.transform))
            if self.scene.polygons is not None and not shapely.intersects(self.scene.polygons, box(*bounds)).any():
                continue
            for modality in self.bands:
                for place, step in enumerate([0] if modality == "DEM" else self.steps):
                    if (modality, step) in self.scene.acquisitions:
                        future = self._pool.submit(self._fill, held, modality, place, step, window)
                        self._coming[index].append(future)

    def _fill(self, held: Rows, modality: str, place: int, step: int, window: Window) -> None:
        values, clouds = read_block(self.scene, self.scene.acquisitions[modality, step], self.bands[modality], window)
        columns = slice(int(window.col_off), int(window.col_off + window.width))
        held[modality][place, :, :, columns] = values
        if modality == "S2L2A" and step == EVENT_STEP:
            held["clouds"][0, 0, :, columns] = clouds


class WaterMask:
    """Water that someone else has mapped: permanent water, or the truth of a flood.

    Args:
        path: Polygons of water, or a raster.
        grid: Of the map.
        value: What water is in a raster; None for all but 0.
    """

    def __init__(self, path: Path, grid: Grid, value: int | None = None) -> None:
        self._path, self._grid, self._value = path, grid, value
        self._polygons = read_polygons(path, grid.crs) if path.suffix.lower() in _VECTORS else None

    def rows(self, row: int, height: int) -> tuple[Array, Array]:
        """Where there is water, and where the file knows, (height, width of the grid) each.

        In a raster its no-data value and negative values are unknown.

        Raises:
            DataError: The raster cannot be read.
        """
        window = Window(0, row, self._grid.width, height)
        if self._polygons is not None:
            there = window_transform(window, self._grid.transform)
            water = geometry_mask(self._polygons, (height, self._grid.width), there, invert=True)
            return water, np.ones(water.shape, bool)
        with gdal(), opened(str(self._path), sign=False) as raster:
            values = read_window(raster, [1], self._grid, window, (), "nearest")[0]
        known = values >= 0  # NaN is not
        return known & (values > 0 if self._value is None else values == self._value), known
