"""What a map leaves: rasters while it is made, then COGs, polygons and a picture.

H, W = rows and columns of the grid.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pyogrio
import rasterio
import rasterio.shutil
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.enums import WktVersion
from rasterio.errors import RasterioError
from rasterio.features import rasterize, shapes
from rasterio.windows import Window
from rasterio.windows import transform as window_transform
from shapely.geometry import shape

from floodrepro.mapping.scene import PIXEL, Grid
from floodrepro.mapping.tiles import Array

NOT_SEEN = 255
PROBABILITY_STEPS = 250  # a probability of 1 in the uint8 raster
_RESAMPLING = {"class": "MODE", "probability": "AVERAGE", "quality": "NEAREST"}  # of overviews
# CPLE_BaseError: rasterio.shutil.copy lets GDAL's own errors through.
ERRORS = (OSError, RasterioError, CPLE_BaseError, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError)
COLOURS = ("red", "green", "blue")
_PICTURE = 1024  # pixels of the picture's longer side, at most
_CHUNK = 256  # rows that are turned into polygons at once


class WorkRasters:
    """Uncompressed rasters (H, W), uint8, of the map and of the event's colours: what is written stays."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid

    def path(self, name: str) -> Path:
        """The file of a raster."""
        return self.folder / f"{name}.raw"

    def write(self, name: str, row: int, values: Array) -> None:
        """Put rows of a raster on disk. Not through a memory map: on a full disk that ends the process (SIGBUS)."""
        self.path(name).touch()
        with self.path(name).open("r+b") as file:
            file.seek(row * self.grid.width)
            file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def array(self, name: str) -> Any:
        """A finished raster, mapped into memory."""
        return np.memmap(self.path(name), np.uint8, "r", shape=(self.grid.height, self.grid.width))

    def write_header(self, name: str) -> None:
        """Write the ENVI header with which GDAL reads a raster."""
        os.truncate(self.path(name), max(self.grid.height * self.grid.width, 2))  # GDAL opens no file of one byte
        grid, no_data = self.grid, {"data ignore value": NOT_SEEN} if name in ("class", "probability") else {}
        header: dict[str, Any] = {
            "samples": grid.width,
            "lines": grid.height,
            "bands": 1,
            "data type": 1,
            "interleave": "bsq",
        }
        header["map info"] = f"{{Arbitrary, 1, 1, {grid.transform.c}, {grid.transform.f}, {PIXEL}, {PIXEL}}}"
        header |= {"coordinate system string": f"{{{grid.crs.to_wkt(version=WktVersion.WKT1_ESRI)}}}"} | no_data
        self.path(name).with_suffix(".hdr").write_text("\n".join(["ENVI", *(f"{k} = {v}" for k, v in header.items())]))


def write_cogs(work: WorkRasters, output: Path) -> None:
    """Write class.tif, probability.tif and quality.tif, each with overviews."""
    options = {"driver": "COG", "compress": "DEFLATE", "bigtiff": "IF_SAFER", "num_threads": "1"}
    for name, resampling in _RESAMPLING.items():
        partial = work.folder / f"{name}.tif"
        work.write_header(name)
        # GDAL finds a raster's header only where it may list the folder; what reads over HTTP often forbids it that.
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE"):
            rasterio.shutil.copy(work.path(name), partial, overview_resampling=resampling, **options)
            with rasterio.open(work.path(name)) as raw, rasterio.open(partial) as made:
                if made.checksum(1) != raw.checksum(1):  # GDAL may say nothing of a disk that is full
                    raise OSError(f"{name}.tif is not what was written")
        partial.replace(output / partial.name)


def write_polygons(work: WorkRasters, path: Path, layers: Mapping[int, str], min_hectares: float) -> dict[str, int]:
    """Write the outlines of some classes with area in km² and mean probability.

    Args:
        work: The finished rasters.
        path: GeoPackage.
        layers: Names by class.
        min_hectares: Minimum mapping unit: smaller polygons are left out.

    Returns:
        Number of polygons by name.
    """
    found = {name: _outlines(work, number, min_hectares * 10_000) for number, name in layers.items()}
    polygons = np.concatenate([*found.values(), np.empty(0, object)])
    names = np.array([name for name, outlines in found.items() for _ in outlines], object)
    partial = work.folder / "water.gpkg"
    partial.unlink(missing_ok=True)
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})  # same map, same bytes
    pyogrio.raw.write(
        partial,
        shapely.to_wkb(polygons),
        [names, shapely.area(polygons) / 1e6, _mean_probability(work, polygons)],
        ["class", "area_km2", "mean_probability"],
        crs=work.grid.crs.to_string(),
        geometry_type="Polygon",
        layer="water",
        driver="GPKG",
    )
    if pyogrio.read_info(partial)["features"] != len(polygons):
        raise OSError("water.gpkg is not what was written")
    partial.replace(path)
    return {name: len(outlines) for name, outlines in found.items()}


def _outlines(work: WorkRasters, number: int, smallest: float) -> Any:
    """The patches of a class (pixels that share an edge) from *smallest* m² on, whole across all chunks of rows."""
    grid, classes = work.grid, work.array("class")
    whole, cut = [], []
    for row in range(0, grid.height, _CHUNK):
        chosen = np.asarray(classes[row : row + _CHUNK]) == number
        there = window_transform(Window(0, row, grid.width, len(chosen)), grid.transform)
        ends = {there.f, there.f - PIXEL * len(chosen)} - {grid.transform.f}
        for geometry, _ in shapes(chosen.view(np.uint8), chosen, 4, there):
            polygon = shape(geometry)
            if {polygon.bounds[1], polygon.bounds[3]} & ends:
                cut.append(polygon)
            elif polygon.area >= smallest:
                whole.append(polygon)
    joined = shapely.simplify(shapely.get_parts(shapely.union_all(cut)), 0)
    return np.array([*whole, *joined[shapely.area(joined) >= smallest]], object)


def _mean_probability(work: WorkRasters, polygons: Any) -> Array:
    """The mean probability of the positive class in each polygon, 0 to 1."""
    grid, probability = work.grid, work.array("probability")
    sums, pixels = np.zeros((2, len(polygons) + 1))
    low, high = shapely.bounds(polygons)[:, [1, 3]].T
    for row in range(0, grid.height, _CHUNK):
        part = probability[row : row + _CHUNK]
        there = window_transform(Window(0, row, grid.width, len(part)), grid.transform)
        here = np.flatnonzero((low < there.f) & (high > there.f - PIXEL * len(part)))
        if len(here):
            pairs = zip(polygons[here], here + 1, strict=True)
            owner = rasterize(pairs, part.shape, transform=there, dtype="int32").ravel()
            sums += np.bincount(owner, part.ravel(), len(sums))
            pixels += np.bincount(owner, None, len(sums))
    return sums[1:] / pixels[1:] / PROBABILITY_STEPS


def write_quicklook(work: WorkRasters, path: Path, positive: int, titles: tuple[str, str, str]) -> None:
    """Write a PNG: the event, the probability, and the outlines of the positive class over the event."""
    step = -(-max(work.grid.height, work.grid.width) // _PICTURE)
    names = ("class", "probability", *COLOURS)
    classes, probability, *colours = (work.array(name)[::step, ::step] for name in names)
    height, width = classes.shape
    figure = matplotlib.figure.Figure(figsize=(15, min(max(5 * height / width + 0.4, 2.5), 25)), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(np.stack(colours, axis=-1))
    unseen = np.ma.masked_equal(probability, NOT_SEEN) / PROBABILITY_STEPS
    shown = axes[1].imshow(unseen, cmap="viridis", vmin=0, vmax=1)
    axes[1].set_facecolor("lightgrey")
    figure.colorbar(shown, ax=axes[1], shrink=0.7)
    axes[2].imshow(np.stack(colours, axis=-1))
    if (classes == positive).any() and min(classes.shape) > 1:
        axes[2].contour(classes == positive, levels=[0.5], colors="red", linewidths=0.8)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
    partial = work.folder / "quicklook.png"
    figure.savefig(partial, dpi=110, metadata={"Software": None})  # without the library's version
    partial.replace(path)
