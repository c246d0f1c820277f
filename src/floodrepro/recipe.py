"""Recipes: where they are found, how a YAML is read, what identifies one. Cheap: nothing here imports torch."""

import contextlib
import datetime
import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from floodrepro.errors import UsageError

Recipe = dict[str, Any]

# The sections of a TerraTorch YAML: an override begins with one of them.
SECTIONS = (
    *("seed_everything", "trainer", "data", "model", "optimizer", "lr_scheduler", "predict_output_dir"),
    *("output_file_prefix", "out_dtype", "deploy_config_file", "custom_modules_path"),
)

# Lightning's names for what --precision chooses.
PRECISIONS = {"fp16": "16-mixed", "bf16": "bf16-mixed", "fp32": "32-true"}


def shipped() -> dict[str, Path]:
    """The recipes that come with floodrepro, by name."""
    packaged = Path(__file__).parent / "configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"  # a checkout: not yet in a wheel
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """Find a recipe by its path, or by the name of a shipped one; raises `UsageError` where there is neither."""
    path, known = Path(name_or_path), shipped()
    if path.is_file():
        return path
    if name_or_path in known:
        return known[name_or_path]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    fix = f"did you mean '{close[0]}'?" if close else "give a path, or a name that 'floodrepro configs ls' lists"
    raise UsageError("config file not found", where=name_or_path, fix=fix)


def read_yaml(path: Path) -> Recipe:
    """Read a YAML; raises `UsageError` where it cannot be read, or it or one of its sections is no mapping."""
    try:
        content: Recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if next(itertools.islice(leaves(content), 10**5, None), None):  # anchors of anchors
            raise ValueError("it holds more than 100,000 values")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no such date
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise UsageError(f"the YAML cannot be read: {getattr(error, 'problem', error)}", where=place) from error
    # What every command may look into before TerraTorch's parser has seen it, outer ones first.
    for key in ("", "trainer", "data", "data.init_args", "model", "model.init_args", "model.init_args.model_args"):
        value: Any = content
        for part in key.split(".") if key else ():
            value = (value or {}).get(part)
        if not isinstance(value, dict) and (value is not None or not key):
            what = f"{key or 'the YAML'} is no mapping of keys to values"
            raise UsageError(what, where=path, fix="see 'floodrepro configs show'")
    return content


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML text, keys in the order in which they were given."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def fold(layers: Sequence[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Merge layers, later ones winning, and overrides, as `pairs` reads them. Types are left to TerraTorch's parser."""
    changes = [*layers]
    for key, value in pairs(overrides):
        for part in reversed(key.split(".")):
            value = {part: value}
        changes.append(value)
    return functools.reduce(_merge, changes, {})


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Key and value, as YAML reads it, of each override: ``--trainer.max_epochs=3``, or flag and value apart."""
    words = iter(overrides)
    for word in words:
        key, given, text = word.removeprefix("--").partition("=")
        value: Any = text if given else next(words, "")
        with contextlib.suppress(yaml.YAMLError, ValueError):
            read = yaml.safe_load(value)
            value = value if isinstance(read, datetime.date) else read
            value = float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-4 as text
        yield key, value


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of a recipe's content: order of keys, comments and layout of the YAML do not count."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Where two nested contents differ: by the key's path, the value in each; None where it is not there."""
    old, new = dict(leaves(before)), dict(leaves(now))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return {key: (old.get(key), new.get(key)) for key in changed}


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of nested mappings and lists, after the dotted path of its key; a list of such is one value."""
    if isinstance(node, Mapping) and node:
        items: list[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list) and any(isinstance(item, Mapping | list) for item in node):
        items = list(enumerate(node))
    else:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


# Where a run takes place: what may differ between the parts of one run, and between two runs of one recipe.
PLACE = re.compile(
    r"trainer\.(default_root_dir|accelerator|devices|num_nodes|strategy|enable_\w+|logger.*)"
    r"|data\.init_args\.(\w*(root|dir|path|split)(\..+)?|num_workers|prefetch_factor|pin_memory|persistent_workers"
    r"|strict|skip_damaged)"
)


def data_overrides(root: Path, *given: Recipe) -> list[str]:
    """Overrides that point recipes at a folder with ``data`` (or tars) and ``split``; split files keep their names."""
    data: dict[str, Any] = (fold(given).get("data") or {}).get("init_args") or {}
    overrides = {"data_root": str(root / "data")}
    for key, value in data.items():
        if key.endswith("_split") and value:
            files = value if isinstance(value, dict) else {"": value}
            moved = {name: str(root / "split" / Path(file).name) for name, file in files.items()}
            overrides[key] = json.dumps(moved) if isinstance(value, dict) else moved[""]
    return [f"--data.init_args.{key}={value}" for key, value in overrides.items()]
