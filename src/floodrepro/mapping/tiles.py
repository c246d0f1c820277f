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
    predict: Predict, shape: tuple[int, int, int], *, crop: int, stride: int, batch: int, first_row: int = 0
) -> Iterator[tuple[int, Array]]:
    """Predict a raster from top to bottom.

    Args:
        predict: Gives the probabilities of tiles; a raster smaller than a tile is one tile of its own size.
        shape: C, H and W.
        crop: Edge of a tile in pixels.
        stride: Pixels between tiles, at most ``crop``.
        batch: Tiles in one call.
        first_row: Strips above it, which another run has finished, are left out. The rest has the same bits: the tiles
            that reach into it are computed again, in the same order and batches.

    Yields:
        The first row of a strip and its probabilities (C, h, W); strips follow each other without a gap.
    """
    classes, height, width = shape
    rows, columns = starts(height, crop, stride), starts(width, crop, stride)
    h, w = min(crop, height), min(crop, width)
    weight = ramp(h)[:, None] * ramp(w)
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
