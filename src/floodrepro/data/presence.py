"""Is what a recipe will read there? A quick look before anything long starts; it reads names, never pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.data import names
from floodrepro.data.chips import ChipSource, open_source_loudly
from floodrepro.data.names import LABEL_DIR, MODALITIES, SPLITS, SUFFIXES, split_file
from floodrepro.data.survey import BOM, BOM_MEANS, OVERLAP, SEEN, QuickAudit, quick_audit
from floodrepro.errors import DataError
from floodrepro.recipe import Recipe

_GET_DATA = "set --data-root, or make toy data: floodrepro data synth --root DIR"


@dataclass(frozen=True)
class DataCheck:
    """What `check_data` found.

    Args:
        chips: Number of chips by split that was asked for; several test splits are counted by their names.
        digest: The data's digest (``data-manifest.json`` has the same); None for a recipe of no known protocol.
        warnings: What a run's record has to keep, as it bears on its scores: events in two of the published splits.
    """

    chips: dict[str, int]
    digest: str | None
    warnings: tuple[str, ...] = ()


def check_data(recipe: Recipe, splits: Sequence[str], *, labels: bool = True) -> DataCheck:
    """Check that every chip of the named splits has its parts, and that the recipe's splits do not overlap.

    impactmesh 0.1.2 finds a missing file only when its turn comes, hours into an epoch, and takes a blank line of a
    split file for a chip. What makes a figure mean something else (an event or a chip in two splits, an id out of
    pattern, a chip twice) is looked for over all splits that the recipe names, in names and sizes only.

    Args:
        recipe: A resolved recipe whose data section names ``data_root`` and ``<split>_split`` files.
        splits: Any of train, val, test, predict.
        labels: Whether masks are needed too.

    Raises:
        DataError: The chips, a split file or a chip's part are missing, a split is empty, or the splits are faulty.
    """
    arguments: Mapping[str, Any] = recipe["data"].get("init_args") or {}
    if "data_root" not in arguments:
        return DataCheck({}, None)  # another data module than ImpactMesh's: it knows its own files
    root = Path(arguments["data_root"])
    roots = {s: Path((s == "predict" and arguments.get("predict_data_root")) or root) for s in splits}
    sources = {place: open_source_loudly(place) for place in dict.fromkeys(roots.values())}
    counts: dict[str, int] = {}
    for split in splits:
        counts |= _count(arguments, split, sources[roots[split]], labels=labels)
    audit = _audit(recipe, sources[root]) if root in sources else None
    for source in sources.values():
        source.close()
    if audit is None:
        return DataCheck(counts, None)
    overlaps = (finding for finding in audit.findings if finding.check == OVERLAP)
    return DataCheck(counts, audit.digest, tuple(finding.message for finding in overlaps))


def _count(arguments: Mapping[str, Any], split: str, source: ChipSource, *, labels: bool) -> dict[str, int]:
    """Chips by name of the split's files; none of its own: impactmesh then takes every chip below the root."""
    parts = [*(arguments.get("modalities") or MODALITIES), *([LABEL_DIR] if labels else [])]
    counts = {}
    for name, file in _files(arguments, split).items():
        chips = _read_split(file, name)
        for part in parts:
            _check_part(source.parts(part), part, chips, f"{source.root} (chips named in {file})")
        counts[name] = len(chips)
    return counts


def _files(arguments: Mapping[str, Any], split: str) -> dict[str, Path]:
    given = arguments.get(f"{split}_split")
    named = given if isinstance(given, dict) else {split: given} if given else {}
    return {name: Path(file) for name, file in named.items()}


def protocol_of(recipe: Recipe) -> str | None:
    """The protocol that a recipe's label map belongs to; None where it is none of the three."""
    return names.protocol_of((recipe["data"].get("init_args") or {}).get("label_map"))


def _audit(recipe: Recipe, source: ChipSource) -> QuickAudit | None:
    arguments, protocol = recipe["data"]["init_args"], protocol_of(recipe)
    if protocol is None:
        return None
    files: dict[str, Path] = {}
    for split in SPLITS:
        for name, file in _files(arguments, split).items():
            files[name if name in SPLITS else f"{split}_{name}"] = file
    if "test" in files:  # the list that says which of the test's events were seen in training, on purpose
        files.setdefault(SEEN, files["test"].with_name(split_file(SEEN)))
    files = {name: file for name, file in files.items() if file.is_file()}  # a test split may not have been fetched
    audit = quick_audit(Path(arguments["data_root"]), protocol, split_files=files, source=source)
    for finding in audit.findings:
        if finding.severity == "warning" and finding.check != "unlisted":
            console.warn(finding.message)
    errors = [finding for finding in audit.errors if finding.check != "missing-part"]
    replace(audit, findings=tuple(errors)).raise_for_errors(arguments["data_root"])
    return audit


def _read_split(file: Path, split: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {split} split cannot be read: {error}", where=file, fix=_GET_DATA) from error
    if lines and lines[0].startswith(BOM):
        raise DataError(f"the {split} split: {BOM_MEANS}", where=file, fix="save it as UTF-8 without one")
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise DataError(
            f"the {split} split has {len(blank)} blank lines, the first is line {blank[0]}",
            where=file,
            fix="remove them: impactmesh takes a blank line for a chip",
        )
    if not lines:
        raise DataError(f"the {split} split is empty", where=file, fix=_GET_DATA)
    return [line.strip() for line in lines]


def _check_part(present: frozenset[str], part: str, chips: Sequence[str], where: str) -> None:
    missing = [chip for chip in chips if chip not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(chips)} chips have no {part} file, the first is {missing[0]}{SUFFIXES[part]}",
            where=where,
            fix="fetch or extract the missing files, or take the chips out of the split",
        )
