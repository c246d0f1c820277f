"""Upload an export to a repository on the hub: weights, YAML, card and results, in one commit."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import UsageError

if TYPE_CHECKING:
    from floodrepro.publishing.upload import Plan

_EPILOG = """\
examples:
  floodrepro publish --export runs/first/export --repo me/flood --dry-run
  floodrepro publish --export runs/first/export --repo me/flood --private

--dry-run contacts nobody. Without it the repository's name has to be typed, or --yes given where there is no terminal.
The hub's address is HF_ENDPOINT's; the token is that of 'hf auth login' or HF_TOKEN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="what floodrepro export wrote")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    parser.add_argument(
        "--branch", "--revision", default="main", metavar="NAME", help="made if it is not there (default: main)"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded where, and stop")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--publish-anyway",
        metavar="SENTENCE",
        help="publish although something speaks against it: what that is, word for word as the refusal says it",
    )
    add_format(parser)
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from floodrepro.publishing.upload import make_plan, refuse_objection, refuse_without_access, upload

    plan = make_plan(args.export, args.repo, branch=args.branch, private=args.private)
    if args.dry_run:
        end = "nothing was sent, nobody was contacted"
        if plan.objection:
            end += f'\nit would be refused without --publish-anyway "{plan.objection}"'
        console.emit(plan.as_dict(), f"{_listing(plan)}\n{end}", args.format)
        return 0
    refuse_objection(plan, args.publish_anyway)
    refuse_without_access(plan)
    for line in _listing(plan).splitlines():
        console.say(line)
    if not args.yes:
        _ask(plan.repo)
    with console.stdout_to_stderr():
        address = upload(plan)
    console.emit(plan.as_dict() | {"commit": address}, f"uploaded {len(plan.items)} files: {address}", args.format)
    return 0


def _listing(plan: "Plan") -> str:
    visible = "private" if plan.private else "public if it is new"
    rows = [["file", "bytes", "sha256"], *([i.path.name, f"{i.size:,}", i.sha256] for i in plan.items)]
    lines = [
        f"from      {plan.folder}",
        f"to        {plan.endpoint}/{plan.repo}  (branch {plan.branch}, {visible})",
        f"verdict   {' '.join(plan.verdict) or 'none'}",
        *([f"against   {plan.objection}"] if plan.objection else []),
        console.columns(rows),
    ]
    return "\n".join([*lines, *([f"not uploaded: {', '.join(plan.left_out)}"] if plan.left_out else [])])


def _ask(repo: str) -> None:
    """Have the repository's name typed.

    Raises:
        UsageError: There is no terminal to ask on, or something else was typed.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "there is no terminal to ask on: nothing was uploaded", fix="--yes, or --dry-run to look first"
        )
    console.say(f"type {repo} to upload these files")
    if sys.stdin.readline().strip() != repo:
        raise UsageError("that is another name: nothing was uploaded", fix="the same command again")
