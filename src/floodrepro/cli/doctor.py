"""Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""

import argparse
import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.recipe import PRECISIONS, Recipe
from floodrepro.system.doctor import Finding, examine


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--config", action="append", metavar="YAML", help="judge the machine for this recipe")
    parser.add_argument("--data-root", "--data", metavar="DIR", help="the data set's folder (default: the recipe's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision")
    add_format(parser)
    parser.epilog = "With --config, overrides as in fit: --data.init_args.num_workers 2\n"


def run_doctor(args: argparse.Namespace) -> int:
    """Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""
    if (args.overrides or args.data_root or args.precision) and not args.config:
        raise UsageError("overrides need the recipe that they change", fix="--config YAML")
    findings = examine(_recipe(args) if args.config else None)
    failed = any(finding.status == "fail" for finding in findings)
    data = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
    console.emit(data, _text(findings), args.format)
    return 1 if failed else 0


def before_fit(args: argparse.Namespace) -> None:
    """Warn of what may hurt a fit. Of several processes of one run, the first one looks.

    Args:
        args: Of `fit`.

    Raises:
        FloodreproError: Something will stop the fit, or make it another run than the recipe describes.
        UsageError: A config cannot be read.
    """
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))):
        return
    findings = examine(_recipe(args), args.runs_root, quick=True)
    for finding in findings:
        if finding.status == "warn":
            console.warn(f"{finding.name}: {finding.detail}; to do: {finding.fix}")
    failed = [finding for finding in findings if finding.status == "fail"]
    if failed:
        what = "; ".join(f"{finding.name}: {finding.detail}" for finding in failed)
        raise FloodreproError(what, fix="; then ".join(finding.fix for finding in failed))


def fold_recipe(configs: Sequence[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Recipes, later ones winning, with command-line overrides folded in. Types are not checked: the parser does that.

    Args:
        configs: Contents of YAML files.
        overrides: Such as ``--trainer.max_epochs=3``, or flag and value apart.
    """
    recipe: Recipe = {}
    for content in configs:
        _merge(recipe, copy.deepcopy(content))
    words = iter(overrides)
    for word in words:
        key, given, text = word.removeprefix("--").partition("=")
        try:
            value = yaml.safe_load(text if given else next(words, ""))
        except yaml.YAMLError:
            continue  # the parser names it
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(recipe, value)
    return recipe


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _recipe(args: argparse.Namespace) -> Recipe:
    given = [recipes.read(recipes.find(name)) for name in args.config]
    overrides = recipes.data_overrides(Path(args.data_root), *given) if args.data_root else []
    if args.precision:
        overrides.append(f"--trainer.precision={PRECISIONS[args.precision]}")
    return fold_recipe(given, [*overrides, *args.overrides])


def _text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<4}  {'':<{width}}  to do: {finding.fix}")
    count = Counter(finding.status for finding in findings)
    return "\n".join([*lines, "", ", ".join(f"{count[status]} {status}" for status in ("ok", "warn", "fail"))])
