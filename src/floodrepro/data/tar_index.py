"""An index of a downloaded tar: where each chip's file, and each chunk inside it, lies. Training reads from the tar.

The index is made in one sequential pass that hashes the tar as it goes, and saved beside it. Nothing is extracted, so
nothing can be written outside a target; what an archive of chips has no reason to hold is refused by name all the same.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from floodrepro import console
from floodrepro.data.names import SUFFIXES
from floodrepro.data.zarr_zip import ArrayLayout, Chunks, find_chunks
from floodrepro.errors import DataError
from floodrepro.run_folder import write_atomically

SCHEMA = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """A chip's file in a tar: offset and size in bytes; the chunks' offsets are relative to the tar as well.

    ``chunks`` is None for a GeoTIFF, and for a zarr that only the zarr library reads.
    """

    offset: int
    size: int
    chunks: Chunks | None


@dataclass(frozen=True)
class TarIndex:
    """What a tar holds.

    Args:
        path: The tar.
        sha256: Of the whole tar.
        part: The modality, or MASK: the folder that all members lie in.
        members: By chip id.
    """

    path: Path
    sha256: str
    part: str
    members: dict[str, Member]


def index_path(tar: Path) -> Path:
    """Where a tar's index is saved."""
    return tar.with_name(f"{tar.name}.index.json")


def open_index(tar: Path, progress: Progress | None = None) -> TarIndex:
    """Load a tar's index, or make it if there is none, or none that fits.

    An index fits a tar of the same size and time of change; where only the time differs, the hash decides.

    Args:
        tar: The archive.
        progress: Called with bytes read and the tar's size while the index is made.

    Raises:
        DataError: The tar is truncated, or holds what is refused.
    """
    status = tar.stat()
    saved = _read_saved(tar)
    if saved is not None and saved["tar_size"] == status.st_size:
        if saved["tar_mtime_ns"] == status.st_mtime_ns:
            return _from_document(tar, saved)
        if _sha256(tar) == saved["sha256"]:
            _save(tar, saved | {"tar_mtime_ns": status.st_mtime_ns})
            return _from_document(tar, saved)
    index = build_index(tar, progress)
    _save(tar, _to_document(index, status.st_size, status.st_mtime_ns))
    return index


def build_index(tar: Path, progress: Progress | None = None) -> TarIndex:
    """Index a tar in one sequential pass.

    Raises:
        DataError: As `open_index`.
    """
    size = tar.stat().st_size
    members: dict[str, Member] = {}
    parts = set()
    with tar.open("rb") as file:
        stream = _Hashed(file, size, progress)
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=1024 * 1024) as archive:
                for info in archive:
                    if info.isdir() and _inside(info.name):
                        continue
                    part, chip = _check_member(info, tar)
                    if chip in members:
                        raise DataError(f"the archive holds '{info.name}' twice", where=tar, fix="fetch it again")
                    content = archive.extractfile(info)
                    data = content.read() if content else b""
                    if len(data) != info.size:
                        raise DataError(f"the archive ends inside '{info.name}'", where=tar, fix="fetch it again")
                    members[chip] = Member(info.offset_data, info.size, _chunks(data, info, tar))
                    parts.add(part)
        except tarfile.TarError as error:
            raise DataError(f"the archive is damaged or truncated: {error}", where=tar, fix="fetch it again") from error
        while stream.read(1024 * 1024):
            pass  # what follows the end marker is hashed too
    if stream.count != size or not members:
        raise DataError("the archive is truncated or empty", where=tar, fix="fetch it again")
    if len(parts) > 1:
        raise DataError(f"the archive mixes {' and '.join(sorted(parts))}", where=tar)
    if size % tarfile.BLOCKSIZE or not stream.ended_with_zeros:
        raise DataError("the archive is truncated: its end marker is missing", where=tar, fix="fetch it again")
    return TarIndex(tar, stream.digest.hexdigest(), parts.pop(), members)


class _Hashed(io.RawIOBase):
    """Hashes and counts what is read of a file."""

    def __init__(self, file: BinaryIO, size: int, progress: Progress | None) -> None:
        self._file, self._size, self._progress = file, size, progress
        self.digest = hashlib.sha256()
        self.count = 0
        self._last = b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.count += len(data)
        if data:
            self._last = (self._last + data[-1024:])[-1024:]
            if self._progress is not None:
                self._progress(self.count, self._size)
        return data

    @property
    def ended_with_zeros(self) -> bool:
        """Whether the last 1,024 bytes were zeros: the end marker of a tar (POSIX.1-2017, pax, ustar format)."""
        return len(self._last) == 1024 and not any(self._last)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _check_member(info: tarfile.TarInfo, tar: Path) -> tuple[str, str]:
    """The part and the chip id of a member; refuses all that is no chip's regular file in its modality's folder."""
    reason = None
    if not info.isreg() or info.sparse is not None:
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a fifo"}
        kinds |= {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
        reason = kinds.get(info.type, "no regular file")
    elif PurePosixPath(info.name).is_absolute():
        reason = "absolute"
    elif not _inside(info.name):
        reason = "climbing out of the archive"
    else:
        parts = [piece for piece in PurePosixPath(info.name).parts if piece != "."]
        if len(parts) == 2 and parts[0] in SUFFIXES and parts[1].endswith(SUFFIXES[parts[0]]):
            return parts[0], parts[1].removesuffix(SUFFIXES[parts[0]])
        reason = "of no known kind"
    raise DataError(
        f"the archive holds '{info.name}', which is {reason}: refused",
        where=tar,
        fix="compare the archive's sha256 with the hub's before anything else",
    )


def _chunks(data: bytes, info: tarfile.TarInfo, tar: Path) -> Chunks | None:
    if not info.name.endswith(".zip"):
        return None
    try:
        found = find_chunks(lambda size, offset: data[offset : offset + size], len(data))
    except DataError as error:
        console.warn(f"{tar.name}: {info.name}: {error.what}")  # one damaged chip must not hide the others
        return None
    if found is None:
        return None
    return Chunks(found.layout, tuple(info.offset_data + offset for offset in found.offsets), found.sizes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_document(index: TarIndex, size: int, mtime_ns: int) -> dict[str, object]:
    """Columns, not rows, and each layout once: an index of 10,000 chips loads in a fraction of a second."""
    layouts: list[ArrayLayout] = []
    which: list[int] = []
    chunks: list[list[int]] = []
    for member in index.members.values():
        if member.chunks is None:
            which.append(-1)
            chunks.append([])
            continue
        if member.chunks.layout not in layouts:
            layouts.append(member.chunks.layout)
        which.append(layouts.index(member.chunks.layout))
        chunks.append([*member.chunks.offsets, *member.chunks.sizes])
    return {
        "schema": SCHEMA,
        "tar_size": size,
        "tar_mtime_ns": mtime_ns,
        "sha256": index.sha256,
        "part": index.part,
        "layouts": [asdict(layout) for layout in layouts],
        "chips": list(index.members),
        "offsets": [member.offset for member in index.members.values()],
        "sizes": [member.size for member in index.members.values()],
        "layout": which,
        "chunks": chunks,
    }


def _from_document(tar: Path, document: dict[str, object]) -> TarIndex:
    saved: dict[str, list] = document  # type: ignore[assignment, type-arg]
    layouts = [ArrayLayout(**{**layout, "shape": tuple(layout["shape"])}) for layout in saved["layouts"]]
    members = {}
    columns = (saved[name] for name in ("chips", "offsets", "sizes", "layout", "chunks"))
    for chip, offset, size, which, places in zip(*columns, strict=True):
        half = len(places) // 2
        chunks = None if which < 0 else Chunks(layouts[which], tuple(places[:half]), tuple(places[half:]))
        members[chip] = Member(offset, size, chunks)
    return TarIndex(tar, str(document["sha256"]), str(document["part"]), members)


def _read_saved(tar: Path) -> dict[str, object] | None:
    try:
        document = json.loads(index_path(tar).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # none yet, or a damaged one: it is made again from the tar
    return document if isinstance(document, dict) and document.get("schema") == SCHEMA else None


def _save(tar: Path, document: dict[str, object]) -> None:
    try:
        write_atomically(index_path(tar), json.dumps(document, separators=(",", ":")))
    except OSError as error:
        console.warn(f"the index of {tar.name} cannot be saved and is made anew each time: {error.strerror}")
