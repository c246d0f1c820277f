"""Train a recipe into a run folder."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console
from floodrepro.cli.doctor import before_fit
from floodrepro.cli.shared import add_recipe_flags, parse_recipe, print_recipe
from floodrepro.errors import SIGNALLED, UsageError
from floodrepro.recipe import SECTIONS, find
from floodrepro.run_folder import RunFolder
from floodrepro.training.declared import declare, parse_seeds, status_of

if TYPE_CHECKING:
    from floodrepro.training.fit import FitResult
    from floodrepro.training.recipe_cli import RecipeCLI

OVERRIDE_SECTIONS = SECTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_recipe_flags(parser, config_required=True)
    parser.add_argument("--name", help="name of the run (default: the recipe's)")
    parser.add_argument(
        "--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="seed of everything (default: the recipe's)")
    parser.add_argument(
        "--seeds", metavar="S,S,…", help="declare one run a seed below --name, then run them one after the other"
    )
    parser.add_argument("--index", type=int, metavar="I", help="of --seeds, run only the I-th, from 0: for job arrays")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="torch's deterministic mode: slower; lists what has no deterministic form (trainer.deterministic: warn)",
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
        "--save-every",
        type=_positive,
        default=500,
        metavar="STEPS",
        help="full state within an epoch (default: 500 steps)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile; may change roundings")
    parser.add_argument("--channels-last", action="store_true", help="NHWC convolutions; may change roundings")
    parser.add_argument("--fused", action="store_true", help="fused AdamW; may change roundings")
    parser.add_argument("--no-guard", action="store_true", help="do not watch for values that are not finite")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.deterministic:
        args.overrides = [*args.overrides, "--trainer.deterministic=warn"]
    if not args.print_config:
        before_fit(args)
    if args.index is not None and args.seeds is None:
        raise UsageError("--index chooses one of --seeds, and there are none", fix="fit --seeds 42,43,44 --index 0")
    if args.name and Path(args.name).name != args.name:
        raise UsageError("--name is one folder's name", where=args.name, fix="--runs-root DIR says where it lies")
    if args.seeds is not None:
        return _run_declared(args)
    if args.seed is not None:
        args.overrides = [*args.overrides, f"--seed_everything={args.seed}"]
    path = args.runs_root / (args.name or find(args.config[-1]).stem)
    if not args.print_config and not console.follows():
        RunFolder(path).refuse_to_begin(args.resume)  # before anything slow; the fit decides for good
    cli = parse_recipe(args)
    if args.print_config:
        print_recipe(cli)
        return 0

    def report(result: "FitResult") -> None:
        console.emit(result.as_dict(), _text(result), args.format)

    _fit(args, cli, path, report)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _run_declared(args: argparse.Namespace) -> int:
    """Declare a run a seed, then run them in turn, or the one of an index; a failure does not stop the others."""
    if args.seed is not None or not args.name:
        raise UsageError("--seeds needs --name, and no --seed beside it", fix="fit --seeds 42,43,44 --name NAME")
    seeds, overrides = parse_seeds(args.seeds), args.overrides
    if any(override.startswith("--seed_everything") for override in overrides):
        raise UsageError("--seeds and --seed_everything both choose the seed", fix="leave one of them out")
    if args.index is not None and not 0 <= args.index < len(seeds):
        raise UsageError(f"--index is {args.index}, the seeds are counted from 0 to {len(seeds) - 1}")
    runs: dict[int, Path] = {}
    for seed in seeds if args.index is None else [seeds[args.index]]:
        args.overrides = [*overrides, f"--seed_everything={seed}"]
        cli = parse_recipe(args)
        if args.print_config:
            print_recipe(cli)
            return 0
        runs = declare(args.runs_root / args.name, seeds, cli.recipe)
        if status_of(runs[seed]) == "finished":
            console.say(f"seed {seed} is finished already: {runs[seed]}")
            continue
        try:
            _fit(args, cli, runs[seed], lambda result: console.say(_text(result)))
        except Exception as error:  # whatever it is: the other seeds are run, and this one stays listed as failed
            code = getattr(error, "exit_code", 1)
            if code >= SIGNALLED or args.index is not None:
                raise
            console.warn(f"seed {seed} failed and stays listed: {error}")
    states = {seed: status_of(run) for seed, run in runs.items()}
    rows = [["seed", "status", "run"], *([str(s), state, str(runs[s])] for s, state in states.items())]
    data = {"runs": {str(seed): {"run": str(runs[seed]), "status": state} for seed, state in states.items()}}
    if not console.follows():
        console.emit(data, console.columns(rows, right_from=3), args.format)
    if console.follows():  # how a run ended is the first process's word: it may not have written it yet
        return 0
    done = states.values() if args.index is None else [states[seeds[args.index]]]
    return 0 if all(state == "finished" for state in done) else 1


def _fit(args: argparse.Namespace, cli: "RecipeCLI", path: Path, report: "Callable[[FitResult], None]") -> None:
    from floodrepro.training.fit import FitOptions, fit

    options = FitOptions(
        resume=args.resume,
        resume_anyway=args.resume_anyway,
        on_overflow=args.on_overflow,
        save_every=args.save_every,
        guard=not args.no_guard,
        compiled=args.compile,
        channels_last=args.channels_last,
        fused=args.fused,
        alone=bool(args.seeds) and args.index is None,
    )
    fit(cli, path, options, report)


def _text(result: "FitResult") -> str:
    text = f"run         {result.run.path}"
    if result.best_epoch is not None:
        text += f"\ncheckpoint  {result.run.best}\n"
        text += f"best epoch  {result.best_epoch + 1} of {result.epochs}, val/loss {result.best_val_loss:.4f}"
    return text
