"""The only reader of split files, and the look at a recipe's data before anything long starts."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import LABEL_DIR, MODALITIES, SPLITS
from floodrepro.data.weights import model_args
from floodrepro.errors import DataError, UsageError, name_three

FETCH_NOTE = "floodrepro-fetch.json"  # beside `split/`: repository, commit and what was asked for
SYNTH_NOTE = "floodrepro-synth.txt"  # there too, of generated chips: the command that makes them again


@dataclass(frozen=True)
class DataState:
    """What a run's record keeps about its data, in JSON types."""

    protocol: str  # its name
    chips: dict[str, int] = field(default_factory=dict)  # by split; several test splits by their names
    # By split, sha256 over chip ids and sizes of the files that the recipe reads: compare those that both sides have.
    digests: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # what may change the meaning of a score, one sentence each
    commit: str | None = None  # the hub's, that the data was fetched from; None where it is not known
    generated: str | None = None  # the command that generated the chips
    events: dict[str, int] = field(default_factory=dict)  # by split, of all splits that are there
    listed: dict[str, str] = field(default_factory=dict)  # sha256 over the chip ids of the same


def read_events(path: Path) -> dict[str, str]:
    """The chips of a split file and the event of each, in the file's order.

    A line holds a chip id, whose event is what stands before its first `_`, or `chip,event`. Blank lines, a first line
    `chip,event` and a byte order mark are passed over.

    Raises:
        DataError: The file cannot be read, names no chip, or names one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the split file cannot be read: {getattr(error, 'strerror', None) or error}"
        raise DataError(what, where=path, fix="set --data-root, or floodrepro data fetch") from error
    rows = [[cell.strip() for cell in f"{line},".split(",")] for line in lines if line.strip()]
    rows = rows[1:] if rows and [cell.lower() for cell in rows[0][:2]] == ["chip", "event"] else rows
    doubles = [chip for chip, count in Counter(row[0] for row in rows).items() if count > 1]
    if doubles or not rows:
        what = name_three("chips listed twice:", doubles) if doubles else "the split file names no chip"
        raise DataError(what, where=path, fix="list each chip once, one id a line")
    return {chip: event or protocols.event_of(chip) for chip, event, *_ in rows}


def split_files(folder: Path) -> dict[str, Path]:
    """The split files in a folder, by the name of the split that each lists."""
    return {file.stem.split("_", 2)[-1]: file for file in sorted(folder.glob("*.txt"))}


def read_splits(arguments: Mapping[str, Any], split: str) -> dict[str, dict[str, str]]:
    """The chips that a recipe reads of a split, and the event of each: by the split's name, or the names of several.

    Of the `init_args` of a data section, `<split>_split` is a path or, by name, several; `limit` and `fraction` keep a
    part of the chips (see `choose_chips`).

    Raises:
        UsageError: The recipe names no such split.
        DataError: A split file cannot be read.
    """
    key, given = f"data.init_args.{split}_split", arguments.get(f"{split}_split")
    if not given:
        raise UsageError(f"the recipe names no {split} split", where=key, fix=f"--{key} FILE")
    files: Mapping[str, str] = given if isinstance(given, Mapping) else {split: given}
    listed = {name: read_events(Path(file)) for name, file in files.items()}
    union = {chip: event for chips in listed.values() for chip, event in chips.items()}
    kept = choose_chips(union, limit=arguments.get("limit"), fraction=arguments.get("fraction"))
    chosen = {name: {c: e for c, e in chips.items() if c in kept} for name, chips in listed.items()}
    if empty := [name for name, chips in chosen.items() if not chips]:
        console.warn(f"limit and fraction leave no chip of {', '.join(empty)}")
    return {name: chips for name, chips in chosen.items() if chips}


def choose_chips(
    events: Mapping[str, str], *, limit: int | None = None, fraction: float | None = None
) -> dict[str, str]:
    """At most `limit` chips, or a fraction of them, and the event of each: whole events, but for the last one taken.

    Events and their chips are taken in the order of hashes, those with more chips than wanted last. All seeds of a
    recipe, and every checkpoint that is tested, see the same chips.

    Raises:
        UsageError: The limit or the fraction is out of range.
    """
    if (limit is not None and limit < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise UsageError("a part of the data needs a limit of at least 1 and a fraction above 0 and at most 1")
    wanted, sizes = min(limit or len(events), max(1, round((fraction or 1) * len(events)))), Counter(events.values())

    def turn(chip: str) -> tuple[bool, bytes, bytes]:
        event, other = (hashlib.sha256(name.encode()).digest() for name in (events[chip], chip))
        return sizes[events[chip]] > wanted, event, other

    chosen = set(sorted(events, key=turn)[:wanted]) if wanted < len(events) else events.keys()
    return {chip: event for chip, event in events.items() if chip in chosen}


def check_data(recipe: Mapping[str, Any], splits: Sequence[str]) -> DataState:
    """Check that every chip of the named splits has the files that a recipe reads; no pixel is read.

    impactmesh finds a missing file only when its turn comes, hours into an epoch. Masks are not needed for predict. A
    recipe with another data module than floodrepro's is not looked at.

    Raises:
        UsageError: The recipe names no such split, or its model has another number of classes than its protocol.
        DataError: Chips, a split file or a chip's part are missing, a chip is in two splits, or, where the recipe is
            `strict`, an event is.
    """
    protocol, arguments = protocols.protocol_of(recipe), protocols.data_arguments(recipe)
    if not protocols.uses_flood_data_module(recipe):
        return DataState(protocol.name)
    count = model_args(dict(recipe)).get("num_classes")
    if count not in (None, len(protocol.class_names)):
        what = f"the model has {count} classes, protocol {protocol.name} {len(protocol.class_names)}"
        raise UsageError(what, where="model.init_args.model_args.num_classes", fix="change one of the two")
    root = Path(arguments["data_root"])
    there: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        with suppress(UsageError, DataError):  # one that is not looked at here may not be named, or not fetched yet
            found = read_splits(arguments, split)
            there |= {name if name == split else f"{split}/{name}": chips for name, chips in found.items()}
    events = {name: len(set(chips.values())) for name, chips in there.items()}
    ids = {name: hashlib.sha256("\n".join(sorted(chips)).encode()).hexdigest() for name, chips in there.items()}
    made = _read_note(root, SYNTH_NOTE)
    state = DataState(protocol.name, commit=read_commit(root), generated=made, events=events, listed=ids)
    for split in splits:
        source = Chips(Path((split == "predict" and arguments.get("predict_data_root")) or root), protocol)
        parts = [*(arguments.get("modalities") or MODALITIES), *([LABEL_DIR] if split != "predict" else [])]
        for name, chips in read_splits(arguments, split).items():
            for part in parts:
                if lacking := [chip for chip in chips if chip not in source.having(part)]:
                    what = f"{len(lacking)} of {len(chips)} chips of {name} have no {part} file"
                    fix = "fetch or extract the missing files, or take the chips out of the split"
                    raise DataError(name_three(f"{what}:", lacking), where=source.root, fix=fix)
            state.chips[name] = len(chips)
            state.digests[name] = digest_of(source, list(chips), parts)
    state.warnings.extend(shared_events(there, splits))
    for warning in state.warnings:
        console.warn(warning)
    if state.warnings and arguments.get("strict"):
        raise DataError(state.warnings[0], where=root, fix="keep each event in one split, or leave --strict out")
    return state


def digest_of(source: Chips, chips: Sequence[str], parts: Sequence[str]) -> str:
    """Sha256 over the sorted chip ids of a split and the size in bytes of each chip's parts."""
    keys = [(chip, part) for chip in sorted(chips) for part in sorted(parts)]
    with ThreadPoolExecutor(16) as pool:  # a network disk takes about a millisecond for each of 320,000 files
        sizes = pool.map(lambda key: source.size(*key), keys, chunksize=64)
        lines = [f"{chip} {part} {size}\n" for (chip, part), size in zip(keys, sizes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def shared_events(splits: Mapping[str, Mapping[str, str]], asked: Sequence[str]) -> list[str]:
    """One sentence for each pair of splits that share events, as published splits do, and one of which is asked for.

    Splits are given as chips and their events. Names as `test/holdout` are of one split: its parts may share chips.

    Raises:
        DataError: A chip is in two splits.
    """
    sentences = []
    for (one, chips), (other, others) in combinations(splits.items(), 2):
        kinds = {one.split("/")[0], other.split("/")[0]}
        if len(kinds) == 1 or not kinds & set(asked):
            continue
        if both := sorted(chips.keys() & others.keys()):
            what = name_three(f"the same chips are in {one} and in {other}:", both)
            raise DataError(what, where=f"{one}, {other}", fix="take the chips out of one of the splits")
        if events := sorted(set(chips.values()) & set(others.values())):
            sentences.append(name_three(f"events in {one} and in {other}: {len(events)},", events))
    return sentences


def read_commit(root: Path) -> str | None:
    """The hub's commit that `data fetch` noted beside the chips; None where there is no note, or a damaged one."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(_read_note(root, FETCH_NOTE) or "")["commit"])
    return None


def _read_note(root: Path, name: str) -> str | None:
    notes = [note for note in (root / name, root.parent / name) if note.is_file()]
    return notes[0].read_text(encoding="utf-8").strip() if notes else None


def data_in(root: Path) -> list[str]:
    """Those folders of a data set, `data`, `split` and one for each split, that are there."""
    return [name for name in ("data", "split", *SPLITS) if (root / name).exists()]
