"""Recipes: where they are found, how a YAML is read, what identifies one. Cheap: nothing here imports torch."""

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
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

# What every command may look into before TerraTorch's parser has seen it, outer ones first.
_MAPPINGS = ("trainer", "data", "data.init_args", "model", "model.init_args", "model.init_args.model_args")

# Lightning's names for what --precision chooses.
PRECISIONS = {"fp16": "16-mixed", "bf16": "bf16-mixed", "fp32": "32-true"}


def shipped() -> dict[str, Path]:
    """The recipes that come with floodrepro, by name."""
    packaged = Path(str(resources.files("floodrepro"))) / "configs"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"  # a checkout: not yet in a wheel
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """Find a recipe by its path, or by the name of a shipped one.

    Raises:
        UsageError: There is neither.
    """
    path, known = Path(name_or_path), shipped()
    if path.is_file():
        return path
    if name_or_path in known:
        return known[name_or_path]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    fix = f"did you mean '{close[0]}'?" if close else "give a path, or a name that 'floodrepro configs ls' lists"
    what = "is a folder, not a recipe" if path.is_dir() else "config file not found"
    raise UsageError(what, where=name_or_path, fix=fix)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would keep the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.composer.ComposerError(None, None, f"'{twice[0]}' stands there twice", node.start_mark)
        return node


def read_yaml(path: Path) -> Recipe:
    """Read a YAML and check that it parses.

    Raises:
        UsageError: The file cannot be read, or it or one of its sections is no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise UsageError(f"the YAML does not parse: {error.problem}", where=place) from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no such date
        raise UsageError(f"the config cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise UsageError("the YAML holds no mapping of keys to values", where=path, fix="see 'floodrepro configs show'")
    for key in _MAPPINGS:
        value: Any = content
        for part in key.split("."):
            value = (value or {}).get(part)
        if not isinstance(value, dict | None):
            raise UsageError(f"{key} is no mapping of keys to values", where=path, fix="see 'floodrepro configs show'")
    return content


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML text, keys in the order in which they were given."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def fold(layers: Sequence[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Merge layers, later ones winning, and command-line overrides. Types are not checked: TerraTorch's parser does.

    Args:
        layers: Contents of YAML files; they are not changed.
        overrides: Such as ``--trainer.max_epochs=3``, or flag and value apart.
    """
    changes = []
    words = iter(overrides)
    for word in words:
        key, given, text = word.removeprefix("--").partition("=")
        try:
            value = yaml.safe_load(text if given else next(words, ""))
        except yaml.YAMLError:
            continue  # the parser names it
        for part in reversed(key.split(".")):
            value = {part: value}
        changes.append(value)
    folded: Recipe = functools.reduce(_merge, [*layers, *changes], {})
    return folded


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return dict(old) | {key: _merge(old.get(key), value) for key, value in new.items()}


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of a recipe's content: order of keys, comments and layout of the YAML do not count."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Where two nested contents differ: by the key's path, the value in each; None where it is not there."""
    old, new = dict(leaves(before)), dict(leaves(now))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a nested content, with the dotted path of its key.

    Args:
        node: Mappings, lists and plain values. A list of plain values is one value.
        path: What the paths begin with.
    """
    if isinstance(node, Mapping) and node:
        items: list[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list) and any(isinstance(item, Mapping | list) for item in node):
        items = list(enumerate(node))
    else:
        yield path, node
        return
    for key, value in items:
        yield from leaves(value, f"{path}.{key}" if path else str(key))


# Where a run takes place, and its seed: what may differ between two runs of one recipe.
_PLACE = re.compile(
    r"seed_everything|trainer\.(default_root_dir|accelerator|devices|num_nodes|strategy|enable_\w+|logger.*)"
    r"|data\.init_args\.((\w+_)?data_root|\w+_split(\.\w+)?|num_workers|prefetch_factor|strict|skip_damaged)"
)


def beside_shipped(recipe: Recipe) -> tuple[str, list[str]]:
    """The shipped recipe nearest to a resolved one, and the keys in which they differ; place and seed do not count."""
    found = {
        name: [key for key in differences(read_yaml(path), recipe) if not _PLACE.fullmatch(key)]
        for name, path in shipped().items()
    }
    nearest = min(found, key=lambda name: len(found[name]))
    return nearest, found[nearest]


def data_overrides(root: Path, *given: Recipe) -> list[str]:
    """Overrides that point recipes at a folder in ImpactMesh-Flood's layout: ``data`` or tars, and ``split``, inside.

    Args:
        root: The folder.
        given: The recipes, whose split files keep their names.
    """
    overrides: dict[str, Any] = {"data_root": str(root / "data")}
    for recipe in given:
        for key, value in ((recipe.get("data") or {}).get("init_args") or {}).items():
            if key.endswith("_split") and value:
                files = value if isinstance(value, dict) else {"": value}
                moved = {name: str(root / "split" / Path(file).name) for name, file in files.items()}
                overrides[key] = json.dumps(moved) if isinstance(value, dict) else moved[""]
    return [f"--data.init_args.{key}={value}" for key, value in overrides.items()]


def check_precision(recipe: Recipe, *, gpu: bool) -> None:
    """Refuse fp16 on a CPU: Lightning 2.6.1 would train in bf16 instead, other numerics than the recipe's.

    Args:
        recipe: A resolved recipe.
        gpu: Whether torch sees a GPU.

    Raises:
        UsageError: The recipe asks for fp16 and will run on a CPU.
    """
    trainer = recipe.get("trainer") or {}
    accelerator, precision = str(trainer.get("accelerator", "auto")), str(trainer.get("precision"))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpu)
    if on_cpu and precision in ("16", "16-mixed", "16-true"):
        raise UsageError(
            "fp16 does not run on a CPU: Lightning would quietly use bf16 in its place",
            where=f"trainer.precision: {precision}, and {'trainer.accelerator is cpu' if gpu else 'torch sees no GPU'}",
            fix="--precision fp32 (slower) or --precision bf16",
        )
