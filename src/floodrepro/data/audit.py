"""Check a data set: read every chip once, and say what is wrong, by kind; figures by split, event and timestep."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product, zip_longest
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Array, Chips, radar_faults
from floodrepro.data.protocols import BEFORE, EVENT, IGNORE_INDEX, NO_DATA, PARTS, S1_BANDS, S2_BANDS, SPLITS, TIMESTEPS
from floodrepro.data.splits import choose_chips, digest_of, read_events, shared_events, split_files
from floodrepro.errors import DataError, UsageError, name_three
from floodrepro.run_folder import replacing, write_atomically

MANIFEST, FIGURES = "data-manifest.json", "data-audit.parquet"

Finding = tuple[str, str, str]  # severity, kind, what was found
Sums = dict[str, Array]  # by figure: number, sum and sum of squares of its pixels, for each timestep (3, T)
Totals = dict[tuple[str | None, str | None], Sums]  # by split and event; None: of all of them

_BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("elevation",)}
_UNSEEN = {"S2L2A": "no_optical", "S1RTC": "no_radar"}  # share of pixels without a value in some band
_T = len(TIMESTEPS)
_DTYPES = {"S2L2A": "int16", "S1RTC": "float16 float32", "DEM": "int16 float32", "MASK": "int8 uint8"}  # else any
_CLOUDY = (8, 9, 10)  # Sen2Cor's scene classification: medium and high probability of cloud, thin cirrus
_DAYS = 5  # between the radar and the optical image of the event
_OFFSET = 900  # of 1000: what processing baseline 04.00 of Sentinel-2 adds to every pixel, from 2022-01-25 on
_DARK, _RARE = "share_of_dark_B11", 0.0001  # pixels of B11 up to that, as water has them; fewer are strays
_FALL = 0.5  # dB that VV falls under flood, at least; on version 1 it falls by about 5
_FEW = 1000  # pixels that are too few for a mean
_SHOWN = ("datetime", "sat_orbit_state", "sat_relative_orbit", "eo_cloud_cover")


def audit(
    root: Path,
    protocol: protocols.Protocol,
    *,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    fraction: float | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Read every chip of some splits once, write `data-manifest.json` and `data-audit.parquet`, and return the first.

    Args:
        root: Folder with `split/` and the chips. The files are written into it.
        protocol: What the data should be.
        splits: Names as in the split files; those of train, val and test that are there where None.
        limit: Number of chips of each split, at most.
        fraction: Share of the chips of each split.
        jobs: Threads; one for each core, up to 16, where None.

    Raises:
        UsageError: The protocol has no classes.
        DataError: There are no chips, no such split file, a split file is faulty, a chip is in two splits, or the root
            cannot be written.
    """
    if not protocol.label_map:
        raise UsageError(f"protocol {protocol.name} has no classes of its own", fix="--config YAML of a recipe")
    source, files = Chips(root, protocol), split_files(root / "split")
    names = splits or [name for name in SPLITS if name in files] or ["train"]
    if strange := [name for name in names if name not in files]:
        fix = f"--split {','.join(files)}" if files else "floodrepro data fetch"
        raise DataError(f"there is no split file of {', '.join(strange)}", where=root / "split", fix=fix)
    if not os.access(root, os.W_OK):
        fix = "--root of a folder that holds links to what is in this one"
        raise DataError("the audit is written into the root, which is read-only", where=root, fix=fix)
    listed = {name: choose_chips(read_events(files[name]), limit=limit, fraction=fraction) for name in names}
    findings: list[Finding] = [("warning", "shared events", text) for text in shared_events(listed, names)]
    keys = {chip: (split, event) for split, chips in listed.items() for chip, event in chips.items()}
    lacking = {chip: [part for part in PARTS if chip not in source.having(part)] for chip in keys}
    findings += [("error", f"no {', '.join(missing)}", chip) for chip, missing in lacking.items() if missing]
    ordered = [chip for chip in source.having(PARTS[0]) if lacking.get(chip) == []]  # as they lie in a tar
    totals: Totals = defaultdict(lambda: defaultdict(lambda: np.zeros((3, _T))))
    workers = max(jobs or min(len(os.sched_getaffinity(0)), 16), 1)
    # Decoding and numpy let other threads run. Unlike an executor, this pool waits for no chip at Ctrl-C.
    with ThreadPool(workers) as pool, console.progress("chips read") as progress:
        checked = pool.imap(partial(check_chip, source), ordered)
        for done, (chip, (found, facts)) in enumerate(zip(ordered, checked, strict=True), start=1):
            findings += [(one, kind, f"{chip}: {what}".removesuffix(": ")) for one, kind, what in found]
            split, event = keys[chip]
            for group, (name, sums) in product(product((split, None), (event, None)), facts.items()):
                totals[group][name] += sums
            progress(done, len(ordered))
    rows, read = [], Counter(keys[chip] for chip in ordered)
    for ((split, event), chips), (step, timestep) in product(sorted(read.items()), enumerate(TIMESTEPS)):
        figures = {name: totals[split, event][name][:2, step] for name in totals[None, None]}
        means = {name: total / count if count else None for name, (count, total) in figures.items()}
        rows.append({"split": split, "event": event, "timestep": timestep, "chips": chips} | means)
    prefix = "" if limit is None and fraction is None else "part-"  # what is known of the whole data stays
    pq.write_table(pa.Table.from_pylist(rows), root / f"{prefix}{FIGURES}")
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for severity, kind, what in [*findings, *_compare_events(totals, protocol)]:
        groups[severity, kind].append(what)
    manifest = {
        "protocol": protocol.name,
        "splits": {split: {"chips": len(c), "events": len(set(c.values()))} for split, c in listed.items()},
        "digests": {name: digest_of(source, [c for c in one if not lacking[c]], PARTS) for name, one in listed.items()},
        "findings": [
            {"severity": severity, "check": kind, "count": len(texts), "message": name_three("", texts, "; ")}
            for (severity, kind), texts in sorted(groups.items())
        ],
        "bands": {split: _statistics(totals[split, None]) for split in listed},
        "figures": f"{prefix}{FIGURES}",
    }
    write_atomically(root / f"{prefix}{MANIFEST}", json.dumps(manifest, indent=2) + "\n")
    return manifest


def draw_chip(source: Chips, chip: str, path: Path) -> dict[str, dict[str, str]]:
    """Write a PNG of a chip, and return dates, orbits and clouds by modality, each a text of four values.

    It shows the optical images, VV before and at the event, and the mask. What is damaged or of another shape is left
    out with a warning.

    Raises:
        DataError: The chip is not there, or nothing of it can be drawn.
    """
    from matplotlib.figure import Figure

    arrays, attributes, found = _read_chip(source, chip)
    for _, kind, what in found:
        console.warn(f"{kind}: {what}")
    facts = {part: {key: str(held[key]) for key in _SHOWN if key in held} for part, held in attributes.items()}
    if "cloud_mask" in arrays:
        facts["S2L2A"]["cloud"] = ";".join(f"{share:.0%}" for share in (arrays["cloud_mask"] != 0).mean(axis=(1, 2)))
    panels: dict[str, tuple[Array, dict[str, Any]]] = {}
    if "S2L2A" in arrays:
        dates = (facts["S2L2A"].get("datetime", "") + ";;;").split(";")
        colours = arrays["S2L2A"][:, [S2_BANDS.index(band) for band in ("B04", "B03", "B02")]].transpose(0, 2, 3, 1)
        for name, date, image in zip(TIMESTEPS, dates, np.clip(colours / 3000, 0, 1), strict=False):
            panels[f"{name} {date[:10]}"] = image, {}
    if "S1RTC" in arrays:
        for step in (BEFORE, EVENT):
            image = arrays["S1RTC"][step, 0].astype(np.float32)
            panels[f"VV {TIMESTEPS[step]}, dB"] = image, {"cmap": "gray", "vmin": -25, "vmax": 0}
    if "MASK" in arrays:
        panels["mask"] = arrays["MASK"], {"cmap": "viridis", "vmin": -1, "vmax": 2}
    if not panels:
        raise DataError(f"there is nothing to draw of chip {chip}", where=source.root, fix="--root, or another chip id")
    figure = Figure(figsize=(3 * len(panels), 3.4), layout="constrained")
    figure.suptitle(chip, fontsize=9)
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (image, options)) in zip(places, panels.items(), strict=True):
        axes.imshow(image, interpolation="nearest", **options)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    return facts


def check_chip(source: Chips, chip: str) -> tuple[list[Finding], Sums]:
    """What is wrong with a chip, and its sums; nothing is raised for a chip that is wrong."""
    arrays, attributes, found = _read_chip(source, chip)
    facts = _sum_up(arrays, range(len(source.protocol.label_map)))
    found += _check_dates(attributes)
    if "S1RTC" in arrays:
        if faults := radar_faults(arrays["S1RTC"]):
            found.append(("error" if "infinite" in faults else "warning", "radar values that become inputs", faults))
        count, total, _ = facts["mean_vv"].sum(axis=1)
        if count >= _FEW and total > 0:
            found.append(("error", "radar is linear, not in dB", f"mean {total / count:.3g}"))
    if "MASK" in arrays and (strange := sorted(set(np.unique(arrays["MASK"]).tolist()) - set(source.known))):
        hint = "; 255 is often -1 saved as uint8" if 255 in strange else ""
        found.append(("error", "mask values", f"{strange}, expected {source.known}{hint}"))
    return found, facts


def _read_chip(source: Chips, chip: str) -> tuple[dict[str, Array], dict[str, dict[str, Any]], list[Finding]]:
    """Arrays of a chip of the right dtype and shape, attributes by modality, and what is wrong with its files."""
    arrays: dict[str, Array] = {}
    attributes: dict[str, dict[str, Any]] = {}
    grids: list[Any] = []
    found: list[Finding] = []
    for part in [part for part in PARTS if chip in source.having(part)]:
        try:
            if part in _UNSEEN:
                arrays[part] = source.bands(chip, part)
                attributes[part], masks = source.extras(chip, part, "SCL", "cloud_mask")
                arrays |= masks
            else:
                arrays[part] = source.raster(chip, part)
                with rasterio.open(source.path(chip, part), driver="GTiff") as file:
                    grids.append((file.crs, file.transform))
        except DataError as error:
            found.append(("error", f"{part} is damaged", error.what))
    if len(grids) == 2 and grids[0] != grids[1]:
        found.append(("error", "DEM and MASK on different grids", ""))
    edges = Counter(array.shape[-2:] for array in arrays.values()).most_common(1)
    for name, array in list(arrays.items()):
        axes = (_T, len(_BANDS[name])) if name in _UNSEEN else () if name in PARTS else (_T,)
        shape, severity = axes + edges[0][0], "error" if name in PARTS else "warning"
        if name in _DTYPES and array.dtype.name not in _DTYPES[name].split():
            found.append((severity, f"{name}: dtype", f"{array.dtype}, expected {_DTYPES[name]}"))
        elif array.shape != shape:
            found.append((severity, f"{name}: shape", f"{array.shape}, expected {shape}"))
        else:
            continue
        del arrays[name]
    return arrays, attributes, found


def _check_dates(attributes: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    events = []
    for part, held in attributes.items():
        text = str(held.get("datetime", ""))
        try:
            times = np.array([d.strip().rstrip("Z").split("+")[0] or "NaT" for d in text.split(";")], "datetime64[s]")
        except ValueError:
            times = np.array(["NaT"], "datetime64[s]")
        known = times[~np.isnat(times)]
        if {len(times), len(known)} != {_T}:
            yield "warning", f"{part}: a date is missing", text
        if (np.diff(known) <= np.timedelta64(0)).any():
            yield "warning", f"{part}: dates doubled or out of order", text
        events += [times[EVENT]] if len(times) == _T else []
    if len(events) == 2 and (days := abs(events[0] - events[1]) / np.timedelta64(1, "D")) > _DAYS:
        yield "warning", f"radar and optical event more than {_DAYS} days apart", f"{days:.0f} days"
    texts = [str(attributes.get("S1RTC", {}).get(key, "")) for key in ("sat_orbit_state", "sat_relative_orbit")]
    orbits = list(zip_longest(*(text.replace(" ", "").split(";") for text in texts)))
    if len(orbits) == _T and orbits[BEFORE] != orbits[EVENT]:
        yield "warning", "radar orbit changed between before and event", ", ".join(texts)


def _sum_up(arrays: Mapping[str, Array], classes: Sequence[int]) -> Sums:
    facts: Sums = {}
    for part in [part for part in _BANDS if part in arrays]:
        values = arrays[part] if part in _UNSEEN else arrays[part][None, None]
        valid = np.isfinite(values) & (values > NO_DATA)
        for number, band in enumerate(_BANDS[part]):
            facts[f"mean_{band}"] = _sums(values[:, number], valid[:, number])
            if band == "B11":
                facts[_DARK] = _sums(values[:, number] <= _OFFSET, valid[:, number])
        if part in _UNSEEN:
            facts[_UNSEEN[part]] = _sums(np.logical_not(valid.all(axis=1)))
        if part == "S1RTC" and "MASK" in arrays:
            both = valid[BEFORE, 0] & valid[EVENT, 0]
            before, event = (np.where(both, values[step, 0], 0).astype(np.float64) for step in (BEFORE, EVENT))
            for value in classes:
                facts[f"vv_change_of_mask_{value}"] = _sums((event - before)[None], both & (arrays["MASK"] == value))
    if "SCL" in arrays:
        facts["cloud"] = _sums(np.isin(arrays["SCL"], _CLOUDY))
    if "MASK" in arrays:
        facts |= {f"share_of_mask_{value}": _sums(arrays["MASK"][None] == value) for value in (IGNORE_INDEX, *classes)}
    return facts


def _sums(values: Array, among: Array | bool = True) -> Array:
    """Number, sum and sum of squares of some pixels (T, H, W), for each timestep (3, T); of a single one, for all."""
    kept = np.where(among, values, 0).astype(np.float64)
    layers = [np.broadcast_to(layer, kept.shape).sum(axis=(1, 2)) for layer in (among, kept, kept**2)]
    return np.stack([np.broadcast_to(layer, _T) for layer in layers]).astype(np.float64)


def _statistics(sums: Sums) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of the valid pixels, by modality and band."""
    found = {}
    for part, bands in _BANDS.items():
        count, total, squares = np.stack([sums[f"mean_{band}"].sum(axis=1) for band in bands], axis=1)
        if count.all():
            std = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
            found[part] = {"mean": (total / count).round(3).tolist(), "std": std.round(3).tolist()}
    return found


def _compare_events(totals: Totals, protocol: protocols.Protocol) -> Iterator[Finding]:
    """What only many chips together show: classes swapped, and an offset between the optical images of events."""
    changes = {v: totals[None, None][f"vv_change_of_mask_{v}"].sum(axis=1) for v in range(len(protocol.label_map))}
    falls = {value: total / count for value, (count, total, _) in changes.items() if count >= _FEW * _T}
    struck = protocol.label_map.index(protocol.positive_class)
    if protocol.hazard.startswith("flood") and struck in falls and len(falls) > 1 and falls[struck] > -_FALL:
        lowest = min(falls, key=lambda value: falls[value])
        swapped = f"; it falls most where the mask is {lowest}: are classes swapped?" if lowest != struck else ""
        text = f"VV changes by {falls[struck]:+.2f} dB from before to event where the mask says flood{swapped}"
        yield "error" if swapped else "warning", "no flood signature", text
    dark = {event: sums[_DARK].sum(axis=1) for (split, event), sums in totals.items() if event and not split}
    lifted = sorted(event for event, (count, total, _) in dark.items() if total < _RARE * count)
    if 0 < len(lifted) < len(dark):
        text = f"{name_three('', lifted)}: hardly a pixel of B11 up to {_OFFSET}, unlike in other events"
        yield "warning", "optical offset of 1000 in some events", text
