"""Measure a checkpoint on the validation split."""

import argparse

from floodrepro import console
from floodrepro.cli.shared import add_checkpoint_flags, parse_recipe_for_checkpoint
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_checkpoint_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    cli = parse_recipe_for_checkpoint(args)
    if cli is None:
        return 0
    from floodrepro.evaluation.passes import validate

    result = validate(cli, args.ckpt)
    console.emit(result.as_dict(), result.table(), args.format)
    return 0
