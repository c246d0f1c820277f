"""Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.recipe import PRECISIONS, SECTIONS
from floodrepro.system.doctor import Finding, examine, quick, read_needs

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--config", action="append", metavar="YAML", help="judge the machine for this recipe")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data set's folder (default: the recipe's)")
    parser.add_argument(
        "--build", action="store_true", help="while a container is built: without GPU, recipe and network"
    )
    add_format(parser)
    parser.epilog = "With --config, overrides as in fit: --data.init_args.num_workers 2\n"


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.overrides and not args.config:
        raise UsageError("overrides need the recipe that they change", fix="--config YAML")
    if args.build and (args.config or args.data):
        raise UsageError("--build looks at neither recipe nor data", fix="leave --config and --data out")
    given = [recipes.read(recipes.find(name)) for name in args.config or ()]
    needs = read_needs(given, args.overrides) if given else None
    findings = examine(needs, args.data, build=args.build)
    failed = any(finding.status == "fail" for finding in findings)
    data = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
    console.emit(data, _text(findings), args.format)
    return 1 if failed else 0


def before_fit(args: argparse.Namespace) -> None:
    """Say what may hurt a fit.

    Args:
        args: Of `fit`, as they were given.

    Raises:
        FloodreproError: Something will stop the fit, or make it another one than it is taken for.
        UsageError: A config cannot be read.
    """
    given = [recipes.read(recipes.find(name)) for name in args.config]
    overrides = recipes.data_overrides(args.data_root, *given) if args.data_root else []
    if args.precision:
        overrides.append(f"--trainer.precision={PRECISIONS[args.precision]}")
    findings = quick(read_needs(given, [*overrides, *args.overrides]), args.runs_root)
    for finding in findings:
        if finding.status == "warn":
            console.warn(f"{finding.name}: {finding.detail}; to do: {finding.fix}")
    failed = [finding for finding in findings if finding.status == "fail"]
    if failed:
        what = "; ".join(f"{finding.name}: {finding.detail}" for finding in failed)
        raise FloodreproError(what, fix="; then ".join(finding.fix for finding in failed))


def _text(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<4}  {'':<{width}}  to do: {finding.fix}")
    count = Counter(finding.status for finding in findings)
    return "\n".join([*lines, "", ", ".join(f"{count[status]} {status}" for status in ("ok", "warn", "fail"))])
