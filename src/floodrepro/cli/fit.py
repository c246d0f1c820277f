"""Train a recipe into a run folder."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_recipe_flags, parse_recipe, print_recipe
from floodrepro.recipe import SECTIONS, find
from floodrepro.run_folder import RunFolder

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_recipe_flags(parser, config_required=True)
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument(
        "--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|FILE",
        help="go on with an unfinished run of this name (auto, default), refuse it, or go on from a full state",
    )
    parser.add_argument(
        "--resume-anyway", action="store_true", help="go on although recipe, data or code changed; recorded"
    )
    parser.add_argument(
        "--on-overflow",
        choices=("stop", "rollback"),
        default="stop",
        help="what follows a value that is not finite: stop (default), or go on from the last good state in bf16, once",
    )
    parser.add_argument(
        "--save-every", type=int, default=500, metavar="STEPS", help="full state within an epoch (default: 500 steps)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile; may change roundings")
    parser.add_argument("--channels-last", action="store_true", help="NHWC convolutions; may change roundings")
    parser.add_argument("--fused", action="store_true", help="fused AdamW; may change roundings")
    parser.add_argument("--no-guard", action="store_true", help="do not watch for values that are not finite")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    path = args.runs_root / (args.name or find(args.config[-1]).stem)
    if not args.print_config:
        RunFolder(path).refuse_to_begin(args.resume)  # before anything slow; the fit decides for good
    cli = parse_recipe(args)
    if args.print_config:
        print_recipe(cli)
        return 0
    from floodrepro.training.fit import FitOptions, FitResult, fit

    def report(result: FitResult) -> None:
        text = f"run         {result.run.path}\ncheckpoint  {result.run.best}"
        if result.best_epoch is not None:
            text += f"\nbest epoch  {result.best_epoch} of {result.epochs}, val/loss {result.best_val_loss:.4f}"
        console.emit(result.as_dict(), text, args.format)

    options = FitOptions(
        resume=args.resume,
        resume_anyway=args.resume_anyway,
        on_overflow=args.on_overflow,
        save_every=args.save_every,
        guard=not args.no_guard,
        compiled=args.compile,
        channels_last=args.channels_last,
        fused=args.fused,
    )
    fit(cli, path, options, report)
    return 0
