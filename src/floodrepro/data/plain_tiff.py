"""The pixels of a plain TIFF, without a library's look at everything else in it.

A chip's DEM and mask are small: opening them with GDAL takes most of a loader's time, for a CRS that nobody asks for
when training. What is laid out in any other way than today's is left to GDAL.
"""

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

# TIFF 6.0 (Adobe, 1992), sections 2 and 8; 8 is Adobe Deflate (Technical Note 2), 32946 its old number.
_ENTRY = struct.Struct("<HHI4s")
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _OFFSETS, _BANDS, _COUNTS = 256, 257, 258, 259, 273, 277, 279
_PREDICTOR, _TILES, _FORMAT = 317, 322, 339
_SIZES = {3: "<u2", 4: "<u4"}  # the types SHORT and LONG
_KINDS = {1: "u", 2: "i", 3: "f"}
_DEFLATE = (8, 32946)


def read(content: bytes) -> npt.NDArray[Any] | None:
    """Pixels (H, W) of a one-band, little-endian TIFF in strips, uncompressed or deflated.

    Args:
        content: The whole file.

    Returns:
        A writable array; None for a file of another kind, or one that is damaged: GDAL says which.
    """
    try:
        return _read(content)
    except (struct.error, zlib.error, ValueError, TypeError, KeyError, IndexError):
        return None


def _read(content: bytes) -> npt.NDArray[Any] | None:
    if content[:4] != b"II*\0":
        return None
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    end = place + 2 + 12 * count
    tags = {tag: (kind, n, value) for tag, kind, n, value in _ENTRY.iter_unpack(content[place + 2 : end])}
    if _TILES in tags or struct.unpack_from("<I", content, end)[0]:  # tiles, or a second image
        return None

    def numbers(tag: int, default: int | None = None) -> list[int]:
        if tag not in tags and default is not None:
            return [default]
        kind, n, value = tags[tag]
        dtype = np.dtype(_SIZES[kind])
        if n * dtype.itemsize <= 4:
            return np.frombuffer(value, dtype, n).tolist()  # type: ignore[no-any-return]
        return np.frombuffer(content, dtype, n, struct.unpack("<I", value)[0]).tolist()  # type: ignore[no-any-return]

    compression = numbers(_COMPRESSION, 1)[0]
    plain = numbers(_BANDS, 1) == [1] and numbers(_PREDICTOR, 1) == [1] and compression in (1, *_DEFLATE)
    if not plain:
        return None
    shape = numbers(_HEIGHT)[0], numbers(_WIDTH)[0]
    dtype = np.dtype(f"<{_KINDS[numbers(_FORMAT, 1)[0]]}{numbers(_BITS, 1)[0] // 8}")
    strips = [content[o : o + n] for o, n in zip(numbers(_OFFSETS), numbers(_COUNTS), strict=True)]
    if compression in _DEFLATE:
        strips = [zlib.decompress(strip) for strip in strips]
    pixels = np.frombuffer(b"".join(strips), dtype)
    return pixels.reshape(shape).copy()  # a wrong number of pixels raises
