"""Is what a recipe will read there? A quick look before anything long starts; it reads names, never pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from floodrepro.data.names import LABEL_DIR, MODALITIES, SUFFIXES
from floodrepro.errors import DataError
from floodrepro.recipe import Recipe

_GET_DATA = "set --data-root, or make toy data: floodrepro data synth --root DIR"


def check_present(recipe: Recipe, splits: Sequence[str], *, labels: bool = True) -> dict[str, int]:
    """Check that every chip of the named splits has its files.

    impactmesh 0.1.2 finds a missing file only when its turn comes, hours into an epoch, and takes a blank line of a
    split file for a chip.

    Args:
        recipe: A resolved recipe whose data section names ``data_root`` and ``<split>_split`` files.
        splits: Any of train, val, test, predict.
        labels: Whether masks are needed too.

    Returns:
        Number of chips by split.

    Raises:
        DataError: The root, a split file or a chip's part is missing, or a split is empty.
    """
    arguments: Mapping[str, Any] = recipe["data"].get("init_args") or {}
    if "data_root" not in arguments:
        return {}  # another data module than ImpactMesh's: it knows its own files
    label_dir = arguments.get("label_dir", LABEL_DIR)
    suffixes = SUFFIXES | {label_dir: SUFFIXES[LABEL_DIR]} | (arguments.get("image_grep") or {})
    counts = {}
    for split in splits:
        root = Path((split == "predict" and arguments.get("predict_data_root")) or arguments["data_root"])
        if not root.is_dir():
            raise DataError("the data root does not exist", where=root, fix=_GET_DATA)
        if not any(root.iterdir()):
            raise DataError("the data root is empty", where=root, fix=_GET_DATA)
        if (file := arguments.get(f"{split}_split")) is None:
            continue  # impactmesh then takes every chip below the root
        chips = _read_split(Path(file), split)
        folders = [*(arguments.get("modalities") or MODALITIES), *([label_dir] if labels else [])]
        for folder in folders:
            _check_folder(root / folder, suffixes[folder].strip("*"), chips, Path(file))
        counts[split] = len(chips)
    return counts


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


def _check_folder(folder: Path, suffix: str, chips: Sequence[str], split_file: Path) -> None:
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [chip for chip in chips if f"{chip}{suffix}" not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(chips)} chips have no {folder.name} file, the first is {missing[0]}{suffix}",
            where=f"{folder} (chips named in {split_file})",
            fix="fetch or extract the missing files, or take the chips out of the split",
        )
