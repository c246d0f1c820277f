"""Write a safetensors + YAML pair that plain TerraTorch loads."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import find, read
from floodrepro.run_folder import RunFolder, config_beside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder: its best checkpoint and its recipe")
    source.add_argument("--ckpt", type=Path, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    parser.add_argument("--config", metavar="YAML", help="recipe of --ckpt (default: the one beside it)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: export/ in the run folder")
    parser.add_argument("--name", help="stem of both files (default: the run's name)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    folder = RunFolder.open(args.run) if args.run else RunFolder.of_checkpoint(args.ckpt)
    checkpoint = args.ckpt or RunFolder(args.run).best
    if not checkpoint.is_file():
        raise CheckpointError("checkpoint not found", where=checkpoint, fix="finish the fit, or give --ckpt FILE")
    output = args.output or (folder.export if folder else None)
    if output is None:
        raise UsageError("the checkpoint lies in no run folder", where=checkpoint, fix="--output DIR")
    recipe = read(find(args.config) if args.config else config_beside(checkpoint))
    name = args.name or (folder.path.resolve().name if folder else checkpoint.stem)
    console.say("loading torch")
    from floodrepro.publishing.export import export

    result = export(checkpoint, recipe, output, name)
    text = (
        f"weights  {result.weights}  ({result.tensors} tensors, {result.parameters:,} values)\n"
        f"config   {result.config}\nsha256   {result.sha256}"
    )
    console.emit(result.as_dict(), text, args.format)
    return 0
