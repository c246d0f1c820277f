"""The whole path: doctor, data and weights, audit, fit, test, the reference, verify, export and card.

Stages whose inputs are as they were are left out, and what was stopped goes on: give the same command again.
"""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.reproduction.plan import PROTOCOLS, SIZES, STAGES, make_plan
from floodrepro.cli.shared import add_format
from floodrepro.errors import UsageError
from floodrepro.recipe import SECTIONS

OVERRIDE_SECTIONS = SECTIONS

_EPILOG = """\
examples:
  floodrepro reproduce --demo
  floodrepro reproduce --revision COMMIT --data-root /data/ImpactMesh-Flood --dry-run
  floodrepro reproduce --protocol v1-binary --seeds 42,43,44,45,46 --precision bf16
  floodrepro reproduce --from verify --until export

Any key of the recipe can be overridden as in fit. RUN-DIR/reproduction.json has a line for every stage. Exit code 1
with a report means that a required check did not pass; without one, that a stage failed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--protocol", choices=PROTOCOLS, help="task and version of the data (default: v0)")
    parser.add_argument("--size", choices=SIZES, help="TerraMind's size (default: base)")
    parser.add_argument("--config", metavar="YAML", help="another recipe than that of --protocol and --size")
    parser.add_argument("--seeds", metavar="S,S,…", help="declared runs, each is tested (default: the recipe's seed)")
    parser.add_argument("--precision", choices=recipes.PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="default: ImpactMesh-Flood")
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="of seed-S/ and reproduction.json (default: runs/RECIPE-reproduction)",
    )
    parser.add_argument("--revision", metavar="SHA", help="of the data: branch, tag or commit (default: main)")
    parser.add_argument("--reference", metavar="FILE|none", help="a checkpoint (default: IBM's, from the hub)")
    parser.add_argument(
        "--reference-sha256", metavar="SHA256", help="of the reference (default for IBM's: as published)"
    )
    parser.add_argument("--from", dest="first", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument("--until", dest="last", choices=STAGES, metavar="STAGE", help="the last stage to look at")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their commands, and stop")
    parser.add_argument("--demo", action="store_true", help="generated chips and TerraMind tiny, on a CPU in minutes")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of the demo (default: demo)")
    add_format(parser)
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    own = {"demo", "folder", "format", "overrides"}
    if args.demo:
        if other := [name for name, value in vars(args).items() if name not in own and value]:
            flag = {"first": "from", "last": "until"}.get(other[0], other[0].replace("_", "-"))
            raise UsageError(f"--{flag} is no flag of the demo", fix="leave out --demo, or that flag")
        from floodrepro.cli.demo import run_demo

        return run_demo(args.folder or Path("demo"), args.overrides, args.format)
    if args.folder:
        raise UsageError("--folder is the demo's", fix="--demo, or --data-root and --run-dir")
    plan = make_plan(args)
    first, last = STAGES.index(args.first or STAGES[0]), STAGES.index(args.last or STAGES[-1])
    if first > last:
        raise UsageError(f"--from {args.first} comes after --until {args.last}", fix=f"stages: {', '.join(STAGES)}")
    names = STAGES[first : last + 1]
    from floodrepro.cli.reproduction.runner import describe, run_stages

    if args.dry_run:
        told = {name: describe(plan, name) for name in names}
        console.emit(told, "\n\n".join("\n".join([name, *lines]) for name, lines in told.items()), args.format)
        return 0
    return run_stages(plan, names, args.format)
