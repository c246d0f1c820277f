"""Train a recipe into a run folder."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_recipe_flags, parse_recipe, print_recipe
from floodrepro.recipe import SECTIONS, find
from floodrepro.run_folder import RunFolder

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_recipe_flags(parser, config_required=True)
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument(
        "--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    path = args.runs_root / (args.name or find(args.config[-1]).stem)
    if not args.print_config:
        RunFolder.refuse_existing(path)  # before anything slow; RunFolder.create decides for good
    cli = parse_recipe(args)
    if args.print_config:
        print_recipe(cli)
        return 0
    from floodrepro.training.fit import fit

    result = fit(cli, path)
    text = f"run         {result.run.path}\ncheckpoint  {result.run.best}"
    if result.best_epoch is not None:
        text += f"\nbest epoch  {result.best_epoch} of {result.epochs}, val/loss {result.best_val_loss:.4f}"
    console.emit(result.as_dict(), text, args.format)
    return 0
