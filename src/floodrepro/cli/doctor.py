"""Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_format, read_recipe
from floodrepro.errors import UsageError
from floodrepro.recipe import PRECISIONS
from floodrepro.system.doctor import Finding, check_chips, examine


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--config", action="append", metavar="YAML", help="judge the machine for this recipe")
    where = "the data set's folder (default: the recipe's)"
    parser.add_argument("--data-root", "--data", type=Path, metavar="DIR", help=where)
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision")
    add_format(parser)
    parser.epilog = "With --config, overrides as in fit: --data.init_args.num_workers 2\n"


def run_doctor(args: argparse.Namespace) -> int:
    """Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""
    if (args.overrides or args.data_root or args.precision) and not args.config:
        raise UsageError("overrides need the recipe that they change", fix="--config YAML")
    recipe = read_recipe(args)[2] if args.config else None
    findings = [*examine(recipe), *([check_chips(recipe)] if recipe else [])]
    failed = any(finding.status == "fail" for finding in findings)
    data = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
    console.emit(data, _text(findings), args.format)
    return 1 if failed else 0


def _text(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        rows.append([finding.status, finding.name, finding.detail])
        if finding.fix:
            rows.append(["", "", f"to do: {finding.fix}"])
    count = Counter(finding.status for finding in findings)
    sums = ", ".join(f"{count[status]} {status}" for status in ("ok", "warn", "fail"))
    return f"{console.columns(rows, right_from=3)}\n\n{sums}"
