"""Generated chips: a small data set in ImpactMesh's layout, from nothing but a seed.

It stands in for the real data wherever what matters is that the pipeline works. Events are numbered from EMSR9001,
beyond any Copernicus activation, so that a generated chip is never taken for a real one.

Each event is one scene of 10 m pixels with four timesteps, of which only the third shows the event. Values are chosen
so that the classes read as ImpactMesh-Flood's do (VV/VH about -10/-15 dB before, -15/-21 dB at the event, and back).
Fields that lose backscatter without water, woods that hide it, wind, speckle and clouds resist a mere threshold.
Shape suffixes: T = 4 timesteps, C = bands, H, W = pixels.
"""

import io
import math
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import zarr
from filelock import FileLock, Timeout
from numcodecs import Blosc, Zlib, blosc
from scipy import ndimage

from floodrepro.data.protocols import (
    EVENT,
    IGNORE_INDEX,
    LABEL_DIR,
    NO_DATA,
    PARTS,
    PROTOCOLS,
    S1_BANDS,
    S2_BANDS,
    SPLITS,
    Protocol,
    suffix_of,
)
from floodrepro.data.splits import SYNTH_NOTE, data_in
from floodrepro.errors import DataError, UsageError

Array = npt.NDArray[Any]

_LOCK = ".floodrepro-synth.lock"  # it stays where a data set was not finished
_HELD = "{} holds a data set already ({}), and nothing is overwritten"
FIRST_EVENT, MAX_EVENTS = 9001, 900  # four digits each, so that names sort in the order of generation
EPSG, TILE = 32630, "30TXM"
DAYS = {"S1RTC": (-30, -12, 0, 12), "S2L2A": (-33, -8, 1, 13)}  # from the event, as the satellites might pass
LOOKS = 4.4  # equivalent number of looks of Sentinel-1 IW GRDH: ESA, S1-RS-MDA-52-7440, table 5-1
CLOUDY, NOT_SEEN = 9, 0  # Sen2Cor's scene classification: Sentinel-2 Products Specification Document, table of SCL
# Surface reflectance x 10,000, in the order of S2_BANDS.
SOIL = np.array((850, 980, 1300, 1650, 1850, 2000, 2120, 2250, 2400, 2450, 2950, 2450))
CROP = np.array((330, 400, 720, 440, 1020, 2650, 3300, 3500, 3700, 3750, 1850, 920))
WATER = np.array((380, 420, 480, 330, 290, 230, 210, 200, 180, 170, 110, 80))
TURBID = np.array((640, 780, 1050, 1120, 1150, 860, 820, 760, 620, 480, 230, 160))
BURNT = np.array((350, 380, 430, 480, 600, 750, 820, 880, 950, 1000, 1700, 1650))
CLOUD = np.array((6300, 6200, 6000, 5900, 6100, 6200, 6300, 6400, 6500, 6600, 4300, 3200))

# How chips may be stored: a zarr chunk as a share of (T, C, H, W), rounded up, its compressor and byte order where
# it is another than this machine's, and GDAL's options for the TIFFs.
VARIANTS: dict[str, dict[str, Any]] = {
    "time": {"chunk": (0.25, 1, 1, 1), "codec": Blosc("lz4"), "tiff": {}},
    # zarr 2.18's own default for 256 px: chunks (2, 6, 128, 128)
    "quarters": {"chunk": (0.5, 0.5, 0.5, 0.5), "codec": Blosc("lz4"), "tiff": {"compress": "deflate", "predictor": 2}},
    "whole": {"chunk": (1, 1, 1, 1), "codec": Blosc("zstd", shuffle=0), "tiff": {"compress": "lzw"}},
    "uneven": {"chunk": (0.75, 1, 0.8, 0.3), "codec": Zlib(), "tiff": {"compress": "zstd"}},
    "big-endian": {
        "chunk": (0.25, 0.08, 1, 1),
        "codec": None,
        "order": ">",
        "tiff": {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"},
    },
}


def generate(
    root: Path,
    *,
    events: int,
    chips: int,
    size: int,
    protocol: str,
    seed: int,
    layout: str = "extracted",
    variants: Sequence[str] = ("time", "quarters"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a generated data set; the same arguments give the same bytes.

    Every event lies in one split, but that a version 1, as published, tests on one chip of each training event too:
    `..._test_seen_events.txt` lists these, `..._test_holdout.txt` the others. `SYNTH_NOTE` says that the chips are
    generated; it is written last: a killed call that is made again removes what it left, and begins anew.

    Args:
        root: Folder to write into; made if it is missing.
        events: Number of events, 3 or more: about 60/20/20 % of them in train, val and test.
        chips: Number of chips over all events.
        size: Height and width of a chip in pixels.
        protocol: Name in `PROTOCOLS`; it gives mask values and file names.
        seed: 0 or more.
        layout: `extracted` (`data/<PART>/`) or `hub` (`<split>/<PART>.tar`, as on the Hugging Face hub).
        variants: How chips are stored, names of `VARIANTS`; chips take them in turn.
        progress: Called after each chip with the number of chips done and the number of all.

    Returns:
        The arguments; `events` and `chips` by split; `class_shares` by name, and the `ignored_share`, of the pixels.

    Raises:
        UsageError: An argument is out of range, or `root` holds a data set already.
        DataError: `root` cannot be written.
    """
    held = data_in(root)
    known = [name for name, rules in PROTOCOLS.items() if rules.class_names]
    demands = (
        (not held or (root / _LOCK).exists(), _HELD.format(root, ", ".join(held))),
        (3 <= events <= MAX_EVENTS, f"--events is {events}, expected 3 (one a split) to {MAX_EVENTS}"),
        (chips >= events, f"--chips is {chips}, expected at least one an event, {events}"),
        (size % 16 == 0 and 32 <= size <= 512, f"--size is {size}, expected a multiple of 16 from 32 to 512"),
        (protocol in known, f"--protocol is {protocol!r}, expected {', '.join(known)}"),
        (seed >= 0, f"--seed is {seed}, expected 0 or more"),
        (layout in ("extracted", "hub"), f"--layout is {layout!r}, expected extracted or hub"),
        (set(variants) <= set(VARIANTS), f"--layout-variant is {','.join(variants)}, expected {', '.join(VARIANTS)}"),
    )
    if problems := [problem for met, problem in demands if not met]:
        raise UsageError("; ".join(problems), fix="change the flags named above, or name a new folder")
    rules = PROTOCOLS[protocol]
    held_out = (events + 2) // 5
    event_counts = {"train": events - 2 * held_out, "val": held_out, "test": held_out}
    listed: dict[str, list[str]] = {split: [] for split in SPLITS}
    subsets: dict[str, list[str]] = {"test_seen_events": [], "test_holdout": []}
    pixels = np.zeros(1 + len(rules.label_map), np.int64)
    try:
        with ExitStack() as stack:
            stack.enter_context(_claimed(root))
            tars: dict[tuple[str, str], tarfile.TarFile] = {}
            for split, part in product(SPLITS, PARTS) if layout == "hub" else ():
                (root / split).mkdir(parents=True, exist_ok=True)
                tar = tarfile.open(root / split / f"{part}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                tars[split, part] = stack.enter_context(tar)
            for event, split in enumerate(np.repeat(SPLITS, list(event_counts.values())).tolist()):
                share = chips // events + (event < chips % events)
                made = _event_chips(seed, event, share, size, rules, [VARIANTS[name] for name in variants])
                for number, (chip, mask, files) in enumerate(made):
                    # Version 1 tests on its training events as well, on chips of theirs that it does not train on.
                    seen = rules.data_version == "v1" and split == "train" and number == 1
                    target = "test" if seen else split
                    for part, content in files.items():
                        name = f"{part}/{chip}{suffix_of(rules, part)}"
                        if tars:
                            member = tarfile.TarInfo(name)  # its defaults: mode 0644, owner 0, dated 1970-01-01
                            member.size = len(content)
                            tars[target, part].addfile(member, io.BytesIO(content))
                        else:
                            _write(root / "data" / name, content)
                    listed[target].append(chip)
                    if target == "test":
                        subsets["test_seen_events" if seen else "test_holdout"].append(chip)
                    pixels += np.bincount(mask.ravel() - IGNORE_INDEX, minlength=len(pixels))
                    progress(sum(map(len, listed.values())), chips)
            for name, ids in (listed | (subsets if rules.data_version == "v1" else {})).items():
                _write(root / "split" / rules.split_file(name), "".join(f"{chip}\n" for chip in ids).encode())
            flags = {"events": events, "chips": chips, "size": size, "protocol": protocol, "seed": seed}
            words = [f"--{name} {value}" for name, value in flags.items()]
            words.append(f"--layout {layout} --layout-variant {','.join(variants)}")
            _write(root / SYNTH_NOTE, f"floodrepro data synth {' '.join(words)}\n".encode())
    except OSError as error:
        problem = f"the data set cannot be written: {error.strerror or error}"
        fix = "delete what was written, if anything, and name a folder that can be written"
        raise DataError(problem, where=error.filename or root, fix=fix) from error
    shares = np.bincount(rules.label_map, pixels[1:], len(rules.class_names)) / pixels[1:].sum()
    return {
        "root": str(root),
        "layout": layout,
        "protocol": protocol,
        "seed": seed,
        "events": event_counts,
        "chips": {split: len(ids) for split, ids in listed.items()},
        "class_shares": dict(zip(rules.class_names, shares.tolist(), strict=True)),
        "ignored_share": float(pixels[0] / pixels.sum()),
    }


def _draw_scene(rng: np.random.Generator, shape: tuple[int, int], hazard: str, edge: str) -> dict[str, Array]:
    """A whole event of (H, W) pixels, as the satellites and the mappers saw it.

    Args:
        rng: The event's own generator; the same state gives the same scene.
        shape: Height and width in pixels.
        hazard: `flood`, or `fire`, which burns what a flood would cover.
        edge: Whose swath ends inside the scene, so that pixels are missing: `S1RTC`, `S2L2A` or neither.

    Returns:
        `DEM` (H, W) int16 metres; `S1RTC` (T, 2, H, W) float16 dB, NaN where missing; `S2L2A` (T, 12, H, W) int16,
        NO_DATA where missing; `SCL` (T, H, W) uint8; (H, W) bool each: `permanent` water, `hit`, and `mapped`.
    """
    rows, columns = np.mgrid[: shape[0], : shape[1]] / min(shape)
    river = 0.25 * shape[1] / min(shape) + 0.1 * np.sin(4 * rows + 6 * rng.random())
    height = np.abs(columns - river) + 0.06 * _field(rng, shape, 6)
    height -= np.quantile(height, rng.uniform(0.03, 0.06))  # the share of permanent water
    permanent = height < 0
    hit = (height < np.quantile(height, rng.uniform(0.14, 0.26))) & ~permanent
    green, rough = _field(rng, shape, 5), _field(rng, shape, 3)
    woods = green > 1
    dry = (_field(rng, shape, 4) > 1.1) & ~woods  # fields that lose backscatter at the event, and no water comes
    s1, s2 = np.empty((4, 2, *shape)), np.empty((4, 12, *shape))
    scl = np.full((4, *shape), 4, np.uint8)
    colour = BURNT if hazard == "fire" else TURBID
    cover = np.clip(0.5 + 0.3 * green, 0, 1)
    for step in range(4):
        struck = hit & (step == EVENT)
        open_water = permanent | (struck & ~woods & (hazard != "fire"))
        land = np.stack((-9.8 + 0.9 * rough, -15.2 + 0.9 * rough)) + 1.2 * woods - 4.0 * (dry & (step == EVENT))
        burnt = np.array((-3.0, -5.0))[:, None, None] * (struck & (hazard == "fire"))
        wind = np.clip(_field(rng, shape, 5) - 1, 0, 1)
        decibels = np.where(
            open_water, np.stack((-17.5 + 4 * wind, -23.5 + 2 * wind)), land + burnt + rng.normal(0, 0.3)
        )
        # Speckle: a gamma law of mean 1 (Oliver and Quegan, Understanding Synthetic Aperture Radar Images, chapter 4).
        s1[step] = decibels + 10 * np.log10(rng.gamma(LOOKS, 1 / LOOKS, decibels.shape))
        surface = SOIL[:, None, None] * (1 - cover) + CROP[:, None, None] * cover
        surface = np.where(permanent, WATER[:, None, None], surface)
        surface = np.where(struck & ~woods, colour[:, None, None], surface)
        thickness = _field(rng, shape, 7)
        haze = np.clip(3 * (thickness - np.quantile(thickness, 0.5 if step == EVENT else 0.85)), 0, 1)
        s2[step] = surface + haze * (CLOUD[:, None, None] - surface) + rng.normal(0, 40, surface.shape)
        scl[step, open_water], scl[step, haze > 0.5] = 6, CLOUDY
    s2 = np.rint(np.clip(s2, 1, 16000)).astype(np.int16)
    beyond = rows * rng.uniform(-1, 1) + columns
    far = beyond > np.quantile(beyond, 0.93)  # the far side of a slanting line: beyond a swath or a mapped area
    if edge == "S1RTC":
        s1[EVENT, :, far] = np.nan
    if edge == "S2L2A":
        s2[0, :, far], scl[0, far] = NO_DATA, NOT_SEEN
    mapped = ~(far if edge == "S1RTC" else beyond < np.quantile(beyond, 0.05))
    elevation = np.rint(60 + 40 * np.maximum(height, 0) + 4 * woods + rng.normal(0, 0.6, shape)).astype(np.int16)
    images = {"DEM": elevation, "S1RTC": s1.astype(np.float16), "S2L2A": s2, "SCL": scl}
    return images | {"permanent": permanent, "hit": hit, "mapped": mapped}


def _field(rng: np.random.Generator, shape: tuple[int, int], smooth: float) -> Array:
    """A smooth random surface (H, W) of mean 0 and standard deviation 1."""
    surface = ndimage.gaussian_filter(rng.standard_normal(shape), smooth, mode="wrap")
    return np.asarray((surface - surface.mean()) / surface.std())


def _event_chips(
    seed: int, event: int, chips: int, size: int, protocol: Protocol, variants: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Array, dict[str, bytes]]]:
    """The neighbouring chips of an event: id, mask as on disk (H, W), and files by part of each."""
    rng = np.random.default_rng([seed, event])
    columns = int(np.ceil(np.sqrt(chips)))
    shape = (-(-chips // columns) * size, columns * size)
    # In turn, so that the smallest data set has both kinds of missing pixels and an event without any.
    scene = _draw_scene(rng, shape, protocol.hazard, edge=("", "S1RTC", "S2L2A")[event % 3])
    truth = np.where(scene["hit"], len(protocol.label_map) - 1, 0).astype(np.int8)
    if len(protocol.label_map) == 3:  # version 1 tells permanent water from the rest
        truth[scene["permanent"]] = 1
    truth[~scene["mapped"]] = IGNORE_INDEX
    time = np.datetime64("2016-01-01T00:00:00") + (7 + 30 * event) * 86_400
    orbits = {"sat_orbit_state": ";".join(["descending"] * 4), "sat_relative_orbit": ";".join(["81"] * 4)}
    for number in range(chips):
        row, column = (place * size for place in divmod(number, columns))
        east, north = 400_005 + 10 * column, 4_500_005 + 100_000 * (event % 9) - 10 * row
        window = np.s_[..., row : row + size, column : column + size]
        s1, s2, scl, mask = scene["S1RTC"][window], scene["S2L2A"][window], scene["SCL"][window], truth[window]
        variant = variants[number % len(variants)]
        yield (
            f"EMSR{FIRST_EVENT + event}_1_{TILE}_x{east}_y{north}",
            mask,
            {
                "S2L2A": zarr_zip(s2, {"SCL": scl, "cloud_mask": scl == CLOUDY}, _attributes(time, "S2L2A"), variant),
                "S1RTC": zarr_zip(s1, {"nan_mask": np.isnan(s1[:, 0])}, _attributes(time, "S1RTC") | orbits, variant),
                "DEM": _geotiff(scene["DEM"][window], east, north, NO_DATA, variant["tiff"]),
                LABEL_DIR: _geotiff(mask, east, north, IGNORE_INDEX, variant["tiff"]),
            },
        )


def _attributes(event: np.datetime64, modality: str) -> dict[str, str]:
    times = event + np.array(DAYS[modality], "timedelta64[D]")
    return {"datetime": ";".join(np.datetime_as_string(times, unit="s").tolist())}


def zarr_zip(
    bands: Array, masks: Mapping[str, Array], attributes: Mapping[str, Any], variant: Mapping[str, Any]
) -> bytes:
    """A radar or optical file: consolidated Zarr v2 in a ZIP whose bytes depend on nothing but the content.

    Args:
        bands: (T, C, H, W).
        masks: By name, (T, H, W) each.
        attributes: Of the root.
        variant: One of `VARIANTS`.
    """
    names = S2_BANDS if bands.shape[1] == len(S2_BANDS) else S1_BANDS
    store: dict[str, Any] = {}
    group = zarr.group(store=store)
    group.attrs.put(dict(attributes))
    # With more threads, numcodecs 0.15.1's blosc stores a chunk's blocks in the order in which they are finished.
    threads, blosc.use_threads = blosc.use_threads, False
    try:
        chunks = [math.ceil(share * edge) for share, edge in zip(variant["chunk"], bands.shape, strict=True)]
        stored = bands.astype(bands.dtype.newbyteorder(variant.get("order", "=")))
        group.array("bands", stored, chunks=chunks, compressor=variant["codec"], fill_value=None)
        group.array("band", np.array(names), fill_value=None)
        for name, mask in masks.items():
            group.array(name, mask.astype(np.uint8), compressor=variant["codec"], fill_value=None)
    finally:
        blosc.use_threads = threads
    zarr.consolidate_metadata(store)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(store):
            archive.writestr(zipfile.ZipInfo(name), bytes(store[name]))  # dated 1980-01-01
    return buffer.getvalue()


def _geotiff(values: Array, east: int, north: int, no_data: int, options: Mapping[str, Any]) -> bytes:
    """One band (H, W) with the chip's georeference: `east` and `north` are the centre of its upper left pixel."""
    profile = {"driver": "GTiff", "count": 1, "dtype": values.dtype.name, "nodata": no_data, **options}
    profile |= {"height": values.shape[0], "width": values.shape[1], "crs": f"EPSG:{EPSG}"}
    with rasterio.MemoryFile() as memory:
        with memory.open(**profile, transform=rasterio.Affine(10, 0, east - 5, 0, -10, north + 5)) as target:
            target.write(values, 1)
        return bytes(memory.read())


@contextmanager
def _claimed(root: Path) -> Iterator[None]:
    """Hold a folder while its data set is written; what a killed process left unfinished there is removed first."""
    lock = root / _LOCK
    begun = lock.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            held = data_in(root)
            if held and (not begun or (root / SYNTH_NOTE).exists()):
                raise UsageError(_HELD.format(root, ", ".join(held)), fix="name a new folder")
            for name in held:
                shutil.rmtree(root / name)
            yield
            lock.unlink()
    except Timeout as error:
        raise UsageError("another data synth is writing here", where=root, fix="name a new folder") from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
