"""Map a scene strip by strip, in bounded memory and resumable; and compare a map with a truth.

Tiles of ``crop`` pixels lie ``stride`` apart and reach both edges exactly; where they overlap, probabilities are
averaged with raised-cosine weights before a class is chosen. Only the rows that later tiles can still change are held:
``classes + 1`` float32 values for ``crop`` x ``width`` pixels.

H, W = rows and columns of the raster, h = rows of a strip, K = classes; B = tiles of a batch, T = timesteps, C = bands.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import pyogrio
import rasterio
import rasterio.features
import rasterio.shutil
import shapely
import torch
from filelock import FileLock, Timeout
from rasterio import DatasetReader
from rasterio._err import CPLE_BaseError  # rasterio.shutil.copy lets GDAL's own errors through
from rasterio.errors import RasterioError
from rasterio.windows import Window, subdivide

from floodrepro import console
from floodrepro.data.protocols import EVENT, IGNORE_INDEX, NO_DATA, PROBABILITY_STEPS, STEPS
from floodrepro.errors import CheckpointError, DataError, RunFolderError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.mapping.reader import OUTSIDE, QUALITY, RESAMPLING, Reader, Water, is_seen, water_of
from floodrepro.mapping.scene import BANDS, PIXEL, Array, Scene, opened
from floodrepro.run_folder import write_atomically
from floodrepro.training.checkpoint import Checkpoint, load_strictly

if TYPE_CHECKING:
    from floodrepro.training.terratorch_cli import RecipeCLI

_RECORD, _WORK, _BEGUN = "map.json", ".map-in-progress", "begun.json"
NOT_SEEN = 255
# The layers of a map that is being made: class, probability, quality, whether it is the positive class, the event in
# red, green and blue. They lie in one file, row by row, which Python writes: GDAL may say nothing of a full disk.
_RAW, _LAYERS = "layers.raw", 7
_HEADER = "ENVI\nsamples = {0.width}\nlines = {0.height}\nbands = {1}\ndata type = 1\ninterleave = bil\n"
_HEADER += "map info = {{UTM, 1, 1, {0.transform.c}, {0.transform.f}, {0.transform.a}, {0.transform.a}, {2}, WGS-84}}\n"
_HEADER += "classes = {3}\nclass lookup = {{{4}}}\n"  # colours of the first band
_RESAMPLING = {"class": "MODE", "probability": "AVERAGE", "quality": "NEAREST"}  # of overviews
_PICTURE = 1024  # pixels of the picture's longer side, at most
_CHUNK = 256  # rows that are held at once where a whole raster is read; edge of a tile that is compared with a truth
_DISK_ERRORS = (OSError, RasterioError, CPLE_BaseError, pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError)
_PATCH = 32  # two of TerraMind's patches: what TerraTorch pads images to
Predict = Callable[[int], Iterable[tuple[int, Array]]]


def starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of the tiles along an axis; one that is smaller than a tile has one tile of its own size."""
    return [*range(0, size - crop, stride), max(size - crop, 0)]


def strips(
    predict: Predict, shape: tuple[int, int, int], crop: int, stride: int, first_row: int = 0
) -> Iterator[tuple[int, Array]]:
    """Predict a raster (K, H, W) from top to bottom: first row and probabilities (K, h, W) of strip after strip.

    *predict* gets the first row of a row of tiles, and gives first columns and probabilities (K, rows, columns) of
    those of its tiles that matter; where none does, the result is 0. Strips that end above *first_row* are left out.
    The rest has the same bits: the tiles that reach into it are computed again in the same order.
    """
    classes, height, width = shape
    rows, h, w = starts(height, crop, stride), min(crop, height), min(crop, width)
    first = max(row for row in [*rows, height] if row <= first_row)
    # Raised-cosine weights along each axis: highest in the middle, never 0.
    down, across = (0.501 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size) for size in (h, w))
    weight = np.outer(down, across).astype(np.float32)
    total = np.zeros((classes + 1, h, width), np.float32)  # the last one sums the weights
    for row, end in zip(rows, [*rows[1:], height], strict=True):
        if row + h <= first:
            continue
        for column, probability in predict(row):
            total[:-1, :, column : column + w] += probability * weight
            total[-1, :, column : column + w] += weight
        done = end - row
        if row >= first:
            yield row, total[:-1, :done] / np.maximum(total[-1, :done], 1e-9)
        # Keep what these tiles have left for the rows below.
        total = np.concatenate([total[:, done:], np.zeros((classes + 1, done, width), np.float32)], axis=1)


class Network:
    """The model of a parsed recipe with the weights of a checkpoint: exactly the arithmetic of `predict`.

    `classes` is K, `steps` are timesteps by modality in the model's order. Raises `UsageError` where the recipe does
    not build, and `CheckpointError` where the weights are another model's.
    """

    def __init__(self, cli: "RecipeCLI", weights: Checkpoint) -> None:
        from floodrepro.training.terratorch_cli import without_files  # a slow import, for which nobody else waits

        without_files(cli.config)
        cli.build()
        load_strictly(weights, cli.model, cli.recipe)
        self._data = cli.datamodule
        self.device = cli.trainer.strategy.root_device
        self._precision = cli.trainer.strategy.precision_plugin
        self._task = self._precision.convert_module(cli.model).to(self.device).eval()
        steps = list(self._data.timesteps)
        self._count = len(steps)
        steps = steps if len(steps) < len(STEPS) else list(range(len(STEPS)))  # impactmesh: all, in their order
        self.steps = {m: [0] if m == "DEM" else steps for m in self._data.modalities}
        self.classes = int(cli.recipe["model"]["init_args"]["model_args"]["num_classes"])

    def probabilities(self, chips: dict[str, list[Array]]) -> Array:
        """Probabilities (B, K, H, W) of tiles of one size, by modality (T, C, H, W) in chip values.

        Raises `CheckpointError` where they are not finite.
        """
        with torch.inference_mode(), self._precision.forward_context():
            images = {modality: self._image(np.stack(tiles)) for modality, tiles in chips.items()}
            height, width = next(iter(chips.values()))[0].shape[-2:]
            logits = self._task(self._data.aug({"image": images})["image"]).output
            top, left = (-height % _PATCH) // 2, (-width % _PATCH) // 2
            inside = logits[..., top : top + height, left : left + width]
            if not bool(torch.isfinite(inside).all()):
                raise CheckpointError("the model predicts values that are not finite", fix="--precision bf16 or fp32")
            return np.asarray(inside.float().softmax(dim=1).cpu())

    def _image(self, values: Array) -> torch.Tensor:
        """Float32 (B, C, T, H, W), or (B, C, H, W) of one timestep, with missing values replaced as in training."""
        # TerraTorch pads both sides by reflection too, but torch refuses where an image is smaller than its padding.
        sides = [(-size % _PATCH // 2, -size % _PATCH - -size % _PATCH // 2) for size in values.shape[-2:]]
        padded = np.pad(values, [(0, 0), (0, 0), (0, 0), *sides], mode="reflect")
        image = torch.from_numpy(padded).to(self.device, torch.float32).transpose(1, 2)
        image = image.masked_fill(image == NO_DATA, self._data.no_data_replace).nan_to_num(self._data.no_data_replace)
        image = image.expand(-1, -1, self._count, -1, -1)
        return image.contiguous() if self._count > 1 else image[:, :, 0]

    def fitting_batch(self, crop: int) -> int:
        """Tiles in a batch: one on a CPU; on a GPU what 70 % of its free memory holds, by a trial of one tile."""
        if self.device.type != "cuda":
            return 1
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        chips = {m: [np.zeros((len(steps), len(BANDS[m]), crop, crop), np.int16)] for m, steps in self.steps.items()}
        self.probabilities(chips)
        each = torch.cuda.max_memory_allocated(self.device) - before
        return int(min(max(0.7 * torch.cuda.mem_get_info(self.device)[0] // max(each, 1), 1), 64))


def map_scene(
    network: Network, scene: Scene, plan: Mapping[str, Any], output: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Map a scene into a folder; killed at any moment, the same call ends with the same bytes.

    *plan* has the names of the classes, the indices positive and permanent (or None), permanent_file (absolute path or
    None), threshold (None for the most probable class), crop, stride and min_hectares; *record* is what map.json says
    of weights, recipe, problems and versions. The whole content of map.json is returned. Raises `RunFolderError` where
    the folder holds something else, is in use or cannot be written.
    """
    water = water_of(Path(plan["permanent_file"]), scene) if plan["permanent_file"] else None
    places = {place for a in scene.acquisitions.values() for bands, _ in a.sources for place, _ in bands.values()}
    for place in sorted(places):
        with opened(place) as raster:
            places |= set(raster.files if raster.driver == "VRT" else ())
    files = [Path(place) for place in sorted(places | {plan["permanent_file"]} - {None})]
    dates = [(str(file), file.is_file() and file.stat().st_mtime_ns) for file in files]
    area = shapely.to_wkb(scene.polygons, hex=True).tolist()
    said = repr([record, plan, scene.content, area, scene.transform, dates])
    identity, work = hashlib.sha256(said.encode()).hexdigest(), output / _WORK
    if not (output / _RECORD).is_file():
        if output.is_dir() and not work.is_dir() and any(output.iterdir()):
            raise RunFolderError("the folder is not empty and nothing in it is overwritten", where=output)
        try:
            work.mkdir(parents=True, exist_ok=True)
            there = (work / _RAW).stat().st_size if (work / _RAW).is_file() else 0
            if (needed := (_LAYERS + 3) * scene.height * scene.width - there) > shutil.disk_usage(work).free:
                raise OSError(f"{scene.height:,} x {scene.width:,} pixels take up to {needed / 1e9:,.0f} GB")
            # MB, by default 5 % of the memory; and TerraTorch lets GDAL look for no file beside a raster: our header.
            options = {"GDAL_CACHEMAX": 128, "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE"}
            with FileLock(work / "lock", timeout=0), rasterio.Env(**options):
                if not (work / _BEGUN).is_file():  # the batch is kept: with another, a network's last bits may differ
                    (work / _RAW).unlink(missing_ok=True)
                    batch = network.fitting_batch(plan["crop"])
                    write_atomically(work / _BEGUN, json.dumps({"identity": identity, "batch": batch}))
                begun = _read_record(work / _BEGUN, identity)
                _map_rows(network, scene, plan, water, work, begun["batch"])
                _finish(scene, plan, output, begun | record)
        except Timeout as error:
            raise RunFolderError("another map is being made here", where=output, fix="wait for it") from error
        except _DISK_ERRORS as error:
            fix = "make room or name another --output; the same command continues"
            raise RunFolderError(f"the map cannot be written: {error}", where=output, fix=fix) from error
    content = _read_record(output / _RECORD, identity)
    shutil.rmtree(work, ignore_errors=True)
    return content


def _read_record(path: Path, identity: str | None = None) -> dict[str, Any]:
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        found = content["identity"]
    except (ValueError, TypeError, KeyError) as error:
        what, fix = f"the map's record is damaged: {error!r}", "move the folder away and map again"
        raise RunFolderError(what, where=path, fix=fix) from error
    if identity not in (None, found):
        what = "the folder holds a map of other files, weights or options, and nothing is overwritten"
        raise RunFolderError(what, where=path.parent, fix="name another --output, or move this folder away")
    return content


def _map_rows(
    network: Network, scene: Scene, plan: Mapping[str, Any], water: Water | None, work: Path, batch: int
) -> None:
    """Append the layers strip by strip to their file, whose length tells how far it has come."""
    crop, positive, reader = plan["crop"], plan["positive"], Reader(scene, network.steps, plan["crop"])

    def predict(row: int) -> Iterator[tuple[int, Array]]:
        reader.hold(row)
        seen = is_seen(reader.bits)
        columns = [c for c in starts(scene.width, crop, plan["stride"]) if seen[:, c : c + crop].any()]
        for some in [columns[i : i + batch] for i in range(0, len(columns), batch)]:
            chips = {m: [reader.cut(m, np.s_[c : c + crop]) for c in some] for m in network.steps}
            yield from zip(some, network.probabilities(chips), strict=True)

    shape, row_bytes = (network.classes, scene.height, scene.width), _LAYERS * scene.width
    with (work / _RAW).open("ab") as file, console.progress("rows") as show:
        for row, probability in strips(predict, shape, crop, plan["stride"], file.tell() // row_bytes):
            bits = reader.bits[: probability.shape[1]]
            seen = is_seen(bits)
            percent = np.rint(PROBABILITY_STEPS * probability[positive]).astype(np.uint8)
            if plan["threshold"] is not None:  # the positive class wherever it reaches it, and nowhere else
                probability[positive] = np.where(probability[positive] >= plan["threshold"], 2, -1)
            classes = probability.argmax(axis=0).astype(np.uint8)
            if water:
                classes[water(Window(0, row, scene.width, len(bits))) == 1] = plan["permanent"]
            classes[~seen] = percent[~seen] = NOT_SEEN
            file.truncate(row * row_bytes)  # what was written of a strip when it was killed
            layers = [classes, percent, bits, classes == positive, *reader.picture(len(bits))]
            file.write(np.stack(layers, axis=1, dtype=np.uint8, casting="unsafe").tobytes())
            file.flush()
            os.fsync(file.fileno())
            show(row + len(bits), scene.height)


def _finish(scene: Scene, plan: Mapping[str, Any], output: Path, record: dict[str, Any]) -> None:
    """Turn the layers into the map's files; map.json comes last: where it is, all is."""
    console.say("writing COGs, polygons and the quicklook")
    work, hazard, epsg = output / _WORK, plan["names"][plan["positive"]], scene.crs.to_epsg()
    zone = f"{epsg % 100}, {'North' if epsg < 32700 else 'South'}"
    colours = {plan["permanent"]: "30, 80, 220", plan["positive"]: "220, 30, 30"}
    lookup = [colours.get(index, "200, 200, 200") for index in range(len(plan["names"]))]
    header = _HEADER.format(scene, _LAYERS, zone, len(lookup), ", ".join(lookup))
    (work / _RAW).with_suffix(".hdr").write_text(header, encoding="utf-8")
    options = {"driver": "COG", "compress": "DEFLATE", "bigtiff": "IF_SAFER", "num_threads": "1"}
    with rasterio.open(work / _RAW) as layers:
        for number, (name, resampling) in enumerate(_RESAMPLING.items(), 1):
            no_data = "" if name == "quality" else f"&a_nodata={NOT_SEEN}"
            layer, path = f"vrt://{layers.name}?bands={number}{no_data}", work / f"{name}.tif"
            rasterio.shutil.copy(layer, path, overview_resampling=resampling, **options)
            with rasterio.open(path) as made:
                if made.checksum(1) != layers.checksum(number):  # where the disk is full, GDAL may say nothing
                    raise OSError(f"{name}.tif is not what was written")
        km2, shares = _areas(layers, plan["names"])
        shown = [f"{a.sensor} of {a.time:%F}" for a in scene.acquisitions.values() if a.step == EVENT]
        shown = [f"{text} (grey)" if text.startswith("S1RTC") else text for text in shown]
        titles = f"event: {', '.join(shown)}", f"probability of {hazard}", f"{hazard}: {km2[hazard]:.2f} km²"
        polygons = _write_polygons(layers, work / "water.gpkg", hazard, plan["min_hectares"])
        _write_quicklook(layers, work / "quicklook.png", titles)
    for name in ("quicklook.png", "water.gpkg", *(f"{name}.tif" for name in _RESAMPLING)):
        (work / name).replace(output / name)
    content = record | {"scene": scene.content, **plan, "resampling": RESAMPLING}
    content["grid"] = {"crs": scene.crs.to_string(), "transform": scene.transform.to_gdal()}
    content |= {"km2": km2, "shares_of_area": shares, "polygons": polygons}
    write_atomically(output / _RECORD, json.dumps(console.public(content), indent=2, default=str))


def _chunks(raster: DatasetReader) -> Any:
    return subdivide(Window(0, 0, raster.width, raster.height), _CHUNK, raster.width)


def _areas(layers: DatasetReader, names: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """km² of the area, of what was seen of it and of each class; shares of the area that were seen, and by quality."""
    parts = (layers.read([1, 3], window=window) for window in _chunks(layers))
    counted = [[np.bincount(layer.ravel(), None, 256) for layer in part] for part in parts]
    classes, qualities = np.sum(counted, axis=0)
    bits = np.arange(256)
    inside = bits & OUTSIDE == 0
    pixels = {"area": qualities[inside].sum(), "seen": qualities[is_seen(bits)].sum()}
    gaps = {name: qualities[inside & (bits & bit > 0)].sum() for name, bit in QUALITY.items() if bit != OUTSIDE}
    shares = {name: float(n / max(pixels["area"], 1)) for name, n in ({"seen": pixels["seen"]} | gaps).items()}
    pixels |= dict(zip(names, classes, strict=False))
    return {name: float(n * PIXEL**2 / 1e6) for name, n in pixels.items()}, shares


def _write_polygons(layers: DatasetReader, path: Path, name: str, min_hectares: float) -> int:
    """Patches of the positive class, of pixels that share an edge, from the minimum mapping unit on; their number."""
    band = rasterio.band(layers, 4)  # which GDAL reads row by row
    patches = rasterio.features.shapes(band, mask=band, connectivity=4, transform=layers.transform)
    found = (shapely.geometry.shape(geometry) for geometry, _ in patches)
    polygons = np.array([polygon for polygon in found if polygon.area >= min_hectares * 10_000], object)
    sums, tree = np.zeros((2, len(polygons) + 1)), shapely.STRtree(polygons)  # of probabilities and of pixels
    for window in _chunks(layers):
        here = np.sort(tree.query(shapely.box(*layers.window_bounds(window))))
        if len(here):
            part, pairs = layers.read(2, window=window), zip(polygons[here], here + 1, strict=True)
            place = {"out_shape": part.shape, "transform": layers.window_transform(window), "dtype": "int32"}
            owner = rasterio.features.rasterize(pairs, **place).ravel()
            sums += [np.bincount(owner, weights, sums.shape[1]) for weights in (part.ravel(), None)]
    columns = {"class": np.full(len(polygons), name, object), "area_km2": shapely.area(polygons) / 1e6}
    columns["mean_probability"] = sums[0, 1:] / sums[1, 1:] / PROBABILITY_STEPS
    path.unlink(missing_ok=True)
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})  # same map, same bytes
    how = {"layer": "water", "geometry_type": "Polygon", "driver": "GPKG", "crs": layers.crs.to_string()}
    pyogrio.raw.write(path, shapely.to_wkb(polygons), list(columns.values()), list(columns), **how)
    return len(polygons)


def _write_quicklook(layers: DatasetReader, path: Path, titles: tuple[str, str, str]) -> None:
    step = -(-max(layers.shape) // _PICTURE)
    height, width = (-(-size // step) for size in layers.shape)
    _, probability, _, positive, *event = layers.read(out_shape=(_LAYERS, height, width))
    figure = matplotlib.figure.Figure(figsize=(15, min(max(5 * height / width + 0.4, 2.5), 25)), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(np.dstack(event))
    axes[1].set_facecolor("lightgrey")
    seen = np.ma.masked_equal(probability, NOT_SEEN) / PROBABILITY_STEPS
    figure.colorbar(axes[1].imshow(seen, cmap="viridis", vmin=0, vmax=1), ax=axes[1], shrink=0.7)
    axes[2].imshow(np.dstack(event))
    if positive.any() and min(positive.shape) > 1:
        axes[2].contour(positive, levels=[0.5], colors="red", linewidths=0.8)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110, metadata={"Software": None})  # without the library's version


def compare_map(folder: Path, truth: Path, value: int | None) -> ChipTable:
    """The counts of a map against a truth as `water_of` has it: class 1 is the map's positive class, 0 all others.

    Raises `RunFolderError` where there is no map; `DataError` where a file cannot be read, or nothing of the truth's
    flood or of its dry land was seen.
    """
    if not (folder / _RECORD).is_file():
        raise RunFolderError("there is no map here", where=folder, fix="give the --output of a floodrepro map")
    record = _read_record(folder / _RECORD)
    rows, counted = list[tuple[str, str]](), list[dict[str, Any]]()
    paths = [str(folder / f"{name}.tif") for name in _RESAMPLING]
    with opened(paths[0]) as classes, opened(paths[1]) as percent, opened(paths[2]) as quality:
        water = water_of(truth, classes, value)
        for window in subdivide(Window(0, 0, classes.width, classes.height), _CHUNK, _CHUNK):
            found, steps, bits = (layer.read([1], window=window) for layer in (classes, percent, quality))
            wet = np.where(bits & OUTSIDE > 0, IGNORE_INDEX, water(window))
            called = np.where(found == NOT_SEEN, -1, found == record["positive"])
            rows.append((f"row{window.row_off:06d}_column{window.col_off:06d}", f"row{window.row_off:06d}"))
            counted.append(count(wet, called, steps / PROBABILITY_STEPS, classes=2))
    fix = "look at its place, at --truth-value, and whether its 0 is declared as no data (gdal_edit.py -unsetnodata)"
    for kind, name in ((1, "flood"), (0, "dry land")):
        if not sum(counts["counts"][0, kind].sum() for counts in counted):
            raise DataError(f"no {name} of the truth lies where the map has seen something", where=truth, fix=fix)
    metadata = {"split": "map", "protocol": "custom", "recipe_sha256": record.get("recipe_sha256")}
    metadata |= {"class_names": ["rest", record["names"][record["positive"]]], "positive_class": 1}
    metadata["checkpoint"] = {"name": record["weights"]["file"]} | record["weights"]
    return ChipTable.of_batches(rows, counted, metadata)
