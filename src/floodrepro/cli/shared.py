"""Flags that several commands share, and what they turn into. No heavy import at module level."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import PRECISIONS
from floodrepro.run_folder import config_beside

if TYPE_CHECKING:
    from floodrepro.training.recipe_cli import RecipeCLI


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add --format."""
    parser.add_argument("--format", choices=console.FORMATS, default="text", help="what stdout holds (default: text)")


def add_recipe_flags(parser: argparse.ArgumentParser, *, config_required: bool) -> None:
    """Add --config, --data-root, --precision, --print_config and a note on overrides."""
    found = "" if config_required else " (default: the one beside the checkpoint)"
    parser.add_argument(
        "--config",
        action="append",
        required=config_required,
        metavar="YAML",
        help=f"a path, or a name from 'floodrepro configs ls'; given twice, the later one wins{found}",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder that holds data/ and split/")
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    parser.add_argument("--print_config", action="store_true", help="print the effective recipe and stop")
    add_format(parser)
    parser.epilog = (
        "Any key of the recipe can be overridden by its path:\n"
        "  --trainer.max_epochs 3  --data.init_args.batch_size 8  --optimizer.init_args.lr 2e-4\n"
    )


def parse_recipe(args: argparse.Namespace, found: Path | None = None) -> "RecipeCLI":
    """Read the configs cheaply first, then let TerraTorch's parser fold the overrides in.

    Args:
        args: With the flags of `add_recipe_flags` and ``overrides``.
        found: The config to use where none was given.

    Returns:
        The parsed recipe; nothing is built yet.
    """
    if args.config:
        configs = [recipes.find(name) for name in args.config]
    elif found:
        configs = [found]
    else:
        raise UsageError("no config", fix="--config YAML")
    given = [recipes.read(path) for path in configs]  # a YAML that does not parse is answered before the slow import
    overrides = recipes.data_overrides(args.data_root, *given) if args.data_root else []
    if args.precision:
        overrides.append(f"--trainer.precision={PRECISIONS[args.precision]}")
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.training.recipe_cli import RecipeCLI

    return RecipeCLI(configs, [*overrides, *args.overrides])


def print_recipe(cli: "RecipeCLI") -> None:
    """Print the effective recipe and its hash on stdout."""
    print(f"# sha256 {recipes.fingerprint(cli.recipe)}\n{recipes.to_yaml(cli.recipe)}", end="")


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add --ckpt and the flags of `add_recipe_flags`."""
    parser.add_argument("--ckpt", type=Path, required=True, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    add_recipe_flags(parser, config_required=False)


def parse_recipe_for_checkpoint(args: argparse.Namespace) -> "RecipeCLI | None":
    """The recipe given or found beside the checkpoint; None where printing it was all that was asked for."""
    if not args.ckpt.is_file():
        best = args.ckpt / "checkpoints" / "best.ckpt"
        fix = f"--ckpt {best}" if best.is_file() else "give runs/NAME/checkpoints/best.ckpt"
        raise CheckpointError("checkpoint not found", where=args.ckpt, fix=fix)
    cli = parse_recipe(args, None if args.config else config_beside(args.ckpt))
    if args.print_config:
        print_recipe(cli)
        return None
    return cli
