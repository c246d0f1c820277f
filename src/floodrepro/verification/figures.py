"""The plots of a report as PNGs. The same plot gives the same bytes with the same matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

DPI = 110
WIDTH = 7.6  # inches
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
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def png(plot: Mapping[str, Any]) -> bytes:
    """A `check.Plot` of kind lines, dots or forest, as it lies in results.json, as a PNG."""
    kind, series = plot["kind"], plot["series"]
    labels = [] if kind == "lines" else [str(label) for label in series[0]["y"]]
    height = {"forest": 0.75 + 0.3 * len(labels), "dots": 1.0 + 0.22 * len(labels)}.get(kind, 3.2)
    with _style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=plot["title"], xlabel=plot["x_label"], ylabel=plot["y_label"])
        for n, one in enumerate(series):
            x, y = _numbers(one["x"]), range(len(labels)) if labels else _numbers(one["y"])
            look = {"color": _COLOURS[n % 6], "marker": _MARKERS[n % 6], "label": one["label"]}
            if one.get("guide"):
                axes.plot(x, y, color=_FAINT, linestyle="--", linewidth=1, label=one["label"], zorder=1)
            elif kind == "lines":
                axes.plot(x, y, **look | ({} if len(x) <= 40 else {"marker": ""}), markersize=4)
            elif kind == "dots":
                axes.plot(x, y, **look, linestyle="", markersize=6 + 3 * n, fillstyle="none" if n else "full")
            else:
                whiskers = np.abs(np.array([_numbers(one["low"]), _numbers(one["high"])]) - x)
                axes.errorbar(x, y, xerr=whiskers, fmt="none", ecolor=look["color"], capsize=3)
                axes.plot(x, y, **look, linestyle="")
        if labels:
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)  # the first on top
        if kind == "dots":
            axes.set_xlim(-0.02, 1.02)
        if kind == "forest":
            axes.axvspan(-plot["margin"], plot["margin"], color="#d8ecd8", linewidth=0, zorder=0)
            axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=1)
        elif len(series) > 1:
            axes.legend(loc="best", fontsize=8)
        return _encode(figure)


def panels_png(panels: Sequence[Mapping[str, Any]], names: Sequence[str], positive: int, metres: float) -> bytes:
    """The panels as one PNG, a row a chip.

    Args:
        panels: For each chip of H x W pixels `title`, `before_rgb` and `event_rgb` (H, W, 3) uint8, `before_vv` and
            `event_vv` (H, W) in dB, NaN is missing, `truth` and `prediction` (H, W), -1 is ignored.
        names: Of the classes.
        positive: The class whose errors are shown.
        metres: Width of a pixel.
    """
    palette = ["#56B4E9" if k else _LAND for k in range(len(names))]
    palette[positive] = _POSITIVE
    classes, errors = ListedColormap([_IGNORED, *palette]), ListedColormap(list(_ERRORS.values()))
    grey = matplotlib.colormaps["gray"].with_extremes(bad=_NO_DATA)
    labels = {"right, not " + names[positive] if key == "right" else key: colour for key, colour in _ERRORS.items()}
    legend = dict(zip(names, palette, strict=True)) | labels | {"S1 no data": _NO_DATA}
    with _style():
        figure = Figure(figsize=(12, 1.95 * len(panels) + 0.5), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(len(panels), 7, squeeze=False), strict=True):
            is_true, is_called = panel["truth"] == positive, panel["prediction"] == positive
            kinds = [panel["truth"] < 0, is_true & is_called, is_true, is_called]  # the first that holds
            images: list[tuple[str, npt.NDArray[Any], dict[str, Any]]] = [
                ("S2 before", panel["before_rgb"], {}),
                ("S2 event", panel["event_rgb"], {}),
                ("VV before", panel["before_vv"], {"cmap": grey, "vmin": _DB[0], "vmax": _DB[1]}),
                ("VV event", panel["event_vv"], {"cmap": grey, "vmin": _DB[0], "vmax": _DB[1]}),
                ("truth", panel["truth"] + 1, {"cmap": classes, "vmin": -0.5, "vmax": classes.N - 0.5}),
                ("prediction", panel["prediction"] + 1, {"cmap": classes, "vmin": -0.5, "vmax": classes.N - 0.5}),
                ("errors", np.select(kinds, [4, 1, 2, 3]), {"cmap": errors, "vmin": -0.5, "vmax": errors.N - 0.5}),
            ]
            for ax, (head, image, options) in zip(axes, images, strict=True):
                ax.imshow(image, interpolation="nearest", **options)
                ax.set(xticks=[], yticks=[], xlabel=head if panel is panels[-1] else "")
            axes[0].set_title(" ")  # room for the row's title, which may be wider than its first picture
            axes[0].text(0, 1.04, panel["title"], transform=axes[0].transAxes, in_layout=False)
            axes[0].set_ylabel(f"{is_true.shape[1] * metres / 1000:.2g} km", fontsize=8)
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


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Floats, NaN where there is none: matplotlib leaves a gap."""
    return [math.nan if value is None else float(value) for value in values]
