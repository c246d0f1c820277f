"""Flags that several commands share, what their values have to be, and what they turn into. Nothing heavy here."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import config_beside

if TYPE_CHECKING:
    from floodrepro.training.terratorch_cli import RecipeCLI

_EPILOG = """\
Any key of the recipe can be overridden by its path:
  --trainer.max_epochs 3  --data.init_args.batch_size 8  --optimizer.init_args.lr 2e-4
--print_config prints the merged recipe with all defaults; --trainer.help and --model.help CLASS list what it can hold.
"""
_SHORT = {  # flags that override the key of their name, by what stands before it
    "data.init_args.": ("limit", "fraction", "strict", "skip_damaged"),
    "trainer.": ("precision", "deterministic"),
    "": ("seed_everything",),
}


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


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add --config, --data-root, --precision, which chips to use, and a note on overrides."""
    add, parser.epilog = parser.add_argument, _EPILOG
    config = "a path, or a name from 'floodrepro configs ls'; layers in order (default: the one beside the checkpoint)"
    add("--config", action="append", metavar="YAML", help=config)
    add("--data-root", type=Path, metavar="DIR", help="folder that holds data/ and split/")
    add("--limit", type=int, metavar="N", help="use N chips of each split, at most; whole events first")
    add("--fraction", type=float, metavar="F", help="share of the chips of each split to use")
    add("--strict", action="store_true", help="an event in two splits is an error, not a warning")
    add("--skip-damaged", type=int, metavar="N", help="leave out up to N chips that cannot be read")
    add("--precision", choices=recipes.PRECISIONS, help="the trainer's precision; fp16 needs a GPU")


def read_recipe(args: argparse.Namespace) -> tuple[list[Path], list[str], Recipe]:
    """The files and overrides that the flags ask for, and what they fold into; it takes no time.

    Without --config it is the config beside --ckpt.

    Raises:
        UsageError: A file is missing or does not parse.
    """
    checkpoint, root = getattr(args, "ckpt", None), getattr(args, "data_root", None)
    files = [recipes.find(name) for name in args.config or []] or ([config_beside(checkpoint)] if checkpoint else [])
    if not files:
        raise UsageError("no config", fix="--config YAML")
    layers = [recipes.read_yaml(path) for path in files]
    overrides = recipes.data_overrides(root, *layers) if root else []
    for key, flag in ((key, flag) for key, flags in _SHORT.items() for flag in flags):
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            overrides.append(f"--{key}{flag}={recipes.PRECISIONS.get(value, str(value).lower())}")
    overrides += args.overrides
    return files, overrides, recipes.fold(layers, overrides)


def parse(files: Sequence[Path], overrides: Sequence[str]) -> "RecipeCLI":
    """Let TerraTorch's parser merge a recipe; nothing is built yet."""
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.training.terratorch_cli import RecipeCLI

    return RecipeCLI(files, overrides)


def parse_recipe(args: argparse.Namespace) -> "RecipeCLI":
    """`read_recipe`, then `parse`."""
    files, overrides, _ = read_recipe(args)
    return parse(files, overrides)
