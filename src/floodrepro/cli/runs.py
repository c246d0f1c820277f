"""List shipped recipes and your runs: configs ls, configs show NAME, configs cp NAME PATH, runs ls."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.data.protocols import protocol_of
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.publishing.export import with_stock_data
from floodrepro.run_folder import RunFolder

_PLAIN = "for TerraTorch without floodrepro: impactmesh's own data module, extracted chips"


def add_configs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show|cp")
    listing = actions.add_parser("ls", prog=f"{parser.prog} ls", help="names, and the first line of each")
    add_format(listing)
    show = actions.add_parser("show", prog=f"{parser.prog} show", help="print one as it is")
    copy = actions.add_parser("cp", prog=f"{parser.prog} cp", help="copy one to change it")
    for action in (show, copy):
        action.add_argument("name")
        action.add_argument("--plain", action="store_true", help=_PLAIN)
    copy.add_argument("path", type=Path)


def run_configs(args: argparse.Namespace) -> int:
    """List, show or copy the shipped recipes: configs ls, configs show NAME, configs cp NAME PATH."""
    if args.action == "ls":
        titles = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in recipes.shipped().items()}
        rows = [[name, title.removeprefix("# ")] for name, title in titles.items()]
        console.emit(dict(rows), console.columns(rows, right_from=2), args.format)
        return 0
    source = recipes.find(args.name)
    text = _plain(source) if args.plain else source.read_text(encoding="utf-8")
    if args.action == "show":
        print(text, end="")
        return 0
    target = args.path / source.name if args.path.is_dir() else args.path
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError("the file exists already and is not overwritten", where=target) from error
    except OSError as error:
        raise UsageError(f"the recipe cannot be copied: {error.strerror}", where=target) from error
    print(target)
    return 0


def add_runs_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action and its flags."""
    listing = parser.add_subparsers(dest="action", required=True, metavar="ls").add_parser(
        "ls", prog=f"{parser.prog} ls", help="one line a run, the newest first"
    )
    listing.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    add_format(listing)


def run_runs(args: argparse.Namespace) -> int:
    """List runs with recipe, status, best score and age, the newest first: runs ls."""
    found = [_summary(record.parent) for record in args.runs_root.rglob("run.json")]
    found.sort(key=lambda run: run["started"] or "", reverse=True)
    rows = [["name", "recipe", "status", "best", "age"]]
    for run in found:
        best = "-" if run["best"] is None else f"{run['monitor']} {run['best']:.4f}"
        rows.append([run["name"], run["recipe"], run["status"], best, run["age"]])
    text = console.columns(rows, right_from=9) if found else f"no runs below {args.runs_root}"
    console.emit({"runs": found}, text, args.format)
    return 0


def _summary(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    try:
        record = run.read_record()
        digest = record.get("recipe_sha256", "")
    except FloodreproError:
        record, digest = {"status": "unreadable"}, ""
    shipped = {recipes.fingerprint(recipes.read(file)): name for name, file in recipes.shipped().items()}
    monitor = record.get("monitor")
    started = record.get("started")
    return {
        "name": path.name,
        "path": str(path),
        "recipe": shipped.get(digest) or f"sha256 {digest[:12]}",
        "status": record.get("status", "unknown"),
        "monitor": monitor,
        "best": (record.get("best_metrics") or {}).get(monitor),
        "started": started,
        "age": _age(started),
    }


def _age(started: str | None) -> str:
    if not started:
        return "-"
    hours = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds() / 3600
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} d"


def _plain(source: Path) -> str:
    recipe = recipes.read(source)
    data = recipe.get("data") or {}
    labels = list(protocol_of(recipe).label_map)
    if "class_path" not in data:
        raise UsageError("the section 'data' has no class_path", where=source)
    if labels != list(range(len(labels))):
        raise UsageError(
            f"the recipe maps mask values to the classes {labels}, which impactmesh's data module cannot",
            where=source,
            fix="terratorch fit --config with the recipe as it is, with floodrepro installed",
        )
    head = f"# {source.stem} for plain TerraTorch; augmentation differs from run to run there, whatever the seed.\n"
    return head + recipes.to_yaml(with_stock_data(recipe))
