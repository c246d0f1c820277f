"""Recipes: where they are found, how a YAML is read, what identifies one. Cheap: nothing here imports torch."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
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
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    close = difflib.get_close_matches(name_or_path, known, n=1)
    raise UsageError(
        "is a folder, not a recipe" if path.is_dir() else "config file not found",
        where=name_or_path,
        fix=f"did you mean '{close[0]}'?"
        if close
        else "give a path to a YAML, or a name that 'floodrepro configs ls' lists",
    )


def read(path: Path) -> Recipe:
    """Read a YAML and check that it parses.

    Raises:
        UsageError: The file cannot be read, or is no YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"the YAML does not parse: {problem}", where=f"{path}{line}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the config cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise UsageError("the YAML holds no mapping of keys to values", where=path, fix="see 'floodrepro configs show'")
    return content


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of a recipe's content: order of keys, comments and layout of the YAML do not count."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(before: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested contents differ: by the key's path, sorted, the value in each; None where it is not there.

    Args:
        before: Mappings, lists and plain values.
        now: The same.
        path: What the paths begin with.
    """
    old, new = dict(leaves(before, path)), dict(leaves(now, path))
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
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(item, Mapping | list) for item in node):
        for number, value in enumerate(node):
            yield from leaves(value, f"{path}.{number}")
    else:
        yield path, node


# Where a run takes place, and its seed: what may differ between two runs of one recipe.
_PLACE = re.compile(
    r"seed_everything|trainer\.(default_root_dir|accelerator|devices|num_nodes|strategy|enable_\w+|logger.*)"
    r"|data\.init_args\.((\w+_)?data_root|\w+_split(\.\w+)?|num_workers|prefetch_factor|strict|skip_damaged)"
)


def beside_shipped(recipe: Recipe) -> tuple[str, list[str]]:
    """The shipped recipe that is nearest to one, and the keys in which they differ; data's place and seed do not count.

    Args:
        recipe: A resolved recipe.
    """
    found = {
        name: [key for key in differences(read(path), recipe) if not _PLACE.fullmatch(key)]
        for name, path in shipped().items()
    }
    nearest = min(found, key=lambda name: len(found[name]))
    return nearest, found[nearest]


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML text, keys in the order in which they were given."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


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
    """Refuse fp16 on a CPU.

    Lightning 2.6.1 (``_check_and_init_precision``) would train in bf16 instead and say so in one warning: other
    numerics than the recipe's, without being asked for.

    Args:
        recipe: A resolved recipe.
        gpu: Whether torch sees a GPU.

    Raises:
        UsageError: The recipe asks for fp16 and will run on a CPU.
    """
    trainer = recipe.get("trainer") or {}
    accelerator = str(trainer.get("accelerator", "auto"))
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpu)
    if on_cpu and str(trainer.get("precision", "32-true")) in ("16", "16-mixed", "16-true"):
        reason = "trainer.accelerator is cpu" if gpu else "torch sees no GPU"
        raise UsageError(
            "fp16 does not run on a CPU: Lightning would quietly use bf16 in its place",
            where=f"trainer.precision: {trainer['precision']}, and {reason}",
            fix="--precision fp32 (slower) or --precision bf16",
        )
