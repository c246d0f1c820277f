"""Whole scenes out of chips: the chips of one event, put together as GeoTIFFs with a scene.yaml for `floodrepro map`.

A generated event is one scene that was cut into neighbouring chips: put together again it has its river, its clouds
and the edge of its radar swath, and `map` over it can be compared with `predict` over its chips.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import yaml
import zarr
from rasterio import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling, calculate_default_transform

from floodrepro.data.chips import Chips
from floodrepro.data.protocols import IGNORE_INDEX, LABEL_DIR, NO_DATA, S1_BANDS, S2_BANDS, event_of

_STEPS = ("month_before", "before", "event", "after")
_DEGREES = 0.00018  # about 20 m


def write_scenes(root: Path) -> list[Path]:
    """Write a scene of each event below ROOT/scenes, every second one *mixed*, and return the scene.yaml files."""
    events: dict[str, list[str]] = {}
    for chip in sorted(Chips(root).having("DEM")):
        events.setdefault(event_of(chip), []).append(chip)
    return [
        write_scene(root, chips, root / "scenes" / event, mixed=bool(number % 2))
        for number, (event, chips) in enumerate(events.items())
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
    source, bounds = Chips(root), {}
    for chip in chips:
        with rasterio.open(source.path(chip, "DEM")) as file:
            bounds[chip], crs, pixel = file.bounds, file.crs, file.transform.a
    left, top = min(b.left for b in bounds.values()), max(b.top for b in bounds.values())
    width = round((max(b.right for b in bounds.values()) - left) / pixel)
    height = round((top - min(b.bottom for b in bounds.values())) / pixel)
    profile = {"driver": "GTiff", "height": height, "width": width, "compress": "deflate", "tiled": True}
    profile |= {"crs": crs, "transform": Affine(pixel, 0, left, 0, -pixel, top)}

    def save(name: str, values: Mapping[str, npt.NDArray[Any]], missing: float, bands: Sequence[str]) -> str:
        """Write the values (C, H, W) of each chip to its place."""
        dtype = values[chips[0]].dtype
        with rasterio.open(output / name, "w", count=len(bands), dtype=dtype, nodata=missing, **profile) as file:
            file.write(np.full((len(bands), height, width), missing, dtype))
            for chip, part in values.items():
                file.write(part, window=file.window(*bounds[chip]).round_offsets().round_lengths())
            file.descriptions = tuple(bands)
        return name

    scene: dict[str, Any] = {"S1RTC": {"unit": "power" if mixed else "dB"}, "S2L2A": {"nodata": [NO_DATA]}}
    for sensor in scene:
        groups = {c: zarr.open_group(zarr.ZipStore(source.path(c, sensor), mode="r"), mode="r") for c in chips}
        for step, (key, time) in enumerate(zip(_STEPS, groups[chips[0]].attrs["datetime"].split(";"), strict=True)):
            images = {chip: source.bands(chip, sensor)[step] for chip in chips}
            if sensor == "S1RTC":
                images = {chip: db.astype(np.float32) for chip, db in images.items()}
                images = {chip: 10 ** (db / 10) for chip, db in images.items()} if mixed else images
                name = save(f"s1_{key}.tif", images, np.nan, S1_BANDS)
                scene[sensor][key] = {"time": time, "orbit": 66, "files": [{"raster": name, "bands": list(S1_BANDS)}]}
                continue
            offset = 1000 if mixed else 0
            images = {
                c: np.concatenate([np.where(i == NO_DATA, i, i + offset), groups[c]["SCL"][step][None].astype(i.dtype)])
                for c, i in images.items()
            }
            bands = [*S2_BANDS, "SCL"]
            name = save(f"s2_{key}.tif", images, NO_DATA, bands)
            files = _in_degrees(output / name) if mixed else {"raster": name, "bands": bands}
            scene[sensor][key] = {"time": time, "files": [files | {"offset": -offset}]}
    dem = save("dem.tif", {chip: source.raster(chip, "DEM")[None] for chip in chips}, NO_DATA, ["data"])
    save("truth.tif", {chip: source.raster(chip, LABEL_DIR)[None] for chip in chips}, IGNORE_INDEX, ["class"])
    scene["DEM"] = {"files": [{"data": dem}]}
    (output / "scene.yaml").write_text(yaml.safe_dump(scene, sort_keys=False), encoding="utf-8")
    return output / "scene.yaml"


def _in_degrees(raster: Path) -> dict[str, str]:
    """Write each band of a raster in EPSG:4326 with pixels of 20 m to a file of its own, and return the names."""
    files = {}
    with rasterio.open(raster) as file:
        grid = calculate_default_transform(
            *(file.crs, "EPSG:4326", file.width, file.height, *file.bounds), resolution=_DEGREES
        )
        place = {"crs": "EPSG:4326", **dict(zip(("transform", "width", "height"), grid, strict=True))}
        for number, band in enumerate(file.descriptions, 1):
            method = Resampling.nearest if band == "SCL" else Resampling.bilinear
            files[band] = f"{raster.stem}_{band}.tif"
            with (
                WarpedVRT(file, resampling=method, **place) as warped,
                rasterio.open(
                    raster.with_name(files[band]), "w", **warped.profile | {"driver": "GTiff", "count": 1}
                ) as out,
            ):
                out.write(warped.read([number]))
                out.descriptions = (band,)
    raster.unlink()
    return files
