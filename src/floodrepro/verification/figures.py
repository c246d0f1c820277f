"""The pictures of a report: its plots, and the chips that it shows. The same input gives the same bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from floodrepro.data import protocols
from floodrepro.errors import TableError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import iou

MIN_SHARE = 0.01
"""Share of counted pixels of the class from which a chip's IoU says something: on fewer, one field decides it."""

_DPI, _WIDTH = 110, 5.4  # of plots, in inches: on a phone's screen their labels can still be read
# Okabe and Ito, Color Universal Design (2008): told apart with every common colour blindness, as are the markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_FAINT, _POSITIVE, _LAND, _IGNORED, _NO_DATA = "#888888", "#0072B2", "#eeece6", "#8c8c8c", "#d8b4d0"
_ERRORS = {"neither": _LAND, "hit": _POSITIVE, "miss": "#D55E00", "false alarm": "#F0E442", "ignored": _IGNORED}
_DB = (-25.0, 0.0)  # VV backscatter of land and water lies within
_METRES = 10.0  # width of ImpactMesh's pixels
_STYLE = {"font.size": 10, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4", "legend.frameon": False}


def png(plot: Mapping[str, Any]) -> bytes:
    """A plot, as it lies in results.json, as a PNG.

    It has `kind`, `series` and `x_label`; a series has `label`, `x` and `y`. The kinds are `lines`, with a `y_label`;
    `dots`, where y are labels; and `forest`, where x are differences with a `low` and a `high`, y are labels, and the
    plot's `margin` is shaded on either side of 0.
    """
    kind, series = plot["kind"], plot["series"]
    labels = [] if kind == "lines" else [str(label) for label in series[0]["y"]]
    height = {"forest": 0.75 + 0.3 * len(labels), "dots": 1.0 + 0.22 * len(labels)}.get(kind, 3.2)
    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's own is
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(plot["x_label"], loc="right")  # it may be wider than the axes
        axes.set_ylabel(plot.get("y_label", ""))
        for n, one in enumerate(series):
            # None becomes NaN, where matplotlib leaves a gap
            x, y = (np.array(range(len(labels)) if labels and axis == "y" else one[axis], float) for axis in "xy")
            look = {"color": _COLOURS[n % 6], "marker": _MARKERS[n % 6], "label": one["label"]}
            if kind == "lines":
                axes.plot(x, y, **look | ({} if len(x) <= 40 else {"marker": ""}), markersize=4)
            else:
                axes.plot(x, y, **look, linestyle="", markersize=6 + 3 * n, fillstyle="none" if n else "full")
            if kind == "forest":
                whiskers = np.abs(np.array([one["low"], one["high"]], float) - x)
                axes.errorbar(x, y, xerr=whiskers, fmt="none", ecolor=look["color"], capsize=3)
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


def choose_chips_to_show(table: ChipTable) -> dict[str, int]:
    """Rows of the chips to show, by kind, as far as there are any: best, median and worst IoU, and empty.

    The first three have a share of MIN_SHARE of the class in the truth, the empty one the most false alarms.

    Raises:
        TableError: There is no chip to show.
    """
    counts, k = table.counts, table.positive
    pixels, truth, called = counts.sum(axis=(1, 2)), counts[:, k].sum(axis=1), counts[:, :, k].sum(axis=1)
    figures = iou(counts, k)
    having = np.flatnonzero((truth > 0) & (truth >= MIN_SHARE * pixels)).tolist()
    having.sort(key=lambda row: (-figures[row], str(table.chips[row])))
    empty = np.flatnonzero((truth == 0) & (pixels > 0)).tolist()
    empty.sort(key=lambda row: (-called[row], str(table.chips[row])))
    rows: dict[str, int] = {}
    for kind, place in (("best", 0), ("median", len(having) // 2), ("worst", -1)):
        if having and having[place] not in rows.values():
            rows[kind] = having[place]
    if empty:
        rows["empty"] = empty[0]
    if not rows:
        raise TableError("all pixels of the chip table are ignored: there is no chip to show")
    return rows


def take_pictures(optical: npt.NDArray[Any], radar: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """True colour (H, W, 3) uint8 and VV (H, W) in dB before and at the event, as they are on disk.

    `optical` and `radar` (timesteps, bands, H, W) are all bands of a chip's Sentinel-2 and Sentinel-1.
    """
    colours = [protocols.S2_BANDS.index(band) for band in ("B04", "B03", "B02")]
    times = [protocols.BEFORE, protocols.EVENT]
    # One stretch, in which a reflectance of 0.3 is white: a change of colour between the dates is one on the ground.
    rgb = np.clip(np.moveaxis(optical[times][:, colours], 1, -1) / 3000 * 255, 0, 255).astype(np.uint8)
    vv = radar[times][:, protocols.S1_BANDS.index("vv")].astype(np.float32)
    vv = np.where(vv > protocols.NO_BACKSCATTER, vv, np.float32(np.nan))
    return {"before_rgb": rgb[0], "event_rgb": rgb[1], "before_vv": vv[0], "event_vv": vv[1]}


def panels_png(panels: Sequence[Mapping[str, Any]], names: Sequence[str], positive: int) -> bytes:
    """The panels as one PNG, a row a chip; of the classes of these names, the positive one's errors are shown.

    A chip has `title`, `before_rgb` and `event_rgb` (H, W, 3) uint8, `before_vv` and `event_vv` (H, W) in dB, NaN is
    missing, `truth` and `prediction` (H, W), -1 is ignored.
    """
    palette = [_POSITIVE if k == positive else "#56B4E9" if k else _LAND for k in range(len(names))]
    classes, errors = ListedColormap([_IGNORED, *palette]), ListedColormap(list(_ERRORS.values()))
    grey = matplotlib.colormaps["gray"].with_extremes(bad=_NO_DATA)
    legend = dict(zip(names, palette, strict=True)) | {name: c for name, c in _ERRORS.items() if c not in palette}
    legend |= {"S1 no data": _NO_DATA}
    with matplotlib.style.context(["default", _STYLE]):  # whatever the user's own is
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
            axes[0].set_ylabel(f"{is_true.shape[1] * _METRES / 1000:.2g} km", fontsize=8)
        patches = [Patch(facecolor=c, edgecolor="#777777", linewidth=0.6, label=name) for name, c in legend.items()]
        figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), fontsize=8, handlelength=1.2)
        return _encode(figure)


def _encode(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})  # neither time nor version
    return file.getvalue()
