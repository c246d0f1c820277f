"""scene.yaml: which file shows what and when, and the UTM grid that all of it is brought to."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from rasterio import Affine, DatasetReader
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds
from shapely.geometry import box

from floodrepro import recipe as recipes
from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.errors import DataError, UsageError
from floodrepro.mapping.area import DEGREES, read_polygons, to_crs

STEPS = ("month_before", "before", "event", "after")  # the data set's timesteps 0 to 3
EVENT_STEP = 2
SCL = "SCL"  # Sen2Cor's scene classification, optional
BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("data",)}
UNITS = {"S2L2A": ("reflectance x 10000",), "S1RTC": ("dB", "power"), "DEM": ("m",)}  # the first is the default
PIXEL = 10  # metres
_KEYS = {*BANDS, "area", "crs", "stac", "sign", "event", "notes", "radar_optical_gap_days"}
_SENSOR_KEYS = {*STEPS, "collection", "unit", "nodata", "files"}


@dataclass(frozen=True)
class Source:
    """Files of one place and time: by band, a path or link and the number of the band in it; and what else is known."""

    bands: dict[str, tuple[str, int]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Acquisition:
    """One sensor at one timestep (0 for the terrain model); of several sources the first that has a pixel wins."""

    sensor: str
    step: int
    time: datetime | None
    facts: dict[str, Any]
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """How messages and scene.yaml call it, such as ``S1RTC.event``."""
        return name_of(self.sensor, self.step)


@dataclass(frozen=True)
class Grid:
    """Pixels of 10 m whose edges lie at multiples of 10 m in a UTM zone."""

    crs: CRS
    transform: Affine
    height: int
    width: int


@dataclass(frozen=True)
class Scene:
    """A scene as its file describes it.

    Args:
        content: What the file holds.
        event: When the flood began, if it says so.
        acquisitions: By sensor and timestep.
        units: By sensor.
        no_data: By sensor, values that mean no data besides each file's own.
        sign: Whether links are signed for Planetary Computer before they are opened.
        grid: Of the map.
        polygons: The area in the grid's CRS; None where all of the grid is meant.
    """

    content: dict[str, Any]
    event: datetime | None
    acquisitions: dict[tuple[str, int], Acquisition]
    units: dict[str, str]
    no_data: dict[str, list[float]]
    sign: bool
    grid: Grid
    polygons: Any


def name_of(sensor: str, step: int) -> str:
    """A sensor at a timestep, as scene.yaml has it."""
    return sensor if sensor == "DEM" else f"{sensor}.{STEPS[step]}"


def opened(place: str, *, sign: bool) -> DatasetReader:
    """Open a raster; a link is signed right before, because signatures last 45 minutes.

    Raises:
        DataError: It cannot be opened.
    """
    link = place
    if sign and place.startswith("http"):
        try:
            import planetary_computer
        except ImportError as error:
            raise UsageError("signed links need planetary-computer", fix="pip install 'floodrepro[stac]'") from error
        link = planetary_computer.sign_url(place)  # leaves alone what is not in Azure's blob storage
    try:
        return rasterio.open(link)
    except RasterioError as error:
        problem = str(error).replace(link, "")[:200]
        raise DataError(f"the raster cannot be opened: {problem}", where=place, fix="look at scene.yaml") from error


def read_scene(path: Path) -> Scene:
    """Read a scene.

    Raises:
        UsageError: It does not say what it has to, or says what nobody understands.
        DataError: A file of it cannot be opened.
    """
    content = recipes.read(path)
    _refuse_unknown(content, _KEYS, path)
    found: dict[tuple[str, int], Acquisition] = {}
    units, no_data = {}, {}
    for sensor in [name for name in BANDS if content.get(name)]:
        entry = content[sensor]
        _refuse_unknown(entry, _SENSOR_KEYS, f"{path}: {sensor}")
        units[sensor] = entry.get("unit", UNITS[sensor][0])
        no_data[sensor] = entry.get("nodata", [0] if sensor == "S2L2A" else [])
        if units[sensor] not in UNITS[sensor]:
            fix = f"unit: {' or '.join(UNITS[sensor])}"
            raise UsageError(f"unknown unit '{units[sensor]}' of {sensor}", where=path, fix=fix)
        steps = {0: entry} if sensor == "DEM" else {i: entry[s] for i, s in enumerate(STEPS) if s in entry}
        found |= {(sensor, i): _acquisition(sensor, i, e, path) for i, e in steps.items() if not e.get("missing")}
    if not found:
        raise UsageError("the scene names no files", where=path, fix="see docs/mapping.md")
    sign = content.get("sign") == "planetary-computer"
    grid, polygons = _grid(content, path, found, sign)
    return Scene(content, _time(content.get("event"), path), found, units, no_data, sign, grid, polygons)


def _refuse_unknown(entry: Any, known: set[str], where: Path | str) -> None:
    if not isinstance(entry, dict) or (unknown := [str(key) for key in entry if key not in known]):
        problem = f"unknown key '{unknown[0]}'" if isinstance(entry, dict) else "this is no mapping"
        raise UsageError(problem, where=where, fix=f"known keys: {', '.join(sorted(known))}")


def _acquisition(sensor: str, step: int, entry: dict[str, Any], path: Path) -> Acquisition:
    where, files = f"{path}: {name_of(sensor, step)}", entry.get("files")
    if not files or (sensor != "DEM" and not entry.get("time")):
        raise UsageError("'files' and 'time' are needed", where=where, fix="or write {missing: true}")
    listed = [files] if isinstance(files, str) else files
    sources = tuple(_source(file, sensor, path.parent, where) for file in listed)
    return Acquisition(sensor, step, _time(entry.get("time"), where), entry, sources)


def _source(entry: Any, sensor: str, folder: Path, where: str) -> Source:
    """One entry of ``files``: a raster of all bands, a folder with a file for each band, or a file for each band."""
    entry = {"raster": entry} if isinstance(entry, str) else entry
    names = [*BANDS[sensor], SCL] if sensor == "S2L2A" else list(BANDS[sensor])
    places = {
        k: v if re.match(r"\w+://|/vsi", v) else str(folder / v) for k, v in entry.items() if k in (*names, "raster")
    }
    raster = places.get("raster")
    if raster and Path(raster).is_dir():
        bands: dict[str, tuple[str, int]] = {}
        for name in names:
            pattern = re.compile(rf"(^|[_.-]){name}([_.-]|$)", re.IGNORECASE)
            for file in sorted(file for file in Path(raster).iterdir() if pattern.search(file.stem)):
                if name in bands:
                    raise UsageError(f"{bands[name][0]} and {file} look like band {name}", where=where)
                bands[name] = (str(file), 1)
    elif raster:
        bands = {name: (raster, number) for number, name in enumerate(entry.get("bands", BANDS[sensor]), 1)}
    else:
        bands = {name: (place, 1) for name, place in places.items()}
    facts = {k: v for k, v in entry.items() if k not in (*names, "raster", "bands")}
    fix = f"bands: {', '.join(names)}"
    if unknown := {*bands, *facts} - {*names, "item", "tile", "baseline", "offset", "cloud"}:
        raise UsageError(f"unknown band or key '{min(unknown)}'", where=where, fix=fix)
    if missing := [name for name in BANDS[sensor] if name not in bands]:
        raise UsageError(f"no file for band {', '.join(missing)}", where=where, fix=fix)
    return Source(bands, facts)


def _time(value: Any, where: Path | str) -> datetime | None:
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value.isoformat() if isinstance(value, date) else value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"'{value}' is no time", where=where, fix="2026-08-28 or 2026-08-28T05:12:12Z") from error
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


def _grid(
    content: dict[str, Any], path: Path, found: dict[tuple[str, int], Acquisition], sign: bool
) -> tuple[Grid, Any]:
    """The grid, and the area's polygons in it; without an area, the footprint of the event's first raster."""
    area, polygons, crs = content.get("area") or {}, None, content.get("crs")
    if "file" in area:
        polygons = read_polygons(path.parent / area["file"])
        outline, own = box(*shapely.total_bounds(polygons)), CRS.from_user_input(DEGREES)
    elif "box" in area:
        outline, own = box(*area["box"]), CRS.from_user_input(area.get("crs", DEGREES))
    else:
        first = min(found.values(), key=lambda a: (abs(a.step - EVENT_STEP), a.sensor))
        with opened(first.sources[0].bands[BANDS[first.sensor][0]][0], sign=sign) as raster:
            outline, own = box(*raster.bounds), raster.crs
    if crs is None and re.fullmatch(r"EPSG:32[67]\d\d", own.to_string()):
        crs = own
    elif crs is None:
        west, south, east, north = transform_bounds(own, DEGREES, *outline.bounds)
        zone = int(((west + east) / 2 + 180) % 360 // 6) + 1
        crs = f"EPSG:{326 if south + north > 0 else 327}{zone:02d}"
    bounds = np.array(transform_bounds(own, crs, *outline.bounds))
    if polygons is not None:
        polygons = to_crs(shapely.segmentize(polygons, 0.01), own, crs)
        bounds = shapely.total_bounds(polygons)
    slack = PIXEL / 1000  # a corner that went to degrees and back must not add a row
    left, bottom = np.floor((bounds[:2] + slack) / PIXEL) * PIXEL
    right, top = np.maximum(np.ceil((bounds[2:] - slack) / PIXEL) * PIXEL, [left + PIXEL, bottom + PIXEL])
    size = round((top - bottom) / PIXEL), round((right - left) / PIXEL)
    return Grid(CRS.from_user_input(crs), Affine(PIXEL, 0, left, 0, -PIXEL, top), *size), polygons
