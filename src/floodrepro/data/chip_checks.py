"""One chip's bytes in, one small record out: what is wrong with it, and what it adds to the data set's statistics.

Everything here is a pure function of the files' content, so that chips can be checked by any process in any order.
What a damaged file makes a decoder raise is a finding about that file, never the end of an audit.

What cannot be seen here: a changed byte in an uncompressed GeoTIFF, which has no checksum (the manifest's content
digest tells it), and an exchange of two bands or timesteps that look alike.
"""

import hashlib
import io
import math
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
import zarr

from floodrepro.data.moments import BandProducts, ChipRecord, Moments, exchanges
from floodrepro.data.names import (
    BEFORE,
    EVENT,
    IGNORE_INDEX,
    LABEL_DIR,
    NO_DATA,
    S1_BANDS,
    S2_BANDS,
    TIMESTEPS,
    Protocol,
)

Array = npt.NDArray[Any]

BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS}
DTYPES = {"S2L2A": "int16", "S1RTC": "float16", "DEM": "int16", LABEL_DIR: "int8"}

# Linear backscatter is never negative. In dB, all land and water but the brightest buildings is: on three real scenes
# more than 99 % of the pixels, and a chip with less than this share would have to be a steel roof from edge to edge.
LEAST_NEGATIVE = 0.01
# Over land VV lies about 6 dB above VH; where still water sinks both into the sensor's noise they come close to each
# other, but VH does not rise above. So half of the pixels alone is not enough, the gap has to be clear as well.
CLEAR_GAP_DB = 1.0
FEWEST_PIXELS = 64  # below that a share says nothing
# A chip of one field or of water alone has little that tells its bands apart: it takes more here than for an event,
# and it stays a warning. No crop of three real scenes comes near (moments.exchanges).
CHIP_PATH = 0.80
DAMAGED = "damaged"  # the check of a file that cannot be read
SAMPLED_EDGE = 64  # correlations take about this many rows and columns of a timestep: neighbours say the same


class Grid(NamedTuple):
    """Where a part's pixels lie: CRS, centre of the first pixel and step from pixel to pixel (x, y) in its units."""

    crs: Any
    first: tuple[float, float]
    step: tuple[float, float]


def check_chip(chip: str, files: Mapping[str, bytes], protocol: Protocol) -> ChipRecord:
    """Check all that can be checked on one chip.

    Args:
        chip: Its id.
        files: Content of its files by part; a part that is left out is not missed.
        protocol: What the mask's values mean.
    """
    record = ChipRecord(chip)
    pixels: dict[str, Array] = {}
    grids: dict[str, Grid] = {}
    for part, content in files.items():
        record.sizes[part] = len(content)
        record.sha256[part] = hashlib.sha256(content).hexdigest()
        try:
            read = _read_zarr if part in BANDS else _read_geotiff
            array, grid = read(record, part, content)
        except Exception as error:  # a damaged file can make zipfile, zarr, blosc or GDAL raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            record.add("error", DAMAGED, f"cannot be read: {reason}", part)
            continue
        if grid is not None:
            grids[part] = grid
        if _check_array(record, part, array):
            pixels[part] = array
    _check_same_grid(record, grids)
    edges = Counter(array.shape[-2:] for array in pixels.values())
    if any(height != width for height, width in edges) or len(edges) > 1:
        shapes = ", ".join(f"{part} {array.shape[-2]} x {array.shape[-1]}" for part, array in pixels.items())
        record.add("error", "shape", f"its parts are not squares of one size: {shapes}")
        return record
    record.edge = next(iter(edges), (0, 0))[0]
    _measure(record, pixels, protocol)
    return record


def _read_zarr(record: ChipRecord, part: str, content: bytes) -> tuple[Array, Grid | None]:
    """``bands`` (T, C, H, W) and the grid. zipfile checks the CRC of every member, and names the one that fails."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        store = {name: archive.read(name) for name in archive.namelist()}
    if ".zmetadata" not in store:
        raise ValueError("its consolidated metadata (.zmetadata) is missing")
    group = zarr.open_consolidated(store, mode="r")
    if "bands" not in group:
        raise ValueError("it holds no array 'bands'")
    array = group["bands"]
    if array.fill_value is None and array.nchunks_initialized != array.nchunks:
        raise ValueError(f"{array.nchunks - array.nchunks_initialized} of its {array.nchunks} chunks are missing")
    names = [str(name).casefold() for name in group["band"][:]] if "band" in group else []
    expected = [name.casefold() for name in BANDS[part]]
    if names != expected and sorted(names) == sorted(expected):  # other spellings are none of our business
        record.add("error", "band-order", f"its bands are in the order {', '.join(names)}", part)
    _check_times(record, part, group.attrs.get("datetime"))
    return array[...], _grid_of_zarr(record, part, group)


def _check_times(record: ChipRecord, part: str, text: Any) -> None:
    try:
        times = np.array([str(time).strip().rstrip("Z") for time in str(text).split(";")], "datetime64[ns]")
    except ValueError:
        record.add("warning", "timesteps", f"its datetime cannot be read: {text!r}", part)
        return
    if len(times) != len(TIMESTEPS):
        record.add("error", "timesteps", f"it has {len(times)} times instead of {len(TIMESTEPS)}: {text}", part)
    elif (steps := np.diff(times) / np.timedelta64(1, "D")).min() < 0:
        record.add("error", "timesteps", f"its timesteps are not in order: {text}", part)
    elif steps.min() == 0:
        record.add("warning", "timesteps", f"two of its timesteps have the same time: {text}", part)


def _grid_of_zarr(record: ChipRecord, part: str, group: Any) -> Grid | None:
    try:
        codes = sorted({code.strip() for code in str(group.attrs["proj_code"]).split(";")})  # one, or one a timestep
        if len(codes) > 1:
            record.add("error", "crs", f"its timesteps lie in {' and '.join(codes)}", part)
            return None
        crs = _crs(codes[0])
        x, y = (np.asarray(group[axis][:], np.float64) for axis in "xy")
        grid = Grid(crs, (float(x[0]), float(y[0])), (float(x[1] - x[0]), float(y[1] - y[0])))
    except Exception as error:  # CRSError, KeyError, IndexError …: the pixels are whole, only their place is not known
        record.add("warning", "grid", f"where it lies cannot be read: {type(error).__name__}: {error}", part)
        return None
    height, width = group["bands"].shape[-2:]
    even = all(np.allclose(np.diff(axis), step) for axis, step in zip((x, y), grid.step, strict=True))
    if (len(x), len(y)) != (width, height) or not even or grid.step[0] <= 0 or grid.step[1] >= 0:
        record.add("error", "grid", "its x or y does not go in even steps from west to east and north to south", part)
    boxes = _boxes(group.attrs.get("proj_bbox"))
    if len(boxes) not in (1, len(TIMESTEPS)):
        record.add("warning", "grid", f"its proj_bbox cannot be read: {group.attrs.get('proj_bbox')!r}", part)
        return grid
    for west, south, east, north in boxes:
        # Half a pixel of room at each side: whether x and y are centres or corners is nowhere written down.
        inside = west - grid.step[0] <= x.min() <= x.max() <= east + grid.step[0]
        if not (inside and south + grid.step[1] <= y.min() <= y.max() <= north - grid.step[1]):
            record.add("error", "grid", f"its pixels lie outside its proj_bbox {[west, south, east, north]}", part)
            break
    return grid


def _boxes(value: Any) -> list[list[float]]:
    """One box of four numbers, or one for each timestep, however they are joined; empty if they are anything else."""
    try:
        numbers = [float(text) for text in re.split(r"[\s;,()\[\]'\"]+", str(value)) if text]
    except ValueError:
        return []
    return [] if len(numbers) % 4 else [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


@lru_cache
def _crs(text: str) -> Any:
    return rasterio.crs.CRS.from_user_input(text)


def _read_geotiff(_record: ChipRecord, part: str, content: bytes) -> tuple[Array, Grid | None]:
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        if file.count != 1:
            raise ValueError(f"it has {file.count} bands instead of one")
        place = file.transform
        grid = Grid(file.crs, (place.c + place.a / 2, place.f + place.e / 2), (place.a, place.e))
        array: Array = file.read(1)
        return array, grid


def _check_array(record: ChipRecord, part: str, array: Array) -> bool:
    """Whether dtype and shape are those of the part; else a finding says what they are."""
    wanted = (len(TIMESTEPS), len(BANDS[part])) if part in BANDS else ()
    shape_fits = array.ndim == len(wanted) + 2 and array.shape[: len(wanted)] == wanted
    if not shape_fits:
        expected = ", ".join([*map(str, wanted), "H", "W"])
        record.add("error", "shape", f"its shape is {array.shape} instead of ({expected})", part)
    dtype_fits = array.dtype.newbyteorder("=") == np.dtype(DTYPES[part])
    if not dtype_fits:
        record.add("error", "dtype", f"its values are {array.dtype} instead of {DTYPES[part]}", part)
    return bool(shape_fits and dtype_fits)


def _check_same_grid(record: ChipRecord, grids: Mapping[str, Grid]) -> None:
    """All parts lie where most of them lie: in one CRS, and with less than a pixel between them."""
    if not grids:
        return
    crs = Counter(_name(grid.crs) for grid in grids.values()).most_common(1)[0][0]
    alike = {part: grid for part, grid in grids.items() if _name(grid.crs) == crs}
    for part in grids.keys() - alike.keys():
        record.add("error", "crs", f"its CRS is {_name(grids[part].crs)}, the other parts have {crs}", part)
    middle = [sorted(grid.first[axis] for grid in alike.values())[(len(alike) - 1) // 2] for axis in (0, 1)]
    step = Counter(grid.step for grid in alike.values()).most_common(1)[0][0]
    for part, grid in alike.items():
        shift = max(abs(a - b) for a, b in zip(grid.first, middle, strict=True))
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(grid.step, step, strict=True)):
            record.add("error", "grid", f"its pixels measure {grid.step}, those of the other parts {step}", part)
        elif shift > 0.5001 * abs(step[0]):  # half a pixel: corners were taken for centres somewhere, no more than that
            record.add("error", "grid", f"it lies {shift:.0f} m beside the other parts", part)


def _name(crs: Any) -> str:
    code = crs.to_epsg() if crs else None
    return f"EPSG:{code}" if code else (crs.to_wkt() if crs else "none")


def _measure(record: ChipRecord, pixels: Mapping[str, Array], protocol: Protocol) -> None:
    if "S2L2A" in pixels:
        _measure_optical(record, pixels["S2L2A"])
    if "S1RTC" in pixels:
        _measure_radar(record, pixels["S1RTC"])
    if "DEM" in pixels:
        seen: Array = pixels["DEM"] != NO_DATA
        record.moments["DEM"] = Moments.of([pixels["DEM"][seen]])
        record.missing["DEM"] = _missing(seen)
    if LABEL_DIR in pixels:
        _measure_mask(record, pixels[LABEL_DIR], protocol)
        if "S1RTC" in pixels:
            flood = pixels[LABEL_DIR] == len(protocol.class_names) - 1  # the last class of every protocol
            vv = pixels["S1RTC"][:, 0].astype(np.float32)
            change = (vv[EVENT] - vv[BEFORE])[flood & _seen_by_radar(vv[[BEFORE, EVENT]]).all(axis=0)]
            record.flood = Moments.of([change])


def _missing(seen: Array) -> tuple[int, int]:
    return int(seen.size - np.count_nonzero(seen)), int(seen.size)


def _seen_by_radar(decibels: Array) -> Array:
    # float16 has no -9999: it rounds to -10000.
    seen: Array = np.isfinite(decibels) & (decibels != np.float32(np.float16(NO_DATA)))
    return seen


def _measure_optical(record: ChipRecord, s2: Array) -> None:
    seen: Array = s2 != NO_DATA
    record.moments["S2L2A"] = Moments.of([s2[:, band][seen[:, band]] for band in range(len(S2_BANDS))])
    whole = np.asarray(seen.all(axis=1))
    record.missing["S2L2A"] = _missing(whole)
    stride = max(1, s2.shape[-1] // SAMPLED_EDGE)
    sample = s2[..., ::stride, ::stride].swapaxes(0, 1)[:, whole[..., ::stride, ::stride]]
    record.order = BandProducts.of(sample)
    best = next(iter(exchanges(record.order)), None)
    if best is not None and best.path < CHIP_PATH:
        pair = f"{S2_BANDS[best.first]} and {S2_BANDS[best.second]}"
        record.add("warning", "band-order", f"its bands {pair} look exchanged", "S2L2A")


def _measure_radar(record: ChipRecord, s1: Array) -> None:
    decibels = s1.astype(np.float32)
    infinite = int(np.isinf(decibels).sum())
    if infinite:
        # numpy.nan_to_num, which the reader calls, turns them into the largest number that there is.
        record.add("error", "infinite", f"{infinite} of its values are infinite", "S1RTC")
    seen = _seen_by_radar(decibels)
    record.moments["S1RTC"] = Moments.of([decibels[:, band][seen[:, band]] for band in range(len(S1_BANDS))])
    whole = np.asarray(seen.all(axis=1))
    record.missing["S1RTC"] = _missing(whole)
    values = decibels[seen & (decibels != 0)]  # 0 may have been filled in for no-data
    if values.size >= FEWEST_PIXELS and (negative := float((values < 0).mean())) < LEAST_NEGATIVE:
        message = (
            f"it is linear, not in dB: {negative:.1%} of its values are negative, their mean is {values.mean():.3g}"
        )
        record.add("error", "linear", message, "S1RTC")
    gap = decibels[:, 1] - decibels[:, 0]  # dB, (T, H, W)
    steps, shares = [], []
    for step in range(len(TIMESTEPS)):
        above = gap[step][whole[step]]
        if above.size >= FEWEST_PIXELS and np.median(above) > CLEAR_GAP_DB:
            steps.append(TIMESTEPS[step])
            shares.append(float((above > 0).mean()))
    if steps:
        message = f"vv and vh are swapped ({', '.join(steps)}): VH lies above VV on {max(shares):.0%} of the pixels"
        record.add("error", "band-order", message, "S1RTC")


def _measure_mask(record: ChipRecord, mask: Array, protocol: Protocol) -> None:
    values, counts = (found.tolist() for found in np.unique(mask, return_counts=True))
    histogram = dict(zip(values, counts, strict=True))
    ignored = histogram.pop(IGNORE_INDEX, 0)
    record.missing[LABEL_DIR] = (ignored, int(mask.size))
    known = range(len(protocol.class_names))
    unknown = sorted(set(histogram) - set(known))
    if unknown:
        listed = ", ".join(f"{value} on {histogram[value]} pixels" for value in unknown)
        names = ", ".join(str(value) for value in (IGNORE_INDEX, *known))
        record.add("error", "mask-values", f"it holds {listed}; protocol {protocol.name} knows {names}", LABEL_DIR)
    record.classes = {str(value): histogram.get(value, 0) for value in known}
