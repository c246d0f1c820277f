"""The plots of a report as PNGs, a renderer a kind. The same plot gives the same bytes with the same matplotlib."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

DPI = 110
WIDTH = 7.6  # inches
PANEL_ARRAYS = (
    "titles",
    "before_rgb",
    "event_rgb",
    "before_vv",
    "event_vv",
    "truth",
    "prediction",
    "metres_per_pixel",
    "class_names",
    "positive",
)
# Okabe and Ito, Color Universal Design (2008): told apart with every common colour blindness, as are the markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_FAINT, _POSITIVE, _LAND, _IGNORED, _NO_DATA = "#888888", "#0072B2", "#eeece6", "#8c8c8c", "#d8b4d0"
_ERRORS = {"right": _LAND, "hit": _POSITIVE, "miss": "#D55E00", "false alarm": "#F0E442", "ignored": _IGNORED}
_DB = (-25.0, 0.0)  # VV backscatter of land and water lies within
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.facecolor": "white",
}

Plot = Mapping[str, Any]
"""A `check.Plot` as it lies in results.json."""


def png(plot: Plot) -> bytes:
    """A plot of kind lines, dots or forest as a PNG."""
    with _style():
        rows = len(plot["series"][0]["y"]) if plot["kind"] in ("dots", "forest") else 0
        height = {"forest": 0.75 + 0.3 * rows, "dots": 1.0 + 0.22 * rows}.get(plot["kind"], 3.2)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=plot["title"], xlabel=plot["x_label"], ylabel=plot["y_label"])
        axes.grid(True)
        _RENDERERS[plot["kind"]](axes, plot["series"])
        if plot["kind"] == "forest":
            axes.axvspan(-plot["margin"], plot["margin"], color="#d8ecd8", linewidth=0, zorder=0)
            axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=1)
        elif len(plot["series"]) > 1:
            axes.legend(loc="best", fontsize=8)
        return _encode(figure)


def panels_png(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The panels as one PNG, a row a chip.

    Args:
        arrays: PANEL_ARRAYS; P panels of H x W pixels. VV is in dB and drawn as it is, NaN is missing, truth -1 is
            ignored.
    """
    names, rows, positive = arrays["class_names"].tolist(), len(arrays["titles"]), int(arrays["positive"])
    palette = ["#56B4E9" if k else _LAND for k in range(len(names))]
    palette[positive] = _POSITIVE
    classes, errors = ListedColormap([_IGNORED, *palette]), ListedColormap(list(_ERRORS.values()))
    grey = matplotlib.colormaps["gray"].with_extremes(bad=_NO_DATA)
    labels = {"right, not " + names[positive] if key == "right" else key: colour for key, colour in _ERRORS.items()}
    legend = dict(zip(names, palette, strict=True)) | labels | {"S1 no data": _NO_DATA}
    with _style():
        figure = Figure(figsize=(12, 1.95 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, 7, squeeze=False)
        for row, axes in enumerate(grid):
            truth, called = arrays["truth"][row], arrays["prediction"][row]
            hit, miss = (truth == positive) & (called == positive), (truth == positive) & (called != positive)
            alarm = (truth != positive) & (called == positive)
            wrong = np.select([truth < 0, hit, miss, alarm], [4, 1, 2, 3], default=0)
            axes[0].imshow(arrays["before_rgb"][row])
            axes[1].imshow(arrays["event_rgb"][row])
            for ax, name in ((axes[2], "before_vv"), (axes[3], "event_vv")):
                ax.imshow(arrays[name][row], cmap=grey, vmin=_DB[0], vmax=_DB[1], interpolation="nearest")
            for ax, image, colours in ((axes[4], truth, classes), (axes[5], called, classes), (axes[6], wrong, errors)):
                low = -1.5 if colours is classes else -0.5
                ax.imshow(image, cmap=colours, vmin=low, vmax=low + colours.N, interpolation="nearest")
            axes[0].set_title(" ")  # room for the row's title, which may be wider than its first picture
            axes[0].text(0, 1.04, str(arrays["titles"][row]), transform=axes[0].transAxes, in_layout=False)
            kilometres = truth.shape[1] * float(arrays["metres_per_pixel"]) / 1000
            axes[0].set_ylabel(f"{kilometres:.2g} km", fontsize=8)
            heads = ("S2 before", "S2 event", "VV before", "VV event", "truth", "prediction", "errors")
            for ax, head in zip(axes, heads, strict=True):
                ax.set(xticks=[], yticks=[])
                if row == rows - 1:
                    ax.set_xlabel(head)
        patches = [Patch(facecolor=c, edgecolor="#777777", linewidth=0.6, label=name) for name, c in legend.items()]
        figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), fontsize=8, handlelength=1.2)
        return _encode(figure)


def _style() -> Any:
    """A context with floodrepro's own settings of matplotlib, whatever the user's are."""
    default: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return matplotlib.rc_context(default | _STYLE)


def _encode(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})  # neither time nor version
    return file.getvalue()


def _lines(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    for n, one in enumerate(series):
        x, y = _numbers(one["x"]), _numbers(one["y"])
        if one.get("guide"):
            axes.plot(x, y, color=_FAINT, linestyle="--", linewidth=1, label=one["label"], zorder=1)
        else:
            marker = _MARKERS[n % 6] if len(x) <= 40 else ""
            axes.plot(x, y, color=_COLOURS[n % 6], marker=marker, markersize=4, label=one["label"])


def _dots(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    labels = [str(label) for label in series[0]["y"]]
    for n, one in enumerate(series):
        axes.plot(_numbers(one["x"]), range(len(labels)), _MARKERS[n % 6], color=_COLOURS[n % 6], label=one["label"])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.set_xlim(-0.02, 1.02)


def _forest(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    one = series[0]
    x, low, high = (_numbers(one[key]) for key in ("x", "low", "high"))
    whiskers = [[m - a for m, a in zip(x, low, strict=True)], [b - m for m, b in zip(x, high, strict=True)]]
    axes.errorbar(x, range(len(x)), xerr=whiskers, fmt="o", color=_COLOURS[0], capsize=3)
    axes.set_yticks(range(len(x)), one["y"])
    axes.set_ylim(len(x) - 0.5, -0.5)


_RENDERERS: dict[str, Callable[[Axes, Sequence[Mapping[str, Any]]], None]] = {
    "lines": _lines,
    "dots": _dots,
    "forest": _forest,
}


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Floats, NaN where there is none: matplotlib leaves a gap."""
    return [math.nan if value is None else float(value) for value in values]
