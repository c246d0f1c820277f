"""Areas: the polygons of a file, or a box, in degrees, in the CRS of a map's grid, or in metres."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio.warp
import shapely
from shapely.geometry import box

from floodrepro.errors import UsageError

DEGREES = "EPSG:4326"


def to_crs(geometry: Any, source: Any, target: Any) -> Any:
    """Geometries, one or an array of them, brought from one CRS to another vertex by vertex."""
    return shapely.transform(geometry, lambda xy: np.stack(rasterio.warp.transform(source, target, *xy.T), axis=1))


def in_one_piece(geometry: Any) -> Any:
    """Geometries in degrees; what lies on both sides of 180 gets longitudes from 0 to 360."""
    west, _, east, _ = shapely.total_bounds(geometry)
    if east - west <= 180:
        return geometry
    return shapely.transform(geometry, lambda xy: np.stack([xy[:, 0] % 360, xy[:, 1]], axis=1))


def read_polygons(path: Path, crs: Any = DEGREES) -> Any:
    """The polygons of a GeoJSON, GeoPackage or other vector file as an array, in *crs*.

    Raises:
        UsageError: The file cannot be read or holds no polygon.
    """
    try:
        meta, _, wkb, _ = pyogrio.raw.read(path, columns=[], force_2d=True)
        found = shapely.make_valid(shapely.from_wkb(wkb))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.GEOSException) as error:
        raise UsageError(f"the polygons cannot be read: {error}", where=path) from error
    parts = shapely.get_parts(shapely.get_parts(found))  # twice: a MultiPolygon may lie in a collection
    parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    if not len(parts):
        raise UsageError("the file holds no polygon", where=path)
    if not meta["crs"] and (np.abs(shapely.get_coordinates(parts)) > [360, 90]).any():
        raise UsageError("the coordinates are not degrees", where=path, fix="GeoJSON is longitude, latitude")
    return to_crs(in_one_piece(parts) if meta["crs"] in (None, DEGREES) else parts, meta["crs"] or DEGREES, crs)


class Area:
    """Where a flood is looked for.

    Args:
        source: A file of polygons, or a box (west, south, east, north) in degrees; across 180 its west is greater.

    Attributes:
        whole: All of it, in metres in a local equal-area projection.
    """

    def __init__(self, source: Path | Sequence[float]) -> None:
        self._parts = read_polygons(source) if isinstance(source, Path) else in_one_piece([box(*source)])
        west, south, east, north = shapely.total_bounds(self._parts)
        self._local = f"+proj=laea +lat_0={(south + north) / 2} +lon_0={(west + east) / 2} +datum=WGS84 +units=m"
        self.whole = shapely.union_all([self.project(part) for part in self._parts])

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
