"""Scenes and a network for the tests of `floodrepro map` that need no TerraMind: they map a scene in a second."""

import multiprocessing
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import rasterio
import yaml

from conftest import PLACE, save
from floodrepro.data.protocols import S1_BANDS, S2_BANDS
from floodrepro.errors import RunFolderError
from floodrepro.mapping.mapper import map_scene
from floodrepro.mapping.scene import STEPS, read_scene

LEFT, TOP, CRS = PLACE["transform"].c, PLACE["transform"].f, PLACE["crs"]
DAYS = {"S1RTC": ("2026-07-11", "2026-08-16", "2026-08-28", "2026-09-09")}
DAYS["S2L2A"] = ("2026-07-12", "2026-08-17", "2026-08-27", "2026-09-08")
PLAN = {"names": ["rest", "flood"], "positive": 1, "permanent": None, "permanent_file": None, "threshold": None}
PLAN |= {"crop": 64, "stride": 48, "min_hectares": 0.0}


def lake(height: int, width: int):
    """Where the scenes below are flooded, (H, W)."""
    rows, columns = np.mgrid[:height, :width]
    return ((rows / height - 0.5) ** 2 + (columns / width - 0.4) ** 2 < 0.06) | (abs(columns - width * 0.8) < 3)


def make_scene(folder: Path, height: int, width: int, **changes) -> Path:
    """A scene of dark radar where it is flooded, vegetation and low hills; some keys of scene.yaml may be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    scene: dict = {"S1RTC": {"unit": "dB"}, "S2L2A": {}}
    green = np.array([300, 400, 700, 450, 1000, 2600, 3200, 3400, 3500, 3600, 1800, 900])[:, None, None]
    for number, step in enumerate(STEPS):
        db = np.stack([np.full((height, width), -10.0), np.full((height, width), -16.0)])
        db -= 9.0 * (lake(height, width) & (number == 2))
        db += rng.normal(0, 1, db.shape)
        name = save(folder / f"s1_{step}.tif", db.astype(np.float32), S1_BANDS, nodata=np.nan).name
        scene["S1RTC"][step] = {"time": DAYS["S1RTC"][number], "orbit": 66, "files": [name]}
        optical = green + rng.integers(-90, 90, (12, height, width))
        name = save(folder / f"s2_{step}.tif", optical.astype(np.uint16), S2_BANDS, nodata=0).name
        scene["S2L2A"][step] = {"time": DAYS["S2L2A"][number], "files": [{"raster": name, "offset": 0}]}
    dem = save(folder / "dem.tif", (100 + np.mgrid[:height, :width][0] // 9).astype(np.float32), nodata=-9999).name
    path = folder / "scene.yaml"
    path.write_text(yaml.safe_dump(scene | {"DEM": {"files": dem}} | changes))
    return path


def edit_pixels(scene: Path, pattern: str, change) -> None:
    """Change the values of the files beside a scene.yaml whose names match."""
    for file in scene.parent.glob(pattern):
        with rasterio.open(file, "r+") as raster:
            raster.write(change(raster.read()).astype(raster.dtypes[0]))


def read(folder: Path, name: str = "class"):
    """A layer of a map as whole numbers, (H, W)."""
    with rasterio.open(folder / f"{name}.tif") as file:
        return file.read(1).astype(int)


class RadarNetwork:
    """Flood is where VV at the event is low; every probability depends on all inputs a little, as a network's does."""

    steps: ClassVar = {"S2L2A": [0, 1, 2, 3], "S1RTC": [0, 1, 2, 3], "DEM": [0]}
    classes = 2

    def probabilities(self, chips):
        out = []
        for s2, s1, dem in zip(chips["S2L2A"], chips["S1RTC"], chips["DEM"], strict=True):
            vv = np.nan_to_num(s1[2, 0].astype(np.float32))
            rest = (s2.astype(np.float32).mean((0, 1)) + dem[0, 0]) * 1e-5 + 0.01 * np.cos(np.arange(vv.shape[1]))
            flood = 1 / (1 + np.exp(vv + 14 + rest))
            out.append(np.stack([1 - flood, flood]))
        return np.stack(out).astype(np.float32)

    def fitting_batch(self, crop):
        return 2


def run(scene: Path, output: Path, network=None, **options):
    """Map a scene with the network above."""
    return map_scene(network or RadarNetwork(), read_scene(scene), PLAN | options, output, {"weights": "none"})


def run_without_room(scene: Path, output: Path, rooms: Sequence[int]):
    """Map with one limit on the size of a file after the other, as a full disk has it; each time that is the error."""

    def run_with(room: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            run(scene, output)
        except RunFolderError as error:
            sys.exit(7 if "cannot be written" in str(error) else 1)

    for room in rooms:
        process = multiprocessing.get_context("fork").Process(target=run_with, args=(room,))
        process.start()
        process.join()
        assert process.exitcode == 7, room
