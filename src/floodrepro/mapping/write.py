"""What a map leaves: rasters while it is made, then COGs, polygons and a picture."""

import os
from pathlib import Path

import matplotlib.figure
import numpy as np
import pyogrio
import rasterio
import rasterio.features
import rasterio.shutil
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window
from shapely.geometry import shape

from floodrepro.mapping.scene import PIXEL, Array, Grid

NOT_SEEN = 255
PROBABILITY_STEPS = 250  # a probability of 1 in the uint8 raster
_RESAMPLING = {"class": "MODE", "probability": "AVERAGE", "quality": "NEAREST"}  # of overviews
# CPLE_BaseError: rasterio.shutil.copy lets GDAL's own errors through.
ERRORS = (OSError, RasterioError, CPLE_BaseError, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError)
COLOURS = ("red", "green", "blue")
_PICTURE = 1024  # pixels of the picture's longer side, at most
_CHUNK = 256  # rows that are held at once where a whole raster is read


def work_raster(folder: Path, name: str) -> Path:
    """A raster of the map that is being made: `class`, `probability`, `quality`, `positive` or a colour."""
    return folder / f"{name}.work.tif"


def write_rows(folder: Path, name: str, grid: Grid, row: int, values: Array) -> None:
    """Put rows (h, W) of an uncompressed work raster on disk.

    The first ones make the file, whose blocks all have their place from then on: what is written stays.

    Raises:
        OSError: They are not there afterwards: GDAL may say nothing of a full disk.
    """
    path, window = work_raster(folder, name), Window(0, row, grid.width, len(values))
    place = {"height": grid.height, "width": grid.width, "crs": grid.crs, "transform": grid.transform}
    place |= {"nodata": NOT_SEEN} if name in ("class", "probability") else {}
    new = {"driver": "GTiff", "count": 1, "dtype": "uint8"} | place
    with rasterio.open(path, "r+" if row else "w", **({} if row else new)) as file:
        file.write(values.astype(np.uint8), 1, window=window)
    with path.open("rb") as written:
        os.fsync(written.fileno())
    with rasterio.open(path) as file:
        if not np.array_equal(file.read(1, window=window), values):
            raise OSError(f"{path.name} is not what was written")


def write_cogs(folder: Path, output: Path) -> None:
    """Make class.tif, probability.tif and quality.tif of the work rasters, each with overviews."""
    options = {"driver": "COG", "compress": "DEFLATE", "bigtiff": "IF_SAFER", "num_threads": "1"}
    for name, resampling in _RESAMPLING.items():
        partial = folder / f"{name}.tif"
        rasterio.shutil.copy(work_raster(folder, name), partial, overview_resampling=resampling, **options)
        with rasterio.open(work_raster(folder, name)) as raw, rasterio.open(partial) as made:
            if made.checksum(1) != raw.checksum(1):  # GDAL may say nothing of a disk that is full
                raise OSError(f"{name}.tif is not what was written")
        partial.replace(output / partial.name)


def write_polygons(folder: Path, path: Path, name: str, min_hectares: float) -> int:
    """Write the outlines of the positive class as a GeoPackage and return their number.

    Patches of pixels that share an edge, with km² and mean probability, from the minimum mapping unit on.
    """
    with rasterio.open(work_raster(folder, "positive")) as raster:
        crs, band = raster.crs.to_string(), rasterio.band(raster, 1)  # which GDAL reads row by row
        patches = rasterio.features.shapes(band, mask=band, connectivity=4, transform=raster.transform)
        found = (shape(geometry) for geometry, _ in patches)
        polygons = np.array([polygon for polygon in found if polygon.area >= min_hectares * 10_000], object)
    partial = folder / path.name
    partial.unlink(missing_ok=True)
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})  # same map, same bytes
    columns = {"class": np.full(len(polygons), name, object), "area_km2": shapely.area(polygons) / 1e6}
    columns["mean_probability"] = _mean_probability(folder, polygons)
    how = {"layer": "water", "geometry_type": "Polygon", "driver": "GPKG", "crs": crs}
    pyogrio.raw.write(partial, shapely.to_wkb(polygons), list(columns.values()), list(columns), **how)
    if pyogrio.read_info(partial)["features"] != len(polygons):
        raise OSError(f"{path.name} is not what was written")
    partial.replace(path)
    return len(polygons)


def _mean_probability(folder: Path, polygons: Array) -> Array:
    """The mean probability of the positive class in each polygon, 0 to 1."""
    sums, pixels = np.zeros((2, len(polygons) + 1))
    low, high = shapely.bounds(polygons)[:, [1, 3]].T
    with rasterio.open(work_raster(folder, "probability")) as raster:
        for row in range(0, raster.height, _CHUNK):
            part = raster.read(1, window=Window(0, row, raster.width, min(_CHUNK, raster.height - row)))
            there = raster.window_transform(Window(0, row, raster.width, len(part)))
            here = np.flatnonzero((low < there.f) & (high > there.f - PIXEL * len(part)))
            if len(here):
                pairs = zip(polygons[here], here + 1, strict=True)
                owner = rasterio.features.rasterize(pairs, part.shape, transform=there, dtype="int32").ravel()
                sums += np.bincount(owner, part.ravel(), len(sums))
                pixels += np.bincount(owner, None, len(sums))
    return np.asarray(sums[1:] / pixels[1:] / PROBABILITY_STEPS)


def write_quicklook(folder: Path, path: Path, titles: tuple[str, str, str]) -> None:
    """Write a PNG: the event, the probability, and the outlines of the positive class over the event."""
    shown: dict[str, Array] = {}
    for name in ("positive", "probability", *COLOURS):
        with rasterio.open(work_raster(folder, name)) as raster:
            step = -(-max(raster.shape) // _PICTURE)
            shown[name] = raster.read(1, out_shape=(-(-raster.height // step), -(-raster.width // step)))
    positive, event = shown["positive"], np.stack([shown[name] for name in COLOURS], axis=-1)
    height, width = positive.shape
    figure = matplotlib.figure.Figure(figsize=(15, min(max(5 * height / width + 0.4, 2.5), 25)), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(event)
    axes[1].set_facecolor("lightgrey")
    seen = np.ma.masked_equal(shown["probability"], NOT_SEEN) / PROBABILITY_STEPS
    figure.colorbar(axes[1].imshow(seen, cmap="viridis", vmin=0, vmax=1), ax=axes[1], shrink=0.7)
    axes[2].imshow(event)
    if positive.any() and min(positive.shape) > 1:
        axes[2].contour(positive, levels=[0.5], colors="red", linewidths=0.8)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
    partial = folder / path.name
    figure.savefig(partial, dpi=110, metadata={"Software": None})  # without the library's version
    partial.replace(path)
