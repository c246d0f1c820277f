"""Run a network over a raster of any size in row strips, with bounded memory.

Tiles of ``crop`` pixels lie ``stride`` apart and reach both edges exactly; where they overlap, probabilities are
averaged with raised-cosine weights before a class is chosen. Only the rows that later tiles can still change are held:
``classes + 1`` float32 values for ``crop`` x ``width`` pixels.

C = classes, H, W = rows and columns of the raster, h = rows of a strip.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tile = tuple[int, int, int, int]  # first row, first column, rows, columns
Predict = Callable[[Sequence[Tile]], Array]  # tiles of one size -> probabilities (N, C, rows, columns)


def starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of the tiles along one axis: ``stride`` apart, the last one flush with the edge."""
    return [0] if size <= crop else [*range(0, size - crop, stride), size - crop]


def ramp(size: int) -> Array:
    """Raised-cosine weights along one axis, (size,): highest in the middle, never 0."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(size) + 0.5) / size)).astype(np.float32) + np.float32(1e-3)


def strips(
    predict: Predict, height: int, width: int, *, crop: int, stride: int, batch: int, first_row: int = 0
) -> Iterator[tuple[int, Array]]:
    """Predict a raster from top to bottom.

    Args:
        predict: Gives the probabilities of tiles; a raster smaller than a tile is one tile of its own size.
        height: H.
        width: W.
        crop: Edge of a tile in pixels.
        stride: Pixels between tiles, at most ``crop``.
        batch: Tiles in one call.
        first_row: Strips above it, which another run has finished, are left out. The rest has the same bits: the tiles
            that reach into it are computed again, in the same order and batches.

    Yields:
        The first row of a strip and its probabilities (C, h, W); strips follow each other without a gap.
    """
    rows, columns = starts(height, crop, stride), starts(width, crop, stride)
    h, w = min(crop, height), min(crop, width)
    weight = ramp(h)[:, None] * ramp(w)[None, :]
    total: Array | None = None
    norm = np.zeros((h, width), np.float32)
    top = None
    for i, row in enumerate(rows):
        if row + h <= first_row:
            continue
        if top is not None:  # keep what the tiles above have left
            norm = np.concatenate([norm[row - top :], np.zeros((row - top, width), np.float32)])
            if total is not None:
                new = np.zeros((len(total), row - top, width), np.float32)
                total = np.concatenate([total[:, row - top :], new], axis=1)
        top = row
        for j in range(0, len(columns), batch):
            tiles = [(row, column, h, w) for column in columns[j : j + batch]]
            for (_, column, _, _), probability in zip(tiles, predict(tiles), strict=True):
                if total is None:
                    total = np.zeros((len(probability), h, width), np.float32)
                total[:, :, column : column + w] += probability * weight
                norm[:, column : column + w] += weight
        end = rows[i + 1] if i + 1 < len(rows) else height
        assert total is not None
        if row >= first_row:
            yield row, total[:, : end - row] / norm[: end - row]
