"""A picture of a chip: the optical images, the radar before and at the event, and the mask."""

from pathlib import Path
from typing import Any

import numpy as np

from floodrepro.data.chips import Chips
from floodrepro.data.protocols import BEFORE, EVENT, LABEL_DIR, S2_BANDS, TIMESTEPS
from floodrepro.errors import DataError, UsageError

_FACTS = ("datetime", "sat_orbit_state", "sat_relative_orbit", "eo_cloud_cover")
_RGB = [S2_BANDS.index(band) for band in ("B04", "B03", "B02")]


def draw_chip(source: Chips, chip: str, path: Path) -> dict[str, dict[str, str]]:
    """Write a picture and return dates, orbits and clouds by modality, each a text of four values.

    Raises:
        UsageError: The picture cannot be written, or its suffix names no format.
        DataError: The chip is not there, or is damaged.
    """
    from matplotlib.figure import Figure

    facts: dict[str, dict[str, str]] = {}
    for part in [part for part in ("S2L2A", "S1RTC") if chip in source.having(part)]:
        attributes, masks = source.extras(chip, part, "cloud_mask")
        facts[part] = {key: str(attributes[key]) for key in _FACTS if key in attributes}
        for mask in masks.values():
            facts[part]["cloud"] = ";".join(f"{share:.0%}" for share in mask.astype(bool).mean(axis=(1, 2)))
    panels: list[tuple[str, Any, dict[str, Any]]] = []
    if "S2L2A" in facts:
        dates = (facts["S2L2A"].get("datetime", "") + ";;;").split(";")
        for name, date, image in zip(TIMESTEPS, dates, source.bands(chip, "S2L2A")[:, _RGB], strict=False):
            panels.append((f"{name} {date[:10]}", np.clip(image.transpose(1, 2, 0) / 3000, 0, 1), {}))
    if "S1RTC" in facts:
        for step in (BEFORE, EVENT):
            image = source.bands(chip, "S1RTC")[step, 0].astype(np.float32)
            panels.append((f"VV {TIMESTEPS[step]}, dB", image, {"cmap": "gray", "vmin": -25, "vmax": 0}))
    if chip in source.having(LABEL_DIR):
        panels.append(("mask", source.raster(chip, LABEL_DIR), {"cmap": "viridis", "vmin": -1, "vmax": 2}))
    if not panels:
        raise DataError(f"there is no chip {chip}", where=source.root, fix="--root, or another chip id")
    figure = Figure(figsize=(3 * len(panels), 3.4), layout="constrained")
    for axes, (title, image, options) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(image, interpolation="nearest", **options)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    figure.suptitle(chip, fontsize=9)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UsageError(f"the picture cannot be written: {error}", where=path, fix="--output FILE.png") from error
    return facts
