"""The panels: chips as a reader sees them, a row a chip, drawn from `evidence/panels.npz`."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from floodrepro.verification.figures import encode, style

ARRAYS = (
    *("titles", "before_rgb", "event_rgb", "before_vv", "event_vv", "truth", "prediction"),
    *("metres_per_pixel", "class_names"),
)
_COLUMNS = ("S2 before", "S2 at the event", "S1 VV before", "S1 VV at the event", "truth", "prediction", "errors")
_DB = (-25.0, 0.0)  # VV backscatter of land and water lies within
# Okabe and Ito's colours: yellow, blue and vermilion differ in lightness as well.
_FLOOD, _WATER, _LAND, _IGNORED, _MISSING = "#0072B2", "#56B4E9", "#eeece6", "#8c8c8c", "#d8b4d0"
_ERRORS = {
    "right, no flood": _LAND,
    "hit": _FLOOD,
    "miss": "#D55E00",
    "false alarm": "#F0E442",
    "other classes confused": "#CC79A7",
    "ignored": _IGNORED,
}
_CELL, _GAP, _TITLE, _HEAD, _FOOT, _SIDE = 1.75, 0.06, 0.3, 0.32, 0.75, 0.08  # inches


def panels_png(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The panels as one PNG.

    Args:
        arrays: ARRAYS; P panels of H x W pixels. VV is in dB already and drawn as it is; NaN is missing. The last
            class is flood, -1 ignored.
    """
    names, rows = [str(name) for name in arrays["class_names"]], len(arrays["titles"])
    width = 2 * _SIDE + len(_COLUMNS) * _CELL + (len(_COLUMNS) - 1) * _GAP
    height = _HEAD + rows * (_TITLE + _CELL) + _FOOT
    classes = ListedColormap([_IGNORED, *_class_colours(len(names))])
    grey = matplotlib.colormaps["gray"].with_extremes(bad=_MISSING)
    with style():
        figure = Figure(figsize=(width, height))
        for row in range(rows):
            bottom = height - _HEAD - (row + 1) * (_TITLE + _CELL)
            figure.text(_SIDE / width, (bottom + _CELL + 0.07) / height, str(arrays["titles"][row]), fontsize=9)
            axes = [_cell(figure, column, bottom, width, height) for column in range(len(_COLUMNS))]
            axes[0].imshow(arrays["before_rgb"][row], interpolation="nearest")
            axes[1].imshow(arrays["event_rgb"][row], interpolation="nearest")
            for ax, name in ((axes[2], "before_vv"), (axes[3], "event_vv")):
                ax.imshow(arrays[name][row], cmap=grey, vmin=_DB[0], vmax=_DB[1], interpolation="nearest")
            for ax, name in ((axes[4], "truth"), (axes[5], "prediction")):
                ax.imshow(arrays[name][row], cmap=classes, vmin=-1.5, vmax=len(names) - 0.5, interpolation="nearest")
            errors = _errors(arrays["truth"][row], arrays["prediction"][row], len(names) - 1)
            colours = ListedColormap(list(_ERRORS.values()))
            axes[6].imshow(errors, cmap=colours, vmin=-0.5, vmax=len(_ERRORS) - 0.5, interpolation="nearest")
            _scale_bar(axes[0], errors.shape, float(arrays["metres_per_pixel"]))
            if row == 0:
                for ax, title in zip(axes, _COLUMNS, strict=True):
                    place = ax.get_position()
                    figure.text(place.x0 + place.width / 2, 1 - 0.22 / height, title, ha="center", weight="bold")
        _legends(figure, names, width, height)
        return encode(figure)


def _cell(figure: Figure, column: int, bottom: float, width: float, height: float) -> Axes:
    left = _SIDE + column * (_CELL + _GAP)
    axes = figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#bbbbbb", linewidth=0.6)
    return axes


def _class_colours(classes: int) -> list[str]:
    return [_LAND, *[_WATER] * (classes - 2), _FLOOD]


def _errors(truth: npt.NDArray[Any], prediction: npt.NDArray[Any], flood: int) -> npt.NDArray[np.int64]:
    """Places in _ERRORS of each pixel."""
    true, called = truth == flood, prediction == flood
    confused = ~true & ~called & (truth != prediction)
    return np.select([truth < 0, true & called, true, called, confused], [5, 1, 2, 3, 4], default=0)


def _scale_bar(axes: Axes, shape: tuple[int, ...], metres_per_pixel: float) -> None:
    """A bar of a round length, at most a third of the chip, in the lower left corner."""
    rows, columns = shape
    third = columns * metres_per_pixel / 3
    power = 10.0 ** math.floor(math.log10(third))
    metres = next(factor * power for factor in (5, 2, 1) if factor * power <= third)
    long, left, low = metres / metres_per_pixel, 0.05 * columns, 0.94 * rows
    bar: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.8}
    axes.add_patch(Rectangle((left, low - 0.025 * rows), long, 0.025 * rows, **bar))
    label = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m"
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.2}
    axes.text(left, low - 0.05 * rows, label, color="white", fontsize=7.5, va="bottom", bbox=box)


def _legends(figure: Figure, names: list[str], width: float, height: float) -> None:
    shown = {name: c for name, c in _ERRORS.items() if len(names) > 2 or name != "other classes confused"}
    classes = dict(zip(names, _class_colours(len(names)), strict=True)) | {"ignored": _IGNORED}
    backscatter = {f"VV \N{MINUS SIGN}{-_DB[0]:g} dB": "#000000", f"VV {_DB[1]:g} dB": "#ffffff", "no data": _MISSING}
    for column, title, entries in ((0, "S1", backscatter), (3, "Classes", classes), (4.7, "Errors", shown)):
        patches = [Patch(facecolor=c, edgecolor="#777777", linewidth=0.6, label=name) for name, c in entries.items()]
        figure.legend(
            handles=patches,
            title=title,
            alignment="left",
            ncols=3,
            loc="upper left",
            bbox_to_anchor=((_SIDE + column * (_CELL + _GAP)) / width, (_FOOT - 0.02) / height),
            borderaxespad=0,
            fontsize=8,
            title_fontsize=8,
            columnspacing=1.2,
            handlelength=1.3,
        )
