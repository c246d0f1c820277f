"""Generated chips: a small data set in ImpactMesh's layout, from nothing but a seed; and its events as whole scenes.

It stands in for the real data wherever what matters is that the pipeline works. Events are numbered from EMSR9001,
beyond any Copernicus activation, so that a generated chip is never taken for a real one.

Each event is one scene of 10 m pixels with four timesteps, of which only the third shows the event: a flood, whatever
the protocol calls it. Values are chosen so that the classes read as ImpactMesh-Flood's do (VV/VH about -10/-15 dB
before, -15/-21 dB at the event, and back). Fields that lose backscatter without water, woods that hide it, wind,
speckle and clouds resist a mere threshold. Shape suffixes: T = 4 timesteps, C = bands, H, W = pixels.
"""

import io
import math
import shutil
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
import yaml
import zarr
from numcodecs import Blosc, Zlib
from rasterio.transform import from_origin, xy
from rasterio.warp import reproject
from scipy import ndimage

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Array
from floodrepro.data.protocols import EVENT, IGNORE_INDEX, NO_DATA, PARTS, PROTOCOLS, S1_BANDS, S2_BANDS, SPLITS
from floodrepro.data.splits import SYNTH_NOTE, data_in
from floodrepro.errors import DataError, UsageError

_CRS, _DEGREES = "EPSG:4326", 0.00018  # about 20 m: of a scene that is not like its chips
FIRST_EVENT = 9001
EPSG, TILE = 32630, "30TXM"
DAYS = {"S1RTC": (-30, -12, 0, 12), "S2L2A": (-33, -8, 1, 13)}  # from the event, as the satellites might pass
LOOKS = 4.4  # equivalent number of looks of Sentinel-1 IW GRDH: ESA, S1-RS-MDA-52-7440, table 5-1
CLOUDY, NOT_SEEN = 9, 0  # Sen2Cor's scene classification: Sentinel-2 Products Specification Document, table of SCL
_MISSING = {"S1RTC": np.nan, "S2L2A": NO_DATA, "DEM": NO_DATA, "MASK": IGNORE_INDEX}
# Surface reflectance x 10,000 (C, 1, 1), in the order of S2_BANDS.
SOIL = np.array((850, 980, 1300, 1650, 1850, 2000, 2120, 2250, 2400, 2450, 2950, 2450))[:, None, None]
CROP = np.array((330, 400, 720, 440, 1020, 2650, 3300, 3500, 3700, 3750, 1850, 920))[:, None, None]
WATER = np.array((380, 420, 480, 330, 290, 230, 210, 200, 180, 170, 110, 80))[:, None, None]
TURBID = np.array((640, 780, 1050, 1120, 1150, 860, 820, 760, 620, 480, 230, 160))[:, None, None]
CLOUD = np.array((6300, 6200, 6000, 5900, 6100, 6200, 6300, 6400, 6500, 6600, 4300, 3200))[:, None, None]

# How chips may be stored: a zarr chunk as a share of (T, C, H, W), rounded up, its compressor and byte order where
# it is another than this machine's, and GDAL's options for the TIFFs.
_TILES = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
VARIANTS: dict[str, dict[str, Any]] = {
    "time": {"chunk": (0.25, 1, 1, 1), "codec": Blosc("lz4"), "tiff": {}},
    # zarr 2.18's own default for 256 px: chunks (2, 6, 128, 128)
    "quarters": {"chunk": (0.5, 0.5, 0.5, 0.5), "codec": Blosc("lz4"), "tiff": {"compress": "deflate", "predictor": 2}},
    "whole": {"chunk": (1, 1, 1, 1), "codec": Blosc("zstd", shuffle=0), "tiff": {"compress": "lzw"}},
    "uneven": {"chunk": (0.75, 1, 0.8, 0.3), "codec": Zlib(), "tiff": {"compress": "zstd"}},
    "big-endian": {"chunk": (0.25, 0.08, 1, 1), "codec": None, "order": ">", "tiff": _TILES},
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
    scenes: bool = False,
) -> dict[str, Any]:
    """Write a generated data set and return what was written; the same arguments give the same bytes.

    Every event lies in one split, but that a version 1, as published, tests on one chip of each training event too:
    `..._test_seen_events.txt` lists these, `..._test_holdout.txt` the others. `SYNTH_NOTE` says that the chips are
    generated. All is written into a hidden folder first.

    Args:
        root: Folder to write into; made if it is missing.
        events: Number of events, 3 or more: about 60/20/20 % of them in train, val and test.
        chips: Number of chips over all events.
        size: Height and width of a chip in pixels.
        protocol: Name in `PROTOCOLS` of one with classes; it gives mask values and file names.
        seed: 0 or more.
        layout: `extracted` (`data/<PART>/`) or `hub` (`<split>/<PART>.tar`, as on the Hugging Face hub).
        variants: How chips are stored, names of `VARIANTS`; chips take them in turn.
        scenes: Whether each event is written whole too, as `scenes/<event>/`, every second one *mixed*.

    Raises:
        UsageError: An argument is out of range, or `root` holds a data set already.
        DataError: `root` cannot be written.
    """
    demands = {
        f"--root holds a data set ({', '.join(data_in(root))}), and nothing is overwritten": not data_in(root),
        f"--events is {events}, expected at least 3, one a split": events >= 3,
        f"--chips is {chips}, expected at least one an event, {events}": chips >= events,
        "--root holds scenes, and nothing is overwritten": not (scenes and (root / "scenes").exists()),
        f"--seed is {seed}, expected 0 or more": seed >= 0,
        f"--size is {size}, expected a multiple of 16 from 32 to 512": size in range(32, 513, 16),
        f"--layout-variant is {','.join(variants)}, expected {', '.join(VARIANTS)}": set(variants) <= set(VARIANTS),
    }
    if problems := [problem for problem, met in demands.items() if not met]:
        raise UsageError("; ".join(problems), where=root, fix="change the flags named above, or name a new folder")
    rules, held_out = PROTOCOLS[protocol], (events + 2) // 5
    counts = {"train": events - 2 * held_out, "val": held_out, "test": held_out}
    like_v1 = rules.data_version == "v1"
    names = (*SPLITS, "test_seen_events", "test_holdout") if like_v1 else SPLITS
    lists: dict[str, list[str]] = {name: [] for name in names}
    flags = f"--events {events} --chips {chips} --size {size} --protocol {protocol} --seed {seed} --layout {layout}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".synth-", dir=root) as hidden, console.progress("chips") as progress:
            made = Path(hidden)
            for event, split in enumerate(np.repeat(SPLITS, list(counts.values())).tolist()):
                share = chips // events + (event < chips % events)
                scene = draw_event(seed, event, share, size, len(rules.label_map))
                for number in range(share):
                    chip, files = _cut_chip(scene, event, number, size, VARIANTS[variants[number % len(variants)]])
                    for part, content in files.items():
                        _write(made / "data" / part / f"{chip}{protocols.suffix_of(rules, part)}", content)
                    # Version 1 tests on its training events as well, on chips of theirs that it does not train on.
                    seen = like_v1 and split == "train" and number == 1
                    lists["test" if seen else split].append(chip)
                    if like_v1 and (seen or split == "test"):
                        lists["test_seen_events" if seen else "test_holdout"].append(chip)
                    progress(sum(len(lists[name]) for name in SPLITS), chips)
                if scenes:
                    write_scene(scene, event, made / "scenes" / protocols.event_of(chip), mixed=event % 2 == 1)
            if layout == "hub":
                _pack(made, lists, rules)
            for name, listed in lists.items():
                _write(made / "split" / rules.split_file(name), "".join(f"{chip}\n" for chip in listed).encode())
            note = f"floodrepro data synth {flags} --layout-variant {','.join(variants)}\n"
            _write(made / SYNTH_NOTE, note.encode())
            # Of two processes only one can put `split` there; what says that the chips are generated comes with it.
            for path in sorted(made.iterdir(), key=lambda path: (path.name != "split", path.name != SYNTH_NOTE)):
                path.rename(root / path.name)
            for left in root.glob(".synth-*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        what = f"the data set cannot be written: {error.strerror or error}"
        raise DataError(what, where=root, fix="name a new folder that can be written") from error
    return {"root": str(root), "events": counts, "chips": {split: len(lists[split]) for split in SPLITS}}


def write_scene(scene: Mapping[str, Array], event: int, output: Path, *, mixed: bool = False) -> Path:
    """Write an event that `draw_event` drew as rasters for `floodrepro map`, with truth.tif and a scene.yaml.

    `map` over it can be compared with `predict` over the chips that are cut from it.

    Args:
        scene: Its images.
        event: Its number, which says where and when it was.
        output: Folder to write.
        mixed: Write what a map has to undo: optical bands in EPSG:4326 with pixels of 20 m, each in a file of its own,
            1000 added as from baseline 04.00 on, and radar as linear power.

    Returns:
        The scene.yaml.
    """
    offset, bands, place, times = 1000 if mixed else 0, [*S2_BANDS, "SCL"], _place(event), _times(event)
    optical = np.where(scene["S2L2A"] == NO_DATA, NO_DATA, scene["S2L2A"] + offset)
    optical = np.concatenate([optical, scene["SCL"][:, None]], axis=1)
    radar: Array = scene["S1RTC"].astype(np.float32)
    radar = 10 ** (radar / 10) if mixed else radar

    def save(name: str, part: str, values: Array, described: Sequence[str], **where: Any) -> dict[str, Any]:
        """Write a raster (C, H, W) and return a scene's entry of it."""
        options = {"compress": "deflate", "tiled": True} | place | where
        _write(output / name, _geotiff(values, _MISSING[part], described, **options))
        return {"raster": name, "bands": list(described)}

    listed: dict[str, Any] = {"S1RTC": {"unit": "power" if mixed else "dB"}, "S2L2A": {"nodata": [NO_DATA]}}
    for step, key in enumerate(protocols.STEPS):
        file = save(f"s1_{key}.tif", "S1RTC", radar[step], S1_BANDS)
        listed["S1RTC"][key] = {"time": times["S1RTC"][step], "orbit": 66, "files": [file]}
        if mixed:
            given = {"src_crs": place["crs"], "src_transform": place["transform"], "src_nodata": NO_DATA}
            warped, grid = reproject(optical[step], **given, dst_crs=_CRS, dst_resolution=_DEGREES)
            file = {band: f"s2_{key}_{band}.tif" for band in bands}
            for band, image in zip(bands, warped, strict=True):
                save(file[band], "S2L2A", image[None], [band], crs=_CRS, transform=grid)
        else:
            file = save(f"s2_{key}.tif", "S2L2A", optical[step], bands)
        listed["S2L2A"][key] = {"time": times["S2L2A"][step], "files": [file | {"offset": -offset}]}
    save("dem.tif", "DEM", scene["DEM"][None], ["data"])
    listed["DEM"] = {"files": [{"data": "dem.tif"}]}
    save("truth.tif", "MASK", scene["MASK"][None], ["class"])
    _write(output / "scene.yaml", yaml.safe_dump(listed, sort_keys=False).encode())
    return output / "scene.yaml"


def draw_event(seed: int, event: int, chips: int, size: int, values: int) -> dict[str, Array]:
    """An event as the satellites (DEM, S1RTC, S2L2A, SCL) and the mappers (MASK of so many values) saw it.

    The images have room for so many chips of `size` pixels, about as many in a row as in a column.
    """
    rng, across = np.random.default_rng([seed, event]), math.ceil(math.sqrt(chips))
    shape = (math.ceil(chips / across) * size, across * size)
    edge = ("", "S1RTC", "S2L2A")[event % 3]  # the sensor whose swath ends inside: each is in the smallest data set
    rows, columns = np.mgrid[: shape[0], : shape[1]] / min(shape)
    river = 0.25 * shape[1] / min(shape) + 0.1 * np.sin(4 * rows + 6 * rng.random())
    height = np.abs(columns - river) + 0.06 * _field(rng, shape, 6)
    height -= np.quantile(height, rng.uniform(0.03, 0.06))  # the share of permanent water
    permanent = height < 0
    hit = (height < np.quantile(height, rng.uniform(0.14, 0.26))) & ~permanent
    green, rough = _field(rng, shape, 5), _field(rng, shape, 3)
    woods = green > 1
    dry = (_field(rng, shape, 4) > 1.1) & ~woods  # fields that lose backscatter at the event, and no water comes
    wet, cover = hit & ~woods, np.clip(0.5 + 0.3 * green, 0, 1)
    ground = np.where(permanent, WATER, SOIL * (1 - cover) + CROP * cover)
    s1, s2 = np.empty((4, 2, *shape)), np.empty((4, 12, *shape))
    scl = np.full((4, *shape), 4, np.uint8)
    for step in range(4):
        at_event = step == EVENT
        open_water = permanent | (wet & at_event)
        land = np.stack((-9.8 + 0.9 * rough, -15.2 + 0.9 * rough)) + 1.2 * woods - 4.0 * (dry & at_event)
        wind = np.clip(_field(rng, shape, 5) - 1, 0, 1)
        water = np.stack((-17.5 + 4 * wind, -23.5 + 2 * wind))
        decibels = np.where(open_water, water, land + rng.normal(0, 0.3))
        # Speckle: a gamma law of mean 1 (Oliver and Quegan, Understanding Synthetic Aperture Radar Images, chapter 4).
        s1[step] = decibels + 10 * np.log10(rng.gamma(LOOKS, 1 / LOOKS, decibels.shape))
        surface = np.where(wet & at_event, TURBID, ground)
        thickness = _field(rng, shape, 7)
        haze = np.clip(3 * (thickness - np.quantile(thickness, 0.5 if at_event else 0.85)), 0, 1)
        s2[step] = surface + haze * (CLOUD - surface) + rng.normal(0, 40, surface.shape)
        scl[step, open_water], scl[step, haze > 0.5] = 6, CLOUDY
    s2 = np.rint(np.clip(s2, 1, 16000)).astype(np.int16)
    beyond = rows * rng.uniform(-1, 1) + columns
    far = beyond > np.quantile(beyond, 0.93)  # the far side of a slanting line: beyond a swath or a mapped area
    if edge == "S1RTC":
        s1[EVENT, :, far] = np.nan
    if edge == "S2L2A":
        s2[0, :, far], scl[0, far] = NO_DATA, NOT_SEEN
    truth = np.where(hit, values - 1, permanent & (values == 3)).astype(np.int8)  # version 1 tells permanent water
    truth[far if edge == "S1RTC" else beyond < np.quantile(beyond, 0.05)] = IGNORE_INDEX
    elevation = np.rint(60 + 40 * np.maximum(height, 0) + 4 * woods + rng.normal(0, 0.6, shape)).astype(np.int16)
    return {"DEM": elevation, "S1RTC": s1.astype(np.float16), "S2L2A": s2, "SCL": scl, "MASK": truth}


def _field(rng: np.random.Generator, shape: tuple[int, int], smooth: float) -> Array:
    """A smooth random surface (H, W) of mean 0 and standard deviation 1."""
    surface = ndimage.gaussian_filter(rng.standard_normal(shape), smooth, mode="wrap")
    return np.asarray((surface - surface.mean()) / surface.std())


def _cut_chip(
    scene: Mapping[str, Array], event: int, number: int, size: int, variant: Mapping[str, Any]
) -> tuple[str, dict[str, bytes]]:
    """A chip of an event, counted row by row from the upper left: its id, and the content of each part's file."""
    row, column = (size * place for place in divmod(number, scene["DEM"].shape[1] // size))
    cut = {name: image[..., row : row + size, column : column + size] for name, image in scene.items()}
    masks = {
        "S2L2A": {"SCL": cut["SCL"], "cloud_mask": cut["SCL"] == CLOUDY},
        "S1RTC": {"nan_mask": np.isnan(cut["S1RTC"][:, 0])},
    }
    known = {sensor: {"datetime": ";".join(dates)} for sensor, dates in _times(event).items()}
    known["S1RTC"] |= {"sat_orbit_state": ";".join(["descending"] * 4), "sat_relative_orbit": ";".join(["81"] * 4)}
    contents = {part: zarr_zip(cut[part], masks[part], known[part], variant) for part in masks}
    place = _place(event, row, column)
    for part in ("DEM", "MASK"):
        contents[part] = _geotiff(cut[part][None], _MISSING[part], **place, **variant["tiff"])
    x, y = xy(place["transform"], 0, 0)  # of the first pixel's centre
    return f"EMSR{FIRST_EVENT + event}_1_{TILE}_x{x:.0f}_y{y:.0f}", contents


def _place(event: int, row: int = 0, column: int = 0) -> dict[str, Any]:
    """Where an image lies that begins at this pixel of an event."""
    west, north = 400_000 + 10 * column, 4_500_010 + 100_000 * (event % 9) - 10 * row
    return {"crs": f"EPSG:{EPSG}", "transform": from_origin(west, north, 10, 10)}


def _times(event: int) -> dict[str, list[str]]:
    time = np.datetime64("2016-01-01", "s") + np.timedelta64(7 + 30 * event, "D")
    return {sensor: [str(time + np.timedelta64(day, "D")) for day in days] for sensor, days in DAYS.items()}


def zarr_zip(
    bands: Array, masks: Mapping[str, Array], attributes: Mapping[str, Any], variant: Mapping[str, Any]
) -> bytes:
    """A radar or optical file (T, C, H, W) with masks (T, H, W): Zarr v2 in a ZIP, its bytes decided by the content."""
    names = S2_BANDS if bands.shape[1] == len(S2_BANDS) else S1_BANDS
    store: dict[str, Any] = {}
    group = zarr.group(store=store)
    group.attrs.put(dict(attributes))
    chunks = [math.ceil(share * edge) for share, edge in zip(variant["chunk"], bands.shape, strict=True)]
    stored = bands.astype(bands.dtype.newbyteorder(variant.get("order", "=")))
    group.array("bands", stored, chunks=chunks, compressor=variant["codec"], fill_value=None)
    group.array("band", np.array(names), fill_value=None)
    for name, mask in masks.items():
        group.array(name, mask.astype(np.uint8), compressor=variant["codec"], fill_value=None)
    zarr.consolidate_metadata(store)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(store):
            archive.writestr(zipfile.ZipInfo(name), bytes(store[name]))  # dated 1980-01-01
    return buffer.getvalue()


def _geotiff(values: Array, no_data: float, described: Sequence[str] = (), **options: Any) -> bytes:
    shape = dict(zip(("count", "height", "width"), values.shape, strict=True))
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", dtype=values.dtype.name, nodata=no_data, **shape, **options) as target:
            target.write(values)
            if described:
                target.descriptions = tuple(described)
        return bytes(memory.read())


def _pack(made: Path, lists: Mapping[str, Sequence[str]], rules: protocols.Protocol) -> None:
    for split, part in product(SPLITS, PARTS):
        (made / split).mkdir(exist_ok=True)
        with tarfile.open(made / split / f"{part}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for chip in lists[split]:
                member = tarfile.TarInfo(f"{part}/{chip}{protocols.suffix_of(rules, part)}")  # dated 1970-01-01
                content = (made / "data" / member.name).read_bytes()
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shutil.rmtree(made / "data")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
