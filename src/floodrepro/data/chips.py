"""Chips on disk, wherever they lie: extracted into folders, or still inside the downloaded tars."""

import io
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import zarr
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from floodrepro import console
from floodrepro.data import plain_tiff
from floodrepro.data.names import LABEL_DIR, MODALITIES, SPLITS, SUFFIXES
from floodrepro.data.tar_index import Member, TarIndex, open_index
from floodrepro.data.zarr_zip import ARRAY, Chunks, decode, find_chunks
from floodrepro.errors import DataError

Array = npt.NDArray[Any]
PARTS = (*MODALITIES, LABEL_DIR)


class ChipSource:
    """Reads parts of chips: ``S2L2A``, ``S1RTC``, ``DEM`` or ``MASK``.

    It pickles; each process opens the files for itself, and reads by offset, so that a fork shares nothing that moves.

    Args:
        root: Where the chips were found.
        layout: ``extracted`` or ``tars``.
        indexes: Of the tars; none for the extracted layout.
    """

    def __init__(self, root: Path, layout: str, indexes: Sequence[TarIndex] = ()) -> None:
        self.root = root
        self.layout = layout
        self._members: dict[str, dict[str, tuple[Path, Member]]] = {part: {} for part in PARTS}
        self._twice: list[str] = []
        for index in indexes:
            held = self._members[index.part]
            for chip, member in index.members.items():
                if chip in held:
                    self._twice.append(f"{chip} {index.part}: in {held[chip][0].name} and {index.path.name}")
                held[chip] = (index.path, member)
        self._open: dict[Path, int] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {**self.__dict__, "_open": {}}

    def parts(self, part: str) -> frozenset[str]:
        """Ids of the chips that have this part."""
        if self.layout == "tars":
            return frozenset(self._members[part])
        folder, suffix = self.root / part, SUFFIXES[part]
        names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208  # a Path for each of 80,000 is slow
        return frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))

    def duplicates(self) -> list[str]:
        """Chips whose part lies in two tars, one line each."""
        return list(self._twice)

    def path(self, chip: str, part: str) -> str:
        """A path that GDAL opens, named after the chip."""
        name = f"{chip}{SUFFIXES[part]}"
        if self.layout == "extracted":
            return str(self.root / part / name)
        tar, _ = self._member(chip, part)
        return f"/vsitar/{tar}/{part}/{name}"

    def file_size(self, chip: str, part: str) -> int | None:
        """Bytes of a chip's file; None where it is listed but not there, as a link that leads nowhere."""
        if self.layout == "tars":
            return self._member(chip, part)[1].size
        try:
            return os.stat(self.path(chip, part)).st_size  # noqa: PTH116  # a Path for each of 320,000 is slow
        except FileNotFoundError:
            return None

    def read_file(self, chip: str, part: str) -> bytes:
        """A chip's whole file.

        Raises:
            DataError: The chip has no such part.
        """
        if self.layout == "tars":
            tar, member = self._member(chip, part)
            return os.pread(self._descriptor(tar), member.size, member.offset)
        try:
            return Path(self.path(chip, part)).read_bytes()
        except OSError as error:
            raise self._missing(chip, part) from error

    def read_bands(
        self, chip: str, modality: str, timesteps: Sequence[int] | None = None, out: Array | None = None
    ) -> Array:
        """A chip's S2L2A or S1RTC.

        Args:
            chip: Its id.
            modality: S2L2A or S1RTC.
            timesteps: Indices on the time axis in the order wanted; all where None.
            out: Array to decode into where that is possible: compare it with what is returned.

        Returns:
            Array (T, C, H, W): int16 reflectance x 10,000, or float16 dB; no-data as on disk.

        Raises:
            DataError: The part is missing or damaged.
        """
        try:
            if self.layout == "tars":
                tar, member = self._member(chip, modality)
                if member.chunks is not None:
                    return decode(member.chunks, partial(_borrow, self._descriptor(tar)), timesteps, out)
            else:
                array = self._decode_file(self.path(chip, modality), timesteps, out)
                if array is not None:
                    return array
            return read_any_zarr(self.read_file(chip, modality), timesteps)
        except FileNotFoundError as error:
            raise self._missing(chip, modality) from error
        except (DataError, OSError) as error:
            raise DataError(
                f"{chip}{SUFFIXES[modality]} is damaged: {error}",
                where=self.path(chip, modality),
                fix="floodrepro data audit --deep lists all damaged chips",
            ) from error

    def read_raster(self, chip: str, part: str) -> Array:
        """A chip's DEM (metres, int16) or MASK (classes, int8), (H, W).

        Raises:
            DataError: The part is missing or damaged.
        """
        content = self.read_file(chip, part)
        try:
            array = plain_tiff.read(content)
            if array is None:
                with MemoryFile(content) as memory, memory.open() as file:
                    array = file.read(1)
        except RasterioError as error:
            raise DataError(f"{chip}{SUFFIXES[part]} is damaged: {error}", where=self.path(chip, part)) from error
        return array

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        if self._owner == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open = {}

    def _decode_file(self, path: str, timesteps: Sequence[int] | None, out: Array | None) -> Array | None:
        descriptor = os.open(path, os.O_RDONLY)
        try:

            def read_at(size: int, offset: int) -> bytes:
                return os.pread(descriptor, size, offset)

            chunks: Chunks | None = find_chunks(read_at, os.fstat(descriptor).st_size)
            return None if chunks is None else decode(chunks, partial(_borrow, descriptor), timesteps, out)
        finally:
            os.close(descriptor)

    def _descriptor(self, path: Path) -> int:
        if self._owner != os.getpid():  # a forked worker: the parent's descriptors are the parent's to close
            self._open, self._owner = {}, os.getpid()
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _member(self, chip: str, part: str) -> tuple[Path, Member]:
        try:
            return self._members[part][chip]
        except KeyError:
            raise self._missing(chip, part) from None

    def _missing(self, chip: str, part: str) -> DataError:
        return DataError(f"{chip} has no {part}", where=self.root, fix="floodrepro data audit lists what is missing")


# Reused by every read of a process: a new buffer of this size costs more in page faults than the copy into it.
_scratch = bytearray()


def _borrow(descriptor: int, size: int, offset: int) -> memoryview:
    """Read into the scratch buffer; what it returns is valid until the next call."""
    if len(_scratch) < size:
        _scratch.extend(bytes(size - len(_scratch)))
    view = memoryview(_scratch)[:size]
    return view[: os.preadv(descriptor, [view], offset)]


# What zipfile and zarr 2.18.0 raise: the last four for a .zarray that is JSON, and not an array's.
_OF_DAMAGED_ZARR = (
    *(zipfile.BadZipFile, KeyError, ValueError, RuntimeError, OSError, NotImplementedError),
    *(zarr.errors.MetadataError, AttributeError, TypeError, ZeroDivisionError),
)


def read_any_zarr(content: bytes, timesteps: Sequence[int] | None = None) -> Array:
    """Read ``bands`` from a zarr ZIP of whatever layout with the zarr library: slower, and right.

    Raises:
        DataError: It is no readable zarr ZIP.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            store = {name: archive.read(name) for name in archive.namelist()}
        array = zarr.open_group(store, mode="r")[ARRAY]
        if array.nchunks_initialized != array.nchunks and array.fill_value is None:
            raise DataError("a chunk is missing")
        whole: Array = array[...]
    except _OF_DAMAGED_ZARR as error:
        raise DataError(f"the zarr cannot be read: {error}") from error
    return whole if timesteps is None else whole[list(timesteps)]


def open_source(root: Path, progress: Callable[[int, int], None] | None = None) -> ChipSource:
    """Find out how the chips below a folder lie and open them.

    Args:
        root: A folder in ImpactMesh-Flood's layout, or the ``data`` folder in it.
        progress: Called with bytes done and bytes in all where tars have to be indexed first.

    Raises:
        DataError: There are no chips, or an archive is damaged or refused.
    """
    for folder in (root / "data", root):
        if any((folder / part).is_dir() for part in MODALITIES):
            return ChipSource(folder, "extracted")
    for folder in (root, root.parent):
        tars = [tar for split in SPLITS for part in PARTS for tar in sorted((folder / split).glob(f"{part}*.tar"))]
        if tars:
            return ChipSource(folder, "tars", _open_indexes(tars, progress))
    if not root.is_dir():
        problem = "the data root does not exist"
    elif not any(root.iterdir()):
        problem = "the data root is empty"
    else:
        problem = "the data root holds no chips: neither folders S2L2A, S1RTC, DEM, nor tars of them"
    raise DataError(
        problem,
        where=root,
        fix="set --data-root, fetch the data, or make toy data: floodrepro data synth --root DIR",
    )


def _open_indexes(tars: Sequence[Path], progress: Callable[[int, int], None] | None) -> list[TarIndex]:
    total = sum(tar.stat().st_size for tar in tars)
    indexes, before = [], 0
    for tar in tars:
        indexes.append(open_index(tar, partial(_report_from, progress, before, total) if progress else None))
        before += tar.stat().st_size
    return indexes


def _report_from(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def open_source_loudly(root: Path) -> ChipSource:
    """`open_source` with its progress on stderr, in MiB."""
    with console.progress("indexing tars (MiB)") as show:
        return open_source(root, lambda done, total: show(done >> 20, total >> 20))
