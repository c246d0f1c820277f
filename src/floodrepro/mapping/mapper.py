"""Map a scene: strips of probability to files, resumable at any strip, and the record of what was done."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from filelock import FileLock, Timeout

from floodrepro import console
from floodrepro.data.protocols import NO_DATA
from floodrepro.errors import RunFolderError
from floodrepro.mapping import write
from floodrepro.mapping.reader import OUTSIDE, QUALITY, RESAMPLING, Reader, WaterMask
from floodrepro.mapping.scene import EVENT_STEP, PIXEL, Scene, name_of
from floodrepro.mapping.tiles import Array, Tile, strips
from floodrepro.run_folder import PARTIAL, write_atomically

if TYPE_CHECKING:
    from floodrepro.mapping.network import Network

RECORD, _WORK, _JOURNAL, _LOCK = "map.json", ".work", "journal.json", ".lock"


def map_scene(
    network: "Network", scene: Scene, plan: Mapping[str, Any], output: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """Map a scene into a folder; killed at any moment, the same call ends with the same bytes.

    Args:
        network: Turns chip values into probabilities.
        scene: What is read.
        plan: In JSON types: names of the classes, positive (index of the class that the map is about), permanent (of
            permanent water, or None), permanent_file (path or None), threshold (probability from which a pixel is
            positive; None for the most probable class), crop and stride (pixels), batch (None for what fits) and
            min_hectares (minimum mapping unit of the polygons).
        output: Folder for the map.
        record: What map.json says of weights, recipe, problems and versions.

    Returns:
        The content of map.json.

    Raises:
        RunFolderError: The folder holds something else, another process maps into it, or it cannot be written.
        DataError: A file cannot be read.
    """
    identity, work = _identity(scene, plan, record), output / _WORK
    if not (output / RECORD).is_file():
        if output.is_dir() and any(path != work for path in output.iterdir()) and not (work / _JOURNAL).is_file():
            raise RunFolderError("the folder is not empty and nothing in it is overwritten", where=output)
        if os.path.lexists(work) and not _is_ours(work):
            raise RunFolderError("something else lies here, and nothing in it is overwritten", where=work)
        try:
            work.mkdir(parents=True, exist_ok=True)
            with FileLock(work / _LOCK, timeout=0):
                _map(network, scene, plan, output, record, identity)
        except Timeout as error:
            raise RunFolderError("another map is being made here", where=output, fix="wait for it") from error
        except write.ERRORS as error:
            fix = "make room or name another --output; the same command continues"
            raise RunFolderError(f"the map cannot be written: {error}", where=output, fix=fix) from error
    content = read_map_record(output / RECORD, identity)
    if _is_ours(work):
        with suppress(OSError):  # the map is whole
            for path in sorted(work.iterdir(), key=lambda path: path.name == _JOURNAL):  # last: it tells whose all is
                path.unlink()
            work.rmdir()
    return content


def _is_ours(work: Path) -> bool:
    """Whether a folder holds a map's beginning, or nothing yet."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = [path.name for path in work.iterdir()]
    return _JOURNAL in names or all(name == _LOCK or name.endswith(PARTIAL) for name in names)


def read_map_record(path: Path, identity: str | None = None) -> dict[str, Any]:
    """The content of a map's record or journal.

    Args:
        path: The file.
        identity: What the map has to be of.

    Raises:
        RunFolderError: It is missing or damaged, or the map is of something else.
    """
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        found = content["identity"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        fix = "move the folder away and map again"
        raise RunFolderError(f"the map's record cannot be read: {error!r}", where=path, fix=fix) from error
    if identity not in (None, found):
        raise RunFolderError(
            "the folder holds a map of other files, weights or options, and nothing is overwritten",
            where=path.parent,
            fix="name another --output, or move this folder away",
        )
    return content


def _map(
    network: "Network", scene: Scene, plan: Mapping[str, Any], output: Path, record: dict[str, Any], identity: str
) -> None:
    """Begin a map or continue it; the journal is there before any other file, and tells what they are of."""
    work = output / _WORK
    if (output / RECORD).is_file():  # another process has just finished it
        return
    if (work / _JOURNAL).is_file():
        journal = read_map_record(work / _JOURNAL, identity)
    else:
        # The batch is kept from the first start on: with other batches a network's last bits may differ.
        batch = plan["batch"] or network.fitting_batch(plan["crop"])
        journal = {"identity": identity, "rows": 0, "counts": {}, "batch": batch}
        write_atomically(work / _JOURNAL, json.dumps(journal))
    _map_rows(network, scene, plan, work, journal)
    _finish(scene, plan, output, journal, record)


def _identity(scene: Scene, plan: Mapping[str, Any], record: dict[str, Any]) -> str:
    """A hash of all that a map depends on; of files, absolute paths, sizes and dates."""
    places = {place for a in scene.acquisitions.values() for s in a.sources for place, _ in s.bands.values()}
    files: list[list[Any]] = []
    for place in filter(None, [*places, plan["permanent_file"]]):
        stat = Path(place).stat() if Path(place).is_file() else None
        files.append([str(Path(place).resolve()), stat.st_size, stat.st_mtime_ns] if stat else [place])
    files.sort()
    options = dict(plan, permanent_file=None)  # a path: it depends on where the command is called
    parts = [record, options, scene.content, shapely.to_wkb(scene.polygons, hex=True).tolist(), scene.grid, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _map_rows(network: "Network", scene: Scene, plan: Mapping[str, Any], work: Path, journal: dict[str, Any]) -> None:
    """Fill the work rasters strip by strip; the journal is written after a strip is on disk."""
    grid, reader = scene.grid, Reader(scene, network.bands, network.steps, plan["crop"])
    rasters = write.WorkRasters(work, grid)
    permanent = WaterMask(Path(plan["permanent_file"]), grid) if plan["permanent_file"] else None
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

    shape, sizes = (network.classes, grid.height, grid.width), {key: plan[key] for key in ("crop", "stride")}
    with console.progress("rows") as show:
        for row, probability in strips(predict, shape, **sizes, batch=journal["batch"], first_row=journal["rows"]):
            height = probability.shape[1]
            bits, seen = (values[:height] for values in held[row])
            classes = _classes(probability, plan["positive"], plan["threshold"])
            if permanent is not None:
                classes[permanent.rows(row, height)[0]] = plan["permanent"]
            percent = np.rint(write.PROBABILITY_STEPS * probability[plan["positive"]]).astype(np.uint8)
            classes[~seen] = percent[~seen] = write.NOT_SEEN
            values = {"class": classes, "probability": percent, "quality": bits}
            for name, value in (values | _colours(reader, (row, 0, *bits.shape))).items():
                rasters.write(name, row, value)
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


def _classes(probability: Array, positive: int, threshold: float | None) -> Array:
    """The most probable class; with a threshold, the positive class wherever it reaches it."""
    if threshold is not None:
        reached = probability[positive] >= threshold
        probability = probability.copy()
        probability[positive] = np.where(reached, 2, -1)
    return np.asarray(probability.argmax(axis=0), np.uint8)


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
    rasters, counts, names = write.WorkRasters(output / _WORK, scene.grid), journal["counts"], plan["names"]
    write.write_cogs(rasters, output)
    water = {i: name for i, name in enumerate(names) if i in (plan["positive"], plan["permanent"])}
    polygons = write.write_polygons(rasters, output / "water.gpkg", water, plan["min_hectares"])
    area, hazard = max(counts["area"], 1), names[plan["positive"]]
    km2 = {name: counts[name] * PIXEL**2 / 1e6 for name in ("area", "seen", *names)}
    shares = {name: count / area for name, count in counts.items() if name not in ("area", *names)}
    shown = [f"{a.sensor} of {a.time:%F}" for a in scene.acquisitions.values() if a.step == EVENT_STEP]
    titles = f"event: {', '.join(shown)}", f"probability of {hazard}", f"{hazard}: {km2[hazard]:.2f} km²"
    write.write_quicklook(rasters, output / "quicklook.png", plan["positive"], titles)
    content = {
        "identity": journal["identity"],
        **record,
        "scene": scene.content,
        **plan,
        "batch": journal["batch"],
        "grid": {"crs": scene.grid.crs.to_string(), "transform": scene.grid.transform.to_gdal()[:6]},
        "resampling": RESAMPLING,
        "km2": km2,
        "shares_of_area": shares,
        "polygons": polygons,
    }
    write_atomically(output / RECORD, json.dumps(content, indent=2, default=str))
