"""scene.yaml: which file shows what and when, and the UTM grid that all of it is brought to."""

import math
import re
from collections.abc import Iterator, Mapping
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
from rasterio import Affine, DatasetReader
from rasterio._err import CPLE_BaseError  # PROJ's own errors have no other name
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from shapely.geometry import box

from floodrepro import recipe as recipes
from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.errors import DataError, UsageError

DEGREES = "EPSG:4326"
STEPS = ("month_before", "before", "event", "after")  # the data set's timesteps 0 to 3
EVENT_STEP = 2
SCL = "SCL"  # Sen2Cor's scene classification, optional
BANDS: dict[str, tuple[str, ...]] = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("data",)}
PIXEL = 10  # metres
_UNITS = {"S2L2A": ("reflectance x 10000",), "S1RTC": ("dB", "power"), "DEM": ("m",)}  # the first is the default
_NO_DATA = {"S2L2A": [0], "S1RTC": [], "DEM": []}  # besides what each file says

# What scene.yaml may say, by key: a type (object: anything), a pattern of text, [what a list holds], {what a mapping
# holds}, or a tuple of alternatives.
_NUMBER, _TIME, _CRS = (int, float), (str, date, datetime), (str, int)
_NOTES = dict.fromkeys(("orbit", "direction", "satellite", "coverage", "cloud"), object)


def _keys_of(sensor: str) -> dict[str, Any]:
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else list(BANDS[sensor])
    file: dict[str, Any] = dict.fromkeys(("item", "tile", "cloud"), object) | dict.fromkeys(("raster", *names), str)
    file |= {"bands": [re.compile("|".join(names))], "offset": _NUMBER}
    file["baseline"] = (*_NUMBER, re.compile(r"\d+(\.\d+)?"))
    common = {"unit": re.compile("|".join(_UNITS[sensor])), "nodata": [_NUMBER]}
    dated = common | _NOTES | {"time": _TIME, "missing": bool, "files": (str, [(str, file)])}
    return dated if sensor == "DEM" else common | dict.fromkeys(STEPS, dated)


_KEYS = {sensor: _keys_of(sensor) for sensor in BANDS} | {
    "area": {"file": str, "box": [_NUMBER] * 4, "crs": _CRS},
    "crs": _CRS,
    "event": _TIME,
    "stac": str,
}
_WORDS = {str: "text", bool: "true or false", dict: "a mapping of keys to values"}
_WORDS |= dict.fromkeys((int, float), "a number") | dict.fromkeys((date, datetime), "a date")


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
    time: Any  # datetime (UTC), of the terrain model None
    facts: Mapping[str, Any]
    sources: tuple[Source, ...]


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
        try:
            import planetary_computer
        except ImportError as error:
            raise UsageError("signed links need planetary-computer", fix="pip install 'floodrepro[stac]'") from error
        link = planetary_computer.sign_url(place)
    try:
        with (
            rasterio.Env(GDAL_CACHEMAX=128, GDAL_HTTP_MAX_RETRY=5, GDAL_HTTP_RETRY_DELAY=1, VSI_CACHE=True),
            rasterio.open(link) as raster,
        ):
            yield raster
    except (RasterioError, CRSError, CPLE_BaseError, IndexError) as error:  # IndexError: there is no such band
        problem = str(error).replace(link, place)[:200]
        raise DataError(f"the raster cannot be read: {problem}", where=place, fix="look at scene.yaml") from error


def read_scene(path: Path) -> Scene:
    """Read a scene.

    Raises:
        UsageError: It does not say what it has to, or says what nobody understands.
        DataError: A file of it cannot be opened.
    """
    content = recipes.read_yaml(path)
    _check(content, _KEYS, f"{path}: ")
    found: dict[tuple[str, int], Acquisition] = {}
    for sensor in [sensor for sensor in BANDS if content.get(sensor)]:
        common = {"unit": _UNITS[sensor][0], "nodata": _NO_DATA[sensor]} | content[sensor]
        steps = [common] if sensor == "DEM" else [common.get(step, {"missing": True}) for step in STEPS]
        for step, facts in enumerate(steps):
            name = name_of(sensor, step)
            where = f"{path}: {name}"
            if facts.get("missing"):
                continue
            files = facts.get("files")
            if not files or (sensor != "DEM" and not facts.get("time")):
                raise UsageError("'files' and 'time' are needed", where=where, fix="or write {missing: true}")
            listed = [files] if isinstance(files, str) else files
            sources = tuple(_source(file, sensor, path.parent, where) for file in listed)
            time = parse_time(facts["time"], where) if "time" in facts else None
            found[sensor, step] = Acquisition(name, sensor, step, time, common | facts, sources)
    if not found:
        raise UsageError("the scene names no files", where=path, fix="see docs/mapping.md")
    try:
        grid, polygons = _grid(content, path, found)
    except ValueError as error:  # CRSError is one
        raise UsageError(f"unknown CRS: {error}", where=path, fix="crs: EPSG:32633") from error
    event = parse_time(content["event"], path) if content.get("event") else None
    return Scene(content, event, found, grid, polygons)


def _check(value: Any, known: Any, where: str) -> None:
    """Compare what scene.yaml says with the table above.

    Raises:
        UsageError: It has an unknown key, or a value of another kind.
    """
    options = known if isinstance(known, tuple) else (known,)
    for option in options:
        if isinstance(option, dict) and isinstance(value, dict):
            for key, content in value.items():
                if key not in option:
                    fix = f"known are {', '.join(sorted(option))}"
                    raise UsageError(f"unknown name '{key}'", where=where.rstrip(".: "), fix=fix)
                _check(content, option[key], f"{where}{key}.")
            return
        if isinstance(option, list) and isinstance(value, list) and len(option) in (1, len(value)):
            for content in value:
                _check(content, option[0], where)
            return
        if isinstance(option, re.Pattern) and isinstance(value, str) and option.fullmatch(value):
            return
        if option is object or (type(value) is option and (option is not float or math.isfinite(value))):
            return
    kinds = " or ".join(dict.fromkeys(map(_said, options)))
    raise UsageError(f"{value!r} is not {kinds}", where=where.rstrip(".: "))


def _said(option: Any) -> str:
    """One alternative of the table in words."""
    if isinstance(option, re.Pattern):
        return str(option.pattern)
    if isinstance(option, list):
        return "a list" if len(option) == 1 else f"a list of {len(option)}"
    return _WORDS[option if isinstance(option, type) else dict]


def _source(entry: Any, sensor: str, folder: Path, where: str) -> Source:
    """One entry of ``files``: a raster of all bands, a folder with a file for each band, or a file for each band."""
    entry = {"raster": entry} if isinstance(entry, str) else entry
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else list(BANDS[sensor])
    files = {key: entry[key] for key in ("raster", *names) if key in entry}
    places = {key: file if re.match(r"\w+://|/vsi", file) else str(folder / file) for key, file in files.items()}
    bands = {name: (place, 1) for name, place in places.items()}
    if raster := places.get("raster"):
        bands = {name: (raster, number) for number, name in enumerate(entry.get("bands", BANDS[sensor]), 1)}
    if raster and Path(raster).is_dir():
        of_band = {n: re.compile(rf"(^|[_.-]){n}([_.-]|$)", re.IGNORECASE) for n in names}
        listed = [(n, str(f)) for n in names for f in Path(raster).iterdir() if of_band[n].search(f.stem)]
        bands = {name: (file, 1) for name, file in listed}
        if len(bands) < len(listed):
            raise UsageError(f"several files of {raster} look like one band: {listed}", where=where)
    if missing := [name for name in BANDS[sensor] if name not in bands]:
        raise UsageError(f"no file for band {', '.join(missing)}", where=where, fix=f"bands: {', '.join(names)}")
    # From baseline 04.00 on, 1000 is added to every pixel but no-data (microsoft/PlanetaryComputer#134).
    baseline = entry.get("baseline")
    offset = entry.get("offset", baseline and (-1000 if float(baseline) >= 4 else 0))
    return Source(bands, offset)


def to_crs(geometry: Any, source: Any, target: Any) -> Any:
    """Geometries, one or an array of them, brought from one CRS to another vertex by vertex.

    Raises:
        UsageError: They lie where the CRS does not reach.
    """
    try:
        return shapely.transform(geometry, lambda xy: np.stack(rasterio.warp.transform(source, target, *xy.T), axis=1))
    except CPLE_BaseError as error:
        raise UsageError(f"the area lies nowhere on Earth: {error}", fix="look at its coordinates and CRS") from error


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
        layers = [name for name, kind in pyogrio.list_layers(path) if kind]  # a GeoPackage has tables without shapes
        if len(layers) > 1:
            told = f"the file has several layers ({', '.join(layers)}), and it is not known which is meant"
            raise UsageError(told, where=path, fix="save one of them to a file of its own")
        meta, _, wkb, _ = pyogrio.raw.read(path, *layers, columns=[], force_2d=True)
        found = shapely.make_valid(shapely.from_wkb(wkb))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.GEOSException) as error:
        raise UsageError(f"the polygons cannot be read: {error}", where=path) from error
    parts = shapely.get_parts(shapely.get_parts(found))  # twice: a MultiPolygon may lie in a collection
    parts = parts[shapely.area(parts) > 0]
    if not len(parts):
        raise UsageError("the file holds no polygon", where=path)
    if not meta["crs"] and (np.abs(shapely.get_coordinates(parts)) > [360, 90]).any():
        raise UsageError("the coordinates are not degrees", where=path, fix="GeoJSON is longitude, latitude")
    return to_crs(in_one_piece(parts) if meta["crs"] in (None, DEGREES) else parts, meta["crs"] or DEGREES, crs)


def parse_time(value: Any, where: Path | str) -> datetime:
    """A time or date as YAML or a flag gives it, in UTC.

    Raises:
        UsageError: It is none.
    """
    try:
        time = datetime.fromisoformat(value.isoformat() if isinstance(value, date) else value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"'{value}' is no time", where=where, fix="2026-08-28 or 2026-08-28T05:12:12Z") from error
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def _grid(content: dict[str, Any], path: Path, found: dict[tuple[str, int], Acquisition]) -> tuple[Grid, Any]:
    """The grid and the area in its CRS: without `area`, the footprint of the event's first raster."""
    area = content.get("area", {})
    if "area" in content and set(area) not in ({"file"}, {"box"}, {"box", "crs"}):
        raise UsageError("the area is to be a file, or a box with or without its crs", where=path)
    if "file" in area:
        parts, own = read_polygons(path.parent / area["file"]), DEGREES
    elif "box" in area:
        parts, own = [box(*area["box"])], area.get("crs", DEGREES)
    else:
        sensor, step = min(found, key=lambda key: (abs(key[1] - EVENT_STEP), key[0]))
        with opened(found[sensor, step].sources[0].bands[BANDS[sensor][0]][0]) as raster:
            parts, own = [box(*raster.bounds)], CRS.from_user_input(raster.crs)
    own = CRS.from_user_input(own)
    if own.is_geographic:
        parts = in_one_piece(parts)
    west, south, east, north = shapely.total_bounds(to_crs(parts, own, DEGREES))
    if not (-90 <= south < north <= 90 and west < east):  # infinite or NaN is what lies outside of a CRS
        told = f"longitude {west:g} to {east:g}, latitude {south:g} to {north:g}"
        fix = "a box is [west, south, east, north]"
        raise UsageError(f"the area lies nowhere on Earth: {told}", where=path, fix=fix)
    zone = int(((west + east) / 2 + 180) % 360 // 6) + 1
    crs = CRS.from_user_input(content["crs"]) if "crs" in content else own
    if not re.fullmatch(r"EPSG:32[67](0[1-9]|[1-5]\d|60)", crs.to_string()):
        nearest = f"EPSG:{326 if south + north > 0 else 327}{zone:02d}"
        if "crs" in content:  # elsewhere a pixel of 10 m is no 100 m² of ground
            raise UsageError("the CRS of a map is a UTM zone of WGS 84", where=path, fix=f"crs: {nearest}")
        crs = CRS.from_string(nearest)
    polygons = to_crs(shapely.segmentize(parts, 0.01 if own.is_geographic else 1000), own, crs)
    bounds, slack = shapely.total_bounds(polygons), PIXEL / 1000  # what was in degrees must not add a row
    left, bottom = np.floor((bounds[:2] + slack) / PIXEL) * PIXEL
    right, top = np.maximum(np.ceil((bounds[2:] - slack) / PIXEL) * PIXEL, [left + PIXEL, bottom + PIXEL])
    size = round((top - bottom) / PIXEL), round((right - left) / PIXEL)
    return Grid(crs, Affine(PIXEL, 0, left, 0, -PIXEL, top), *size), polygons
