"""Check a data set: read every chip once, and say what is wrong, by kind; figures by split, event and timestep."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Array, Chips, radar_faults
from floodrepro.data.protocols import BEFORE, EVENT, IGNORE_INDEX, NO_DATA, PARTS, S1_BANDS, S2_BANDS, SPLITS, TIMESTEPS
from floodrepro.data.splits import choose_chips, digest_of, read_events, shared_events, split_files
from floodrepro.errors import DataError, UsageError
from floodrepro.run_folder import write_atomically

MANIFEST, FIGURES = "data-manifest.json", "data-audit.parquet"
SCHEMA = 2

Finding = tuple[str, str, str, str]  # severity, kind, what was found, chip
# They add up over chips: by name, a sum and a number for each timestep (2, T); by modality, of the valid pixels of each
# band, sum, number and sum of squares (3, T, C).
Facts = dict[str, Array]

_BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("elevation",)}
_SATELLITES = ("S2L2A", "S1RTC")
_COUNTS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "int64")
_LAYOUT: dict[str, tuple[tuple[int, ...], Sequence[str]]] = {  # axes before height and width, and dtypes that are right
    "S2L2A": ((len(TIMESTEPS), len(S2_BANDS)), ("int16",)),
    "S1RTC": ((len(TIMESTEPS), len(S1_BANDS)), ("float16", "float32")),
    "DEM": ((), ("int16", "float32")),
    "MASK": ((), ("int8", "uint8")),
    "SCL": ((len(TIMESTEPS),), _COUNTS),
    "cloud_mask": ((len(TIMESTEPS),), _COUNTS),
}
_CLOUDY = (8, 9, 10)  # Sen2Cor's scene classification: medium and high probability of cloud, thin cirrus
_DAYS = 5  # between the radar and the optical image of the event
_OFFSET = 900  # of 1000: what processing baseline 04.00 of Sentinel-2 adds to every pixel, from 2022-01-25 on
_FALL = 0.5  # dB that VV falls under flood, at least; on version 1 it falls by about 5
_FEW = 1000  # pixels that are too few for a mean
_EXAMPLES = 3
_SHOWN = ("datetime", "sat_orbit_state", "sat_relative_orbit", "eo_cloud_cover")


def audit(
    root: Path,
    protocol: protocols.Protocol,
    *,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    fraction: float | None = None,
    jobs: int | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Read every chip of some splits once, write `data-manifest.json` and `data-audit.parquet`, and return the first.

    Args:
        root: Folder with `split/` and the chips. The files are written into it.
        protocol: What the data should be.
        splits: Names as in the split files; all split files where None.
        limit: Number of chips of each split, at most.
        fraction: Share of the chips of each split.
        jobs: Threads; one for each core, up to 16, where None.
        strict: Whether an event in two splits is an error.

    Raises:
        UsageError: The protocol has no classes.
        DataError: There are no chips, or no such split file, or the root cannot be written.
    """
    if not protocol.label_map:
        raise UsageError(f"protocol {protocol.name} has no classes of its own", fix="--config YAML of a recipe")
    source = Chips(root, protocol)
    if not os.access(root, os.W_OK):
        fix = "--root of a folder that holds links to what is in this one"
        raise DataError("the audit is written into the root, which is read-only", where=root, fix=fix)
    listed, findings = _read_lists(root, splits, limit, fraction)
    try:
        # Further lists of a split, as `test_holdout`, may share chips with it.
        kinds = {name if name in SPLITS else name.replace("_", "/", 1): chips for name, chips in listed.items()}
        findings += [("error" if strict else "warning", "shared events", text, "") for text in shared_events(kinds)]
    except DataError as error:
        findings.append(("error", "chip in two splits", error.what, ""))
    whole: dict[str, list[tuple[str, str]]] = defaultdict(list)  # by chip, its lists and events
    for split, chip in [(split, chip) for split, chips in listed.items() for chip in chips]:
        if missing := [part for part in PARTS if chip not in source.having(part)]:
            findings.append(("error", f"no {', '.join(missing)}", "", chip))
        else:
            whole[chip].append((split, listed[split][chip]))
    totals: dict[tuple[str, str], Facts] = defaultdict(dict)  # by split and event
    darkest: dict[str, float] = defaultdict(lambda: np.inf)  # by event
    ordered = [chip for chip in source.having(PARTS[0]) if chip in whole]  # as they lie in a tar
    with ExitStack() as stack:
        workers = max(jobs or min(len(os.sched_getaffinity(0)), 16), 1)
        pool = stack.enter_context(ThreadPoolExecutor(workers))  # decoding and numpy let other threads run
        stack.callback(pool.shutdown, cancel_futures=True)  # at Ctrl-C: it would wait for all chips
        progress = stack.enter_context(console.progress("chips read"))
        checked = pool.map(partial(check_chip, source), ordered)
        for done, (chip, (found, facts, dark)) in enumerate(zip(ordered, checked, strict=True), start=1):
            findings += found
            for split, event in whole[chip]:
                darkest[event] = min(darkest[event], dark)
                totals[split, event] = _add_up([totals[split, event], facts])
            progress(done, len(ordered))
    findings += _compare_events(_add_up(totals.values()), darkest, protocol)
    bands = {one: _statistics(_add_up(totals[key] for key in totals if key[0] == one)) for one in listed}
    manifest = {
        "schema": SCHEMA,
        "protocol": protocol.name,
        "deep": True,
        "splits": {split: {"chips": len(c), "events": len(set(c.values()))} for split, c in listed.items()},
        "digests": {split: digest_of(source, [c for c in held if c in whole], PARTS) for split, held in listed.items()},
        "findings": _group(findings),
        "bands": bands,
    }
    write_atomically(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if totals:
        pq.write_table(_figures(totals), root / FIGURES)
    return manifest


def draw_chip(source: Chips, chip: str, path: Path) -> dict[str, dict[str, str]]:
    """Write a picture of a chip, and return dates, orbits and clouds by modality, each a text of four values.

    It shows the optical images, VV before and at the event, and the mask. What is damaged or of another shape is left
    out with a warning.

    Raises:
        UsageError: The picture cannot be written, or its suffix names no format.
        DataError: The chip is not there, or nothing of it can be drawn.
    """
    from matplotlib.figure import Figure

    arrays, attributes, _, found = _read_chip(source, chip)
    for _, kind, what, _ in found:
        console.warn(f"{kind}: {what}")
    facts = {part: {key: str(held[key]) for key in _SHOWN if key in held} for part, held in attributes.items()}
    if "cloud_mask" in arrays:
        facts["S2L2A"]["cloud"] = ";".join(f"{share:.0%}" for share in (arrays["cloud_mask"] != 0).mean(axis=(1, 2)))
    panels: list[tuple[str, Any, dict[str, Any]]] = []
    for step, name in enumerate(TIMESTEPS if "S2L2A" in arrays else ()):
        colours = [arrays["S2L2A"][step, S2_BANDS.index(band)] for band in ("B04", "B03", "B02")]
        date = (facts["S2L2A"].get("datetime", "") + ";;;").split(";")[step]
        panels.append((f"{name} {date[:10]}", np.clip(np.stack(colours, axis=-1) / 3000, 0, 1), {}))
    for step in (BEFORE, EVENT) if "S1RTC" in arrays else ():
        image = arrays["S1RTC"][step, 0].astype(np.float32)
        panels.append((f"VV {TIMESTEPS[step]}, dB", image, {"cmap": "gray", "vmin": -25, "vmax": 0}))
    if "MASK" in arrays:
        panels.append(("mask", arrays["MASK"], {"cmap": "viridis", "vmin": -1, "vmax": 2}))
    if not panels:
        raise DataError(f"there is nothing to draw of chip {chip}", where=source.root, fix="--root, or another chip id")
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


def check_chip(source: Chips, chip: str) -> tuple[list[Finding], Facts, float]:
    """What is wrong with a chip, its facts, and the first percentile of its optical band B11 (inf where it has none).

    Nothing is raised for a chip that is wrong.
    """
    arrays, attributes, grids, found = _read_chip(source, chip)
    more = list(_check_dates(attributes))
    if len(grids) == 2 and grids[0] != grids[1]:
        more.append(("error", "DEM and MASK on different grids", ""))
    band = arrays["S2L2A"][:, S2_BANDS.index("B11")] if "S2L2A" in arrays else np.empty(0)
    dark = float(np.percentile(band[band != NO_DATA], 1)) if (band != NO_DATA).any() else np.inf
    if "S1RTC" in arrays:
        if faults := radar_faults(arrays["S1RTC"]):
            more.append(("error" if "infinite" in faults else "warning", "radar values that become inputs", faults))
        seen = arrays["S1RTC"][_valid(arrays["S1RTC"])].astype(np.float64)
        if seen.size >= _FEW and (seen < 0).mean() < 0.5:
            more.append(("error", "radar is linear, not in dB", f"mean {seen.mean():.3g}"))
    if "MASK" in arrays:
        known = {IGNORE_INDEX, *range(len(source.protocol.label_map))}
        if strange := sorted(set(np.unique(arrays["MASK"]).tolist()) - known):
            hint = "; 255 is often -1 saved as uint8" if 255 in strange else ""
            more.append(("error", "mask values", f"{strange}, expected {sorted(known)}{hint}"))
    return found + [(*finding, chip) for finding in more], _measure(arrays, source.protocol), dark


def _group(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One entry for each severity and kind, errors first, with a count and three examples."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for severity, kind, what, chip in findings:
        groups[severity, kind].append(": ".join(text for text in (chip, what) if text))
    entries = []
    for (severity, kind), texts in sorted(groups.items()):
        message = "; ".join(texts[:_EXAMPLES]) + ("; …" if len(texts) > _EXAMPLES else "")
        entries.append({"severity": severity, "check": kind, "count": len(texts), "message": message})
    return entries


def _read_chip(
    source: Chips, chip: str
) -> tuple[dict[str, Array], dict[str, dict[str, Any]], list[Any], list[Finding]]:
    """Arrays of a chip of the right dtype and shape, attributes, grids of its rasters, and what is wrong with it."""
    arrays: dict[str, Array] = {}
    attributes: dict[str, dict[str, Any]] = {}
    grids: list[Any] = []
    found: list[Finding] = []
    for part in [part for part in PARTS if chip in source.having(part)]:
        try:
            if part in _SATELLITES:
                arrays[part] = source.bands(chip, part)
                attributes[part], masks = source.extras(chip, part, "SCL", "cloud_mask")
                arrays |= masks
            else:
                arrays[part] = source.raster(chip, part)
                grids.append(source.grid(chip, part))
        except DataError as error:
            found.append(("error", f"{part} is damaged", error.what, chip))
    edges = Counter(array.shape[-2:] for array in arrays.values()).most_common(1)
    for name, array in list(arrays.items()):
        axes, dtypes = _LAYOUT[name]
        shape, severity = axes + edges[0][0], "error" if name in PARTS else "warning"
        if array.dtype.name not in dtypes:
            found.append((severity, f"{name}: dtype", f"{array.dtype}, expected {' or '.join(dtypes)}", chip))
        elif array.shape != shape or not array.size:
            found.append((severity, f"{name}: shape", f"{array.shape}, expected {shape}", chip))
        else:
            continue
        del arrays[name]
    return arrays, attributes, grids, found


def _read_lists(
    root: Path, splits: Sequence[str] | None, limit: int | None, fraction: float | None
) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Chips and events by split, train, val and test first, and what is wrong with the split files."""
    files = split_files(root / "split")
    names = sorted(splits or files, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
    if strange := set(names) - set(files) or ({"any split"} if not files else set()):
        fix = f"--split {','.join(files)}" if files else "floodrepro data fetch"
        raise DataError(f"there is no split file of {', '.join(sorted(strange))}", where=root / "split", fix=fix)
    listed, findings = {}, []
    for name in names:
        try:
            listed[name] = choose_chips(read_events(files[name]), limit=limit, fraction=fraction)
        except DataError as error:
            findings.append(("error", "split file", f"{files[name].name}: {error.what}", ""))
    return listed, findings


def _check_dates(attributes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    times: dict[str, Array] = {}
    for part, held in attributes.items():
        text = str(held.get("datetime", ""))
        try:
            dates = [date.strip().rstrip("Z").split("+")[0] or "NaT" for date in text.split(";")]
            times[part] = np.array(dates, "datetime64[s]")
        except ValueError:
            times[part] = np.array(["NaT"], "datetime64[s]")
        known = times[part][~np.isnat(times[part])]
        if {len(times[part]), len(known)} != {len(TIMESTEPS)}:
            yield "warning", f"{part}: a date is missing", text
        if len(set(known.tolist())) < len(known):
            yield "warning", f"{part}: a date is there twice", text
        elif (np.diff(known) < np.timedelta64(0)).any():
            yield "warning", f"{part}: dates out of order", text
    if [len(found) for found in times.values()] == [len(TIMESTEPS)] * len(_SATELLITES):
        days = abs(times["S1RTC"][EVENT] - times["S2L2A"][EVENT]) / np.timedelta64(1, "D")
        if days > _DAYS:
            yield "warning", f"radar and optical event more than {_DAYS} days apart", f"{days:.0f} days"
    texts = [str(attributes.get("S1RTC", {}).get(key, "")) for key in ("sat_orbit_state", "sat_relative_orbit")]
    orbits = [[orbit.strip() for orbit in text.split(";")] for text in texts]
    if any(len(four) == len(TIMESTEPS) and four[BEFORE] != four[EVENT] for four in orbits):
        yield "warning", "radar orbit changed between before and event", ", ".join(texts)


def _valid(values: Array) -> Array:
    return np.isfinite(values) & (values > NO_DATA)


def _pair(values: Array, among: Array | None = None) -> Array:
    """The sum of some pixels (T, H, W) and their number, for each timestep (2, T); of a single one, for all."""
    number = np.ones_like(values, bool) if among is None else among
    pair = np.stack([values.sum(axis=(1, 2)), number.sum(axis=(1, 2))]).astype(np.float64)
    return np.broadcast_to(pair, (2, len(TIMESTEPS)))


def _measure(arrays: Mapping[str, Array], protocol: protocols.Protocol) -> Facts:
    """What a chip holds, by modality and by column of the figures; `_change_VALUE` is of VV where the mask is VALUE."""
    facts = {"chips": np.ones((2, len(TIMESTEPS)))}
    classes = range(len(protocol.label_map))
    for part in [part for part in _BANDS if part in arrays]:
        values = arrays[part] if part in _SATELLITES else np.stack([arrays[part][None]] * len(TIMESTEPS))
        valid = _valid(values)
        kept = np.where(valid, values, 0).astype(np.float64)
        facts[part] = np.stack([layer.sum(axis=(2, 3)) for layer in (kept, valid, kept**2)])
        if part in _SATELLITES:
            facts["no_optical" if part == "S2L2A" else "no_radar"] = _pair(np.logical_not(valid.all(axis=1)))
        if part == "S1RTC" and "MASK" in arrays:
            for value in classes:
                chosen = (valid[BEFORE, 0] & valid[EVENT, 0] & (arrays["MASK"] == value))[None]
                facts[f"_change_{value}"] = _pair((kept[EVENT, 0] - kept[BEFORE, 0]) * chosen, chosen)
    if "SCL" in arrays:
        facts["cloud"] = _pair(np.isin(arrays["SCL"], _CLOUDY))
    if "MASK" in arrays:
        facts |= {f"share_of_mask_{value}": _pair(arrays["MASK"][None] == value) for value in (IGNORE_INDEX, *classes)}
    return facts


def _add_up(groups: Iterable[Facts]) -> Facts:
    """The facts of several groups of pixels together."""
    added: Facts = {}
    for name, sums in [fact for facts in groups for fact in facts.items()]:
        added[name] = added[name] + sums if name in added else sums
    return added


def _statistics(facts: Facts) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of the valid pixels, by modality and band."""
    found = {}
    for part in [part for part in _BANDS if part in facts]:
        total, count, squares = facts[part].sum(axis=1)
        if count.all():
            std = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))
            found[part] = {"mean": (total / count).round(3).tolist(), "std": std.round(3).tolist()}
    return found


def _compare_events(facts: Facts, darkest: Mapping[str, float], protocol: protocols.Protocol) -> list[Finding]:
    """What only many chips together show: classes swapped, and an offset between the optical images of events."""
    findings: list[Finding] = []
    names = {value: f"_change_{value}" for value in range(len(protocol.label_map))}
    changes = {value: facts[name].sum(axis=1) for value, name in names.items() if name in facts}
    falls = {value: total / count for value, (total, count) in changes.items() if count >= _FEW * len(TIMESTEPS)}
    struck = protocol.label_map.index(protocol.positive_class)
    if protocol.hazard.startswith("flood") and struck in falls and len(falls) > 1 and falls[struck] > -_FALL:
        lowest = min(falls, key=lambda value: falls[value])
        swapped = f"; it falls most where the mask is {lowest}: are classes swapped?" if lowest != struck else ""
        text = f"VV changes by {falls[struck]:+.2f} dB from before to event where the mask says flood{swapped}"
        findings.append(("error" if swapped else "warning", "no flood signature", text, ""))
    lifted = sorted(event for event, value in darkest.items() if _OFFSET < value < np.inf)
    if 0 < len(lifted) < len(darkest):
        text = f"{', '.join(lifted[:_EXAMPLES])}: darkest B11 above {_OFFSET}, in other events below"
        findings.append(("warning", "optical offset of 1000 in some events", text, ""))
    return findings


def _figures(totals: Mapping[tuple[str, str], Facts]) -> pa.Table:
    """A row for each split, event and timestep: means over its pixels, none where there are none."""
    rows = []
    for (split, event), facts in sorted(totals.items()):
        for step, timestep in enumerate(TIMESTEPS):
            sums = {name: pair[:, step] for name, pair in facts.items() if not name.startswith("_")}
            for part in [part for part in _BANDS if part in sums]:
                means = zip(_BANDS[part], sums.pop(part)[:2].T, strict=True)
                sums |= {f"mean_{band}": pair for band, pair in means}
            row = {"split": split, "event": event, "timestep": timestep, "chips": int(sums.pop("chips")[0])}
            rows.append(row | {name: total / count if count else None for name, (total, count) in sums.items()})
    return pa.table({name: [row.get(name) for row in rows] for name in {name: None for row in rows for name in row}})
