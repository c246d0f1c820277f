"""Resident memory and time of a map of WIDTH x HEIGHT pixels: sparse files, a network that costs nothing.

    python scripts/map-memory.py WIDTH HEIGHT FOLDER

docs/mapping.md quotes it at 4,000 x 2,000, 20,000 x 4,000 and 20,000 x 20,000 px: 0.5, 3 and 12 minutes on two cores.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio import Affine
from rasterio.windows import Window

from floodrepro.mapping.mapper import map_scene
from floodrepro.mapping.scene import BANDS, STEPS, read_scene


class Threshold:
    """Flood is where VV is low at the event."""

    bands = {sensor: list(names) for sensor, names in BANDS.items()}  # noqa: RUF012
    steps = {"S2L2A": [0, 1, 2, 3], "S1RTC": [0, 1, 2, 3], "DEM": [0]}  # noqa: RUF012
    classes = 2

    def probabilities(self, chips: dict[str, list[Any]]) -> Any:
        """Of tiles (B, 2, H, W)."""
        vv = np.stack([radar[2, 0] for radar in chips["S1RTC"]]).astype(np.float32)
        flood = 1 / (1 + np.exp(vv + 14))
        return np.stack([1 - flood, flood], axis=1)

    def fitting_batch(self, crop: int) -> int:
        """One tile at a time."""
        return 1


def write_scene_of_zeros(folder: Path, width: int, height: int) -> Path:
    """A scene whose files hold no block, but lakes of 360 px, 512 px apart, in the event's radar."""
    place = {"width": width, "height": height, "crs": "EPSG:32633", "transform": Affine(10, 0, 3e5, 0, -10, 53e5)}
    tiles = {"tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True, "compress": "deflate"}
    lakes = np.where(np.hypot(*np.mgrid[-256:256, -256:256]) < 180, -20, -9)
    scene = {"S2L2A": {"nodata": []}, "S1RTC": {}}
    for sensor, step in [("S2L2A", s) for s in STEPS] + [("S1RTC", s) for s in STEPS] + [("DEM", "")]:
        name, bands = f"{sensor}{step}.tif", len(BANDS[sensor])
        dtype = "float32" if sensor == "S1RTC" else "int16"
        with rasterio.open(folder / name, "w", driver="GTiff", count=bands, dtype=dtype, **place, **tiles) as file:
            for row in range(0, height, 512) if (sensor, step) == ("S1RTC", "event") else ():
                rows = np.tile(np.stack([lakes, lakes - 6]), (1, 1, -(-width // 512)))[:, : height - row, :width]
                file.write(rows.astype(dtype), window=Window(0, row, width, rows.shape[1]))
        if sensor == "DEM":
            scene["DEM"] = {"files": name}
        else:
            time = f"2026-0{6 + STEPS.index(step)}-01"
            scene[sensor][step] = {"time": time, "files": [{"raster": name, "offset": 0}]}
    (folder / "scene.yaml").write_text(yaml.safe_dump(scene))
    return folder / "scene.yaml"


if __name__ == "__main__":
    (width, height), folder = map(int, sys.argv[1:3]), Path(sys.argv[3])
    folder.mkdir(parents=True)
    scene = read_scene(write_scene_of_zeros(folder, width, height))
    plan = {"names": ["rest", "flood"], "positive": 1, "permanent": None, "permanent_file": None, "threshold": None}
    plan |= {"crop": 256, "stride": 208, "batch": 1, "min_hectares": 0.1}
    before, began = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), time.monotonic()
    record = map_scene(Threshold(), scene, plan, folder / "map", {})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took, cpu = time.monotonic() - began, time.process_time() / width / height * 1e6
    print(
        json.dumps(
            {"gib_beyond_the_process": (peak - before) / 2**30, "seconds": took, "us_cpu_a_pixel": cpu} | record["km2"]
        )
    )
