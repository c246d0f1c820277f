"""What a map leaves: rasters while it is made, then COGs, polygons and a picture.

H, W = rows and columns of the grid.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pyogrio
import rasterio
import rasterio.shutil
import shapely
from rasterio.features import shapes
from rasterio.windows import Window
from rasterio.windows import transform as window_transform
from scipy import ndimage
from shapely.geometry import shape

from floodrepro.mapping.scene import PIXEL, Grid
from floodrepro.mapping.tiles import Array

NOT_SEEN = 255
PROBABILITY_STEPS = 250  # a probability of 1 in the uint8 raster
_RESAMPLING = {"class": "MODE", "probability": "AVERAGE", "quality": "NEAREST"}  # of overviews
_PICTURE = 1024  # pixels of the picture's longer side, at most
_CHUNK = 1024  # rows that are turned into polygons at once


class WorkRasters:
    """Uncompressed rasters of the whole grid: a row is on disk, whatever happens to the process then."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        self.step = max(1, -(-max(grid.height, grid.width) // _PICTURE))
        self.small = -(-grid.height // self.step), -(-grid.width // self.step)
        profile = {"driver": "ENVI", "height": grid.height, "width": grid.width, "count": 1, "dtype": "uint8"}
        profile |= {"crs": grid.crs, "transform": grid.transform}
        for name in _RESAMPLING:
            if not self.path(name).with_suffix(".hdr").is_file():
                no_data = {} if name == "quality" else {"nodata": NOT_SEEN}
                rasterio.open(self.path(name), "w", **profile, **no_data).close()

    def path(self, name: str) -> Path:
        """The file of a raster."""
        return self.folder / f"{name}.raw"

    def array(self, name: str, mode: Any = "r") -> Any:
        """A raster (H, W), mapped into memory."""
        return np.memmap(self.path(name), np.uint8, mode, shape=(self.grid.height, self.grid.width))

    def picture(self, mode: Any = "r") -> Any:
        """The small colour picture (rows, columns, 3) of the event, mapped into memory."""
        mode = mode if self.path("picture").is_file() else "w+"
        return np.memmap(self.path("picture"), np.uint8, mode, shape=(*self.small, 3))

    def write(self, row: int, rasters: dict[str, Array], colours: Array) -> None:
        """Write finished rows: (h, W) by name, and the colours (h, W / step, 3) of every step-th column."""
        for name, values in rasters.items():
            mapped = self.array(name, "r+")
            mapped[row : row + len(values)] = values
            mapped.flush()
        first = -row % self.step
        kept = colours[first :: self.step]
        mapped = self.picture("r+")
        mapped[(row + first) // self.step :][: len(kept)] = kept
        mapped.flush()


def write_cogs(work: WorkRasters, output: Path) -> None:
    """Write class.tif, probability.tif and quality.tif, each with overviews."""
    for name, resampling in _RESAMPLING.items():
        partial = work.folder / f"{name}.tif"
        rasterio.shutil.copy(
            *(work.path(name), partial),
            driver="COG",
            compress="DEFLATE",
            bigtiff="IF_SAFER",
            overview_resampling=resampling,
            num_threads="1",
        )
        partial.replace(output / partial.name)


def write_polygons(work: WorkRasters, path: Path, layers: dict[int, str], min_hectares: float) -> dict[str, int]:
    """Write the outlines of some classes with area in km² and mean probability, whole across all chunks of rows.

    Args:
        work: The finished rasters.
        path: GeoPackage.
        layers: Names by class.
        min_hectares: Minimum mapping unit: smaller polygons are left out.

    Returns:
        Number of polygons by name.
    """
    rows: list[tuple[Any, str, float, float]] = []
    for number, name in layers.items():
        for polygon, pixels, mean in _polygons(work, number):
            if pixels * PIXEL**2 >= min_hectares * 10_000:
                rows.append((polygon, name, pixels * PIXEL**2 / 1e6, mean))
    partial = work.folder / "water.gpkg"
    partial.unlink(missing_ok=True)
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})  # same map, same bytes
    columns = [np.array(column) for column in zip(*[row[1:] for row in rows], strict=True)] or [np.array([])] * 3
    pyogrio.raw.write(
        partial,
        shapely.to_wkb(np.array([row[0] for row in rows], object)),
        [columns[0].astype(object), columns[1].astype(float), columns[2].astype(float)],
        ["class", "area_km2", "mean_probability"],
        crs=work.grid.crs.to_string(),
        geometry_type="Polygon",
        layer="water",
        driver="GPKG",
    )
    partial.replace(path)
    return {name: sum(row[1] == name for row in rows) for name in layers.values()}


def _polygons(work: WorkRasters, number: int) -> Iterator[tuple[Any, int, float]]:
    """Outline, pixels and mean probability of each patch of a class (pixels that share an edge)."""
    grid, classes, probability = work.grid, work.array("class"), work.array("probability")
    open_parts: list[tuple[Any, int, float]] = []
    for row in range(0, grid.height, _CHUNK):
        chosen = np.asarray(classes[row : row + _CHUNK]) == number
        labels = ndimage.label(chosen)[0]
        count = int(labels.max()) + 1
        pixels, sums = np.zeros(count, np.int64), np.zeros(count)
        for part in (np.s_[i : i + 64] for i in range(0, len(chosen), 64)):  # bincount copies to 64 bits
            pixels += np.bincount(labels[part].ravel(), None, count)
            sums += np.bincount(labels[part].ravel(), probability[row : row + _CHUNK][part].ravel(), count)
        there = window_transform(Window(0, row, grid.width, len(chosen)), grid.transform)
        top, bottom = grid.transform.f - PIXEL * row, grid.transform.f - PIXEL * (row + len(chosen))
        found = [(shape(s), int(pixels[int(v)]), float(sums[int(v)])) for s, v in shapes(labels, chosen, 4, there)]
        joined = _joined(open_parts, [part for part in found if part[0].bounds[3] == top])
        joined += [part for part in found if part[0].bounds[3] != top]
        at_end = row + len(chosen) == grid.height
        open_parts = [p for p in joined if p[0].bounds[1] == bottom and not at_end]
        for polygon, count, total in joined:
            if at_end or polygon.bounds[1] != bottom:
                yield polygon, count, total / count / PROBABILITY_STEPS


def _joined(above: list[Any], below: list[Any]) -> list[tuple[Any, int, float]]:
    """Parts above and below a line, made one where they share an edge."""
    parts = [*above, *below]
    if not parts:
        return []
    union = shapely.get_parts(shapely.union_all([part[0] for part in parts]))
    tree = shapely.STRtree(union)
    inside = [shapely.point_on_surface(part[0]) for part in parts]
    sums = np.zeros((len(union), 2))
    members, owners = tree.query(inside, predicate="within")
    np.add.at(sums, owners, np.array([part[1:] for part in parts])[members])
    return [
        (shapely.simplify(polygon, 0), int(count), total) for polygon, (count, total) in zip(union, sums, strict=True)
    ]


def write_quicklook(work: WorkRasters, path: Path, positive: int, titles: tuple[str, str, str]) -> None:
    """Write a PNG: the event, the probability, and the outlines of the positive class over the event."""
    step = work.step
    classes, probability = (work.array(name)[::step, ::step] for name in ("class", "probability"))
    colours = np.array(work.picture())
    height, width = classes.shape
    figure = matplotlib.figure.Figure(figsize=(15, min(max(5 * height / width + 0.4, 2.5), 25)), layout="constrained")
    axes = figure.subplots(1, 3)
    unseen = np.ma.masked_equal(probability, NOT_SEEN) / PROBABILITY_STEPS
    axes[0].imshow(colours)
    shown = axes[1].imshow(unseen, cmap="viridis", vmin=0, vmax=1)
    axes[1].set_facecolor("lightgrey")
    figure.colorbar(shown, ax=axes[1], shrink=0.7)
    axes[2].imshow(colours)
    if (classes == positive).any() and min(classes.shape) > 1:
        axes[2].contour(classes == positive, levels=[0.5], colors="red", linewidths=0.8)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    partial = work.folder / "quicklook.png"
    figure.savefig(partial, dpi=110, metadata={"Software": None})  # without the library's version
    partial.replace(path)
