"""A check's plots as PNGs: one renderer a kind. The same plot gives the same bytes with the same matplotlib."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 110
WIDTH = 7.6  # inches
_INK, _FAINT = "#222222", "#888888"
# Okabe and Ito, Color Universal Design (2008): told apart with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # so that colour is not all that tells two series apart
_DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
_STYLE = {
    **{"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"},
    **{"axes.titlepad": 8, "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "text.color": _INK},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"xtick.color": _INK, "ytick.color": _INK, "grid.color": "#e4e4e4", "grid.linewidth": 0.8},
    **{
        "legend.frameon": False,
        "figure.facecolor": "white",
        "figure.constrained_layout.w_pad": 0.1,
        "savefig.facecolor": "white",
        "savefig.dpi": DPI,
    },
}

Plot = Mapping[str, Any]
"""A `check.Plot` as it lies in results.json."""


def png(plot: Plot) -> bytes:
    """A plot of kind lines, scatter, bars or forest as a PNG."""
    with style():
        figure = Figure(figsize=(WIDTH, _height(plot)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(plot["title"], wrap=True)
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot["y_label"])
        _RENDERERS[plot["kind"]](axes, plot["series"])
        return encode(figure)


def style() -> Any:
    """A context with floodrepro's own settings of matplotlib, whatever the user's are."""
    default: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return matplotlib.rc_context(default | _STYLE)


def encode(figure: Figure) -> bytes:
    """A figure as a PNG that names neither time nor version."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def _lines(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    for i, (one, guide) in enumerate(zip(series, _guides(series), strict=True)):
        x, y = _numbers(one["x"]), _numbers(one["y"])
        if guide:
            axes.plot(x, y, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1, label=one.get("label"), zorder=1)
            continue
        colour, few = COLOURS[i % len(COLOURS)], len(x) <= 40
        marks: dict[str, Any] = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 4} if few else {}
        axes.plot(x, y, color=colour, linestyle=_DASHES[i % len(_DASHES)], label=one.get("label"), **marks)
        if one.get("low") and one.get("high"):
            axes.fill_between(x, _numbers(one["low"]), _numbers(one["high"]), color=colour, alpha=0.18, linewidth=0)
    axes.grid(True)
    _legend(axes, series)


def _scatter(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    points = sum(len(one["x"]) for one in series)
    for i, (one, guide) in enumerate(zip(series, _guides(series), strict=True)):
        x, y = _numbers(one["x"]), _numbers(one["y"])
        if guide:
            axes.plot(x, y, color=_FAINT, linestyle=(0, (4, 3)), linewidth=1, label=one.get("label"), zorder=3)
        else:
            colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
            size, alpha = (26, 0.8) if points < 300 else (12, 0.45) if points < 3000 else (5, 0.25)
            axes.scatter(x, y, s=size, alpha=alpha, color=colour, marker=marker, linewidths=0, label=one.get("label"))
    axes.grid(True)
    _legend(axes, series)


def _bars(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(str(label) for one in series for label in one["x"]))
    wide = 0.8 / max(len(series), 1)
    for i, one in enumerate(series):
        places = [labels.index(str(label)) + wide * (i - (len(series) - 1) / 2) for label in one["x"]]
        heights = _numbers(one["y"])
        axes.bar(places, heights, 0.92 * wide, color=COLOURS[i % len(COLOURS)], label=one.get("label"))
        if one.get("low") and one.get("high"):
            axes.errorbar(places, heights, _whiskers(heights, one), fmt="none", ecolor=_INK, capsize=2, linewidth=1)
    crowded = len(labels) > 8 or sum(map(len, labels)) > 70
    axes.set_xticks(range(len(labels)), labels, rotation=60 if crowded else 0, ha="right" if crowded else "center")
    if crowded:
        axes.tick_params(axis="x", labelsize=8 if len(labels) <= 40 else 6)
    axes.axhline(0, color=_FAINT, linewidth=0.8)
    axes.grid(True, axis="y")
    _legend(axes, series)


def _forest(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    labels = list(dict.fromkeys(str(label) for one in series for label in one["y"]))
    step = 0.5 / max(len(series), 1)
    for i, one in enumerate(series):
        places = [labels.index(str(label)) + step * (i - (len(series) - 1) / 2) for label in one["y"]]
        x, colour = _numbers(one["x"]), COLOURS[i % len(COLOURS)]
        if one.get("low") and one.get("high"):
            axes.errorbar(x, places, xerr=_whiskers(x, one), fmt="none", ecolor=colour, linewidth=1.4)
        axes.plot(
            x, places, _MARKERS[i % len(_MARKERS)], color=colour, markersize=4.5, linestyle="", label=one.get("label")
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    if axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
        axes.axvline(0, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.grid(True)
    axes.tick_params(axis="y", length=0)
    _legend(axes, series)


_RENDERERS: dict[str, Callable[[Axes, Sequence[Mapping[str, Any]]], None]] = {
    "lines": _lines,
    "scatter": _scatter,
    "bars": _bars,
    "forest": _forest,
}


def _height(plot: Plot) -> float:
    """Inches: a forest grows with its rows, up to what a renderer can hold."""
    if plot["kind"] != "forest":
        return 4.6 if plot["kind"] == "scatter" else 4.0
    rows = len({str(label) for one in plot["series"] for label in one["y"]})
    return min(1.3 + 0.21 * rows * max(1.0, 0.6 * len(plot["series"])), 60.0)


def _guides(series: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which series are guides, drawn dashed and grey: those of two points beside longer ones."""
    longest = max((len(one["x"]) for one in series), default=0)
    return [len(one["x"]) == 2 < longest for one in series]


def _legend(axes: Axes, series: Sequence[Mapping[str, Any]]) -> None:
    if len(series) > 1:
        axes.figure.legend(loc="outside lower left", ncols=min(len(series), 3))


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Floats, NaN where there is none: matplotlib leaves a gap."""
    return [math.nan if value is None else float(value) for value in values]


def _whiskers(middle: Sequence[float], one: Mapping[str, Any]) -> list[list[float]]:
    low, high = _numbers(one["low"]), _numbers(one["high"])
    return [
        [max(m - end, 0.0) if not math.isnan(end) else math.nan for m, end in zip(middle, low, strict=True)],
        [max(end - m, 0.0) if not math.isnan(end) else math.nan for m, end in zip(middle, high, strict=True)],
    ]
