"""scene.yaml: which file shows what and when, and the UTM grid that all of it is brought to."""

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import rasterio
import rasterio.warp
import shapely
from numpy.typing import NDArray
from rasterio import Affine, DatasetReader
from rasterio._err import CPLE_BaseError  # PROJ's own errors have no other name
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from shapely.geometry import box

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.errors import DataError, UsageError

Array = NDArray[Any]
DEGREES = "EPSG:4326"
STEPS = ("month_before", "before", "event", "after")  # the data set's timesteps 0 to 3
EVENT_STEP = 2
SCL = "SCL"  # Sen2Cor's scene classification, optional
BANDS: dict[str, tuple[str, ...]] = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("data",)}
PIXEL = 10  # metres
# What may stand in scene.yaml of a sensor, a step and a file; the last in each are notes for its reader.
_UNITS = {"S2L2A": ("reflectance x 10000",), "S1RTC": ("dB", "power"), "DEM": ("m",)}  # the first is the default
_STEP_KEYS = ("time", "missing", "files", "orbit", "direction", "satellite", "coverage", "cloud")
_FILE_KEYS = ("raster", "bands", "offset", "baseline", "item", "tile", "cloud")


def parse_time(value: Any, where: str) -> datetime:
    """A time or date as YAML or a flag gives it, in UTC.

    Raises:
        UsageError: It is none, or long before or after all satellites.
    """
    try:
        time = datetime.fromisoformat(value.isoformat() if isinstance(value, date) else value)
        if not 2000 <= time.year < 2100:
            raise ValueError("no satellite flew then")
    except (TypeError, ValueError) as error:
        raise UsageError(f"'{value}' is no time", where=where, fix="2026-08-28 or 2026-08-28T05:12:12Z") from error
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Source:
    """Files of one place and time: by band, a path or link and the band's number in it; an offset where one is said."""

    bands: dict[str, tuple[str, int]]
    offset: float | None


@dataclass(frozen=True)
class Acquisition:
    """One sensor at one timestep, with what scene.yaml says of it; of its sources the first that has a pixel wins."""

    name: str  # as in scene.yaml, such as S1RTC.event
    sensor: str
    step: int
    time: Any  # datetime (UTC); a terrain model may have none
    facts: Mapping[str, Any]
    unit: str
    nodata: list[float]  # besides what each file says
    sources: list[Source]


@dataclass(frozen=True)
class Grid:
    """Pixels of 10 m whose edges lie at multiples of 10 m in a UTM zone."""

    crs: CRS
    transform: Affine
    height: int
    width: int


@dataclass(frozen=True)
class Scene:
    """What scene.yaml holds: acquisitions by sensor and timestep (the terrain model's is 0), polygons on the grid."""

    content: dict[str, Any]
    event: datetime | None
    acquisitions: dict[tuple[str, int], Acquisition]
    grid: Grid
    polygons: Any


def name_of(sensor: str, step: int) -> str:
    """A sensor at a timestep, as scene.yaml has it."""
    return sensor if sensor == "DEM" else f"{sensor}.{STEPS[step]}"


@contextmanager
def opened(place: str) -> Iterator[DatasetReader]:
    """Open a raster; a link into Azure's blob storage is signed right before, because signatures last 45 minutes.

    Raises:
        DataError: It cannot be opened, or read in the with-block.
    """
    link = place
    if re.match(r"https://\w+\.blob\.core\.windows\.net/", place):
        import planetary_computer  # of floodrepro[stac], with which the links were found

        link = planetary_computer.sign_url(place)
    try:
        with (
            rasterio.Env(GDAL_CACHEMAX=128, GDAL_HTTP_MAX_RETRY=5, GDAL_HTTP_RETRY_DELAY=1, VSI_CACHE=True),
            rasterio.open(link) as raster,
        ):
            yield raster
    except (RasterioError, CRSError, CPLE_BaseError, IndexError) as error:  # IndexError: there is no such band
        problem = console.public(str(error).replace(link, place))[:200]
        raise DataError(
            f"the raster cannot be read: {problem}", where=console.public(place), fix="look at scene.yaml"
        ) from error


def read_scene(path: Path) -> Scene:
    """Read a scene.

    Raises:
        UsageError: It does not say what it has to, or says what nobody understands.
        DataError: A file of it cannot be opened.
    """
    content = _known(recipes.read_yaml(path), ("area", "crs", "event", "stac", *BANDS), path)
    found: dict[tuple[str, int], Acquisition] = {}
    where = str(path)
    try:
        for sensor in BANDS:
            own = _STEP_KEYS if sensor == "DEM" else STEPS
            said = _known(content.get(sensor, {}), ("unit", "nodata", *own), f"{path}: {sensor}")
            for number, step in enumerate([said] if sensor == "DEM" else [said.get(name, {}) for name in STEPS]):
                where = f"{path}: {name_of(sensor, number)}"
                _known(step, (*_STEP_KEYS, *said), where)
                if step.get("files") and not step.get("missing"):
                    found[sensor, number] = _acquisition(sensor, number, said | step, path, where)
        where = str(path)
        if not found:
            raise UsageError("the scene names no files", where=path, fix="see docs/mapping.md")
        event = parse_time(content["event"], f"{path}: event") if "event" in content else None
        return Scene(content, event, found, *_grid(content, path, found))
    except (TypeError, ValueError, OverflowError, CPLE_BaseError) as error:  # CRSError is a ValueError
        raise UsageError(f"the scene is not understood: {error}", where=where, fix="see docs/mapping.md") from error


def _known(content: Any, keys: Iterable[str], where: Any) -> dict[str, Any]:
    """A part of scene.yaml, once it is a mapping of known keys."""
    if not isinstance(content, dict):
        raise UsageError(f"{reprlib.repr(content)} is not a mapping of keys to values", where=where)
    if strange := [key for key in content if key not in keys]:
        raise UsageError(f"unknown name '{strange[0]}'", where=where, fix=f"known are {', '.join(sorted(keys))}")
    return content


def _acquisition(sensor: str, step: int, said: dict[str, Any], scene: Path, where: str) -> Acquisition:
    """One sensor at one timestep; what stands at the sensor holds for its steps."""
    units, files = _UNITS[sensor], said["files"]
    unit, no_data = said.get("unit", units[0]), said.get("nodata", [0] if sensor == "S2L2A" else [])
    if unit not in units:
        raise UsageError(f"the unit '{unit}' is not known", where=where, fix=f"unit: {' or '.join(units)}")
    sources = [_source(file, sensor, scene, where) for file in ([files] if isinstance(files, str) else files)]
    time = None if sensor == "DEM" else parse_time(said.get("time"), where)
    return Acquisition(name_of(sensor, step), sensor, step, time, said, unit, [float(v) for v in no_data], sources)


def _source(entry: Any, sensor: str, scene: Path, where: str) -> Source:
    """One entry of `files`: a raster of all bands, a folder with a file for each band, or a file for each band."""
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else list(BANDS[sensor])
    entry = _known({"raster": entry} if isinstance(entry, str) else entry, (*_FILE_KEYS, *names), where)
    files = {key: entry[key] for key in ("raster", *names) if key in entry}
    folder = scene.absolute().parent
    places = {key: file if re.match(r"\w+://|/vsi", file) else str(folder / file) for key, file in files.items()}
    bands = {name: (place, 1) for name, place in places.items()}
    if raster := places.get("raster"):
        bands = {name: (raster, number) for number, name in enumerate(entry.get("bands", BANDS[sensor]), 1)}
    if raster and Path(raster).is_dir():
        of_band = {name: re.compile(rf"(^|[_.-]){name}([_.-]|$)", re.IGNORECASE) for name in names}
        bands = {name: (str(f), 1) for name in names for f in Path(raster).iterdir() if of_band[name].search(f.stem)}
    if missing := [name for name in BANDS[sensor] if name not in bands]:
        raise UsageError(f"no file for band {', '.join(missing)}", where=where, fix=f"bands: {', '.join(names)}")
    # From baseline 04.00 on, 1000 is added to every pixel but no-data (microsoft/PlanetaryComputer#134).
    baseline, offset = entry.get("baseline"), entry.get("offset")
    by_baseline = None if baseline is None else -1000 if float(baseline) >= 4 else 0
    offset = by_baseline if offset is None else float(offset)
    if not (-2000 <= (offset or 0) <= 0 and 0 <= float(baseline or 0) < 100):  # NaN is not either
        raise ValueError(f"offset {offset} and baseline {baseline}: they are from -2000 to 0, and such as 05.11")
    return Source(bands, offset)


def to_crs(geometry: Any, source: Any, target: Any) -> Any:
    """Geometries, one or an array of them, brought from one CRS to another vertex by vertex."""
    return shapely.transform(geometry, lambda *xy: rasterio.warp.transform(source, target, *xy), interleaved=False)


def _in_one_piece(geometry: Any) -> Any:
    """Geometries in degrees; what lies on both sides of 180 gets longitudes from 0 to 360."""
    west, _, east, _ = shapely.total_bounds(geometry)
    if east - west <= 180:
        return geometry
    return shapely.transform(geometry, lambda x, y: (x % 360, y), interleaved=False)


def to_degrees(geometry: Any, crs: Any) -> Any:
    """Geometries of any CRS in degrees, with vertices so close that edges stay where they were."""
    try:
        geographic = CRS.from_user_input(crs).is_geographic
        reach = np.abs(shapely.total_bounds(geometry)).max()
        if reach > (540 if geographic else 1e8):  # segmentize would fill the memory
            what = f"the coordinates reach {reach:g}: these are no {'degrees' if geographic else 'metres'}"
            raise UsageError(what, fix="give the polygons in degrees, or in a file that says its CRS")
        close = shapely.segmentize(_in_one_piece(geometry), 0.01) if geographic else shapely.segmentize(geometry, 1000)
        degrees = _in_one_piece(to_crs(close, crs, DEGREES))
        west, south, east, north = bounds = shapely.total_bounds(degrees)
    except (CPLE_BaseError, shapely.GEOSException) as error:
        raise UsageError(f"the area cannot be brought to degrees: {error}", fix="look at its coordinates") from error
    if not (-90 <= south < north <= 90 and west < east):  # infinite or NaN is what lies outside of a CRS
        raise UsageError(f"the area lies nowhere on Earth: {bounds}", fix="a box is west, south, east, north")
    return degrees


def read_polygons(path: Path, crs: Any = DEGREES) -> Any:
    """The polygons of a GeoJSON, GeoPackage or other vector file as an array, in *crs*."""
    try:
        meta, _, wkb, _ = pyogrio.raw.read(path, columns=[], force_2d=True)
        found = shapely.make_valid(shapely.from_wkb(wkb))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.GEOSException) as error:
        raise UsageError(f"the polygons cannot be read: {error}", where=path) from error
    parts = shapely.get_parts(shapely.get_parts(found))  # twice: a MultiPolygon may lie in a collection
    parts = parts[shapely.area(parts) > 0]
    if not len(parts):
        raise UsageError("the file holds no polygon", where=path)
    parts = to_degrees(parts, meta["crs"] or DEGREES)
    return parts if crs == DEGREES else to_crs(parts, DEGREES, crs)


def _grid(content: dict[str, Any], path: Path, found: dict[tuple[str, int], Acquisition]) -> tuple[Grid, Any]:
    """The grid and the area in its CRS: without `area`, the footprint of the event's first raster."""
    area, own = _known(content.get("area", {}), ("file", "box"), path), DEGREES
    if "file" in area:
        parts = read_polygons(path.parent / area["file"])
    elif "box" in area:
        parts = to_degrees([box(*area["box"])], DEGREES)
    else:
        sensor, step = min(found, key=lambda key: (abs(key[1] - EVENT_STEP), key[0]))
        with opened(found[sensor, step].sources[0].bands[BANDS[sensor][0]][0]) as raster:
            own = CRS.from_user_input(raster.crs)
            parts = to_degrees([box(*raster.bounds)], own)
    crs = CRS.from_user_input(content.get("crs", own))
    if not re.fullmatch(r"EPSG:32[67](0[1-9]|[1-5]\d|60)", crs.to_string()):
        west, south, east, north = shapely.total_bounds(parts)
        zone = int(((west + east) / 2 + 180) % 360 // 6) + 1
        nearest = f"EPSG:{326 if south + north > 0 else 327}{zone:02d}"
        if "crs" in content:  # elsewhere a pixel of 10 m is no 100 m² of ground
            raise UsageError("the CRS of a map is a UTM zone of WGS 84", where=path, fix=f"crs: {nearest}")
        crs = CRS.from_string(nearest)
    polygons = to_crs(parts, DEGREES, crs)
    bounds, slack = shapely.total_bounds(polygons), PIXEL / 1000  # what was in degrees must not add a row
    left, bottom = np.floor((bounds[:2] + slack) / PIXEL) * PIXEL
    right, top = np.maximum(np.ceil((bounds[2:] - slack) / PIXEL) * PIXEL, [left + PIXEL, bottom + PIXEL])
    size = round((top - bottom) / PIXEL), round((right - left) / PIXEL)
    return Grid(crs, Affine(PIXEL, 0, left, 0, -PIXEL, top), *size), polygons
