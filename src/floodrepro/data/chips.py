"""Where chips lie, in folders or inside the hub's tars, and how one is read. Nothing is extracted.

Any layout that zarr 2 and GDAL write is read by these libraries themselves; ZIP checksums are always compared.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numcodecs.registry
import numpy as np
import numpy.typing as npt
import rasterio
import zarr
from numcodecs import Blosc, blosc
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from floodrepro import console
from floodrepro.data.protocols import IGNORE_INDEX, LABEL_DIR, PARTS, PROTOCOLS, SPLITS, Protocol, suffix_of
from floodrepro.errors import DataError
from floodrepro.run_folder import write_atomically

try:
    from isal.isal_zlib import crc32  # five times as fast
except ModuleNotFoundError:  # as on a machine without a network
    from zlib import crc32

T = TypeVar("T")
Array = npt.NDArray[Any]
Place = tuple[str, int, int | None]  # a file, and where the chip begins in it and how many bytes it has; None: all

numcodecs.registry.codec_registry.pop("pickle", None)  # a chip could name it, and would run code when it is read
# Chips are read by several processes or threads, whose threads would wait for each other. In writing, numcodecs 0.15.1
# would store a chunk's blocks in the order in which they are finished.
blosc.use_threads = False
# Their georeference is not read (see `read_raster`), also in threads, where warnings.catch_warnings does harm.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_UNKNOWN = -128  # the class of a mask value that the label map does not know
_LARGE = 2**30  # bytes of a tar whose headers may take a while
_WAITS = (0.2, 2.0)  # seconds before the second and the third try of a read that failed


class Chips:
    """The chips below a folder: in `data/<PART>/`, or in `<split>/<PART>*.tar`.

    Where both hold a part (S2L2A, S1RTC, DEM or MASK), the one with more chips is read first, and what it lacks comes
    from the other. An object holds names and places only: it pickles, and threads and processes may share it.

    Args:
        root: A folder in ImpactMesh-Flood's layout, or the `data` folder in it.
        protocol: Says how masks are named.

    Raises:
        DataError: There are no chips, or an archive is damaged.
    """

    def __init__(self, root: Path, protocol: Protocol = PROTOCOLS["custom"]) -> None:
        self.root, self.protocol, labels = root, protocol, protocol.label_map
        self.known = [IGNORE_INDEX, *range(len(labels))]
        self._classes = np.full(256, _UNKNOWN, np.int8)  # by mask value, int8 read as uint8: -1 is the last place
        self._classes[self.known] = [IGNORE_INDEX, *labels]
        self._places = {part: self._find(part) for part in PARTS}
        if not any(self._places.values()):
            what = "there are no chips: neither folders S2L2A, S1RTC, DEM, MASK nor tars of them"
            fix = "set --data-root, fetch the data, or make toy data: floodrepro data synth --root DIR"
            raise DataError(what if root.is_dir() else "the data root does not exist", where=root, fix=fix)

    def having(self, part: str) -> Set[str]:
        """Ids of the chips that have a part, those of a tar in its order."""
        return self._places[part].keys()

    def path(self, chip: str, part: str) -> str:
        """A path that GDAL opens, named after the chip."""
        file, _, size = self._place(chip, part)
        return file if size is None else f"/vsitar/{file}/{part}/{chip}{suffix_of(self.protocol, part)}"

    def size(self, chip: str, part: str) -> int:
        """Number of bytes of a chip's file."""
        file, _, size = self._place(chip, part)
        return os.stat(file).st_size if size is None else size  # noqa: PTH116  # a Path for each of 320,000 is slow

    def bands(self, chip: str, modality: str, empty: Callable[..., Array] = np.empty) -> Array:
        """A chip's S2L2A (T, C, H, W), int16 reflectance x 10,000, or S1RTC (T, 2, H, W), float16 dB, as on disk.

        It is decoded into what `empty(shape, dtype)` returns.

        Raises:
            DataError: The part is missing or damaged; the checksum of each chunk is compared.
        """
        return self._read(chip, modality, functools.partial(read_bands, empty=empty))

    def extras(self, chip: str, modality: str, *names: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """The attributes in a chip's S2L2A or S1RTC, and the named arrays that are there; raises as `bands`."""
        return self._read(chip, modality, functools.partial(_read_extras, names=names))

    def raster(self, chip: str, part: str) -> Array:
        """A chip's DEM, int16 metres, or MASK, int8 classes, (H, W) as on disk; raises as `bands`."""
        return self._read(chip, part, read_raster)

    def truth(self, chip: str) -> Array:
        """The classes of a chip's mask, int8 (H, W), IGNORE_INDEX kept; raises as `bands`, and for an unknown value."""
        values = self.raster(chip, LABEL_DIR)
        narrow = values.astype(np.int8)
        classes: Array = self._classes.take(narrow.view(np.uint8))
        if (classes == _UNKNOWN).any() or (values.dtype != np.int8 and (narrow != values).any()):
            strange = sorted(set(np.unique(values).tolist()) - set(self.known))
            what = f"the mask of {chip} holds {strange}, expected {self.known}"
            fix = "name the protocol of this data: --data.init_args.protocol v0, v1-binary, v1 or custom"
            raise DataError(what, where=self.path(chip, LABEL_DIR), fix=fix)
        return classes

    def _read(self, chip: str, part: str, decode: Callable[[bytes], T]) -> T:
        """What is decoded from a chip's file. The disk is asked three times: a network disk's hiccup passes."""
        file, offset, size = self._place(chip, part)
        for wait in (*_WAITS, None):
            try:
                with open(file, "rb", buffering=0) as stream:  # noqa: PTH123  # as in `size`
                    wanted = os.fstat(stream.fileno()).st_size if size is None else size
                    content = os.pread(stream.fileno(), wanted, offset)
                break
            except OSError as error:
                if wait is None:
                    what = f"the {part} of {chip} cannot be read: {error.strerror or error}"
                    raise DataError(what, where=file, fix="check the disk, then run the same command again") from error
                time.sleep(wait)
        try:
            if len(content) != wanted:
                raise EOFError("the archive ends inside it")
            return decode(content)
        except DataError:  # of the memory that it was to be read into
            raise
        except Exception as error:  # a damaged file makes zipfile, zarr, numcodecs and GDAL raise nearly anything
            what = f"{chip}{suffix_of(self.protocol, part)} is damaged: {type(error).__name__}: {error}"
            fix = "fetch it again; --skip-damaged N leaves out up to N such chips; data audit lists all"
            raise DataError(what, where=self.path(chip, part), fix=fix) from error

    def _place(self, chip: str, part: str) -> Place:
        if chip not in self._places[part]:
            fix = "floodrepro data audit lists what is missing"
            raise DataError(f"{chip} has no {part}", where=self.root, fix=fix)
        return self._places[part][chip]

    def _find(self, part: str) -> dict[str, Place]:
        suffix = suffix_of(self.protocol, part)

        def chips(names: Iterable[str]) -> list[str]:
            """Ids of those files that are a chip's; `._NAME` is what macOS puts beside a file."""
            return [name.removesuffix(suffix) for name in names if name.endswith(suffix) and not name.startswith(".")]

        folder: dict[str, Place] = {}
        tars: dict[str, Place] = {}
        for parent in (self.root / "data" / part, self.root / part):
            if not folder and parent.is_dir():
                names = os.listdir(parent)  # noqa: PTH208  # a Path for each of 80,000 is slow
                folder = {chip: (f"{parent}/{chip}{suffix}", 0, None) for chip in chips(names)}
        for parent in (self.root, self.root.parent):
            for tar in [] if tars else sorted(tar for split in SPLITS for tar in (parent / split).glob(f"{part}*.tar")):
                index = tar_index(tar)
                tars |= {chip: (str(tar), *index[chip + suffix]) for chip in chips(index)}
        return tars | folder if len(folder) >= len(tars) else folder | tars


def radar_faults(bands: Array) -> str | None:
    """How many values of a radar image are infinite or -10000, in words; None where none is.

    float16 has no -9999: it becomes -10000, which `no_data_value: -9999` does not match (impactmesh 0.1.2 and 0.2.0).
    """
    if bands.dtype == np.float16:  # numpy compares float16 about ten times as slowly as its bits
        bits = bands.view(np.uint16)
        if bits.max(initial=0) < 0xF0E2 and not (bits == 0x7C00).any():  # neither -10000 or less, nor +inf: as usual
            return None
        counts = {"infinite": (0x7C00, 0xFC00), "-10000 (no-data that is not recognised)": (0xF0E2,)}
        found = {name: sum(np.count_nonzero(bits == value) for value in values) for name, values in counts.items()}
    else:
        found = {"infinite": np.count_nonzero(np.isinf(bands))}
    return ", ".join(f"{count} values {name}" for name, count in found.items() if count) or None


def tar_index(tar: Path) -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of each regular file of a tar, by its name without folders, from the tar's headers.

    The index is kept beside the tar or, where that folder is read-only, in the user's cache, and made anew when the
    tar's size or time of change is another. Of several processes one reads the headers and the others wait.

    Raises:
        DataError: The tar is damaged.
    """
    state = [tar.stat().st_size, tar.stat().st_mtime_ns]
    saved = tar.with_name(f"{tar.name}.index.json")
    if not os.access(tar.parent, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '')}/.cache") / "floodrepro"
        saved = cache / f"{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}-{saved.name}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # no locks, or no cache: every process reads for itself
            saved.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(saved.with_name(f".{saved.name}.lock")))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or of another version
            kept = json.loads(saved.read_text(encoding="utf-8"))
            if kept["tar"] == state:
                return {name: (offset, size) for name, (offset, size) in kept["files"].items()}
        if state[0] > _LARGE:
            console.say(f"reading the headers of {tar}")
        try:
            with tarfile.open(tar, "r:") as archive:
                files = [m for m in archive if m.isreg() and ".." not in m.name.split("/")]
        except (tarfile.TarError, EOFError) as error:
            what = f"the archive is damaged or cut short: {error}"
            raise DataError(what, where=tar, fix="fetch it again: delete it, then floodrepro data fetch") from error
        index = {Path(m.name).name: (m.offset_data, m.size) for m in files}
        with contextlib.suppress(OSError):  # a full disk: the headers are read again next time
            write_atomically(saved, json.dumps({"tar": state, "files": index}))
    return index


def _read_extras(content: bytes, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        group = zarr.open_group({name: archive.read(name) for name in archive.namelist()}, mode="r")
    return dict(group.attrs), {name: group[name][...] for name in names if name in group}


def read_raster(content: bytes) -> Array:
    """The only band (H, W) of a GeoTIFF, as GDAL reads it: it refuses damage that tifffile takes for pixels."""
    # Reading the georeference, which nobody asks for here, would take twice as long as the pixels.
    with (
        rasterio.Env(GDAL_GEOREF_SOURCES="NONE", GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        MemoryFile(content) as memory,
        memory.open(driver="GTiff") as dataset,
    ):
        return np.asarray(dataset.read(1))


def read_bands(content: bytes, empty: Callable[..., Array] = np.empty) -> Array:
    """The array `bands` of a zarr ZIP, decoded into what `empty(shape, dtype)` returns.

    Raises `ValueError` where a chunk is missing that no fill value stands for, and what zipfile, zarr and numcodecs
    raise for a damaged file.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        array = _open_array(archive.read("bands/.zarray"))
        dtype = array.dtype.newbyteorder("=")  # torch takes no big-endian arrays
        out = empty(array.shape, dtype)
        plain = (array.order, array.filters or None, array.dtype) == ("C", None, dtype)
        direct = isinstance(array.compressor, Blosc) and plain
        whole = np.empty(array.chunks, dtype)  # one for all chunks that lie in several places of `out`
        chunks = {f"bands/{array._chunk_key(index)}": index for index in np.ndindex(*array.cdata_shape)}
        if not chunks.keys() <= members.keys():
            if array.fill_value is None:
                raise ValueError("chunks are missing")
            out[...] = array.fill_value
            for info in archive.infolist():
                archive.open(info).close()  # raises for a file of two names: a chunk would be taken for one left out
        for name in [name for name in chunks if name in members]:
            corner = zip(chunks[name], array.chunks, strict=True)
            place = out[tuple(slice(i * edge, (i + 1) * edge) for i, edge in corner)]
            chunk = _member(content, archive, members[name])
            if not direct:
                whole = array._decode_chunk(chunk)
            elif int.from_bytes(chunk[4:8], "little") != whole.nbytes:  # README_CHUNK_FORMAT of c-blosc 1
                raise ValueError(f"{name} has another size")  # numcodecs 0.15 would leave the rest as it was
            elif place.shape == whole.shape and place.flags.c_contiguous:
                array.compressor.decode(chunk, place)
                continue
            else:
                array.compressor.decode(chunk, whole)
            place[...] = whole[tuple(slice(edge) for edge in place.shape)]
    return out


@functools.lru_cache(16)
def _open_array(metadata: bytes) -> zarr.Array:
    """An array without chunks: how they are stored. zarr takes half a millisecond for it, and most chips share it."""
    return zarr.open_array({".zarray": metadata}, mode="r")


def _member(content: bytes, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """A member of a ZIP, its checksum compared. zipfile copies a stored one, this does not."""
    name = info.orig_filename.encode()
    start = info.header_offset + 30 + len(name)  # APPNOTE.TXT of PKWARE, 4.3.7
    stored = memoryview(content)[start : start + info.compress_size]
    if info.compress_type != zipfile.ZIP_STORED or content[start - len(name) - 2 : start] != b"\0\0" + name:
        return archive.read(info)
    if crc32(stored) != info.CRC or info.file_size != info.compress_size:
        raise zipfile.BadZipFile(f"the checksum of {info.filename} differs")
    return stored
