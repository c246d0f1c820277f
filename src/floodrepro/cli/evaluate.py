"""``floodrepro validate``, ``test`` and ``predict``: one pass over a split with a checkpoint."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli import shared
from floodrepro.errors import UsageError

_MAIN_METRICS = ("mIoU", "IoU_0", "IoU_1", "IoU_2", "F1_Score", "Pixel_Accuracy")
_MASKS = """\
Masks: GeoTIFFs named after chips (CHIP.tif, CHIP_pred.tif), or a few rasters in any CRS that cover the chips. A pixel
of a chip takes the value of the mask's pixel in which its centre lies; where there is none it is not counted.
  floodrepro test --masks gfm/ --name GFM --config demo --data-root chips --values 1=flood,0=rest,255=none
  floodrepro verify --run runs/first --reference evaluation/test/GFM.parquet"""
_FILES = """\
CHIP_pred.tif has the class of each pixel as int16 on the chip's grid, and -1, its no-data value, where neither
Sentinel-1 nor Sentinel-2 has data at the event. --probabilities adds CHIP_prob.tif: the probability of the positive
class as float32, NaN where nothing was seen; --probabilities uint8: 250 means 1, and 255 that nothing was seen. Which
chips are mapped: --data.init_args.predict_split FILE, an id a line (default: the recipe's, its test split)."""

add_validate_arguments = shared.add_checkpoint_flags


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--ckpt", "--ckpt_path", type=Path, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    shared.add_recipe_flags(parser, config_required=False)
    splits = "test (default; several test splits in one pass), val, train, or one of the recipe's test splits"
    parser.add_argument("--split", default="test", metavar="NAME", help=splits)
    where = "folder of the chip tables (default: evaluation/ of the run folder; of masks, here)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=where)
    parser.add_argument("--no-baselines", action="store_true", help="leave out the tables of the four baselines")
    masks = parser.add_argument_group("masks made by anyone else, in place of --ckpt; --config says which chips")
    masks.add_argument("--masks", type=Path, nargs="+", metavar="PATH", help="a folder of GeoTIFFs, or files")
    name = "what reports call them (default: the name of the first path)"
    masks.add_argument("--name", type=shared.plain_name, help=name)
    masks.add_argument("--values", metavar="1=flood,0=rest", help="class of each value; 255=none leaves one out")
    scale = "masks hold probabilities of the positive class; SCALE is the value that means 1 (default: 1)"
    masks.add_argument("--probability", type=float, nargs="?", const=1.0, metavar="SCALE", help=scale)
    parser.epilog = f"{parser.epilog}\n{_MASKS}"


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    shared.add_checkpoint_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the masks; must be empty")
    kinds: dict[str, Any] = {"nargs": "?", "const": "float32", "choices": ("float32", "uint8")}
    parser.add_argument("--probabilities", **kinds, help="write the positive class's probability too")
    parser.epilog = f"{parser.epilog}\n{_FILES}"


def run_validate(args: argparse.Namespace) -> int:
    """Measure a checkpoint on the validation split."""
    cli = shared.parse_recipe_for_checkpoint(args)
    from floodrepro.evaluation.passes import ChipPass, run_pass

    data, metrics = run_pass(cli, "validate", ChipPass(args.ckpt), "val")
    result = {"stage": "validate", "checkpoint": str(args.ckpt), "chips": data.chips, "metrics": metrics}
    console.emit(result, _two_columns(metrics), args.format)
    return 0


def run_test(args: argparse.Namespace) -> int:
    """Measure a checkpoint, or masks made by anyone else, on the test split and leave a chip table."""
    if bool(args.ckpt) == bool(args.masks):
        raise UsageError("test needs either --ckpt or --masks", fix="--ckpt runs/NAME/checkpoints/best.ckpt")
    cli = shared.parse_recipe(args) if args.masks else shared.parse_recipe_for_checkpoint(args)
    from floodrepro.evaluation.chip_table import read_table
    from floodrepro.evaluation.metrics import which_iou
    from floodrepro.evaluation.passes import tabulate_checkpoint

    if args.masks:
        result = _test_masks(args, cli)
    else:
        options = {"split": args.split, "folder": args.output, "baselines": not args.no_baselines}
        result = tabulate_checkpoint(cli, args.ckpt, **options)
    text = _two_columns(result["metrics"])
    for split, path in result["tables"].items():
        console.say(f"chip table of {split}, {result['chips'][split]} chips: {path}")
    if result["tables"]:
        table = read_table(Path(next(iter(result["tables"].values()))))
        label = table.metadata["class_names"][table.positive]
        result["which_iou"] = which_iou(table.counts, table.events, table.positive, label)
        rows = [[one["name"], _shown(one["iou"]), str(one["n"]), one["of"]] for one in result["which_iou"]]
        text += "\n\n" + console.columns([["which IoU is this?", "IoU", "n", ""], *rows])
    console.emit(result, text, args.format)
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """Write a flood mask (GeoTIFF) for every chip of the predict split."""
    cli = shared.parse_recipe_for_checkpoint(args)
    from floodrepro.evaluation.passes import predict

    files = predict(cli, args.ckpt, args.output, probabilities=args.probabilities)
    console.emit({"files": [str(file) for file in files]}, f"{len(files)} files  {args.output}", args.format)
    return 0


def _test_masks(args: argparse.Namespace, cli: Any) -> dict[str, Any]:
    from floodrepro.evaluation.chip_table import write_table
    from floodrepro.evaluation.masks import tabulate_masks
    from floodrepro.evaluation.metrics import class_scores, scores
    from floodrepro.evaluation.passes import choose_split

    split, events = next(iter(choose_split(cli.recipe, args.split).items()))
    name = args.name or args.masks[0].resolve().stem
    given = {"name": name, "split": split, "scale": args.probability, "values": args.values}
    table = tabulate_masks(cli.recipe, args.masks, events, **given)
    path = (args.output or Path("evaluation")) / split / f"{name}.parquet"
    write_table(table, path)
    pooled, label = table.counts.sum(axis=0), table.metadata["class_names"][table.positive]
    of_class = {f"{label} {key}": value for key, value in class_scores(pooled, table.positive).items() if key != "iou"}
    return {
        "name": name,
        "chips": {split: len(table)},
        "metrics": scores(pooled) | of_class,
        "tables": {split: str(path)},
        "pixels": {"counted": int(pooled.sum()), "unseen": int(table.unseen.sum())},
    }


def _two_columns(metrics: Mapping[str, float | None]) -> str:
    """TerraTorch's main metrics, and what masks have besides."""
    shown = [name for main in _MAIN_METRICS for name in metrics if name.rsplit("/", 1)[-1] == main]
    shown += [name for name in metrics if " " in name]
    return console.columns([[name, _shown(metrics[name])] for name in shown])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
