"""Map a scene: strips of probability to files, resumable at any strip, and the record of what was done."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from floodrepro import console
from floodrepro.data.protocols import NO_DATA
from floodrepro.errors import RunFolderError
from floodrepro.mapping import write
from floodrepro.mapping.reader import OUTSIDE, QUALITY, RESAMPLING, Reader, WaterMask
from floodrepro.mapping.scene import EVENT_STEP, PIXEL, STEPS, Scene
from floodrepro.mapping.tiles import Array, Tile, strips
from floodrepro.run_folder import write_atomically

if TYPE_CHECKING:
    from floodrepro.mapping.network import Network

RECORD, _WORK, _JOURNAL = "map.json", ".work", "journal.json"


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
        RunFolderError: The folder holds something else, or another process works in it.
        DataError: A file cannot be read.
    """
    work, identity = output / _WORK, _identity(scene, plan, record)
    _refuse_other(output, identity)
    if not (output / RECORD).is_file():
        work.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(work / "lock", timeout=0):
                journal = {"identity": identity, "rows": 0, "counts": {}}
                if (work / _JOURNAL).is_file():
                    journal = json.loads((work / _JOURNAL).read_text(encoding="utf-8"))
                # Kept from the first start on: with other batches a network's last bits may differ.
                journal.setdefault("batch", plan["batch"] or network.fitting_batch(plan["crop"]))
                _map_rows(network, scene, plan, work, journal)
                _finish(scene, plan, output, journal, record)
        except Timeout as error:
            raise RunFolderError("another process maps into this folder", where=output) from error
    shutil.rmtree(work, ignore_errors=True)
    return dict(json.loads((output / RECORD).read_text(encoding="utf-8")))


def _identity(scene: Scene, plan: Mapping[str, Any], record: dict[str, Any]) -> str:
    """A hash of all that a map depends on; of the scene's files, names, sizes and dates."""
    places = sorted({place for a in scene.acquisitions.values() for s in a.sources for place, _ in s.bands.values()})
    stats = [Path(place).stat() for place in places if Path(place).is_file()]
    files = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    parts = [record, plan, scene.content, scene.grid.transform.to_gdal(), places, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_other(output: Path, identity: str) -> None:
    for path in (output / RECORD, output / _WORK / _JOURNAL):
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")).get("identity") != identity:
                raise RunFolderError(
                    "the folder holds a map of other files, weights or options, and nothing is overwritten",
                    where=output,
                    fix="name another --output, or move this folder away",
                )
            return
    if output.is_dir() and any(path.name != _WORK for path in output.iterdir()):
        raise RunFolderError("the folder is not empty and nothing in it is overwritten", where=output)


def _map_rows(network: "Network", scene: Scene, plan: Mapping[str, Any], work: Path, journal: dict[str, Any]) -> None:
    """Fill the work rasters strip by strip; the journal is written after a strip is on disk."""
    grid, done, began = scene.grid, journal["rows"], time.monotonic()
    reader = Reader(scene, network.bands, network.steps, plan["crop"])
    rasters = write.WorkRasters(work, grid)
    permanent = WaterMask(Path(plan["permanent_file"]), grid) if plan["permanent_file"] else None
    quality: dict[int, Array] = {}  # of the row of tiles that is worked on, by its first row

    def predict(tiles: Sequence[Tile]) -> Array:
        """Probabilities; 0 in tiles without a pixel that was seen, on which no result depends."""
        row, _, height, width = tiles[0]
        if row not in quality:
            quality.clear()
            reader.hold(row, height)
            quality[row] = reader.quality(row, height)
        seen = reader.seen(quality[row])
        wanted = [i for i, tile in enumerate(tiles) if seen[:, tile[1] : tile[1] + width].any()]
        out = np.zeros((len(tiles), network.classes, height, width), np.float32)
        if wanted:
            out[wanted] = network.probabilities({m: [reader.cut(m, tiles[i]) for i in wanted] for m in network.bands})
        return out

    first = done
    sizes = {"crop": plan["crop"], "stride": plan["stride"], "batch": journal["batch"]}
    for row, probability in strips(predict, grid.height, grid.width, **sizes, first_row=done):
        height = probability.shape[1]
        bits = quality[row][:height]
        seen, inside = reader.seen(bits), bits & OUTSIDE == 0
        classes = _classes(probability, plan)
        if permanent is not None:
            classes = np.where(permanent.rows(row, height)[0], np.uint8(plan["permanent"]), classes)
        percent = np.rint(write.PROBABILITY_STEPS * probability[plan["positive"]]).astype(np.uint8)
        classes, percent = (np.where(seen, values, np.uint8(write.NOT_SEEN)) for values in (classes, percent))
        values = {"class": classes, "probability": percent, "quality": bits}
        rasters.write(row, values, _colours(reader, (row, 0, *bits.shape), rasters.step))
        counts = {"area": inside, "seen": seen}
        counts |= {name: classes == number for number, name in enumerate(plan["names"])}
        counts |= {name: inside & (bits & bit > 0) for name, bit in QUALITY.items()}
        for modality in network.bands:
            for place, step in enumerate([0] if modality == "DEM" else network.steps):
                name = "missing DEM" if modality == "DEM" else f"missing {modality}.{STEPS[step]}"
                counts[name] = inside & reader.missing(modality, place, row, height)
        done = journal["rows"] = row + height
        for name, where in counts.items():
            journal["counts"][name] = journal["counts"].get(name, 0) + int(where.sum())
        write_atomically(work / _JOURNAL, json.dumps(journal))
        left = (time.monotonic() - began) / (done - first) * (grid.height - done)
        console.say(f"row {done} of {grid.height}, {left / 60:.1f} min left")


def _classes(probability: Array, plan: Mapping[str, Any]) -> Array:
    """The most probable class; with a threshold, the positive class wherever it reaches it."""
    if plan["threshold"] is None:
        return np.asarray(probability.argmax(axis=0), np.uint8)
    rest = probability.copy()
    rest[plan["positive"]] = -1
    reached = probability[plan["positive"]] >= plan["threshold"]
    return np.asarray(np.where(reached, plan["positive"], rest.argmax(axis=0)), np.uint8)


def _colours(reader: Reader, tile: Tile, step: int) -> Array:
    """The event in colours (h, W / step, 3): optical where there is some, else VV in grey."""
    event = reader.steps.index(EVENT_STEP)

    def band(modality: str, number: int) -> Array:
        part = np.s_[event : event + 1, number : number + 1]
        return reader.cut(modality, tile, part)[0, 0, :, ::step].astype(np.float32)

    out = np.zeros((tile[2], -(-tile[3] // step), 3), np.float32)
    if "S1RTC" in reader.bands:
        out += np.nan_to_num((band("S1RTC", 0)[..., None] + 25) * 10.2)  # -25 dB is black, 0 dB white
    names = reader.bands.get("S2L2A", [])
    for channel, name in enumerate(name for name in ("B04", "B03", "B02") if name in names):
        values = band("S2L2A", names.index(name))
        out[..., channel] = np.where(values == NO_DATA, out[..., channel], values * 0.085)  # 3000 is white
    return np.clip(out, 0, 255).astype(np.uint8)


def _finish(
    scene: Scene, plan: Mapping[str, Any], output: Path, journal: dict[str, Any], record: dict[str, Any]
) -> None:
    """Turn the work rasters into the map's files; map.json comes last: where it is, all is."""
    console.say("writing COGs, polygons and the quicklook")
    rasters, counts = write.WorkRasters(output / _WORK, scene.grid), journal["counts"]
    write.write_cogs(rasters, output)
    water = {i: name for i, name in enumerate(plan["names"]) if i in (plan["positive"], plan["permanent"])}
    polygons = write.write_polygons(rasters, output / "water.gpkg", water, plan["min_hectares"])
    area, hazard = max(counts["area"], 1), plan["names"][plan["positive"]]
    km2 = {name: counts[name] * PIXEL**2 / 1e6 for name in ("area", "seen", *plan["names"])}
    shown = next(a for s in ("S2L2A", "S1RTC") if (a := scene.acquisitions.get((s, EVENT_STEP))))
    titles = (
        f"event: {shown.sensor} of {shown.time:%Y-%m-%d}",
        f"probability of {hazard}",
        f"{hazard}: {km2[hazard]:.2f} km², {counts['seen'] / area:.0%} of the area seen",
    )
    write.write_quicklook(rasters, output / "quicklook.png", plan["positive"], titles)
    shares = {name: count / area for name, count in counts.items() if name not in ("area", *plan["names"])}
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
