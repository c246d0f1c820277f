"""List shipped recipes and your runs: configs ls, configs show NAME, runs ls."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.errors import FloodreproError
from floodrepro.run_folder import RunFolder


def add_configs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show")
    add_format(actions.add_parser("ls", prog=f"{parser.prog} ls", help="names, and the first line of each"))
    show = actions.add_parser("show", prog=f"{parser.prog} show", help="print one; > mine.yaml keeps it")
    show.add_argument("name")


def run_configs(args: argparse.Namespace) -> int:
    """List the shipped recipes, or print one: configs ls, configs show NAME > mine.yaml."""
    if args.action == "show":
        print(recipes.find(args.name).read_text(encoding="utf-8"), end="")
        return 0
    titles = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in recipes.shipped().items()}
    rows = [[name, title.removeprefix("# ")] for name, title in titles.items()]
    console.emit(dict(rows), console.columns(rows, right_from=2), args.format)
    return 0


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and its flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls")
    listing = actions.add_parser("ls", prog=f"{parser.prog} ls", help="one line a run, the newest first")
    listing.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    add_format(listing)


def run_runs(args: argparse.Namespace) -> int:
    """List runs with recipe, status, best score and age, the newest first: runs ls."""
    shipped = {recipes.fingerprint(recipes.read_yaml(file)): name for name, file in recipes.shipped().items()}
    found = [
        _summary(RunFolder(record.parent), shipped) for record in args.runs_root.rglob("run.json") if record.is_file()
    ]
    found.sort(key=lambda run: run["started"], reverse=True)
    rows = [["name", "recipe", "status", "best", "age"]]
    for run in found:
        best = "-" if run["best"] is None else f"{run['monitor']} {run['best']:.4f}"
        rows.append([run["name"], run["recipe"], run["status"], best, run["age"]])
    text = console.columns(rows, right_from=9) if found else f"no runs below {args.runs_root}"
    console.emit({"runs": found}, text, args.format)
    return 0


def _summary(run: RunFolder, shipped: dict[str, str]) -> dict[str, Any]:
    found = {"name": run.path.name, "path": str(run.path)}
    try:
        record = run.read_record()
        digest, monitor, started = str(record["recipe_sha256"]), record.get("monitor"), record["started"]
        hours = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds() / 3600
        found["age"] = (
            f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"
        )
        best = dict(record.get("best_metrics") or {}).get(monitor)  # a running run has none yet
        found |= {"recipe": shipped.get(digest) or f"sha256 {digest[:12]}", "status": str(record["status"])}
        return found | {"monitor": monitor, "best": None if best is None else float(best), "started": started}
    except (FloodreproError, LookupError, TypeError, ValueError, OverflowError):  # one odd record hides no other run
        return found | {"recipe": "-", "status": "unreadable", "best": None, "started": "", "age": "-"}
