"""The commands that take a recipe: fit makes a checkpoint; validate, test and predict use one."""

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from floodrepro import console, recipe as recipes
from floodrepro.cli import main
from floodrepro.errors import TableError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import config_beside, sha256_of
from floodrepro.system.doctor import check_before_fit

if TYPE_CHECKING:
    from floodrepro.training.terratorch_cli import RecipeCLI

# Flags that override a key, by their name.
_KEYS = {name: f"data.init_args.{name}" for name in ("limit", "fraction", "strict", "skip_damaged")}
_KEYS |= {"precision": "trainer.precision", "deterministic": "trainer.deterministic", "seed": "seed_everything"}
_OVERRIDES = """\
Any key of the recipe can be overridden by its path:
  --trainer.max_epochs 3  --data.init_args.batch_size 8  --optimizer.init_args.lr 2e-4
--print_config prints the merged recipe with all defaults; --trainer.help and --model.help CLASS list what it can hold.
"""
_MASKS = """\
docs/chip-table.md tells what is done with masks: GeoTIFFs named after chips, or a few rasters that cover the chips.
  floodrepro test --masks gfm/ --name GFM --config demo --data-root chips --values 1=flood,0=rest,255=none
  floodrepro verify --run runs/first --reference evaluation/test/GFM.parquet"""
_FILES = """\
CHIP_pred.tif has the class of each pixel, and -1 where neither Sentinel-1 nor Sentinel-2 has data at the event.
CHIP_prob.tif has the probability of the positive class as float32, NaN where nothing was seen, or as uint8, 250 for
1 and 255 for unseen. Which chips: --data.init_args.predict_split FILE, an id a line (default: the test split)."""


def add_recipe_flags(parser: argparse.ArgumentParser, default: str = "the one beside the checkpoint") -> None:
    """Add --config (its help names the default), --data-root, --precision, which chips to use, and the epilog."""
    add, parser.epilog = parser.add_argument, _OVERRIDES
    config = "a path, or a name from 'floodrepro configs ls'; layers in order"
    add("--config", action="append", metavar="YAML", help=f"{config} (default: {default})" if default else config)
    add("--data-root", type=Path, metavar="DIR", help="folder that holds data/ and split/")
    add("--limit", type=int, metavar="N", help="use N chips of each split, at most; whole events first")
    add("--fraction", type=float, metavar="F", help="share of the chips of each split to use")
    add("--strict", action="store_const", const="true", help="an event in two splits is an error, not a warning")
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
    given = {key: vars(args).get(flag) for flag, key in _KEYS.items()}
    overrides += [f"--{key}={recipes.PRECISIONS.get(v, v)}" for key, v in given.items() if v is not None]
    overrides += args.overrides
    return files, overrides, recipes.fold(layers, overrides)


def parse(files: Sequence[Path], overrides: Sequence[str]) -> "RecipeCLI":
    """Let TerraTorch's parser merge a recipe; nothing is built yet."""
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.training.terratorch_cli import RecipeCLI

    return RecipeCLI(files, overrides)


def _fit(parser: main.Parser) -> None:
    add_recipe_flags(parser, default="")
    add = parser.add_argument
    add("--name", type=main.plain_name, help="name of the run (default: the first recipe's)")
    add("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)")
    add("--seed", type=int, metavar="S", help="seed of everything (default: the recipe's)")
    add("--deterministic", action="store_const", const="warn", help="torch's deterministic mode: slower, not complete")
    add("--ckpt_path", metavar="last|FILE", help="a full state that a new run begins with")
    add("--weights", type=main.existing_file, metavar="FILE", help="start from a checkpoint's weights alone")
    add("--resume-anyway", action="store_true", help="resume although data, packages or settings changed; recorded")
    add("--on-overflow", choices=("stop", "rollback"), default="stop", help="rollback: resume in bf16, once")
    add("--save-every", type=main.between(1, 10**9, int), default=500, help="steps between two states (default: 500)")
    args = parser.read(overrides=True)
    files, overrides, recipe = read_recipe(args)
    check_before_fit(recipe, args.runs_root)
    cli = parse(files, overrides)
    from floodrepro.training.fit import fit

    path = args.runs_root / (args.name or files[0].stem)
    chosen = {"ckpt_path": args.ckpt_path, "weights": args.weights, "on_overflow": args.on_overflow}
    record = fit(cli, path, allow_changes=args.resume_anyway, save_every=args.save_every, **chosen)
    text = f"run         {path}"
    if record.get("best_epoch") is not None:
        text += f"\ncheckpoint  {path}/checkpoints/best.ckpt"
        text += f"\nbest epoch  {record['best_epoch'] + 1} of {record['progress']['epochs']}, by {record['monitor']}"
    console.emit({"run": str(path), **record}, text, args.format)


def _validate(parser: main.Parser) -> None:
    main.add_checkpoint(parser, required=True)
    add_recipe_flags(parser)
    args = parser.read(overrides=True)
    cli = parse(*read_recipe(args)[:2])
    from floodrepro.evaluation.passes import ChipPass, run_pass

    data, metrics = run_pass(cli, "validate", ChipPass(args.ckpt), "val")
    shown = {name: None if math.isnan(value) else value for name, value in metrics.items()}  # NaN is no JSON
    result = {"stage": "validate", "checkpoint": str(args.ckpt), "chips": data.chips, "metrics": shown}
    console.emit(result, console.columns([*shown.items()]), args.format)


def _test(parser: main.Parser) -> None:
    group = parser.add_argument_group("a checkpoint, or masks made by anyone else; --config says on which chips")
    either = group.add_mutually_exclusive_group(required=True)
    main.add_checkpoint(either)
    either.add_argument("--masks", type=Path, nargs="+", metavar="PATH", help="a folder of GeoTIFFs, or files")
    add = group.add_argument
    add("--name", type=main.plain_name, help="what reports call the masks (default: the name of the first path)")
    add("--values", metavar="1=flood,0=rest", help="class of each value of masks; 255=none leaves one out")
    what, scale = "of masks: what means 1 (default: 1)", main.between(1e-6, 1e6)
    add("--probability", type=scale, nargs="?", const=1.0, metavar="SCALE", help=what)
    add_recipe_flags(parser)
    add, parser.epilog = parser.add_argument, f"{parser.epilog}\n{_MASKS}"
    add("--split", default="test", metavar="NAME", help="test (default), val, train, or one of several test splits")
    place = "of the chip tables (default: evaluation/ of the run or beside the checkpoint; of masks: here)"
    add("--output", type=Path, metavar="DIR", help=place)
    add("--no-baselines", dest="baselines", action="store_false", help="leave out the tables of the four baselines")
    args = parser.read(overrides=True)
    cli = parse(*read_recipe(args)[:2])
    from floodrepro.evaluation import chip_table, metrics
    from floodrepro.evaluation.masks import tabulate_masks
    from floodrepro.evaluation.passes import choose_split, table_path, tabulate_checkpoint

    if args.ckpt and args.output:
        with contextlib.suppress(TableError):  # there is none, or a damaged one
            path = table_path(args.ckpt, args.split, args.output)
            if chip_table.read_table(path).weights != sha256_of(args.ckpt):
                raise UsageError(
                    "a table of other weights is here and is not overwritten", where=path, fix="--output DIR"
                )
    if args.ckpt:
        result = tabulate_checkpoint(cli, args.ckpt, split=args.split, folder=args.output, baselines=args.baselines)
    else:
        split, events = next(iter(choose_split(cli.recipe, args.split).items()))
        name = args.name or args.masks[0].resolve().stem
        given = {"name": name, "split": split, "scale": args.probability, "values": args.values}
        table = tabulate_masks(cli.recipe, args.masks, events, **given)
        path = (args.output or Path("evaluation")) / split / f"{name}.parquet"
        chip_table.write_table(table, path)
        pooled = table.counts.sum(axis=0)
        result = {"name": name, "chips": {split: len(table)}, "tables": {split: str(path)}}
        result["metrics"] = metrics.scores(pooled)
        result["pixels"] = {"counted": int(pooled.sum()), "unseen": int(table.unseen.sum())}
    text = console.columns([*result["metrics"].items()])
    for split, path in result["tables"].items():
        console.say(f"chip table of {split}, {result['chips'][split]} chips: {path}")
    if result["tables"]:
        table = chip_table.read_table(Path(next(iter(result["tables"].values()))))
        label = table.metadata["class_names"][table.positive]
        result["which_iou"] = metrics.which_iou(table.counts, table.events, table.positive, label)
        rows = [[one["name"], one["iou"], one["n"], one["of"]] for one in result["which_iou"]]
        text += "\n\n" + console.columns([["which IoU is this?", "IoU", "n", ""], *rows])
    console.emit(result, text, args.format)


def _predict(parser: main.Parser) -> None:
    main.add_checkpoint(parser, required=True)
    add_recipe_flags(parser)
    add, kinds = parser.add_argument, ("float32", "uint8")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the masks; must be empty")
    add("--probabilities", nargs="?", const="float32", choices=kinds, help="write the positive class's probability too")
    parser.epilog = f"{parser.epilog}\n{_FILES}"
    args = parser.read(overrides=True)
    cli = parse(*read_recipe(args)[:2])
    from floodrepro.evaluation.passes import predict

    files = predict(cli, args.ckpt, args.output, probabilities=args.probabilities)
    console.emit({"files": [str(file) for file in files]}, f"{len(files)} files  {args.output}", args.format)
