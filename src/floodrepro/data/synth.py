"""Generated chips: a small data set in ImpactMesh-Flood's on-disk format, from nothing but a seed.

It stands in for the real data, about 210 GB, wherever what matters is that the pipeline works: tests, the demo, a
first look at a new machine. The real `impactmesh.ImpactMeshDataset` reads it as its own. Events are numbered from
EMSR9001, beyond any Copernicus activation, so that a generated chip is never taken for a real one.

Not documented by the data set, and therefore assumed here: a chip id's easting and northing are the centre of its
upper left pixel; `proj_bbox` and `eo_cloud_cover` are joined by ";" as `datetime` is; `nan_mask`, `data_mask` and
`cloud_mask` are uint8 (T, H, W) with 1 for yes; only S2L2A has `eo_cloud_cover` and `s2_mgrs_tile`.
"""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.warp
import zarr
from numcodecs import blosc

from floodrepro.data import names
from floodrepro.data.scene import SCL_CLOUD, SCL_NO_DATA, SCL_THIN_CLOUD, make_scene
from floodrepro.errors import DataError, UsageError

PIXEL = 10  # metres
FIRST_EVENT, MAX_EVENTS = 9001, 900  # four digits each, so that names sort in the order of generation
# Days from the event at the four timesteps, as the two satellites' orbits might fall.
DAYS = {"S1RTC": (-30, -12, 0, 12), "S2L2A": (-33, -8, 1, 13)}
BANDS = {"S1RTC": names.S1_BANDS, "S2L2A": names.S2_BANDS}

Pixels = npt.NDArray[Any]
Put = Callable[[str, str, str, bytes], None]  # split, part, file name, content


@dataclass(frozen=True)
class SynthReport:
    """What was generated: counts by split, and shares by class name over the pixels that are not ignored."""

    root: Path
    layout: str
    protocol: str
    seed: int
    events: dict[str, int]
    chips: dict[str, int]
    class_shares: dict[str, float]
    ignored_share: float

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "root": str(self.root)}


@dataclass(frozen=True)
class Place:
    """Where a chip lies (UTM zone, first row and column in its scene, degrees at its centre) and its event's time."""

    chip: names.ChipId
    epsg: int
    row: int
    col: int
    lat: float
    lon: float
    event_time: np.datetime64


def generate(
    root: Path,
    *,
    events: int,
    chips: int,
    size: int,
    protocol: str,
    seed: int,
    layout: str = "extracted",
    progress: Callable[[int, int], None] | None = None,
) -> SynthReport:
    """Write a generated data set; the same arguments give the same bytes.

    Each event is one scene, drawn from a generator of its own and cut into neighbouring chips. It lies in one split
    only, but that v1, as published, tests on one chip of each training event too: `..._test_seen_events.txt` lists
    these, `..._test_holdout.txt` the others. The split files are written last: where they are, everything else is.

    Args:
        root: Folder to write into; made if it is missing.
        events: Number of flood events, 3 or more: about 60/20/20 % of them in train, val and test.
        chips: Number of chips over all events.
        size: Height and width of a chip in pixels.
        protocol: Mask classes, `v0` or `v1`.
        seed: Seed, 0 or more.
        layout: `extracted` (`data/<MODALITY>/`) or `hub` (`<split>/<MODALITY>.tar`, as on the Hugging Face hub).
        progress: Called after each chip with the number of chips done and the number of all.

    Raises:
        UsageError: If an argument is out of range, or `root` holds a data set already.
        DataError: If `root` cannot be written.
    """
    _check_arguments(events, chips, size, protocol, seed, layout)
    held_out = (events + 2) // 5
    event_counts = {"train": events - 2 * held_out, "val": held_out, "test": held_out}
    listed: dict[str, list[str]] = {split: [] for split in names.SPLITS}
    subsets: dict[str, list[str]] = {"seen_events": [], "holdout": []}
    class_names = names.PROTOCOLS[protocol].class_names
    pixels = np.zeros(1 + len(class_names), np.int64)
    try:
        _check_vacant(root)
        with (_extracted if layout == "extracted" else _hub)(root) as put:
            for event, split in enumerate(np.repeat(names.SPLITS, list(event_counts.values())).tolist()):
                share = chips // events + (event < chips % events)
                for number, (place, mask, files) in enumerate(_event_chips(seed, event, share, size, protocol), 1):
                    # Version 1 tests on its training events as well, on chips of theirs that it does not train on.
                    seen = protocol == "v1" and split == "train" and number == share > 1
                    target = "test" if seen else split
                    for part, content in files.items():
                        put(target, part, f"{place.chip}{names.SUFFIXES[part]}", content)
                    listed[target].append(str(place.chip))
                    subsets["seen_events" if seen else "holdout"] += [str(place.chip)] * (target == "test")
                    pixels += np.bincount(mask.ravel() - names.IGNORE_INDEX, minlength=len(pixels))
                    if progress is not None:
                        progress(sum(map(len, listed.values())), chips)
        extra = {f"test_{name}": chip_ids for name, chip_ids in subsets.items()} if protocol == "v1" else {}
        for split, chip_ids in (extra | listed).items():
            _write_whole(root / "split" / names.split_file(split), "".join(f"{c}\n" for c in chip_ids).encode())
    except OSError as error:
        problem = f"cannot write the data set: {error.strerror or error}"
        fix = "delete what was written, if anything, and name a folder that can be written"
        raise DataError(problem, where=error.filename or root, fix=fix) from error
    chip_counts = {split: len(chip_ids) for split, chip_ids in listed.items()}
    shares = dict(zip(class_names, (pixels[1:] / pixels[1:].sum()).tolist(), strict=True))
    return SynthReport(root, layout, protocol, seed, event_counts, chip_counts, shares, float(pixels[0] / pixels.sum()))


def _check_arguments(events: int, chips: int, size: int, protocol: str, seed: int, layout: str) -> None:
    demands = (
        (3 <= events <= MAX_EVENTS, f"--events is {events}, expected 3 (one a split) to {MAX_EVENTS}"),
        (chips >= events, f"--chips is {chips}, expected at least one an event, {events}"),
        (size % 16 == 0 and 32 <= size <= 512, f"--size is {size}, expected a multiple of 16 from 32 to 512"),
        (protocol in names.PROTOCOLS, f"--protocol is {protocol!r}, expected {' or '.join(names.PROTOCOLS)}"),
        (seed >= 0, f"--seed is {seed}, expected 0 or more"),
        (layout in ("extracted", "hub"), f"--layout is {layout!r}, expected extracted or hub"),
    )
    problems = [problem for met, problem in demands if not met]
    if problems:
        raise UsageError("; ".join(problems), fix="change the flags named above")


def _check_vacant(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise DataError("the data set's folder is a file", where=root, fix="name a folder that is new or empty")
    held = [name for name in ("data", "split", *names.SPLITS) if (root / name).exists()]
    if held:
        problem = f"the folder holds a data set already ({', '.join(held)}), and nothing is overwritten"
        raise UsageError(problem, where=root, fix="name a folder that is new or empty, or delete this one first")


def _event_chips(
    seed: int, event: int, chips: int, size: int, protocol: str
) -> Iterator[tuple[Place, npt.NDArray[np.int8], dict[str, bytes]]]:
    """Each chip of one event, sorted by name: where it lies, its mask (H, W), and its files' content by part."""
    rng = np.random.default_rng([seed, event])
    columns = int(np.ceil(np.sqrt(chips)))
    shape = (-(-chips // columns) * size, columns * size)
    places = _places(rng, f"EMSR{FIRST_EVENT + event}", chips, columns, size)
    # By turns, so that the smallest data set has both kinds of missing pixels and an event without any.
    scene = make_scene(rng, shape, s1_edge=event % 3 == 1, s2_edge=event % 3 == 2)
    truth = (scene.flood if protocol == "v0" else scene.permanent + 2 * scene.flood).astype(np.int8)
    truth[~scene.mapped] = names.IGNORE_INDEX
    for place in sorted(places, key=lambda place: str(place.chip)):
        window = np.s_[..., place.row : place.row + size, place.col : place.col + size]
        s1, s2, scl = scene.s1[window], scene.s2[window], scene.scl[window]
        cloud = np.isin(scl, (SCL_THIN_CLOUD, SCL_CLOUD))
        masks = {"SCL": scl, "cloud_mask": cloud}
        percent = ";".join(f"{100 * share:.1f}" for share in cloud.mean(axis=(1, 2)))
        attributes = {"eo_cloud_cover": percent, "s2_mgrs_tile": place.chip.tile}
        files = {
            "S2L2A": _zarr_zip(place, "S2L2A", s2, scl == SCL_NO_DATA, masks, attributes),
            "S1RTC": _zarr_zip(place, "S1RTC", s1, np.isnan(s1[:, 0]), {}, {}),
            "DEM": _geotiff(place, scene.elevation[window], names.NO_DATA),
            names.LABEL_DIR: _geotiff(place, truth[window], names.IGNORE_INDEX),
        }
        yield place, truth[window], files


def _places(rng: np.random.Generator, event: str, chips: int, columns: int, size: int) -> list[Place]:
    """Neighbouring chips between the tropics and 55 degrees, well inside one UTM zone."""
    zone, south = int(rng.integers(1, 61)), bool(rng.random() < 0.3)
    left = 350_005 + PIXEL * int(rng.integers(15_000))
    top = 5 + PIXEL * int(rng.integers(600_000, 700_000) if south else rng.integers(300_000, 600_000))
    time = np.datetime64("2016-01-01T00:00:00") + rng.integers(9 * 365 * 86_400)
    epsg = (32700 if south else 32600) + zone
    rows, cols = (size * index for index in np.divmod(np.arange(chips), columns))
    half = PIXEL * (size - 1) / 2
    xs, ys = left + PIXEL * cols + half, top - PIXEL * rows - half
    lons, lats = rasterio.warp.transform(_crs(epsg), "EPSG:4326", xs, ys)
    tiles = [names.mgrs_tile(zone, lat, int(x), int(y)) for lat, x, y in zip(lats, xs, ys, strict=True)]
    return [
        Place(names.ChipId(event, "1", tile, left + PIXEL * col, top - PIXEL * row), epsg, row, col, lat, lon, time)
        for tile, row, col, lat, lon in zip(tiles, rows.tolist(), cols.tolist(), lats, lons, strict=True)
    ]


@lru_cache
def _crs(epsg: int) -> rasterio.crs.CRS:
    return rasterio.crs.CRS.from_epsg(epsg)


def _zarr_zip(
    place: Place, modality: str, bands: Pixels, missing: Pixels, masks: dict[str, Pixels], attributes: dict[str, Any]
) -> bytes:
    """A radar or optical file: consolidated Zarr v2 in a ZIP whose bytes depend on nothing but the content.

    `bands` is (T, C, H, W); `missing` and each of `masks` (T, H, W); `attributes` are added to the root's.
    """
    size, left, top, wkt = bands.shape[-1], place.chip.easting, place.chip.northing, _crs(place.epsg).to_wkt()
    times = place.event_time + np.array(DAYS[modality], "timedelta64[D]")
    offsets = PIXEL * np.arange(size, dtype=np.float64)
    arrays: dict[str, tuple[Pixels, tuple[str, ...], dict[str, str]]] = {
        "bands": (bands, ("time", "band", "y", "x"), {"grid_mapping": "spatial_ref"}),
        "band": (np.array(BANDS[modality]), ("band",), {}),
        "time": (times.astype(np.int64), ("time",), {"units": "seconds since 1970-01-01", "calendar": "standard"}),
        "x": (left + offsets, ("x",), {}),
        "y": (top - offsets, ("y",), {}),
        "spatial_ref": (np.array(0), (), {"crs_wkt": wkt, "spatial_ref": wkt}),
    }
    for name, mask in {"nan_mask": missing, "data_mask": ~missing, **masks}.items():
        arrays[name] = (mask.astype(np.uint8), ("time", "y", "x"), {})
    box = (left - PIXEL / 2, top + PIXEL / 2 - PIXEL * size, left - PIXEL / 2 + PIXEL * size, top + PIXEL / 2)
    store: dict[str, Any] = {}
    group = zarr.group(store=store)
    group.attrs.put(attributes | {"proj_code": f"EPSG:{place.epsg}", "center_lat": place.lat, "center_lon": place.lon})
    group.attrs["datetime"] = ";".join(np.datetime_as_string(times, unit="s").tolist())
    group.attrs["proj_bbox"] = ";".join(f"{edge:.0f}" for edge in box)
    # With more threads, numcodecs 0.15.1's blosc stores a chunk's blocks in the order in which they are finished.
    threads, blosc.use_threads = blosc.use_threads, False
    try:
        for name, (values, dims, attrs) in arrays.items():
            chunks = (1, *values.shape[1:]) if len(dims) > 1 else values.shape
            # No fill value: xarray would take pixels that equal it for missing.
            array = group.array(name, values, chunks=chunks, compressor=blosc.Blosc("lz4"), fill_value=None)
            array.attrs.put({"_ARRAY_DIMENSIONS": list(dims), **attrs})
    finally:
        blosc.use_threads = threads
    zarr.consolidate_metadata(store)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(store):
            entry = zipfile.ZipInfo(name)  # dated 1980-01-01
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, bytes(store[name]))
    return buffer.getvalue()


def _geotiff(place: Place, values: Pixels, no_data: int) -> bytes:
    """One band (H, W) with the chip's georeference."""
    left, top = place.chip.easting - PIXEL / 2, place.chip.northing + PIXEL / 2
    transform = rasterio.Affine(PIXEL, 0, left, 0, -PIXEL, top)
    profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype.name, "nodata": no_data, "crs": _crs(place.epsg)}
    profile |= {"height": values.shape[0], "width": values.shape[1], "transform": transform}
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(values, 1)
        return bytes(memory.read())


def _partial(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.partial")


def _write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name beside `path`, then rename: a file that is there is complete."""
    partial = _partial(path)
    partial.write_bytes(content)
    partial.replace(path)


@contextmanager
def _extracted(root: Path) -> Iterator[Put]:
    yield lambda _split, part, name, content: _write_whole(root / "data" / part / name, content)


@contextmanager
def _hub(root: Path) -> Iterator[Put]:
    """Archives that get their names once all of them are complete; members come in the order in which they are put."""
    paths = {(split, part): root / split / f"{part}.tar" for split in names.SPLITS for part in names.SUFFIXES}
    with ExitStack() as stack:
        archives = {
            key: stack.enter_context(tarfile.open(_partial(path), "w", format=tarfile.USTAR_FORMAT))
            for key, path in paths.items()
        }

        def put(split: str, part: str, name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"{part}/{name}")  # its defaults: mode 0644, owner 0, dated 1970-01-01
            member.size = len(content)
            archives[split, part].addfile(member, io.BytesIO(content))

        yield put
    for path in paths.values():
        _partial(path).replace(path)
