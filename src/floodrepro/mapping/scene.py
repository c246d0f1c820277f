"""scene.yaml: which file shows what and when, and the UTM grid that all of it is brought to."""

import difflib
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

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

from floodrepro import recipe as recipes
from floodrepro.console import public
from floodrepro.data.protocols import EVENT, S1_BANDS, S2_BANDS, STEPS
from floodrepro.errors import DataError, UsageError

Array = NDArray[Any]
Grid = Any  # what has crs, transform, height and width: a scene or an open raster
Bands = dict[str, tuple[str, int]]  # by name, a path or link and the band's number in it
DEGREES = "EPSG:4326"
SCL = "SCL"  # Sen2Cor's scene classification, optional
BANDS: dict[str, tuple[str, ...]] = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("data",)}
LAYERS = BANDS | {"S2L2A": (*S2_BANDS, SCL)}  # what files may have
PIXEL = 10  # metres
_UNREADABLE = (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError)
_RASTERS = (".tif", ".tiff", ".jp2", ".vrt")  # of a folder of bands: other programs leave more beside them
_GDAL = {"GDAL_CACHEMAX": 128, "GDAL_HTTP_MAX_RETRY": 5, "GDAL_HTTP_RETRY_DELAY": 1, "VSI_CACHE": True}
_UNITS = {"S2L2A": ("reflectance x 10000",), "S1RTC": ("dB", "power"), "DEM": ("m",)}  # the first is the default
# What may stand in a scene.yaml; the last line has notes for its reader.
_NAMES = {*STEPS, *LAYERS, *(name for names in LAYERS.values() for name in names), "area", "file", "box", "missing"}
_NAMES |= {"unit", "nodata", "time", "orbit", "files", "raster", "bands", "offset", "baseline"}
_NAMES |= {"event", "stac", "days", "direction", "satellite", "coverage", "cloud", "item", "tile"}


def parse_time(value: Any, where: str) -> datetime:
    """A time or date as YAML or a flag gives it, in UTC; anything else raises `UsageError`."""
    try:
        time = datetime.fromisoformat(str(value))
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"'{value}' is no time", where=where, fix="2026-08-28 or 2026-08-28T05:12:12Z") from error


class Acquisition(NamedTuple):
    """One sensor at one timestep; of its sources the first that has a pixel wins."""

    name: str  # as in scene.yaml, such as S1RTC.event
    sensor: str
    step: int
    time: Any  # datetime (UTC); a terrain model may have none
    said: dict[str, Any]  # in scene.yaml; its unit and nodata (besides what each file says) are always there
    sources: list[tuple[Bands, float | None]]  # each with its offset, where one is said


class Scene(NamedTuple):
    """What scene.yaml holds, and its grid: pixels of 10 m whose edges lie at multiples of 10 m in a UTM zone."""

    content: dict[str, Any]
    acquisitions: dict[tuple[str, int], Acquisition]  # by sensor and timestep; the terrain model's is 0
    polygons: Any  # of the area, in the grid's CRS
    crs: CRS
    transform: Affine
    height: int
    width: int


def name_of(sensor: str, step: int) -> str:
    """A sensor at a timestep, as scene.yaml has it."""
    return sensor if sensor == "DEM" else f"{sensor}.{STEPS[step]}"


@contextmanager
def opened(place: str) -> Iterator[DatasetReader]:
    """Open a raster; raises `DataError` where it cannot be opened, or read in the with-block.

    A link into Azure's blob storage is signed right before, because signatures last 45 minutes.
    """
    link = place
    if re.match(r"https://\w+\.blob\.core\.windows\.net/", place):
        import planetary_computer  # of floodrepro[stac], with which the links were found

        link = planetary_computer.sign_url(place)
    try:
        with rasterio.Env(**_GDAL), rasterio.open(link) as raster:
            if not raster.crs:
                cure = "gdalwarp brings it to one" if raster.gcps[0] else "gdal_edit.py -a_srs EPSG:N sets one"
                raise CRSError(f"it has no CRS; {cure}")
            yield raster
    except (RasterioError, CRSError, CPLE_BaseError, IndexError) as error:  # IndexError: there is no such band
        what = f"the raster cannot be read: {public(str(error).replace(link, place))[:200]}"
        raise DataError(what, where=public(place), fix="check the file, and what names it") from error


def read_scene(path: Path) -> Scene:
    """Read a scene; raises `UsageError` where it is not understood, and `DataError` where a file cannot be opened.

    What stands at a sensor holds for its steps, and what stands at a step for its files.
    """
    content, found = recipes.read_yaml(path), dict[tuple[str, int], Acquisition]()
    names = {name for key, _ in recipes.leaves(content) for name in key.split(".") if not name.isdigit()}
    if strange := sorted(names - _NAMES):
        close = difflib.get_close_matches(strange[0], _NAMES, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(sorted(_NAMES))}"
        raise UsageError(f"unknown name '{strange[0]}'", where=path, fix=fix)
    try:
        for sensor, number in [(name, n) for name in BANDS for n in range(1 if name == "DEM" else len(STEPS))]:
            where = f"{path}: {name_of(sensor, number)}"
            said = {"unit": _UNITS[sensor][0], "nodata": [0] if sensor == "S2L2A" else []} | content.get(sensor, {})
            said |= {} if sensor == "DEM" else said.get(STEPS[number], {})
            if not said.get("files") and said.keys() & {"raster", *LAYERS[sensor]}:
                raise ValueError("it has no 'files'")
            if not said.get("files") or said.get("missing"):
                continue
            if said["unit"] not in _UNITS[sensor]:
                raise ValueError(f"the unit '{said['unit']}' is not known: say {' or '.join(_UNITS[sensor])}")
            # 0 is no power: it would be mixed into its neighbours.
            gaps = [*np.atleast_1d(said["nodata"]), *([0] if said["unit"] == "power" else [])]
            said["nodata"] = [float(value) for value in gaps]
            files = said["files"] if isinstance(said["files"], list) else [said["files"]]
            sources = [_source(file, said, sensor, path.absolute().parent) for file in files]
            time = None if sensor == "DEM" else parse_time(said.get("time"), where)
            found[sensor, number] = Acquisition(name_of(sensor, number), sensor, number, time, said, sources)
        where = str(path)
        return Scene(content, found, *_grid(content, path.parent, found))
    except (AttributeError, TypeError, ValueError, OverflowError, CPLE_BaseError) as error:  # CRSError is a ValueError
        raise UsageError(f"the scene is not understood: {error}", where=where, fix="see docs/mapping.md") from error


def _source(file: Any, said: dict[str, Any], sensor: str, folder: Path) -> tuple[Bands, float | None]:
    """One entry of `files`: a raster of all bands, a folder with a file for each band, or a file for each band."""
    names, entry = LAYERS[sensor], said | ({"raster": file} if isinstance(file, str) else file)
    paths = {key: entry[key] for key in ("raster", *names) if key in entry}
    paths = {key: path if re.match(r"\w+://|/vsi", path) else str(folder / path) for key, path in paths.items()}
    raster = paths.pop("raster", None)
    bands = {name: (path, 1) for name, path in paths.items()}
    if raster and Path(raster).is_dir():
        of_band = {name: re.compile(rf"(^|[_.-]){name}([_.-]|$)", re.IGNORECASE) for name in names}
        files = [file for file in sorted(Path(raster).iterdir()) if file.suffix.lower() in _RASTERS]
        found = [(name, str(file)) for name in names for file in files if of_band[name].search(file.stem)]
        bands = {name: (file, 1) for name, file in found}
        if twice := [(name, file) for name, file in found if bands[name][0] != file]:
            name, file = twice[0]
            both = f"{file} and {bands[name][0]}"
            raise ValueError(f"two files are named after {name}: {both}; a folder has one date, and a file a band")
    elif raster:
        bands = {name: (raster, number) for number, name in enumerate(entry.get("bands", BANDS[sensor]), 1)}
    if missing := [name for name in BANDS[sensor] if name not in bands]:
        raise ValueError(f"no file for band {', '.join(missing)}")
    # From baseline 04.00 on, 1000 is added to every pixel but no-data (microsoft/PlanetaryComputer#134).
    baseline = float(re.sub(r"^N?(\d\d)\.?(\d\d)$", r"\1.\2", str(entry.get("baseline", 0))))  # as in N0511
    by_baseline = None if "baseline" not in entry else -1000 if baseline >= 4 else 0
    offset = float(entry["offset"]) if "offset" in entry else by_baseline
    if not (-2000 <= (offset or -1) <= -1 and 0 <= baseline < 100):  # NaN is not either; -0.1 is of reflectances
        raise ValueError(f"offset {offset}, baseline {entry.get('baseline')}: 0 or from -2000 to -1, and such as 05.11")
    return bands, offset


def to_crs(geometry: Any, source: Any, target: Any) -> Any:
    """Geometries, an array of them, brought from one CRS to another; edges stay where they were.

    Raises `ValueError` where they lie nowhere on Earth.
    """
    if source != target:
        west, south, east, north = shapely.total_bounds(geometry)
        close = shapely.segmentize(geometry, (east - west + north - south) / 200)
        move = functools.partial(rasterio.warp.transform, source, target)
        geometry = shapely.transform(close, move, interleaved=False)
    west, south, east, north = bounds = shapely.total_bounds(geometry)
    if not (np.isfinite(bounds).all() and west < east and (target != DEGREES or -90 <= south < north <= 90)):
        raise ValueError(f"it lies nowhere on Earth: {', '.join(f'{edge:g}' for edge in bounds)}")
    if target == DEGREES and east - west > 180:  # on both sides of 180
        geometry = shapely.transform(geometry, lambda x, y: (x % 360, y), interleaved=False)
    return geometry


def read_polygons(path: Path, crs: Any = DEGREES) -> Any:
    """The polygons of a GeoJSON, GeoPackage or other vector file as an array in *crs*; raises `UsageError` for none."""
    try:
        layers = [name for name, kind in pyogrio.list_layers(path) if kind]  # QGIS keeps styles in a table beside them
        if len(layers) != 1:
            raise ValueError(f"there are {len(layers)} layers ({', '.join(layers)}), and one is needed")
        meta, _, wkb, _ = pyogrio.raw.read(path, layer=layers[0], columns=[], force_2d=True)
        parts = shapely.make_valid(shapely.from_wkb(wkb))
        parts = shapely.get_parts(shapely.get_parts(parts))  # twice: a MultiPolygon may lie in a collection
        if not shapely.area(parts).any():
            raise ValueError("the file holds no polygon")
        return to_crs(parts[shapely.area(parts) > 0], meta["crs"] or DEGREES, crs)
    except (*_UNREADABLE, ValueError, CPLE_BaseError) as error:
        fix = "give polygons in one layer of a GeoJSON, GeoPackage, Shapefile or FlatGeobuf; without a CRS, in degrees"
        raise UsageError(f"the polygons cannot be read: {error}", where=path, fix=fix) from error


def read_area(area: Any, folder: Path) -> Any:
    """The polygons, an array of them in degrees, of what stands at `area`; paths begin in *folder*."""
    if isinstance(area, dict) and "file" in area:
        return read_polygons(folder / area["file"])
    try:
        west, south, east, north = area["box"]
        return to_crs(np.array([shapely.box(west, south, east, north)]), DEGREES, DEGREES)
    except (KeyError, TypeError, ValueError) as error:
        fix = "{file: A.geojson}, or {box: [west, south, east, north]} in degrees"
        raise UsageError(f"this is no area: {area} ({error})", fix=fix) from error


def footprint(raster: DatasetReader) -> Any:
    """The outline of a raster in its CRS, which may be turned."""
    (height, width), place = raster.shape, raster.transform
    return shapely.Polygon([place * corner for corner in ((0, 0), (width, 0), (width, height), (0, height))])


def _grid(content: dict[str, Any], folder: Path, found: dict[tuple[str, int], Acquisition]) -> tuple[Any, ...]:
    """Polygons, CRS, transform, height, width; without `area`, the polygon is the footprint of the event's raster."""
    if content.get("area"):
        parts, crs = read_area(content["area"], folder), CRS.from_user_input(DEGREES)
    elif not found:
        raise ValueError("it names neither an area nor files")
    else:
        sensor, step = min(found, key=lambda key: (abs(key[1] - EVENT), key[0]))
        outlines, crs = [], None
        for bands, _ in found[sensor, step].sources:
            with opened(bands[BANDS[sensor][0]][0]) as raster:
                crs = crs or raster.crs  # of the first
                outlines.append(to_crs(footprint(raster), raster.crs, crs))
        parts = np.array(outlines)
    epsg = crs.to_epsg() or 0
    if epsg // 100 not in (326, 327):  # WGS 84 / UTM, north and south: elsewhere 10 m x 10 m are not 100 m² of ground
        west, south, east, north = shapely.total_bounds(to_crs(parts, crs, DEGREES))
        epsg = (32600 if south + north > 0 else 32700) + int(((west + east) / 2 + 180) % 360 // 6) + 1
    polygons = to_crs(parts, crs, CRS.from_epsg(epsg))
    bounds, slack = shapely.total_bounds(polygons), PIXEL / 1000  # what was in degrees must not add a row
    left, bottom = np.floor((bounds[:2] + slack) / PIXEL) * PIXEL
    right, top = np.ceil((bounds[2:] - slack) / PIXEL) * PIXEL
    size = round((top - bottom) / PIXEL), round((right - left) / PIXEL)
    return polygons, CRS.from_epsg(epsg), Affine(PIXEL, 0, left, 0, -PIXEL, top), *size
