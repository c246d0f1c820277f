"""Map a whole scene (map), compare a map with a truth (map check), write a scene from a catalogue (map plan)."""

import argparse
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from floodrepro import __version__, console, recipe as recipes
from floodrepro.cli import main, model
from floodrepro.errors import DataError, FloodreproError, UsageError
from floodrepro.run_folder import sha256_of, write_atomically

_EXAMPLES = """\
examples:
  floodrepro map plan --aoi area.geojson --event 2026-08-26 --output scene.yaml
  floodrepro map --export runs/first/export --scene scene.yaml --output flood
  floodrepro map check --map flood --truth flooded.gpkg --output check.parquet
docs/mapping.md describes scenes and maps. If it is interrupted, run the same command again.
"""


def _map(parser: main.Parser) -> None:
    parser.epilog = _EXAMPLES
    amount, share = main.between(0, 1e5), main.between(0, 1)
    weights, add = parser.add_mutually_exclusive_group(), parser.add_argument
    main.add_checkpoint(weights)
    weights.add_argument("--export", type=Path, metavar="DIR", help="folder of an exported pair")
    add("--config", action="append", metavar="YAML", help="recipe (default: the one beside the weights)")
    add("--scene", type=Path, metavar="YAML", help="what to map; 'map plan' writes one")
    add("--output", type=Path, metavar="DIR", help="folder for the map")
    add("--precision", choices=recipes.PRECISIONS, help="default: the recipe's; fp16 needs a GPU")
    add("--missing", choices=("refuse", "zero"), default="refuse", help="what to do about missing dates and sensors")
    add("--anyway", action="store_true", help="map a scene with problems, and record them")
    add("--max-gap", type=amount, default=5, metavar="DAYS", help="radar to optical event (default: 5)")
    add("--min-seen", type=share, default=0.5, metavar="SHARE", help="of the area; exit 1 below it (default: 0.5)")
    add("--threshold", type=share, metavar="P", help="probability of the positive class (default: argmax)")
    add("--permanent", type=main.existing_file, metavar="FILE", help="raster or polygons of permanent water")
    add("--min-hectares", type=amount, default=0.1, metavar="HA", help="smallest polygon (default: 0.1)")
    add("--crop", type=main.between(32, 4096, int), metavar="PX", help="edge of a tile (default: the recipe's, or 256)")
    actions = parser.add_subparsers(dest="action", metavar="check|plan")
    check = actions.add_parser("check", help="compare a map with a truth")
    add = check.add_argument
    add("--map", type=Path, required=True, metavar="DIR", help="folder of a map")
    add("--truth", type=Path, required=True, metavar="FILE", help="polygons or raster of the flood")
    add("--truth-value", type=int, metavar="N", help="what flood is in a raster (default: all but 0)")
    add("--output", type=main.new_file, metavar="FILE", help="write the chip table there (.parquet)")
    plan = actions.add_parser("plan", help="write scene.yaml from a STAC catalogue")
    place, add = plan.add_mutually_exclusive_group(required=True), plan.add_argument
    place.add_argument("--aoi", type=Path, metavar="FILE", help="polygons: GeoJSON, GeoPackage")
    place.add_argument("--box", type=float, nargs=4, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="in degrees")
    add("--event", required=True, help="2026-08-26, or with a time (UTC) 2026-08-26T14:00")
    add("--stac", default="https://planetarycomputer.microsoft.com/api/stac/v1", metavar="URL", help="a STAC API")
    add("--output", type=main.new_file, default="scene.yaml", metavar="YAML", help="default: scene.yaml")
    add("--max-days", type=amount, default=12, metavar="N", help="that an event pass may come late (default: 12)")
    add("--max-gap", type=amount, default=argparse.SUPPRESS, metavar="DAYS", help="radar to optical event (default: 5)")
    add("--min-coverage", type=share, default=0.5, metavar="SHARE", help="of the area, of a pass (default: 0.5)")
    args = parser.read()
    {None: _map_scene, "check": _check, "plan": _plan}[args.action](args)


def _map_scene(args: argparse.Namespace) -> None:
    weights = [*args.export.glob("*.safetensors")] if args.export else [args.ckpt] if args.ckpt else []
    if not args.scene or not args.output or len(weights) != 1:
        what = "map needs --scene, --output, and --ckpt or --export with one .safetensors"
        raise UsageError(what, where=args.export, fix="floodrepro map --help")
    from floodrepro.mapping.reader import list_problems
    from floodrepro.mapping.scene import name_of, read_scene

    scene = read_scene(args.scene)  # what is wrong with it is answered before the slow import
    [args.ckpt] = weights
    files, overrides, _ = model.read_recipe(args)
    problems = list_problems(scene, args.max_gap, args.min_seen)
    for problem in problems:
        console.warn(problem)
    if problems and not args.anyway:
        fix = "mend it, or --anyway: map.json will list them"
        raise DataError(f"problems of the scene, listed above: {len(problems)}", where=args.scene, fix=fix)
    cli = model.parse(files, overrides)
    import torch

    from floodrepro.mapping.mapper import Network, map_scene
    from floodrepro.training.checkpoint import read_checkpoint

    network = Network(cli, read_checkpoint(args.ckpt))
    wanted = [(m, step) for m, steps in network.steps.items() for step in steps]
    missing = [name_of(*key) for key in wanted if key not in scene.acquisitions]
    if missing and args.missing == "refuse":
        raise DataError(f"the scene lacks {', '.join(missing)}", where=args.scene, fix="add them, or --missing zero")
    if missing:
        console.warn(f"the scene lacks {', '.join(missing)}, filled as training fills what is missing")
    record = {"weights": {"file": args.ckpt.name, "sha256": sha256_of(args.ckpt)}, "device": str(network.device)}
    record |= {"recipe_sha256": recipes.fingerprint(cli.recipe), "filled": missing, "problems": problems}
    record["versions"] = {"floodrepro": __version__, "torch": torch.__version__}
    record["precision"] = cli.recipe.get("trainer", {}).get("precision")
    result = map_scene(network, scene, _plan_of(args, cli.recipe), args.output, record)
    shares = result["shares_of_area"]
    lines = [f"{name:<25} {value:10.3f} km²" for name, value in result["km2"].items()]
    lines += [f"{name:<25} {part:10.1%} of the area" for name, part in shares.items() if part]
    console.emit(result, "\n".join([*lines, str(args.output)]), args.format)
    if args.permanent and not result["km2"][result["names"][result["permanent"]]]:
        console.warn(f"{args.permanent} shows no water that the map has seen")
    if shares["seen"] < args.min_seen:
        why = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != "seen")
        what = f"only {shares['seen']:.0%} of the area was seen (--min-seen {args.min_seen:g}; {why})"
        fix = "find a pass that shows it; the map is there all the same"
        if not result["km2"]["area"]:
            what, fix = "no pixel of 10 m has its middle within the area", "give a larger area"
        raise DataError(what, where=args.output, fix=fix)


def _plan_of(args: argparse.Namespace, recipe: recipes.Recipe) -> dict[str, Any]:
    from safetensors import safe_open

    from floodrepro.data.protocols import protocol_of

    names, positive = list(protocol_of(recipe).class_names), protocol_of(recipe).positive_class
    if args.ckpt.suffix == ".safetensors":  # the YAML of an export has impactmesh's data module: it names no classes
        with safe_open(str(args.ckpt), framework="np") as file:
            said = file.metadata() or {}
        names = json.loads(said.get("class_names", "null")) or names
        positive = int(said.get("positive_class", positive))
    permanent = next((i for i, name in enumerate(names) if "permanent" in name), None)
    if args.permanent and permanent is None:
        names, permanent = [*names, "permanent water"], len(names)
    tiles = recipe["model"]["init_args"].get("tiled_inference_parameters") or {}
    crop = args.crop or tiles.get("h_crop", 256)
    stride = (None if args.crop else tiles.get("h_stride")) or crop * 13 // 16  # 208 of 256, as the recipes have it
    if not 1 <= stride <= crop or crop % 32:
        raise UsageError(f"crop {crop} and stride {stride}: a crop is a multiple of 32, a stride at most the crop")
    plan = {"names": names, "positive": positive, "permanent": permanent, "crop": crop, "stride": stride}
    plan |= {"threshold": args.threshold, "min_hectares": args.min_hectares}
    return plan | {"permanent_file": str(args.permanent.absolute()) if args.permanent else None}


def _check(args: argparse.Namespace) -> None:
    from floodrepro.evaluation import chip_table
    from floodrepro.evaluation.metrics import class_scores
    from floodrepro.mapping.mapper import compare_map

    if args.output and args.output.suffix != ".parquet":
        raise UsageError(f"{args.output} would be a Parquet file", where="--output", fix="name it .parquet")
    table = compare_map(args.map, args.truth, args.truth_value)
    counts, unseen = table.counts.sum(axis=0), int(table.unseen.sum())
    result = {name: class_scores(counts)[name] for name in ("iou", "precision", "recall")}
    result |= {"seen_share": float(counts.sum() / max(counts.sum() + unseen, 1)), "tiles": len(table)}
    if args.output:
        chip_table.write_table(table, args.output)
    console.emit(result, console.columns(list(result.items())), args.format)


def _plan(args: argparse.Namespace) -> None:
    from shapely.errors import ShapelyError

    from floodrepro.mapping import plan
    from floodrepro.mapping.scene import parse_time, read_area

    event = parse_time(args.event, "--event")
    where = {"file": os.path.relpath(args.aoi, args.output.parent)} if args.aoi else {"box": args.box}
    area = read_area(where, args.output.parent)
    limits = {name: getattr(args, name) for name in ("max_days", "max_gap", "min_coverage")}
    items = plan.search(args.stac, area, event)
    try:
        made = plan.make_scene(items, area, event, datetime.now(UTC), limits)
    except (KeyError, TypeError, ValueError, AttributeError, ShapelyError) as error:
        what, fix = f"an item cannot be used: {error!r}", "use a STAC API with items as Planetary Computer has them"
        raise FloodreproError(what, where=console.public(args.stac), fix=fix) from error
    scene = {"area": where, "stac": console.public(args.stac), **made}
    write_atomically(args.output, f"# By floodrepro map plan; change what you like.\n{recipes.to_yaml(scene)}")
    console.emit(scene, str(args.output), args.format)
