"""The inside of a zarr ZIP: where the chunks of its ``bands`` array lie, and how to decode them.

A chip's modality is one ZIP of a zarr v2 group. Opening it with the zarr library parses all of its metadata for each
read, which takes several times as long as decoding the pixels. Here the place and the codec of the chunks are read
once; what is laid out in any other way than today's is left to the zarr library itself.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import get_codec
from numcodecs.abc import Codec

from floodrepro.errors import DataError

ARRAY = "bands"
ReadAt = Callable[[int, int], bytes]  # (size, offset) -> bytes
Borrow = Callable[[int, int], bytes | memoryview]  # the same; what it returns may be gone at the next call

# ZIP file format: PKWARE, APPNOTE.TXT 6.3, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.16 (its end).
_END = struct.Struct("<4s4H2LH")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED = 0
_BLOSC = struct.Struct("<4x3L")  # bytes when decoded, block size, bytes now: the header of c-blosc's chunks
_TAIL = 16 * 1024  # holds the whole directory of a chip, about 40 entries of 80 bytes


@dataclass(frozen=True)
class Entry:
    """One file inside a ZIP: offset and size of its bytes, relative to the ZIP's first byte; stored or compressed."""

    offset: int
    size: int
    stored: bool


@dataclass(frozen=True)
class ArrayLayout:
    """Shape, dtype and compression of a zarr v2 array whose chunks split the first axis only.

    Args:
        shape: Of the array, (T, C, H, W).
        steps: Timesteps in each chunk.
        dtype: NumPy's name of it, byte order included.
        codec: numcodecs configuration as JSON; ``null`` for uncompressed chunks.
    """

    shape: tuple[int, int, int, int]
    steps: int
    dtype: str
    codec: str


@lru_cache(maxsize=64)
def array_layout(metadata: bytes) -> ArrayLayout | None:
    """Read an array's ``.zarray``; None where only the zarr library reads such an array.

    Args:
        metadata: Content of the file. All chips share a handful of them, hence the cache.

    Raises:
        DataError: It is damaged.
    """
    try:
        document = json.loads(metadata)
        shape, chunks = tuple(document["shape"]), tuple(document["chunks"])
        plain = (
            document.get("zarr_format") == 2
            and len(shape) == 4
            and chunks[1:] == shape[1:]
            and shape[0] % chunks[0] == 0
            and document.get("order") == "C"
            and not document.get("filters")
            and document.get("dimension_separator", ".") == "."
        )
        if not plain:
            return None
        compressor = json.dumps(document["compressor"], sort_keys=True)
        _codec(compressor)  # one that numcodecs does not know is told here, not at the first pixel
        return ArrayLayout(shape, chunks[0], np.dtype(document["dtype"]).str, compressor)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"the array's .zarray is damaged: {type(error).__name__}: {error}") from error


def list_entries(read_at: ReadAt, size: int) -> dict[str, Entry]:
    """The files of a ZIP by name, with the offsets of their bytes.

    Args:
        read_at: Reads from the ZIP.
        size: The ZIP's length in bytes.

    Raises:
        DataError: It is no whole ZIP.
    """
    start = max(0, size - _TAIL)
    tail = read_at(size - start, start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < _END.size:
        raise DataError("the ZIP is truncated or damaged: its directory is missing")
    _, _, _, _, count, length, directory, _ = _END.unpack_from(tail, end)
    records = tail[directory - start : directory - start + length] if directory >= start else read_at(length, directory)
    entries = {}
    place = 0
    try:
        for _ in range(count):
            fields = _CENTRAL.unpack_from(records, place)
            if fields[0] != b"PK\x01\x02":
                raise DataError("the ZIP's directory is damaged")
            method, compressed, name_size, extra, comment, header = fields[4], fields[8], *fields[10:13], fields[16]
            name = records[place + _CENTRAL.size :][:name_size].decode()
            # The local header repeats the name and may hold another extra field than the directory: offset comes later.
            entries[name] = Entry(header, compressed, method == _STORED)
            place += _CENTRAL.size + name_size + extra + comment
    except (struct.error, UnicodeDecodeError) as error:
        raise DataError("the ZIP's directory is damaged") from error
    return {name: _data_of(entry, read_at) for name, entry in entries.items() if _wanted(name)}


def _wanted(name: str) -> bool:
    return name.startswith(f"{ARRAY}/")


def _data_of(entry: Entry, read_at: ReadAt) -> Entry:
    header = read_at(_LOCAL.size, entry.offset)
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise DataError("the ZIP is damaged: its directory points to no file")
    fields = _LOCAL.unpack(header)
    return Entry(entry.offset + _LOCAL.size + fields[9] + fields[10], entry.size, entry.stored)


@dataclass(frozen=True)
class Chunks:
    """Where the pixels of one chip's modality lie: layout, then offset and size of each chunk in order of time."""

    layout: ArrayLayout
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def find_chunks(read_at: ReadAt, size: int) -> Chunks | None:
    """Find the chunks of a zarr ZIP; None where only the zarr library reads it.

    Args:
        read_at: Reads from the ZIP.
        size: The ZIP's length in bytes.

    Raises:
        DataError: It is no whole ZIP, holds no array ``bands``, or one whose ``.zarray`` is damaged.
    """
    entries = list_entries(read_at, size)
    metadata = entries.get(f"{ARRAY}/.zarray")
    if metadata is None:
        raise DataError(f"the zarr holds no array '{ARRAY}'")
    if not metadata.stored:
        return None
    layout = array_layout(read_at(metadata.size, metadata.offset))
    if layout is None:
        return None
    names = [f"{ARRAY}/{i}.0.0.0" for i in range(layout.shape[0] // layout.steps)]
    found = [entries[name] for name in names if name in entries and entries[name].stored]
    if len(found) != len(names):  # deflated, or left out because a chunk holds the fill value only
        return None
    return Chunks(layout, tuple(e.offset for e in found), tuple(e.size for e in found))


def decode(
    chunks: Chunks, read_at: Borrow, timesteps: Sequence[int] | None = None, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Decode a chip's modality, or some of its timesteps.

    Args:
        chunks: From `find_chunks` of the same ZIP.
        read_at: Reads from the ZIP.
        timesteps: Indices on the first axis, in the order wanted; all where None.
        out: Contiguous array to decode into, of the result's shape and dtype; a new one where None.

    Returns:
        Array (T, C, H, W) in the dtype on disk, writable.

    Raises:
        DataError: A chunk does not decode to its size.
    """
    layout = chunks.layout
    codec = _codec(layout.codec)
    wanted = range(layout.shape[0]) if timesteps is None else timesteps
    shape = (len(wanted), *layout.shape[1:])
    if out is None or out.shape != shape or out.dtype != layout.dtype:
        out = np.empty(shape, layout.dtype)
    if layout.steps == 1:
        for place, step in enumerate(wanted):
            _decode_into(codec, read_at(chunks.sizes[step], chunks.offsets[step]), out[place])
        return out
    whole = np.empty(layout.shape, layout.dtype)
    for i, (offset, size) in enumerate(zip(chunks.offsets, chunks.sizes, strict=True)):
        _decode_into(codec, read_at(size, offset), whole[i * layout.steps : (i + 1) * layout.steps])
    return whole if timesteps is None else whole[list(wanted)]


@lru_cache(maxsize=16)
def _codec(configuration: str) -> Codec | None:
    document = json.loads(configuration)
    return None if document is None else get_codec(document)


def _decode_into(codec: Codec | None, stored: bytes | memoryview, out: npt.NDArray[Any]) -> None:
    try:
        if codec is not None and codec.codec_id == "blosc":
            # numcodecs decodes a chunk that is too short without a word, and the end of *out* would keep old pixels.
            size, _, compressed = _BLOSC.unpack_from(stored)
            if size != out.nbytes or compressed > len(stored):
                raise ValueError(f"{compressed} bytes for {size} instead of {len(stored)} for {out.nbytes}")
            codec.decode(stored, out=out)
            return
        plain = np.frombuffer(stored if codec is None else codec.decode(stored), np.uint8)
        if plain.nbytes != out.nbytes:
            raise ValueError(f"{plain.nbytes} bytes instead of {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = plain
    except (RuntimeError, ValueError, TypeError, struct.error) as error:
        raise DataError(f"a chunk does not decode: {error}") from error
