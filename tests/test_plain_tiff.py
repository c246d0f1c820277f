"""Plain TIFFs read as GDAL reads them, to the value; all others are left to GDAL."""

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.io import MemoryFile

from floodrepro.data import plain_tiff


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    bands = pixels if pixels.ndim == 3 else pixels[None]
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=len(bands),
            height=bands.shape[1],
            width=bands.shape[2],
            dtype=bands.dtype,
            crs="EPSG:32633",
            transform=rasterio.transform.from_origin(500_000, 5_000_000, 10, 10),
            **options,
        ) as file:
            file.write(bands)
        return memory.read()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", "float32", "float64"]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    compress=st.sampled_from(["none", "deflate"]),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_plain_files_are_read_as_gdal_reads_them(dtype, height, width, compress, rows, seed):
    generator = np.random.default_rng(seed)
    pixels = np.frombuffer(generator.bytes(height * width * np.dtype(dtype).itemsize), dtype).reshape(height, width)
    content = tiff(pixels, compress=compress, blockysize=rows)
    read = plain_tiff.read(content)
    assert read is not None
    assert read.dtype == pixels.dtype
    assert read.tobytes() == pixels.tobytes()
    assert read.flags.writeable


PIXELS = np.arange(64 * 64, dtype=np.int16).reshape(64, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "lzw"},
        {"compress": "deflate", "predictor": 2},
        {"tiled": True, "blockxsize": 16, "blockysize": 16},
        {"ENDIANNESS": "BIG"},
        {"BIGTIFF": "YES"},
        {"NBITS": 12, "dtype_": "uint16"},
        {"NBITS": 4, "dtype_": "uint8"},
        {"SPARSE_OK": "TRUE", "zeros": True},
    ],
)
def test_any_other_layout_is_left_to_gdal(options):
    options = dict(options)
    pixels = (PIXELS % 16).astype(options.pop("dtype_", "int16"))
    if options.pop("zeros", False):
        pixels = np.zeros_like(pixels)
    content = tiff(pixels, **options)
    read = plain_tiff.read(content)
    assert read is None or np.array_equal(read, pixels)  # never misread
    if "SPARSE_OK" not in options:
        assert read is None


def test_two_bands_are_left_to_gdal():
    assert plain_tiff.read(tiff(np.stack([PIXELS, PIXELS]))) is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_never_taken_for_a_smaller_image(data):
    content = tiff(PIXELS, compress=data.draw(st.sampled_from(["none", "deflate"])))
    cut = data.draw(st.integers(0, len(content) - 1))
    read = plain_tiff.read(content[:cut])
    assert read is None or np.array_equal(read, PIXELS)  # what was cut off lay behind the pixels
