"""Reading chips from folders and from tars; what is laid out otherwise is read rightly or refused, never misread."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from floodrepro.data import tar_index
from floodrepro.data.chips import open_source, read_any_zarr
from floodrepro.data.synth import generate
from floodrepro.data.tar_index import build_index, index_path, open_index
from floodrepro.data.zarr_zip import decode, find_chunks
from floodrepro.errors import DataError


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tars") / "ImpactMesh-Flood"
    generate(root, events=6, chips=18, size=64, protocol="v0", seed=1, layout="hub")
    return root


def zip_of(array: np.ndarray, chunks, compressor, *, method=zipfile.ZIP_STORED, order="C", filters=None) -> bytes:
    store: dict = {}
    group = zarr.group(store)
    group.create_dataset("bands", data=array, chunks=chunks, compressor=compressor, order=order, filters=filters)
    zarr.consolidate_metadata(store)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in store.items():
            archive.writestr(name, bytes(content))
    return buffer.getvalue()


def read(content: bytes, timesteps=None) -> tuple[np.ndarray, bool]:
    """What the reader makes of a ZIP, and whether it took the fast way."""

    def read_at(size, offset):
        return content[offset : offset + size]

    chunks = find_chunks(read_at, len(content))
    if chunks is None:
        return read_any_zarr(content, timesteps), False
    return decode(chunks, read_at, timesteps), True


CHIP = np.arange(4 * 3 * 16 * 16, dtype=np.int16).reshape(4, 3, 16, 16)


@pytest.mark.parametrize(
    ("chunks", "compressor", "method", "fast"),
    [
        ((1, 3, 16, 16), numcodecs.Blosc("lz4"), zipfile.ZIP_STORED, True),
        ((1, 3, 16, 16), numcodecs.Blosc("zstd", shuffle=2), zipfile.ZIP_STORED, True),
        ((1, 3, 16, 16), numcodecs.Zstd(), zipfile.ZIP_STORED, True),
        ((1, 3, 16, 16), numcodecs.GZip(), zipfile.ZIP_STORED, True),
        ((1, 3, 16, 16), None, zipfile.ZIP_STORED, True),
        ((2, 3, 16, 16), numcodecs.Blosc("lz4"), zipfile.ZIP_STORED, True),
        ((4, 3, 16, 16), None, zipfile.ZIP_STORED, True),
        ((3, 3, 16, 16), numcodecs.Blosc("lz4"), zipfile.ZIP_STORED, False),
        ((1, 1, 16, 16), numcodecs.Blosc("lz4"), zipfile.ZIP_STORED, False),
        ((4, 3, 5, 7), numcodecs.Zstd(), zipfile.ZIP_STORED, False),
        ((1, 3, 16, 16), numcodecs.Blosc("lz4"), zipfile.ZIP_DEFLATED, False),
        ((1, 3, 16, 16), None, zipfile.ZIP_DEFLATED, False),
    ],
)
@pytest.mark.parametrize("timesteps", [None, [2], [3, 1]])
def test_other_layouts_are_read_rightly(chunks, compressor, method, fast, timesteps):
    found, went_fast = read(zip_of(CHIP, chunks, compressor, method=method), timesteps)
    assert went_fast is fast
    assert found.dtype == CHIP.dtype
    assert np.array_equal(found, CHIP if timesteps is None else CHIP[timesteps])


def test_column_order_filters_and_byte_order_are_read_rightly():
    for content in (
        zip_of(CHIP, (1, 3, 16, 16), None, order="F"),
        zip_of(CHIP, (1, 3, 16, 16), numcodecs.Zstd(), filters=[numcodecs.Delta("<i2")]),
        zip_of(CHIP.astype(">i2"), (1, 3, 16, 16), numcodecs.Blosc("lz4")),
    ):
        assert np.array_equal(read(content)[0], CHIP)


def test_chunk_that_is_all_fill_value_and_therefore_missing_is_filled():
    array = CHIP.copy()
    array[1] = 0
    store: dict = {}
    zarr.group(store).create_dataset(
        "bands", data=array, chunks=(1, 3, 16, 16), compressor=None, fill_value=0, write_empty_chunks=False
    )
    assert "bands/1.0.0.0" not in store
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in store.items():
            archive.writestr(name, bytes(content))
    found, fast = read(buffer.getvalue())
    assert not fast
    assert np.array_equal(found, array)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    cut=st.tuples(*[st.integers(1, 9)] * 4),
    codec=st.sampled_from([None, numcodecs.Zstd(), numcodecs.Blosc("lz4"), numcodecs.Blosc("zlib", shuffle=0)]),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    dtype=st.sampled_from(["<i2", "<f2", "<f4", "|i1"]),
)
@settings(max_examples=80, deadline=None)
def test_any_zarr_reads_as_the_zarr_library_reads_it(shape, cut, codec, method, dtype):
    array = (np.arange(np.prod(shape)).reshape(shape) % 120).astype(dtype)
    content = zip_of(array, tuple(min(c, s) for c, s in zip(cut, shape, strict=True)), codec, method=method)
    found, _ = read(content)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_zarr_is_an_error_and_never_pixels(data):
    content = zip_of(CHIP, (1, 3, 16, 16), numcodecs.Blosc("lz4"))
    kept = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError):
        read(content[:kept])


def edited(content: bytes, name: str, change) -> bytes:
    """The ZIP with one file's bytes changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as target:
        for entry in archive.namelist():
            target.writestr(entry, change(archive.read(entry)) if entry == name else archive.read(entry))
    return buffer.getvalue()


@pytest.mark.parametrize("codec", [numcodecs.Blosc("lz4"), numcodecs.Zstd(), numcodecs.GZip(), None])
def test_chunk_of_another_size_is_an_error_and_leaves_no_old_pixels(codec):
    content = zip_of(CHIP, (1, 3, 16, 16), codec)
    encode = codec.encode if codec else bytes
    for size in (1, 3 * 16 * 15 * 2, 3 * 16 * 17 * 2):
        wrong = edited(content, "bands/2.0.0.0", lambda _, size=size: bytes(encode(bytes(size))))
        with pytest.raises(DataError, match="a chunk does not decode"):
            read(wrong)


def test_blosc_chunk_that_ends_early_is_an_error():
    content = zip_of(CHIP, (1, 3, 16, 16), numcodecs.Blosc("lz4"))
    for kept in (0, 10, 100):
        with pytest.raises(DataError, match="a chunk does not decode"):
            read(edited(content, "bands/2.0.0.0", lambda chunk, kept=kept: chunk[:kept]))
    chunks = find_chunks(lambda size, offset: content[offset : offset + size], len(content))
    with pytest.raises(DataError, match="a chunk does not decode"):  # what lies behind it in memory is not its end
        decode(chunks, lambda size, offset: memoryview(content)[offset : offset + size - 1])


DAMAGED_ZARRAYS = {
    "no JSON": lambda _: b"{",
    "no text": lambda _: b"\xff\xfe",
    "a list": lambda _: b"[]",
    "null": lambda _: b"null",
    "empty": lambda _: b"{}",
    **{f"no {key}": lambda text, key=key: without(text, key) for key in ("shape", "chunks", "dtype", "compressor")},
    "odd shape": lambda text: json.dumps(json.loads(text) | {"shape": ["a", 3, 16, 16]}).encode(),
    "chunks of nothing": lambda text: json.dumps(json.loads(text) | {"chunks": [0, 3, 16, 16]}).encode(),
    "odd dtype": lambda text: json.dumps(json.loads(text) | {"dtype": "<x9"}).encode(),
    "odd codec": lambda text: json.dumps(json.loads(text) | {"compressor": {"id": "none such"}}).encode(),
}


def without(text: bytes, key: str) -> bytes:
    return json.dumps({name: value for name, value in json.loads(text).items() if name != key}).encode()


@pytest.mark.parametrize("damage", DAMAGED_ZARRAYS)
def test_damaged_array_metadata_is_an_error_in_either_layout(tmp_path: Path, damage, capsys):
    chip = "EMSR9001_1_35TMF_x0_y0"
    content = edited(zip_of(CHIP, (1, 3, 16, 16), None), "bands/.zarray", DAMAGED_ZARRAYS[damage])
    folder, tar = tmp_path / "a" / "data" / "S2L2A", tmp_path / "b" / "test" / "S2L2A.tar"
    folder.mkdir(parents=True)
    tar.parent.mkdir(parents=True)
    (folder / f"{chip}_S2L2A.zarr.zip").write_bytes(content)
    with tarfile.open(tar, "w") as archive:
        archive.add(folder / f"{chip}_S2L2A.zarr.zip", f"S2L2A/{chip}_S2L2A.zarr.zip")
    for root in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(DataError, match="is damaged"):
            open_source(root).read_bands(chip, "S2L2A")
    assert ".zarray is damaged" in capsys.readouterr().err


def test_tar_index_gives_every_file_at_its_offset(tars):
    for tar in tars.glob("*/*.tar"):
        index = build_index(tar)
        content = tar.read_bytes()
        with tarfile.open(tar) as archive:
            for info in archive:
                data = archive.extractfile(info).read()
                chip = Path(info.name).name.split("_S")[0].split("_D")[0].split("_a")[0]
                member = index.members[chip]
                assert content[member.offset : member.offset + member.size] == data
            assert len(index.members) == len(archive.getnames())


def test_index_is_saved_beside_the_tar_and_used_again(tars, monkeypatch):
    tar = next(tars.glob("train/S2L2A*.tar"))
    first = open_index(tar)
    assert index_path(tar).parent == tar.parent
    monkeypatch.setattr(tar_index, "build_index", lambda *_: pytest.fail("the index was made again"))
    assert open_index(tar) == first
    status = tar.stat()
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # touched, not changed: the hash decides
    assert open_index(tar) == first


@pytest.mark.parametrize("change", ["size", "content", "damaged index"])
def test_index_that_does_not_fit_is_made_again(tars, tmp_path: Path, change):
    tar = tmp_path / "S2L2A.tar"
    tar.write_bytes(next(tars.glob("test/S2L2A*.tar")).read_bytes())
    first = open_index(tar)
    if change == "damaged index":
        index_path(tar).write_text(index_path(tar).read_text()[:100])
        assert open_index(tar) == first
        return
    content = bytearray(tar.read_bytes())
    content[next(iter(first.members.values())).offset + 40] ^= 1
    tar.write_bytes(bytes(content) + (b"\0" * 10240 if change == "size" else b""))
    assert open_index(tar).sha256 != first.sha256


def test_folder_that_cannot_be_written_is_read_all_the_same(tars, tmp_path: Path, monkeypatch, capsys):
    tar = tmp_path / "S2L2A.tar"
    tar.write_bytes(next(tars.glob("test/S2L2A*.tar")).read_bytes())

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_index, "write_atomically", refuse)
    assert open_index(tar).members
    assert "cannot be saved" in capsys.readouterr().err


def hostile(kind: str) -> tarfile.TarInfo:
    name = "S2L2A/EMSR1_1_35TMF_x1_y1_S2L2A.zarr.zip"
    info = tarfile.TarInfo(
        {
            "absolute": f"/{name}",
            "climbing": f"../{name}",
            "climbing inside": "S2L2A/../../etc/EMSR1_1_35TMF_x1_y1_S2L2A.zarr.zip",
            "unknown": "S2L2A/readme.txt",
            "elsewhere": "OTHER/EMSR1_1_35TMF_x1_y1_S2L2A.zarr.zip",
            "deep": "S2L2A/more/EMSR1_1_35TMF_x1_y1_S2L2A.zarr.zip",
        }.get(kind, name)
    )
    info.type = {
        "symbolic link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
    }.get(kind, tarfile.REGTYPE)
    info.linkname = "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "kind",
    [
        *("symbolic link", "hard link", "device", "block device", "fifo"),
        *("absolute", "climbing", "climbing inside", "unknown", "elsewhere", "deep"),
    ],
)
def test_hostile_member_is_refused_by_name(tmp_path: Path, kind):
    folder = tmp_path / "root" / "train"
    folder.mkdir(parents=True)
    info = hostile(kind)
    with tarfile.open(folder / "S2L2A.tar", "w") as archive:
        archive.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match="refused") as caught:
        open_source(tmp_path / "root")
    assert info.name in caught.value.what
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["S2L2A.tar", "root", "train"]


def test_duplicated_member_is_refused_by_name(tmp_path: Path):
    (tmp_path / "train").mkdir()
    content = zip_of(CHIP, (1, 3, 16, 16), None)
    with tarfile.open(tmp_path / "train" / "S2L2A.tar", "w") as archive:
        for _ in range(2):
            info = hostile("plain")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match="twice"):
        open_source(tmp_path)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_truncated_tar_is_found(tars, tmp_path_factory, data):
    content = next(tars.glob("test/DEM*.tar")).read_bytes()
    # Behind the last block that holds anything there are zeros only, and a cut in there loses nothing.
    end = max(i for i, byte in enumerate(content) if byte) // 512 * 512 + 512
    path = tmp_path_factory.mktemp("cut") / "DEM.tar"
    path.write_bytes(content[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(DataError):
        build_index(path)


def test_chip_in_two_tars_is_listed(tars, tmp_path: Path):
    (tmp_path / "train").mkdir()
    content = next(tars.glob("train/S2L2A*.tar")).read_bytes()
    for name in ("S2L2A_1.tar", "S2L2A_2.tar"):
        (tmp_path / "train" / name).write_bytes(content)
    twice = open_source(tmp_path).duplicates()
    assert "in S2L2A_1.tar and S2L2A_2.tar" in twice[0]


def test_source_pickles_without_its_open_files(tars):
    source = open_source(tars)
    chip = sorted(source.parts("S2L2A"))[0]
    first = source.read_bands(chip, "S2L2A")
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.read_bands(chip, "S2L2A"), first)
    source.close()
    assert np.array_equal(source.read_bands(chip, "S2L2A"), first)


@pytest.mark.parametrize("part", ["S2L2A", "DEM"])
def test_missing_part_is_named(tars, chips, part):
    for root in (tars, chips):
        source = open_source(root)
        with pytest.raises(DataError, match=f"EMSR1_x has no {part}"):
            source.read_bands("EMSR1_x", part) if part == "S2L2A" else source.read_raster("EMSR1_x", part)


def test_layout_is_found_from_the_folder_or_from_data_in_it(chips, tars):
    assert open_source(chips).layout == open_source(chips / "data").layout == "extracted"
    assert open_source(tars).layout == open_source(tars / "data").layout == "tars"


def test_no_chips_at_all_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="the data root is empty"):
        open_source(tmp_path)


def test_saved_index_is_documented_json(tars):
    tar = next(tars.glob("test/S1RTC*.tar"))
    open_index(tar)
    document = json.loads(index_path(tar).read_text())
    assert document["schema"] == 1
    assert len(document["chips"]) == len(document["offsets"]) == len(document["chunks"])
