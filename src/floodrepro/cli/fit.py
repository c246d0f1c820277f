"""Train a recipe into a run folder. If it is interrupted, run the same command again."""

import argparse
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli.shared import add_recipe_flags, parse, plain_name, read_recipe
from floodrepro.errors import UsageError
from floodrepro.system.doctor import check_before_fit


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_recipe_flags(parser, config_required=True)
    add = parser.add_argument
    add("--name", type=plain_name, help="name of the run (default: the first recipe's)")
    add("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)")
    add("--seed", type=int, metavar="S", help="seed of everything (default: the recipe's)")
    add("--deterministic", action="store_true", help="torch's deterministic mode: slower (trainer.deterministic: warn)")
    add("--ckpt_path", metavar="last|FILE", help="a full state to resume from, such as last.ckpt")
    add("--weights", type=Path, metavar="FILE", help="start from a checkpoint's weights, with a fresh optimizer")
    anyway = "resume although data, packages or settings changed; recorded"
    add("--resume-anyway", action="store_true", help=anyway)
    overflow = "after a value that is not finite: stop (default), or resume from the last good state in bf16, once"
    add("--on-overflow", choices=("stop", "rollback"), default="stop", help=overflow)
    add("--save-every", type=_positive, default=500, metavar="STEPS", help="steps between full states (default: 500)")


def run_fit(args: argparse.Namespace) -> int:
    """Train a recipe into a run folder. If it is interrupted, run the same command again."""
    if args.weights is not None and not args.weights.is_file():
        raise UsageError("the checkpoint of --weights does not exist", where=args.weights)
    if args.deterministic:
        args.overrides = [*args.overrides, "--trainer.deterministic=warn"]
    if args.seed is not None:
        args.overrides = [*args.overrides, f"--seed_everything={args.seed}"]
    files, overrides, recipe = read_recipe(args)
    check_before_fit(recipe, args.runs_root)
    cli = parse(files, overrides)
    from floodrepro.training.fit import fit

    path = args.runs_root / (args.name or files[0].stem)
    record = fit(
        cli,
        path,
        ckpt_path=args.ckpt_path,
        weights=args.weights,
        allow_changes=args.resume_anyway,
        on_overflow=args.on_overflow,
        save_every=args.save_every,
    )
    record = {"run": str(path), **record}
    console.emit(record, _text(record), args.format)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _text(record: dict[str, Any]) -> str:
    lines = [f"run         {record['run']}"]
    if record.get("best_epoch") is not None:
        lines.append(f"checkpoint  {record['run']}/checkpoints/best.ckpt")
        lines.append(
            f"best epoch  {record['best_epoch'] + 1} of {record['progress']['epochs']}, by {record['monitor']}"
        )
    return "\n".join(lines)
