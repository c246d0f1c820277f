"""Write a flood mask (GeoTIFF) for every chip of the predict split."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_checkpoint_flags, parse_recipe_for_checkpoint
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_checkpoint_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the masks; must be empty")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    cli = parse_recipe_for_checkpoint(args)
    if cli is None:
        return 0
    from floodrepro.evaluation.passes import predict

    files = predict(cli, args.ckpt, args.output)
    console.emit({"files": [str(file) for file in files]}, f"{len(files)} masks  {args.output}", args.format)
    return 0
