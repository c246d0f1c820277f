"""Compare a map with a truth: a chip table over tiles, so that maps are verified as predictions of chips are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window

from floodrepro.errors import DataError
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.metrics import confusion
from floodrepro.mapping.mapper import RECORD
from floodrepro.mapping.reader import WaterMask
from floodrepro.mapping.scene import Grid
from floodrepro.mapping.write import NOT_SEEN, PROBABILITY_STEPS

_TILE = 256


def compare_map(folder: Path, truth: Path, value: int | None) -> ChipTable:
    """The counts of a map against a truth, tile by tile: class 1 is the map's positive class, 0 all others.

    Args:
        folder: Of the map.
        truth: Polygons of the flood, or a raster; its negative values and no-data are not counted.
        value: What flood is in a raster; None for all but 0.

    Raises:
        DataError: The folder holds no map, or the truth cannot be read.
    """
    if not (folder / RECORD).is_file():
        raise DataError("no map lies here", where=folder, fix="floodrepro map writes one")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    rows: list[tuple[Any, ...]] = []
    with rasterio.open(folder / "class.tif") as classes, rasterio.open(folder / "probability.tif") as probability:
        grid = Grid(classes.crs, classes.transform, classes.height, classes.width)
        mask = WaterMask(truth, grid, value)
        for row in range(0, grid.height, _TILE):
            window = Window(0, row, grid.width, min(_TILE, grid.height - row))
            water, known = mask.rows(row, int(window.height))
            found, percent = classes.read(1, window=window), probability.read(1, window=window)
            for column in range(0, grid.width, _TILE):
                tile = np.s_[:, column : column + _TILE]
                name = f"row{row:06d}_column{column:06d}"
                rows.append((name, *_counts(water[tile], known[tile], found[tile], percent[tile], record["positive"])))
    names = ("chips", "counts", "ignored", "unseen", "histogram", "confidence", "squared_error")
    columns: dict[str, Any] = dict(zip(names, (np.array(column) for column in zip(*rows, strict=True)), strict=True))
    metadata = {"split": "map", "class_names": ["rest", record["names"][record["positive"]]], "positive_class": 1}
    metadata |= {"protocol": "custom", "checkpoint": {"name": record["weights"]["file"]} | record["weights"]}
    return ChipTable(**columns, metadata=metadata)


def _counts(water: Any, known: Any, found: Any, percent: Any, positive: int) -> tuple[Any, ...]:
    """Columns of the chip table of one tile."""
    seen = known & (found != NOT_SEEN)
    truth = water[seen]
    share = percent[seen] / PROBABILITY_STEPS
    bins = np.minimum((share * BINS).astype(int), BINS - 1)
    histogram = np.bincount(truth * BINS + bins, minlength=2 * BINS).reshape(2, BINS)
    unseen = (known & ~seen).sum()
    counts = confusion(truth.astype(int), found[seen] == positive, 2)
    confidence = np.bincount(bins, share, BINS)
    return counts, (~known).sum(), unseen, histogram, confidence, ((share - truth) ** 2).sum()
