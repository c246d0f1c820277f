"""What the values of flags have to be, and a flag that several commands share."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path


def plain_name(text: str) -> str:
    """The value of --name, which becomes the name of a file or folder and must not lead out of the one it lies in."""
    if Path(text).name != text or text == "..":
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; another flag says in which folder it lies")
    return text


def existing_file(text: str) -> Path:
    """The value of a flag that names a file to read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no such file: {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """The value of a flag that names a file to write: nothing is there yet, but its folder is."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already and is not overwritten")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


def listed(text: str) -> list[str]:
    """The value of a flag that takes a list with commas."""
    return [name.strip() for name in text.split(",")]


def between(least: float, most: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """What reads a number of a range."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:  # NaN is not
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from {least:,.0f} to {most:,.0f}")

    return number


def add_checkpoint(parser: "argparse._ActionsContainer", *, required: bool = False) -> None:
    """Add --ckpt, by Lightning's name too."""
    names, what = ("--ckpt", "--ckpt_path"), "a .ckpt, .pt or .safetensors, such as runs/NAME/checkpoints/best.ckpt"
    parser.add_argument(*names, type=existing_file, required=required, metavar="FILE", help=what)
