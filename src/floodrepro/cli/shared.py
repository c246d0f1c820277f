"""Flags that several commands share, and what they turn into. No heavy import at module level."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import PRECISIONS, Recipe
from floodrepro.run_folder import config_beside

if TYPE_CHECKING:
    from floodrepro.training.terratorch_cli import RecipeCLI

_EPILOG = """\
Any key of the recipe can be overridden by its path:
  --trainer.max_epochs 3  --data.init_args.batch_size 8  --optimizer.init_args.lr 2e-4
--print_config prints the merged recipe with all defaults; --trainer.help and --model.help CLASS list what it can hold.
"""


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add --format."""
    parser.add_argument("--format", choices=console.FORMATS, default="text", help="what stdout holds (default: text)")


def plain_name(text: str) -> str:
    """The value of --name, which becomes the name of a file or folder and must not lead out of the one it lies in."""
    if Path(text).name != text or text == "..":
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; another flag says in which folder it lies")
    return text


def new_file(text: str) -> Path:
    """The value of a flag that names a file to write: nothing is there yet, but its folder is."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already and is not overwritten")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


def add_recipe_flags(parser: argparse.ArgumentParser, *, config_required: bool) -> None:
    """Add --config, --data-root, --precision, which chips to use, --format, and a note on overrides."""
    config = "a path, or a name from 'floodrepro configs ls'; later files are layers over earlier ones"
    config += "" if config_required else " (default: the one beside the checkpoint)"
    parser.add_argument("--config", action="append", metavar="YAML", help=config)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder that holds data/ and split/")
    parser.add_argument("--limit", type=int, metavar="N", help="use N chips of each split, at most; whole events first")
    parser.add_argument("--fraction", type=float, metavar="F", help="share of the chips of each split to use")
    parser.add_argument("--strict", action="store_true", help="an event in two splits is an error, not a warning")
    parser.add_argument("--skip-damaged", type=int, metavar="N", help="leave out up to N chips that cannot be read")
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    add_format(parser)
    parser.epilog = _EPILOG


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add --ckpt (or --ckpt_path) and the flags of `add_recipe_flags`."""
    what = "a .ckpt, .pt or .safetensors"
    parser.add_argument("--ckpt", "--ckpt_path", type=Path, required=True, metavar="FILE", help=what)
    add_recipe_flags(parser, config_required=False)


def read_recipe(args: argparse.Namespace, found: Path | None = None) -> tuple[list[Path], list[str], Recipe]:
    """The files and overrides that the flags ask for, and what they fold into; it takes no time.

    Args:
        args: With ``config``, ``data_root``, ``precision`` and ``overrides``, and perhaps other flags of a recipe.
        found: The config to use where none was given.

    Raises:
        UsageError: A file is missing or does not parse.
    """
    files = [recipes.find(name) for name in args.config or []] or ([found] if found else [])
    if not files:
        raise UsageError("no config", fix="--config YAML")
    layers = [recipes.read_yaml(path) for path in files]
    overrides = recipes.data_overrides(args.data_root, *layers) if args.data_root else []
    for key in ("limit", "fraction", "strict", "skip_damaged"):
        if value := getattr(args, key, None):
            overrides.append(f"--data.init_args.{key}={str(value).lower()}")
    if args.precision:
        overrides.append(f"--trainer.precision={PRECISIONS[args.precision]}")
    overrides += args.overrides
    return files, overrides, recipes.fold(layers, overrides)


def parse(files: Sequence[Path], overrides: Sequence[str]) -> "RecipeCLI":
    """Let TerraTorch's parser merge a recipe; nothing is built yet."""
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.training.terratorch_cli import RecipeCLI

    return RecipeCLI(files, overrides)


def parse_recipe(args: argparse.Namespace, found: Path | None = None) -> "RecipeCLI":
    """`read_recipe`, then `parse`."""
    files, overrides, _ = read_recipe(args, found)
    return parse(files, overrides)


def parse_recipe_for_checkpoint(args: argparse.Namespace) -> "RecipeCLI":
    """The recipe that was given, or the one beside the checkpoint."""
    if not args.ckpt.is_file():
        best = args.ckpt / "checkpoints" / "best.ckpt"
        fix = f"--ckpt {best}" if best.is_file() else "give runs/NAME/checkpoints/best.ckpt"
        raise CheckpointError("checkpoint not found", where=args.ckpt, fix=fix)
    return parse_recipe(args, None if args.config else config_beside(args.ckpt))
