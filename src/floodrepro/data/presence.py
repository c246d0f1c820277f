"""Is what a recipe will read there? A quick look before anything long starts; it reads names, never pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.data.chips import open_source_loudly
from floodrepro.data.names import LABEL_DIR, MODALITIES, SPLITS, SUFFIXES, split_file
from floodrepro.data.survey import SEEN, quick_audit
from floodrepro.errors import DataError
from floodrepro.recipe import Recipe

_LABEL_MAPS = {"v0": [0, 1], "v1-binary": [0, 0, 1], "v1": [0, 1, 2]}
_GET_DATA = "set --data-root, or make toy data: floodrepro data synth --root DIR"


def check_present(recipe: Recipe, splits: Sequence[str], *, labels: bool = True) -> dict[str, int]:
    """Check that every chip of the named splits has its parts.

    impactmesh 0.1.2 finds a missing file only when its turn comes, hours into an epoch, and takes a blank line of a
    split file for a chip.

    Args:
        recipe: A resolved recipe whose data section names ``data_root`` and ``<split>_split`` files.
        splits: Any of train, val, test, predict.
        labels: Whether masks are needed too.

    Returns:
        Number of chips by split; several test splits are counted by their names.

    Raises:
        DataError: The chips, a split file or a chip's part are missing, or a split is empty.
    """
    arguments: Mapping[str, Any] = recipe["data"].get("init_args") or {}
    if "data_root" not in arguments:
        return {}  # another data module than ImpactMesh's: it knows its own files
    parts = [*(arguments.get("modalities") or MODALITIES), *([LABEL_DIR] if labels else [])]
    counts = {}
    for split in splits:
        root = Path((split == "predict" and arguments.get("predict_data_root")) or arguments["data_root"])
        source = open_source_loudly(root)
        files = arguments.get(f"{split}_split")
        named = files if isinstance(files, dict) else {split: files} if files else {}
        for name, file in named.items():  # none: impactmesh then takes every chip below the root
            chips = _read_split(Path(file), name)
            for part in parts:
                _check_part(source.parts(part), part, chips, f"{source.root} (chips named in {file})")
            counts[name] = len(chips)
        source.close()
    return counts


def protocol_of(recipe: Recipe) -> str | None:
    """The protocol that a recipe's label map belongs to; None where it is none of the three."""
    label_map = (recipe["data"].get("init_args") or {}).get("label_map")
    return next((name for name, labels in _LABEL_MAPS.items() if labels == label_map), None)


def audit_quickly(recipe: Recipe) -> str | None:
    """Look at names and sizes of all that a recipe's split files name, before anything long starts.

    What a single pass needs is `check_present`'s to say; this finds what makes a figure mean something else: an event
    or a chip in two splits, an id out of pattern, a chip twice.

    Returns:
        The data's digest (``data-manifest.json`` has the same); None for a recipe of none of the three protocols.

    Raises:
        DataError: There is such a fault.
    """
    arguments: Mapping[str, Any] = recipe["data"].get("init_args") or {}
    protocol = protocol_of(recipe)
    if protocol is None or "data_root" not in arguments:
        return None
    files: dict[str, Path] = {}
    for split in SPLITS:
        given = arguments.get(f"{split}_split")
        named = given if isinstance(given, dict) else {split: given} if given else {}
        for name, file in named.items():
            files[name if name in SPLITS else f"{split}_{name}"] = Path(file)
    if "test" in files:  # the list that says which of the test's events were seen in training, on purpose
        files.setdefault(SEEN, files["test"].with_name(split_file(SEEN)))
    files = {name: file for name, file in files.items() if file.is_file()}  # a test split may not have been fetched
    audit = quick_audit(Path(arguments["data_root"]), protocol, split_files=files)
    for finding in audit.findings:
        if finding.severity == "warning" and finding.check != "unlisted":
            console.warn(finding.message)
    errors = [finding for finding in audit.errors if finding.check != "missing-part"]
    replace(audit, findings=tuple(errors)).raise_for_errors(arguments["data_root"])
    return audit.digest


def _read_split(file: Path, split: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {split} split cannot be read: {error}", where=file, fix=_GET_DATA) from error
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
