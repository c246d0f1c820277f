"""Measure a checkpoint on the test split."""

import argparse

from floodrepro.cli.shared import add_checkpoint_flags, run_measurement
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_checkpoint_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return run_measurement(args, "test")
