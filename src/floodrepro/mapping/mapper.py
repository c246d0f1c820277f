"""Map a scene strip by strip, in bounded memory and resumable; and compare a map with a truth.

Tiles of ``crop`` pixels lie ``stride`` apart and reach both edges exactly; where they overlap, probabilities are
averaged with raised-cosine weights before a class is chosen. Only the rows that later tiles can still change are held:
``classes + 1`` float32 values for ``crop`` x ``width`` pixels.

C = classes, H, W = rows and columns of the raster, h = rows of a strip.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
import shapely
from filelock import FileLock, Timeout
from rasterio.windows import Window

from floodrepro import console
from floodrepro.data.protocols import IGNORE_INDEX, NO_DATA
from floodrepro.errors import DataError, RunFolderError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.mapping import write
from floodrepro.mapping.reader import OUTSIDE, QUALITY, RESAMPLING, Reader, Tile, read_water
from floodrepro.mapping.scene import EVENT_STEP, PIXEL, Array, Grid, Scene, name_of, opened
from floodrepro.run_folder import write_atomically

if TYPE_CHECKING:
    from floodrepro.mapping.network import Network

_RECORD, _WORK, _JOURNAL, _LOCK = "map.json", ".map-in-progress", "journal.json", "lock"
_TRUTH_TILE = 256  # pixels: a row of the table that compares a map with a truth
Predict = Callable[[Sequence[Tile]], Array]  # tiles of one size -> probabilities (N, C, rows, columns)


def strips(
    predict: Predict, shape: tuple[int, int, int], crop: int, stride: int, batch: int, first_row: int = 0
) -> Iterator[tuple[int, Array]]:
    """Predict a raster (C, H, W) from top to bottom: first row and probabilities (C, h, W) of strip after strip.

    *predict* gets up to *batch* tiles of one size; a raster smaller than a tile is one tile of its own size. Strips
    above *first_row*, which another run has finished, are left out. The rest has the same bits: the tiles that reach
    into it are computed again, in the same order and batches.
    """
    classes, height, width = shape
    rows, columns = ([*range(0, size - crop, stride), max(size - crop, 0)] for size in (height, width))
    h, w = min(crop, height), min(crop, width)
    # Raised-cosine weights along each axis: highest in the middle, never 0.
    down, across = (0.501 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size) for size in (h, w))
    weight = np.outer(down, across).astype(np.float32)
    total = np.zeros((classes + 1, h, width), np.float32)  # the last one sums the weights
    for row, end in zip(rows, [*rows[1:], height], strict=True):
        if row + h <= first_row:
            continue
        for j in range(0, len(columns), batch):
            tiles = [(row, column, h, w) for column in columns[j : j + batch]]
            for (_, column, _, _), probability in zip(tiles, predict(tiles), strict=True):
                total[:-1, :, column : column + w] += probability * weight
                total[-1, :, column : column + w] += weight
        done = end - row
        if row >= first_row:
            yield row, total[:-1, :done] / total[-1, :done]
        # Keep what these tiles have left for the rows below.
        total = np.concatenate([total[:, done:], np.zeros((classes + 1, done, width), np.float32)], axis=1)


def map_scene(
    network: "Network", scene: Scene, plan: Mapping[str, Any], output: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Map a scene into a folder; killed at any moment, the same call ends with the same bytes.

    Args:
        network: Turns chip values into probabilities.
        scene: What is read.
        plan: In JSON types: names of the classes, positive (index of the class that the map is about), permanent (of
            permanent water, or None), permanent_file (absolute path or None), threshold (probability from which a
            pixel is positive; None for the most probable class), crop and stride (pixels) and min_hectares (minimum
            mapping unit of the polygons).
        output: Folder for the map.
        record: What map.json says of weights, recipe, problems and versions. Its whole content is returned.

    Raises:
        RunFolderError: The folder holds something else, another process maps into it, or it cannot be written.
        DataError: A file cannot be read.
    """
    identity, work = _identity(scene, plan, record), output / _WORK
    if not (output / _RECORD).is_file():
        if output.is_dir() and not work.is_dir() and any(output.iterdir()):
            raise RunFolderError("the folder is not empty and nothing in it is overwritten", where=output)
        try:
            work.mkdir(parents=True, exist_ok=True)
            with FileLock(work / _LOCK, timeout=0), rasterio.Env(GDAL_CACHEMAX=128):  # MB; by default 5 % of the memory
                _finish(scene, plan, output, _map_rows(network, scene, plan, work, identity), record)
        except Timeout as error:
            raise RunFolderError("another map is being made here", where=output, fix="wait for it") from error
        except write.ERRORS as error:
            fix = "make room or name another --output; the same command continues"
            raise RunFolderError(f"the map cannot be written: {error}", where=output, fix=fix) from error
    content = _read_json(output / _RECORD, identity)
    shutil.rmtree(work, ignore_errors=True)
    return content


def _identity(scene: Scene, plan: Mapping[str, Any], record: dict[str, Any]) -> str:
    """A hash of all that a map depends on; of files, paths and dates."""
    places = {place for a in scene.acquisitions.values() for s in a.sources for place, _ in s.bands.values()}
    files = sorted(filter(None, [*places, plan["permanent_file"]]))
    dates = [(place, Path(place).is_file() and Path(place).stat().st_mtime_ns) for place in files]
    parts = [record, plan, scene.content, shapely.to_wkb(scene.polygons, hex=True).tolist(), scene.grid, dates]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read_json(path: Path, identity: str | None = None, keys: Sequence[str] = ("identity",)) -> dict[str, Any]:
    """The content of a map's record or journal, which has some keys and is to be of what *identity* says."""
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        found = [content[key] for key in keys]
        found += [content["names"][content["positive"]], content["weights"]["file"]] if "names" in keys else []
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        fix = "move the folder away and map again"
        raise RunFolderError(f"the map's record cannot be read: {error!r}", where=path, fix=fix) from error
    if identity not in (None, found[0]):
        what = "the folder holds a map of other files, weights or options, and nothing is overwritten"
        raise RunFolderError(what, where=path.parent, fix="name another --output, or move this folder away")
    return content


def _map_rows(network: "Network", scene: Scene, plan: Mapping[str, Any], work: Path, identity: str) -> dict[str, Any]:
    """Fill the work rasters strip by strip; the journal, which is returned, is written after a strip is on disk."""
    if (work / _JOURNAL).is_file():
        journal = _read_json(work / _JOURNAL, identity)
    else:  # the batch is kept: with other batches a network's last bits may differ
        journal = {"identity": identity, "rows": 0, "counts": {}, "batch": network.fitting_batch(plan["crop"])}
        write_atomically(work / _JOURNAL, json.dumps(journal))
    grid, reader = scene.grid, Reader(scene, network.bands, network.steps, plan["crop"])
    positive, permanent = plan["positive"], plan["permanent_file"]
    held: dict[int, tuple[Array, Array]] = {}  # quality and what was seen of the row of tiles, by its first row

    def predict(tiles: Sequence[Tile]) -> Array:
        """Probabilities; 0 in tiles without a pixel that was seen, on which no result depends."""
        row, _, height, width = tiles[0]
        if row not in held:
            held.clear()
            reader.hold(row, height)
            held[row] = reader.quality(row, height)
        wanted = [i for i, tile in enumerate(tiles) if held[row][1][:, tile[1] : tile[1] + width].any()]
        out = np.zeros((len(tiles), network.classes, height, width), np.float32)
        if wanted:
            out[wanted] = network.probabilities({m: [reader.cut(m, tiles[i]) for i in wanted] for m in network.bands})
        return out

    shape, sizes = (network.classes, grid.height, grid.width), (plan["crop"], plan["stride"], journal["batch"])
    with console.progress("rows") as show:
        for row, probability in strips(predict, shape, *sizes, first_row=journal["rows"]):
            height = probability.shape[1]
            bits, seen = (values[:height] for values in held[row])
            percent = np.rint(write.PROBABILITY_STEPS * probability[positive]).astype(np.uint8)
            if plan["threshold"] is not None:  # the positive class wherever it reaches it, and nowhere else
                probability[positive] = np.where(probability[positive] >= plan["threshold"], 2, -1)
            classes = probability.argmax(axis=0).astype(np.uint8)
            if permanent:
                classes[read_water(Path(permanent), grid, row, height)[0]] = plan["permanent"]
            classes[~seen] = percent[~seen] = write.NOT_SEEN
            values = {"class": classes, "probability": percent, "quality": bits, "positive": classes == positive}
            for name, value in (values | _colours(reader, (row, 0, *bits.shape))).items():
                write.write_rows(work, name, grid, row, value)
            inside = bits & OUTSIDE == 0
            counts = {"area": inside, "seen": seen}
            counts |= {name: classes == number for number, name in enumerate(plan["names"])}
            counts |= {name: inside & (bits & bit > 0) for name, bit in QUALITY.items()}
            for modality, step in [(m, step) for m, steps in network.steps.items() for step in steps]:
                counts[f"missing {name_of(modality, step)}"] = inside & reader.missing(modality, step, row, height)
            journal["rows"] = row + height
            for name, where in counts.items():
                journal["counts"][name] = journal["counts"].get(name, 0) + int(where.sum())
            write_atomically(work / _JOURNAL, json.dumps(journal))
            show(row + height, grid.height)
    return journal


def _colours(reader: Reader, tile: Tile) -> dict[str, Array]:
    """The event in colours (h, W) from 0 to 255: optical where there is some, else VV in grey."""
    event = {modality: steps.index(EVENT_STEP) for modality, steps in reader.steps.items() if modality != "DEM"}
    grey: Array = np.zeros(tile[2:], np.float32)
    if "S1RTC" in event:
        vv = reader.cut("S1RTC", tile, np.s_[event["S1RTC"], :1])[0].astype(np.float32)
        grey = np.nan_to_num((vv + 25) * 10.2)  # -25 dB is black, 0 dB white
    out = dict.fromkeys(write.COLOURS, grey)
    for colour, band in zip(write.COLOURS, ("B04", "B03", "B02"), strict=True):
        if band in reader.bands.get("S2L2A", []):
            values = reader.cut("S2L2A", tile, np.s_[event["S2L2A"], reader.bands["S2L2A"].index(band)])
            out[colour] = np.where(values == NO_DATA, grey, values * 0.085)  # 3000 is white
    return {colour: np.clip(values, 0, 255).astype(np.uint8) for colour, values in out.items()}


def _finish(
    scene: Scene, plan: Mapping[str, Any], output: Path, journal: dict[str, Any], record: dict[str, Any]
) -> None:
    """Turn the work rasters into the map's files; map.json comes last: where it is, all is."""
    console.say("writing COGs, polygons and the quicklook")
    work, counts, names = output / _WORK, journal["counts"], plan["names"]
    write.write_cogs(work, output)
    area, hazard = max(counts["area"], 1), names[plan["positive"]]
    km2 = {name: counts[name] * PIXEL**2 / 1e6 for name in ("area", "seen", *names)}
    shares = {name: count / area for name, count in counts.items() if name not in ("area", *names)}
    shown = [f"{a.sensor} of {a.time:%F}" for a in scene.acquisitions.values() if a.step == EVENT_STEP]
    titles = f"event: {', '.join(shown)}", f"probability of {hazard}", f"{hazard}: {km2[hazard]:.2f} km²"
    write.write_quicklook(work, output / "quicklook.png", titles)
    polygons = write.write_polygons(work, output / "water.gpkg", hazard, plan["min_hectares"])
    content = {"identity": journal["identity"], **record, "scene": scene.content, **plan, "batch": journal["batch"]}
    content["grid"] = {"crs": scene.grid.crs.to_string(), "transform": scene.grid.transform.to_gdal()[:6]}
    content |= {"resampling": RESAMPLING, "km2": km2, "shares_of_area": shares, "polygons": polygons}
    write_atomically(output / _RECORD, json.dumps(console.public(content), indent=2, default=str))


def compare_map(folder: Path, truth: Path, value: int | None) -> ChipTable:
    """The counts of a map against a truth as `read_water` has it: class 1 is the map's positive class, 0 all others.

    Raises:
        RunFolderError: The folder holds no map.
        DataError: A file cannot be read, or no flood of the truth lies where the map has seen something.
    """
    record = _read_json(folder / _RECORD, keys=("names", "positive", "weights", "recipe_sha256"))
    positive, events, counted = record["positive"], dict[str, str](), list[dict[str, Any]]()
    with opened(str(folder / "class.tif")) as classes, opened(str(folder / "probability.tif")) as probability:
        grid = Grid(classes.crs, classes.transform, *classes.shape)
        for row in range(0, classes.height, _TRUTH_TILE):
            window = Window(0, row, classes.width, min(_TRUTH_TILE, classes.height - row))
            water, known = read_water(truth, grid, row, int(window.height), value)
            wet = np.where(known, water, IGNORE_INDEX)
            found, share = classes.read(1, window=window), probability.read(1, window=window) / write.PROBABILITY_STEPS
            called = np.where(found == write.NOT_SEEN, -1, found == positive)
            for column in range(0, classes.width, _TRUTH_TILE):
                part = np.s_[None, :, column : column + _TRUTH_TILE]
                events[f"row{row:06d}_column{column:06d}"] = f"row{row:06d}"
                counted.append(count(wet[part], called[part], share[part], classes=2))
    if not sum(int(counts["counts"][0, 1].sum()) for counts in counted):
        fix = "look at the place of the truth, and at --truth-value"
        raise DataError("no flood of the truth lies where the map has seen something", where=truth, fix=fix)
    metadata: dict[str, Any] = {"split": "map", "protocol": "custom"}
    metadata |= {"class_names": ["rest", record["names"][positive]], "positive_class": 1}
    metadata["checkpoint"] = {"name": record["weights"]["file"]} | record["weights"]
    metadata["recipe_sha256"] = record["recipe_sha256"]
    return ChipTable.of_batches(events.items(), counted, metadata)
