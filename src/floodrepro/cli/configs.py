"""List, show or copy the shipped recipes: configs ls, configs show NAME, configs cp NAME PATH."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.errors import UsageError
from floodrepro.publishing.plain import with_stock_data

_PLAIN = "for TerraTorch without floodrepro: impactmesh's own data module, extracted chips"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show|cp")
    listing = actions.add_parser("ls", prog=f"{parser.prog} ls", help="names, and the first line of each")
    add_format(listing)
    show = actions.add_parser("show", prog=f"{parser.prog} show", help="print one as it is")
    show.add_argument("name")
    show.add_argument("--plain", action="store_true", help=_PLAIN)
    copy = actions.add_parser("cp", prog=f"{parser.prog} cp", help="copy one to change it")
    copy.add_argument("name")
    copy.add_argument("path", type=Path)
    copy.add_argument("--plain", action="store_true", help=_PLAIN)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
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


def _plain(source: Path) -> str:
    recipe = recipes.read(source)
    data = recipe.get("data") or {}
    labels = (data.get("init_args") or {}).get("label_map") or []
    if "class_path" not in data:
        raise UsageError("the section 'data' has no class_path", where=source)
    if labels != list(range(len(labels))):
        raise UsageError(
            f"the recipe maps mask values to the classes {labels}, which impactmesh's data module cannot",
            where=source,
            fix="terratorch fit --config the recipe as it is, with floodrepro installed",
        )
    head = f"# {source.stem} for plain TerraTorch; augmentation differs from run to run there, whatever the seed.\n"
    return head + recipes.to_yaml(with_stock_data(recipe))
