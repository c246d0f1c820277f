"""Compare a map with a truth: a chip table over tiles, so that maps are verified as predictions of chips are."""

from pathlib import Path
from typing import Any

import numpy as np
from rasterio.windows import Window

from floodrepro.data.protocols import IGNORE_INDEX
from floodrepro.errors import DataError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.mapping.mapper import RECORD, read_map_record
from floodrepro.mapping.reader import WaterMask
from floodrepro.mapping.scene import Grid, opened
from floodrepro.mapping.write import NOT_SEEN, PROBABILITY_STEPS

_TILE = 256


def compare_map(folder: Path, truth: Path, value: int | None) -> ChipTable:
    """The counts of a map against a truth, tile by tile: class 1 is the map's positive class, 0 all others.

    Args:
        folder: Of the map.
        truth: Polygons of the flood, or a raster; its negative values and no-data are not counted.
        value: What flood is in a raster; None for all but 0.

    Raises:
        RunFolderError: The folder holds no map.
        DataError: A file cannot be read, or no flood of the truth lies where the map has seen something.
    """
    record = read_map_record(folder / RECORD)
    events: dict[str, str] = {}
    counted: list[dict[str, Any]] = []
    with opened(str(folder / "class.tif")) as classes, opened(str(folder / "probability.tif")) as probability:
        mask = WaterMask(truth, Grid(classes.crs, classes.transform, classes.height, classes.width), value)
        for row in range(0, classes.height, _TILE):
            window = Window(0, row, classes.width, min(_TILE, classes.height - row))
            water, known = mask.rows(row, int(window.height))
            wet = np.where(known, water, IGNORE_INDEX)
            found, share = classes.read(1, window=window), probability.read(1, window=window) / PROBABILITY_STEPS
            for column in range(0, classes.width, _TILE):
                name, part = f"row{row:06d}_column{column:06d}", np.s_[:, column : column + _TILE]
                called = np.where(found[part] == NOT_SEEN, -1, (found[part] == record["positive"]).astype(int))
                events[name] = name.split("_")[0]
                counted.append(count(wet[part][None], called[None], share[part][None], classes=2))
    if not sum(int(counts["counts"][0, 1].sum()) for counts in counted):
        fix = "look at the place of the truth, and at --truth-value"
        raise DataError("no flood of the truth lies where the map has seen something", where=truth, fix=fix)
    metadata = {"split": "map", "class_names": ["rest", record["names"][record["positive"]]], "positive_class": 1}
    metadata |= {"protocol": "custom", "checkpoint": {"name": record["weights"]["file"]} | record["weights"]}
    metadata["recipe_sha256"] = record.get("recipe_sha256")  # of maps made before 0.2 none is known
    return ChipTable.of_batches(events.items(), counted, metadata)
