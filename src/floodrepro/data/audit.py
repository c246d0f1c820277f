"""Check a data set: read every chip once, and say what is wrong, by kind; figures by split, event and timestep."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from floodrepro.data.chips import Array, Chips, radar_faults
from floodrepro.data.protocols import (
    BEFORE,
    EVENT,
    IGNORE_INDEX,
    LABEL_DIR,
    NO_DATA,
    PARTS,
    S1_BANDS,
    S2_BANDS,
    SPLITS,
    TIMESTEPS,
    Protocol,
)
from floodrepro.data.splits import choose_chips, digest_of, read_events, shared_events
from floodrepro.errors import DataError, UsageError
from floodrepro.run_folder import write_atomically

MANIFEST, FIGURES = "data-manifest.json", "data-audit.parquet"
SCHEMA = 2

Finding = tuple[str, str, str, str]  # severity, kind, what was found, chip

_BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("elevation",)}
_SHAPES = {"S2L2A": (4, 12), "S1RTC": (4, 2)}
_DTYPES = {
    "S2L2A": ("int16",),
    "S1RTC": ("float16", "float32"),
    "DEM": ("int16", "float32"),
    LABEL_DIR: ("int8", "uint8"),
}
_SHARES = ("cloud", "no_optical", "no_radar")
_CLOUDY = (8, 9, 10)  # Sen2Cor's scene classification: medium and high probability of cloud, thin cirrus
_DAYS = 5  # between the radar and the optical image of the event
_OFFSET = 900  # of 1000: what processing baseline 04.00 of Sentinel-2 adds to every pixel, from 2022-01-25 on
_FALL = 0.5  # dB that VV falls under flood, at least; on version 1 it falls by about 5
_FEW = 1000  # pixels that are too few for a mean
_EXAMPLES = 3


@dataclass
class ChipRow:
    """What one chip was found to hold; small, so that processes can hand it on.

    `classes` is the number of pixels by mask value; `sums` by modality what `_sums` returns; `shares` the share of
    pixels at each timestep (cloud, no_optical, no_radar); `change` by mask value the number of pixels seen before and
    at the event, and their sum of changes of VV in dB; `darkest` the first percentile of the optical band B11.
    """

    chip: str
    split: str
    event: str
    findings: list[Finding] = field(default_factory=list)
    classes: dict[int, int] = field(default_factory=dict)
    sums: dict[str, Array] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    change: dict[int, tuple[int, float]] = field(default_factory=dict)
    darkest: float = float("nan")

    def add(self, severity: str, kind: str, what: str = "") -> None:
        """Note what is wrong with the chip."""
        self.findings.append((severity, kind, what, self.chip))


def audit(
    root: Path,
    protocol: Protocol,
    *,
    splits: Sequence[str] | None = None,
    limit: int | None = None,
    fraction: float | None = None,
    jobs: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Read every chip of some splits once and write `data-manifest.json` and `data-audit.parquet` into the root.

    Args:
        root: Folder with `split/` and the chips.
        protocol: What the data should be.
        splits: Names as in the split files; all split files where None.
        limit: Number of chips of each split, at most.
        fraction: Share of the chips of each split.
        jobs: Processes; one for each core, up to 32, where None.
        strict: Whether an event in two splits is an error.
        progress: Called with the number of chips that were read, and of all.

    Returns:
        The manifest.

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
    rows: dict[str, ChipRow] = {}  # a chip of several test lists is read once
    for split, chips in listed.items():
        for chip, event in chips.items():
            if missing := [part for part in PARTS if chip not in source.having(part)]:
                findings.append(("error", f"no {', '.join(missing)}", "", chip))
            else:
                rows.setdefault(chip, ChipRow(chip, split, event))
    unread = sorted(rows.values(), key=lambda row: source.order(row.chip, PARTS[0]))  # as they lie on disk
    for done, row in enumerate(_read_all(source, unread, jobs or min(len(os.sched_getaffinity(0)), 32)), start=1):
        rows[row.chip] = row
        findings += row.findings
        progress(done, len(rows))
    findings += _compare_rows(list(rows.values()), protocol)
    bands = {split: _statistics([rows[chip] for chip in chips if chip in rows]) for split, chips in listed.items()}
    manifest = {
        "schema": SCHEMA,
        "protocol": protocol.name,
        "deep": True,
        "splits": {split: {"chips": len(c), "events": len(set(c.values()))} for split, c in listed.items()},
        "digests": {
            split: digest_of(source, [c for c in chips if c in rows], PARTS) for split, chips in listed.items()
        },
        "findings": group_findings(findings),
        "bands": bands,
    }
    try:
        write_atomically(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        if rows:
            _write_figures(root / FIGURES, list(rows.values()))
    except OSError as error:
        raise DataError(f"the audit cannot be written: {error}", where=root, fix="check the disk") from error
    return manifest


def group_findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One entry for each severity and kind, errors first, with a count and three examples."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for severity, kind, what, chip in findings:
        groups[severity, kind].append(": ".join(text for text in (chip, what) if text))
    return [
        {
            "severity": severity,
            "check": kind,
            "count": len(texts),
            "message": "; ".join(texts[:_EXAMPLES]) + ("; …" if len(texts) > _EXAMPLES else ""),
        }
        for (severity, kind), texts in sorted(groups.items())
    ]


def check_chip(source: Chips, row: ChipRow) -> ChipRow:
    """Read all parts of a chip and fill its row; nothing is raised for a chip that is wrong."""
    arrays: dict[str, Array] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        try:
            if part in _SHAPES:
                arrays[part] = source.bands(row.chip, part)
                attributes[part], masks = source.extras(row.chip, part, "SCL")
                arrays |= masks
            else:
                arrays[part] = source.raster(row.chip, part)
        except DataError as error:
            row.add("error", f"{part} is damaged", error.what)
    edge = arrays.get(LABEL_DIR, arrays.get("DEM", np.empty((0, 0)))).shape
    for part in [part for part in PARTS if part in arrays]:
        wanted = (*_SHAPES.get(part, ()), *edge)
        if arrays[part].dtype.name not in _DTYPES[part]:
            row.add("error", f"{part}: dtype", str(arrays[part].dtype))
        if arrays[part].shape != wanted:
            row.add("error", f"{part}: shape", f"{arrays.pop(part).shape}, expected {wanted}")
    if "DEM" in arrays and LABEL_DIR in arrays and source.grid(row.chip, "DEM") != source.grid(row.chip, LABEL_DIR):
        row.add("error", "DEM and MASK on different grids")
    _check_dates(row, attributes)
    if "S2L2A" in arrays:
        _measure_optical(row, arrays["S2L2A"], arrays.get("SCL"))
    if "S1RTC" in arrays:
        _measure_radar(row, arrays["S1RTC"], arrays.get(LABEL_DIR))
    if "DEM" in arrays:
        row.sums["DEM"] = _sums(arrays["DEM"][None, None], arrays["DEM"][None, None] != NO_DATA)
    if LABEL_DIR in arrays:
        values, counts = np.unique(arrays[LABEL_DIR], return_counts=True)
        row.classes = dict(zip(values.tolist(), counts.tolist(), strict=True))
        known = {IGNORE_INDEX, *range(len(source.protocol.label_map))}
        if strange := sorted(set(row.classes) - known):
            hint = "; 255 is often -1 saved as uint8" if 255 in strange else ""
            row.add("error", "mask values", f"{strange}, expected {sorted(known)}{hint}")
    return row


def _read_all(source: Chips, rows: Sequence[ChipRow], jobs: int) -> Iterator[ChipRow]:
    """The rows of all chips, filled, in their order. A process is given the places of a few chips at a time."""
    few = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    packs = [(source.only([row.chip for row in pack]), pack) for pack in few]
    if jobs == 1 or len(packs) < 2:
        for pack in packs:
            yield from _check_pack(pack)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # a fork would copy locks of threads
        for filled in pool.map(_check_pack, packs):
            yield from filled


def _check_pack(pack: tuple[Chips, Sequence[ChipRow]]) -> list[ChipRow]:
    source, rows = pack
    return [check_chip(source, row) for row in rows]


def _read_lists(
    root: Path, splits: Sequence[str] | None, limit: int | None, fraction: float | None
) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Chips and events by split, train, val and test first, and what is wrong with the split files."""
    folder = root / "split"
    files = {file.stem.split("_", 2)[-1]: file for file in sorted(folder.glob("*.txt"))}
    names = sorted(splits or files, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
    if not names or (strange := [name for name in names if name not in files]):
        what = f"there is no split file of {strange[0]}" if names else "there are no split files"
        raise DataError(what, where=folder, fix=f"--split {','.join(files)}" if files else "floodrepro data fetch")
    listed, findings = {}, []
    for name in names:
        try:
            listed[name] = choose_chips(read_events(files[name]), limit=limit, fraction=fraction)
        except DataError as error:
            findings.append(("error", "split file", f"{files[name].name}: {error.what}", ""))
    return listed, findings


def _check_dates(row: ChipRow, attributes: dict[str, dict[str, Any]]) -> None:
    times: dict[str, Array] = {}
    for part, held in attributes.items():
        text = str(held.get("datetime", ""))
        try:
            dates = [date.strip().rstrip("Z").split("+")[0] or "NaT" for date in text.split(";")]
            times[part] = np.array(dates, "datetime64[s]")
        except ValueError:
            times[part] = np.array(["NaT"], "datetime64[s]")
        known = times[part][~np.isnat(times[part])]
        if len(times[part]) != len(TIMESTEPS) or len(known) < len(TIMESTEPS):
            row.add("warning", f"{part}: a date is missing", text)
        if len(set(known.tolist())) < len(known):
            row.add("warning", f"{part}: a date is there twice", text)
        elif (np.diff(known) < np.timedelta64(0)).any():
            row.add("warning", f"{part}: dates out of order", text)
    if [len(found) for found in times.values()] == [len(TIMESTEPS)] * len(_SHAPES):
        days = abs(times["S1RTC"][EVENT] - times["S2L2A"][EVENT]) / np.timedelta64(1, "D")
        if days > _DAYS:
            row.add("warning", f"radar and optical event more than {_DAYS} days apart", f"{days:.0f} days")
    for key in ("sat_orbit_state", "sat_relative_orbit"):
        orbits = str(attributes.get("S1RTC", {}).get(key, "")).split(";")
        if len(orbits) == len(TIMESTEPS) and orbits[BEFORE].strip() != orbits[EVENT].strip():
            row.add("warning", "radar orbit changed between before and event", ";".join(orbits))
            break


def _measure_optical(row: ChipRow, bands: Array, scl: Array | None) -> None:
    valid = bands != NO_DATA
    row.sums["S2L2A"] = _sums(bands, valid)
    row.shares["no_optical"] = (1 - valid.all(axis=1).mean(axis=(1, 2))).tolist()
    if scl is not None and scl.shape == (len(bands), *bands.shape[2:]):
        row.shares["cloud"] = np.isin(scl, _CLOUDY).mean(axis=(1, 2)).tolist()
    dark = S2_BANDS.index("B11")
    if (seen := bands[:, dark][valid[:, dark]]).size:
        row.darkest = float(np.percentile(seen, 1))


def _measure_radar(row: ChipRow, bands: Array, mask: Array | None) -> None:
    if faults := radar_faults(bands):
        row.add("error" if "infinite" in faults else "warning", "radar values that become inputs", faults)
    valid = np.isfinite(bands) & (bands > NO_DATA)
    decibels = np.where(valid, bands, 0).astype(np.float64)
    row.sums["S1RTC"] = _sums(decibels, valid)
    row.shares["no_radar"] = (1 - valid.all(axis=1).mean(axis=(1, 2))).tolist()
    seen = decibels[valid]
    if seen.size >= _FEW and (seen < 0).mean() < 0.5:
        row.add("error", "radar is linear, not in dB", f"mean {seen.mean():.3g}")
    if mask is not None and mask.shape == bands.shape[2:]:
        both = valid[BEFORE, 0] & valid[EVENT, 0]
        fall = decibels[EVENT, 0] - decibels[BEFORE, 0]
        for value in np.unique(mask).tolist():
            chosen = both & (mask == value)
            row.change[value] = (int(chosen.sum()), float(fall[chosen].sum()))


def _sums(values: Array, valid: Array) -> Array:
    """Number, sum and sum of squares over the pixels of each timestep and band: (3, T, C) from (T, C, H, W)."""
    kept = np.where(valid, values, 0).astype(np.float64)
    return np.stack([valid.sum(axis=(2, 3)), kept.sum(axis=(2, 3)), (kept**2).sum(axis=(2, 3))])


def _statistics(rows: Sequence[ChipRow]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of each band over the valid values of some chips, by modality."""
    found = {}
    for modality in _BANDS:
        sums = [row.sums[modality].sum(axis=1) for row in rows if modality in row.sums]
        if sums:
            count, total, squares = np.sum(sums, axis=0)
            mean = total / np.maximum(count, 1)
            std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0))
            found[modality] = {"mean": mean.round(3).tolist(), "std": std.round(3).tolist()}
    return found


def _compare_rows(rows: Sequence[ChipRow], protocol: Protocol) -> list[Finding]:
    """What only many chips together show: classes swapped, and an offset between the optical images of events."""
    findings: list[Finding] = []
    falls = {}  # of VV, in dB, by mask value
    for value in range(len(protocol.label_map)):
        pixels, total = np.sum([row.change.get(value, (0, 0.0)) for row in rows] or [(0, 0.0)], axis=0)
        if pixels >= _FEW:
            falls[value] = total / pixels
    struck = protocol.label_map.index(protocol.positive_class) if protocol.label_map else 0
    if protocol.hazard.startswith("flood") and struck in falls and len(falls) > 1 and falls[struck] > -_FALL:
        lowest = min(falls, key=lambda value: falls[value])
        swapped = f"; it falls most where the mask is {lowest}: are classes swapped?" if lowest != struck else ""
        text = f"VV changes by {falls[struck]:+.2f} dB from before to event where the mask says flood{swapped}"
        findings.append(("error" if swapped else "warning", "no flood signature", text, ""))
    darkest: dict[str, float] = {}
    for row in rows:
        darkest[row.event] = min(darkest.get(row.event, np.inf), row.darkest)
    lifted = sorted(event for event, value in darkest.items() if value > _OFFSET)
    if 0 < len(lifted) < len(darkest):
        text = f"{', '.join(lifted[:_EXAMPLES])}: darkest B11 above {_OFFSET}, in other events below"
        findings.append(("warning", "optical offset of 1000 in some events", text, ""))
    return findings


def _write_figures(path: Path, rows: Sequence[ChipRow]) -> None:
    """A Parquet table with a row for each split, event and timestep: means over its chips."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = ["split", "event", "timestep"]
    lines = []
    for row in rows:
        pixels = max(sum(row.classes.values()), 1)
        for step, name in enumerate(TIMESTEPS):
            line: dict[str, Any] = {"split": row.split, "event": row.event, "timestep": name}
            line |= {share: row.shares[share][step] if share in row.shares else None for share in _SHARES}
            for modality in _SHAPES:
                sums = row.sums.get(modality)
                for place, band in enumerate(_BANDS[modality]):
                    count, total, _ = (0, 0, 0) if sums is None else sums[:, step, place]
                    line[f"mean_{band}"] = total / count if count else None
            line |= {f"share_of_mask_{value}": row.classes.get(value, 0) / pixels for value in range(-1, 3)}
            lines.append(line)
    names = [name for name in lines[0] if name not in keys]
    table = pa.Table.from_pylist(lines).group_by(keys).aggregate([([], "count_all"), *((n, "mean") for n in names)])
    pq.write_table(table.rename_columns([*keys, "chips", *names]).sort_by([(key, "ascending") for key in keys]), path)
