"""Areas: polygons from a file or a box, in degrees, in metres, or in the CRS of a map's grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio.warp
import shapely
from rasterio.crs import CRS
from shapely.affinity import translate
from shapely.geometry import box

from floodrepro.errors import UsageError

DEGREES = "EPSG:4326"


def to_crs(geometry: Any, source: Any, target: Any) -> Any:
    """Geometries, one or an array of them, brought from one CRS to another vertex by vertex."""
    if CRS.from_user_input(source) == CRS.from_user_input(target):
        return geometry
    return shapely.transform(
        geometry, lambda xy: np.stack(rasterio.warp.transform(source, target, *xy.T), axis=1) if len(xy) else xy
    )


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
        raise UsageError("the file holds no polygon", where=path, fix="give polygons or multipolygons")
    source = meta["crs"] or DEGREES
    if source == DEGREES and (np.abs(shapely.get_coordinates(parts)) > [360, 90]).any():
        raise UsageError("the coordinates are not degrees", where=path, fix="GeoJSON is longitude, latitude")
    return to_crs(parts, source, crs)


@dataclass(frozen=True)
class Area:
    """Polygons in degrees; longitudes may go beyond 180, so that a part across the antimeridian is in one piece."""

    parts: tuple[shapely.Polygon, ...]

    @classmethod
    def of(cls, source: Path | Sequence[float]) -> "Area":
        """The area of a file, or of a box (west, south, east, north) whose west may be greater than its east."""
        parts = read_polygons(source) if isinstance(source, Path) else [box(*source)]
        turned = [
            shapely.transform(p, lambda xy: np.stack([xy[:, 0] % 360, xy[:, 1]], 1)) if _width(p) > 180 else p
            for p in parts
        ]
        return cls(tuple(turned))

    @cached_property
    def whole(self) -> shapely.Geometry:
        """All parts as one in a local equal-area projection, in metres."""
        return shapely.union_all([self.project(part) for part in self.parts])

    @cached_property
    def _local(self) -> str:
        lon, lat = np.radians(shapely.get_coordinates(self.parts)).T
        middle = math.degrees(math.atan2(np.sin(lon).mean(), np.cos(lon).mean()))  # a mean that 180 does not upset
        return f"+proj=laea +lat_0={math.degrees(lat.mean())} +lon_0={middle} +datum=WGS84 +units=m"

    def project(self, geometry: shapely.Geometry) -> shapely.Geometry:
        """A geometry in metres; one split at 180, drawn around it or going beyond it all become the same."""
        if _width(geometry) < 180:  # edges are straight in degrees; of a shape drawn around 180 only corners count
            geometry = shapely.segmentize(geometry, 0.1)
        return shapely.make_valid(to_crs(geometry, DEGREES, self._local))

    def search_shape(self) -> shapely.Geometry:
        """A simple shape within ±180 degrees that the footprint of every item over the area intersects."""
        world = box(-180, -90, 180, 90)
        turned = [translate(part, turn) for part in self.parts for turn in (-360, 0, 360)]
        pieces = [piece for piece in shapely.intersection(turned, world) if piece.area > 0]
        west, south, east, north = shapely.total_bounds(pieces)
        if max(-west, east) < 170:
            return shapely.union_all(pieces).convex_hull
        # Planetary Computer keeps a footprint across 180 in one piece that goes beyond ±180, where a search may not
        # reach (microsoft/PlanetaryComputer#296). A strip at 180 meets it from either side.
        sides = [[p for p in pieces if p.centroid.x < 0], [p for p in pieces if p.centroid.x >= 0]]
        strips = [box(-180, south, -179.99, north), box(179.99, south, 180, north)]
        return shapely.union_all([shapely.union_all(side).convex_hull for side in sides if side] + strips)


def _width(geometry: shapely.Geometry) -> float:
    west, _, east, _ = shapely.bounds(geometry)
    return float(east - west)
