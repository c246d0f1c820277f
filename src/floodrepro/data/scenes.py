"""Whole scenes out of chips: the chips of one event, put together as GeoTIFFs with a scene.yaml for `floodrepro map`.

A generated event is one scene that was cut into neighbouring chips: put together again it has its river, its clouds
and the edge of its radar swath, and `map` over it can be compared with `predict` over its chips.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.warp
import yaml
import zarr
from rasterio import Affine

from floodrepro.data.chips import Chips
from floodrepro.data.protocols import IGNORE_INDEX, LABEL_DIR, NO_DATA, S1_BANDS, S2_BANDS, event_of

STEPS = ("month_before", "before", "event", "after")
_DEGREES = 0.00018  # about 20 m


def write_scenes(root: Path) -> list[Path]:
    """Write a scene of each event below ROOT/scenes, every second one *mixed*, and return the scene.yaml files."""
    chips = sorted(Chips(root).having("DEM"))
    events = sorted({event_of(chip) for chip in chips})
    return [
        write_scene(root, [c for c in chips if event_of(c) == event], root / "scenes" / event, mixed=bool(number % 2))
        for number, event in enumerate(events)
    ]


def write_scene(root: Path, chips: Sequence[str], output: Path, *, mixed: bool = False) -> Path:
    """Write rasters of each sensor and timestep, the terrain model, truth.tif, and a scene.yaml.

    Args:
        root: Folder of the chips, in ImpactMesh-Flood's layout.
        chips: Ids of one event's chips; places between them stay without data.
        output: Folder to write.
        mixed: Write what a map has to undo: optical bands in EPSG:4326 with pixels of 20 m, each in a file of its own,
            1000 added as from baseline 04.00 on, and radar as linear power.

    Returns:
        The scene.yaml.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = Chips(root)
    bounds = {}
    for chip in chips:
        with rasterio.open(source.path(chip, "DEM")) as file:
            bounds[chip], crs, pixel = file.bounds, file.crs, file.transform.a
    left, top = min(b.left for b in bounds.values()), max(b.top for b in bounds.values())
    right, bottom = max(b.right for b in bounds.values()), min(b.bottom for b in bounds.values())
    shape = round((top - bottom) / pixel), round((right - left) / pixel)
    transform = Affine(pixel, 0, left, 0, -pixel, top)

    def array(part: str, missing: float) -> npt.NDArray[Any]:
        """A part of all chips, (..., H, W)."""
        out = None
        for chip, place in bounds.items():
            if part == "SCL":
                values = zarr.open_array(zarr.ZipStore(source.path(chip, "S2L2A"), mode="r"), path=part, mode="r")[...]
            else:
                values = source.bands(chip, part) if part.startswith("S") else source.raster(chip, part)
            if out is None:
                out = np.full((*values.shape[:-2], *shape), missing, values.dtype)
            row, column = round((top - place.top) / pixel), round((place.left - left) / pixel)
            out[..., row : row + values.shape[-2], column : column + values.shape[-1]] = values
        assert out is not None
        return out

    def save(name: str, values: npt.NDArray[Any], missing: float, names: Sequence[str], **place: Any) -> str:
        profile = {"driver": "GTiff", "dtype": values.dtype.name, "nodata": missing, "compress": "deflate"}
        profile |= {"count": len(values), "height": values.shape[1], "width": values.shape[2], "tiled": True}
        with rasterio.open(output / name, "w", **profile | {"crs": crs, "transform": transform} | place) as file:
            file.write(values)
            file.descriptions = tuple(names)
        return name

    def times(part: str) -> list[str]:
        group = zarr.open_group(zarr.ZipStore(source.path(chips[0], part), mode="r"), mode="r")
        return str(group.attrs["datetime"]).split(";")

    radar: dict[str, Any] = {"unit": "power" if mixed else "dB"}
    for step, time, db in zip(STEPS, times("S1RTC"), array("S1RTC", np.nan).astype(np.float32), strict=True):
        raster = save(f"s1_{step}.tif", 10 ** (db / 10) if mixed else db, np.nan, S1_BANDS)
        radar[step] = {"time": time, "orbit": 66, "files": [{"raster": raster, "bands": list(S1_BANDS)}]}
    optical: dict[str, Any] = {"nodata": [NO_DATA]}
    names = [*S2_BANDS, "SCL"]
    images = np.concatenate([array("S2L2A", NO_DATA), array("SCL", 0)[:, None].astype(np.int16)], axis=1)
    for step, time, image in zip(STEPS, times("S2L2A"), images, strict=True):
        files: dict[str, Any] = {"raster": f"s2_{step}.tif", "bands": names, "offset": 0}
        if mixed:
            image[:-1] += 1000 * (image[:-1] != NO_DATA).astype(np.int16)
            bands, place = _in_degrees(image, crs, transform)
            pairs = zip(names, bands, strict=True)
            files = {n: save(f"s2_{step}_{n}.tif", band[None], NO_DATA, [n], **place) for n, band in pairs}
            files["offset"] = -1000
        else:
            save(f"s2_{step}.tif", image, NO_DATA, names)
        optical[step] = {"time": time, "files": [files]}
    dem = save("dem.tif", array("DEM", NO_DATA)[None], NO_DATA, ["data"])
    save("truth.tif", array(LABEL_DIR, IGNORE_INDEX)[None], IGNORE_INDEX, ["class"])
    scene = {"S1RTC": radar, "S2L2A": optical, "DEM": {"files": [{"data": dem}]}}
    (output / "scene.yaml").write_text(yaml.safe_dump(scene, sort_keys=False), encoding="utf-8")
    return output / "scene.yaml"


def _in_degrees(values: npt.NDArray[Any], crs: Any, transform: Affine) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """Bands and classes (C, H, W) in EPSG:4326, and where they lie."""
    target, size = "EPSG:4326", values.shape[1:]
    bounds = rasterio.transform.array_bounds(*size, transform)
    there, width, height = rasterio.warp.calculate_default_transform(
        crs, target, size[1], size[0], *bounds, resolution=_DEGREES
    )
    out = np.full((len(values), height, width), NO_DATA, values.dtype)
    for part, method in ((slice(0, -1), "bilinear"), (slice(-1, None), "nearest")):
        rasterio.warp.reproject(
            values[part],
            out[part],
            src_transform=transform,
            src_crs=crs,
            src_nodata=NO_DATA,
            dst_transform=there,
            dst_crs=target,
            dst_nodata=NO_DATA,
            resampling=rasterio.warp.Resampling[method],
        )
    return out, {"crs": target, "transform": there}
