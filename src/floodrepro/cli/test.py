"""Measure a checkpoint on the test split and leave its chip table."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_checkpoint_flags, parse_recipe_for_checkpoint
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--split",
        default="test",
        metavar="NAME",
        help="test (default; several test splits in one pass), val, train, or one of the recipe's test splits",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the chip tables (default: evaluation/ of the run folder)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    cli = parse_recipe_for_checkpoint(args)
    if cli is None:
        return 0
    from floodrepro.evaluation.tabulate import run_test

    result = run_test(cli, args.ckpt, split=args.split, folder=args.output)
    for split, path in result.tables.items():
        console.say(f"chip table of {split}, {result.measured.chips[split]} chips: {path}")
    if result.disagreement is not None:
        console.say(f"computed again from the table, the metrics differ by at most {result.disagreement:.1e}")
    console.emit(result.as_dict(), result.measured.table(), args.format)
    return 0
