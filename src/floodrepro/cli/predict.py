"""Write a flood mask (GeoTIFF) for every chip of the predict split."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_checkpoint_flags, parse_recipe_for_checkpoint
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS
_MASKS = """\
A mask is TerraTorch's: CHIP_DEM_pred.tif on the chip's grid, the class of each pixel as int16, and -1 where the terrain
model has no data. Where the sensors saw nothing it has a class all the same. Which chips are mapped:
--data.init_args.predict_split FILE, an id a line (default: the recipe's, its test split)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_checkpoint_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the masks; must be empty")
    parser.epilog = f"{parser.epilog}\n{_MASKS}"


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    cli = parse_recipe_for_checkpoint(args)
    if cli is None:
        return 0
    from floodrepro.evaluation.passes import predict

    files = predict(cli, args.ckpt, args.output)
    console.emit({"files": [str(file) for file in files]}, f"{len(files)} masks  {args.output}", args.format)
    return 0
