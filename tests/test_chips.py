"""Reading chips: any layout gives the pixels that zarr and GDAL give, and damage is an error, never a pixel."""

import json
import os
import pickle
import random
import tarfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import zarr
from hypothesis import HealthCheck, given, settings, strategies as st
from numcodecs import Blosc, Zlib

from conftest import save
from floodrepro.data import chips as reading
from floodrepro.data.chips import Chips, read_bands, read_raster, tar_index
from floodrepro.data.protocols import PARTS, suffix_of
from floodrepro.data.synth import VARIANTS, generate
from floodrepro.errors import DataError

FLIPS = 1000
MADE = {"events": 4, "chips": 8, "size": 32, "protocol": "v0", "seed": 3, "variants": tuple(VARIANTS)}
shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
codecs = st.sampled_from(
    [None, Zlib(1), numcodecs.GZip(1), numcodecs.LZ4(), numcodecs.Zstd(1), numcodecs.BZ2(1)]
    + [Blosc(name, 3, shuffle) for name in ("lz4", "zstd", "zlib") for shuffle in (0, 1, 2)]
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("layouts") / "folders"
    generate(root, **MADE)
    return root


@pytest.fixture
def tars(tmp_path) -> Path:
    generate(tmp_path / "tars", **MADE, layout="hub")
    return tmp_path / "tars"


def file_of(root: Path, chip: str, part: str) -> Path:
    return root / "data" / part / f"{chip}{suffix_of(Chips(root).protocol, part)}"


def stock(path: Path) -> np.ndarray:
    """The array as impactmesh 0.1.2 and 0.2.0 read it."""
    if path.suffix == ".zip":
        return zarr.open_consolidated(path, mode="r")["bands"][...]
    with rasterio.open(path) as file:
        return file.read(1)


def ours(path: Path) -> np.ndarray:
    return (read_bands if path.suffix == ".zip" else read_raster)(path.read_bytes())


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal to the bit, whatever the byte order."""
    other = other.astype(other.dtype.newbyteorder("="))
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_zarr_layout_is_read_as_zarr_reads_it(tmp_path, data):
    shape = data.draw(shapes)
    chunks = tuple(data.draw(st.integers(1, edge + 3)) for edge in shape)
    dtype = data.draw(st.sampled_from(["<i2", ">i2", "<f2", ">f2", "<f4", "u1"]))
    values = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-9, 9, shape).astype(dtype)
    values[: data.draw(st.integers(0, shape[0]))] = 0  # chunks that equal the fill value may be left out
    store: dict[str, bytes] = {}
    zarr.group(store=store).array(
        "bands",
        values,
        chunks=chunks,
        compressor=data.draw(codecs),
        order=data.draw(st.sampled_from("CF")),
        fill_value=data.draw(st.sampled_from([0, 7])),
        filters=data.draw(st.sampled_from([None, [numcodecs.Delta(dtype=dtype)]])) if dtype[1] == "i" else None,
        write_empty_chunks=data.draw(st.booleans()),
        dimension_separator=data.draw(st.sampled_from("./")),
    )
    zarr.consolidate_metadata(store)
    path = tmp_path / "chip.zip"
    with zipfile.ZipFile(path, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name, content in store.items():
            archive.writestr(name, bytes(content))
    assert same(ours(path), stock(path))
    place = np.empty(shape, values.dtype.newbyteorder("="))
    assert read_bands(path.read_bytes(), lambda *_: place) is place
    assert same(place, stock(path))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tiff_layout_is_read_as_gdal_reads_it(tmp_path, data):
    size = 16 * data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(["int8", "uint8", "int16", "float32"]))
    values = np.random.default_rng(1).integers(-3, 3, (size, size)).astype(dtype)
    compress = data.draw(st.sampled_from([None, "deflate", "lzw", "zstd", "packbits"]))
    options = {"compress": compress} if compress else {}
    if compress in ("deflate", "lzw", "zstd"):
        options["predictor"] = data.draw(st.sampled_from([1, 2] if dtype != "float32" else [1, 2, 3]))
    if data.draw(st.booleans()):
        options |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    options |= data.draw(st.sampled_from([{}, {"bigtiff": "yes"}, {"endianness": "big"}]))
    path = save(tmp_path / "chip.tif", values, **options)
    assert same(ours(path), stock(path))
    assert same(ours(path), values)


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def outcome(read, path: Path) -> np.ndarray | None:
    try:
        return read(path)
    except Exception:
        return None


def test_flipped_bit_is_never_a_silently_wrong_pixel_where_stock_raises(folders, tmp_path):
    source, drawn, raised = Chips(folders), random.Random(0), 0
    chips = sorted(source.having("DEM"))
    for number in range(FLIPS):
        path = file_of(folders, drawn.choice(chips), PARTS[number % len(PARTS)])
        content = path.read_bytes()
        damaged = tmp_path / path.name
        damaged.write_bytes(flip(content, drawn.randrange(8 * len(content))))
        mine, theirs = outcome(ours, damaged), outcome(stock, damaged)
        assert mine is None or same(mine, stock(path)) or theirs is not None, path.name
        raised += mine is None
        damaged.unlink()
    assert raised > FLIPS / 4


@pytest.mark.parametrize(
    ("named", "dtype"),
    [({"filters": [{"id": "pickle"}]}, "|O"), ({"compressor": {"id": "pickle"}}, "<f2")],
)
def test_chip_that_names_pickle_as_its_codec_runs_no_code(tmp_path, named, dtype):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shape = {"zarr_format": 2, "shape": [1] * 4, "chunks": [1] * 4, "order": "C", "fill_value": None}
    array = json.dumps({"filters": None, "compressor": None, **shape, "dtype": dtype, **named})
    (tmp_path / "S2L2A").mkdir()
    with zipfile.ZipFile(tmp_path / "S2L2A" / "a_S2L2A.zarr.zip", "w") as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        for name in ("bands", "SCL"):
            archive.writestr(f"{name}/.zarray", array)
            archive.writestr(f"{name}/0.0.0.0", pickle.dumps(Code()))
    for read in (lambda: Chips(tmp_path).bands("a", "S2L2A"), lambda: Chips(tmp_path).extras("a", "S2L2A", "SCL")):
        with pytest.raises(DataError, match=r"a_S2L2A.* is damaged"):
            read()
    assert not (tmp_path / "ran").exists()


def test_vrt_named_as_a_chip_opens_no_other_file(folders, tmp_path):
    elsewhere = file_of(folders, min(Chips(folders).having("DEM")), "MASK")
    (tmp_path / "MASK").mkdir()
    rasterio.shutil.copy(elsewhere, tmp_path / "MASK" / "a_annotation_flood.tif", driver="VRT")
    assert str(elsewhere).encode() in (tmp_path / "MASK" / "a_annotation_flood.tif").read_bytes()
    with pytest.raises(DataError, match=r"a_annotation_flood.* is damaged"):
        Chips(tmp_path).raster("a", "MASK")


@pytest.mark.parametrize("fill", [None, 0])
def test_missing_chunk_without_fill_value_and_a_renamed_one_are_errors(tmp_path, fill):
    path, name = tmp_path / "chip.zip", b"bands/1.0.0.0"
    with zarr.ZipStore(path, mode="w") as store:
        zarr.group(store=store).array("bands", np.ones((2, 1, 4, 4), "i2"), chunks=(1, 1, 4, 4), fill_value=fill)
        zarr.consolidate_metadata(store)
    content = path.read_bytes()
    place = content.rindex(name)  # in the directory
    if fill is None:  # its header has the other name as well: to zipfile the chunk is not there
        content = content.replace(name, b"bands/9.0.0.0")
    path.write_bytes(content[:place] + b"bands/9.0.0.0" + content[place + len(name) :])
    assert outcome(ours, path) is None


def test_empty_folder_hides_no_tars_and_parts_may_lie_in_either(folders, tars):
    chip = min(Chips(folders).having("DEM"))
    (tars / "data" / "DEM").mkdir(parents=True)
    (tars / "data" / "S2L2A").mkdir()
    assert len(Chips(tars).having("DEM")) == len(Chips(tars / "data").having("S2L2A")) == 8
    for split in ("train", "val", "test"):
        (tars / split / "MASK.tar").unlink()
    (tars / "data" / "MASK").mkdir()
    copied = file_of(folders, chip, "MASK")
    (tars / "data" / "MASK" / copied.name).write_bytes(copied.read_bytes())
    assert Chips(tars).having("MASK") == {chip}
    assert same(Chips(tars).raster(chip, "MASK"), stock(copied))


def test_index_is_made_once_by_one_of_several_processes_and_anew_for_another_tar(tars, tmp_path, monkeypatch):
    real, tar, opened = tarfile.open, tars / "train" / "S2L2A.tar", tmp_path / "opened"

    def slow(*arguments, **options):
        with opened.open("a") as file:
            file.write("once\n")
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(reading.tarfile, "open", slow)
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        first, *others = pool.map(tar_index, [tar] * 3)
    assert others == [first, first]
    assert opened.read_text() == "once\n"
    os.utime(tar, (1, 1))
    assert tar_index(tar) == first
    assert opened.read_text() == "once\nonce\n"


def test_index_of_a_read_only_folder_lies_in_the_users_cache(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reading.os, "access", lambda *_: False)  # root may write anywhere
    assert len(Chips(tars).having("DEM")) == 8
    assert len(list((tmp_path / "cache").rglob("*.index.json"))) == 12
    assert not list(tars.rglob("*.index.json"))


def test_stray_files_in_a_tar_are_passed_over(tars):
    tar = tars / "train" / "DEM.tar"
    before = Chips(tars).having("DEM")
    with tarfile.open(tar, "a") as archive:
        for name in (".DS_Store", "._EMSR9001_1_30TXM_x1_y1_DEM.tif", "README.md", "../../EMSR1_1_DEM.tif"):
            archive.addfile(tarfile.TarInfo(f"DEM/{name}"))
        link = tarfile.TarInfo("DEM/EMSR1_1_DEM.tif")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert Chips(tars).having("DEM") == before


def test_tar_that_is_cut_short_is_named(tars):
    tar = tars / "train" / "S2L2A.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged or cut short") as error:
        Chips(tars)
    assert "S2L2A.tar" in error.value.where


def test_transient_error_of_the_disk_is_tried_twice_more(folders, monkeypatch):
    source = Chips(folders)
    chip = min(source.having("DEM"))
    truth, real, failures = source.raster(chip, "DEM"), os.pread, [116, 5]  # ESTALE, EIO

    def fails(*arguments):
        if failures:
            raise OSError(failures.pop(), "hiccup")
        return real(*arguments)

    monkeypatch.setattr(reading, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(reading.os, "pread", fails)
    assert same(source.raster(chip, "DEM"), truth)
    failures += [5, 5, 5]
    with pytest.raises(DataError, match=f"DEM of {chip} cannot be read: hiccup"):
        source.raster(chip, "DEM")


def test_threads_share_a_source_and_kept_errors_do_no_harm(folders):
    source = pickle.loads(pickle.dumps(Chips(folders)))
    truth = {(c, p): source.bands(c, p).tobytes() for c in sorted(source.having("DEM")) for p in ("S2L2A", "S1RTC")}
    kept = []

    def read(number: int) -> list:
        keys = random.Random(number).choices(list(truth), k=20)
        for chip, _ in keys:
            try:
                source.raster(chip, "S1RTC")
            except DataError as error:
                kept.append(error)
        return [key for key in keys if source.bands(*key).tobytes() != truth[key]]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [[]] * 4
    assert len(kept) == 80


def test_no_chips_at_all_is_named_with_what_to_do(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError) as error:
            Chips(root)
        assert "data synth" in error.value.fix
