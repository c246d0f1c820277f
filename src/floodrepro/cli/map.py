"""Map a whole scene (map), compare a map with a truth (map check), write a scene from a catalogue (map plan)."""

import argparse
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from floodrepro import __version__, console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.errors import CheckpointError, DataError, UsageError
from floodrepro.recipe import PRECISIONS
from floodrepro.run_folder import config_beside, sha256_of, write_atomically

_CROP, _STRIDE = 256, 208  # of the published recipes
_SENSORS = ("S1RTC", "S2L2A")
_LIMITS = {
    "radar_days": (12.0, "days that the radar's event pass may come late"),
    "optical_days": (15.0, "the same of the optical event pass"),
    "max_gap": (5.0, "days between the two event passes"),
    "min_coverage": (0.5, "share of the area below which a pass does not count"),
}
_EXAMPLES = """\
examples:
  floodrepro map plan --aoi area.geojson --event 2026-08-26 --output scene.yaml
  floodrepro map --export runs/first/export --scene scene.yaml --output flood
  floodrepro map check --map flood --truth flooded.gpkg --output check.parquet

The scene and the files of a map are described in docs/mapping.md. If it is interrupted, run the same command again.
"""


def _from(low: float, high: float = 1e5, kind: type = float) -> Callable[[str], Any]:
    """A flag's type: a number from *low* to *high*, and not NaN."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is no number from {low:g} to {high:g}")
        return kind(text)

    return number


def add_map_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of map and of its actions."""
    parser.epilog = _EXAMPLES
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", type=Path, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    weights.add_argument("--export", type=Path, metavar="DIR", help="folder of an exported pair")
    add = parser.add_argument
    add("--config", action="append", metavar="YAML", help="recipe (default: the one beside the weights)")
    add("--scene", type=Path, metavar="YAML", help="what to map; 'map plan' writes one")
    add("--output", type=Path, metavar="DIR", help="folder for the map")
    add("--precision", choices=PRECISIONS, help="default: the recipe's; fp16 needs a GPU")
    add("--missing", choices=("refuse", "zero"), default="refuse", help="what to do about missing dates and sensors")
    add("--anyway", action="store_true", help="map a scene with problems, and record them")
    add("--max-gap", type=_from(0), default=5, metavar="DAYS", help="radar to optical event (default: 5)")
    add("--min-seen", type=_from(0, 1), default=0.5, metavar="SHARE", help="exit 1 below it (default: 0.5)")
    add("--threshold", type=_from(0, 1), metavar="P", help="probability of the positive class (default: argmax)")
    add("--permanent", type=Path, metavar="FILE", help="raster or polygons of permanent water")
    add("--min-hectares", type=_from(0), default=0.1, metavar="HA", help="smallest polygon (default: 0.1)")
    add("--crop", type=_from(32, kind=int), metavar="PX", help="edge of a tile (default: the recipe's, or 256)")
    add("--stride", type=_from(1, kind=int), metavar="PX", help="between tiles (default: the recipe's, or 13/16 crop)")
    add(
        "--batch",
        type=_from(1, kind=int),
        metavar="N",
        help="tiles in a batch (default: 1 on a CPU, what fits on a GPU)",
    )
    add_format(parser)
    actions = parser.add_subparsers(dest="action", metavar="check|plan")
    check = actions.add_parser("check", prog=f"{parser.prog} check", help="compare a map with a truth")
    add = check.add_argument
    add("--map", type=Path, required=True, metavar="DIR", help="folder of a map")
    add("--truth", type=Path, required=True, metavar="FILE", help="polygons or raster of the flood")
    add("--truth-value", type=int, metavar="N", help="what flood is in a raster (default: all but 0)")
    add("--output", type=Path, metavar="FILE", help="write the chip table there (.parquet)")
    add_format(check)
    plan = actions.add_parser("plan", prog=f"{parser.prog} plan", help="write scene.yaml from a STAC catalogue")
    add = plan.add_argument
    place = plan.add_mutually_exclusive_group(required=True)
    place.add_argument("--aoi", type=Path, metavar="FILE", help="polygons: GeoJSON, GeoPackage")
    place.add_argument("--box", type=float, nargs=4, metavar=("WEST", "SOUTH", "EAST", "NORTH"), help="in degrees")
    add("--event", required=True, help="2026-08-26, or with a time (UTC) 2026-08-26T14:00")
    add("--stac", metavar="URL", help="a STAC API (default: Planetary Computer)")
    add("--sensors", nargs="+", choices=_SENSORS, default=list(_SENSORS), help="default: both")
    add("--output", type=Path, default=Path("scene.yaml"), metavar="YAML", help="default: scene.yaml")
    for name, (value, text) in _LIMITS.items():
        kind = _from(0, 1) if name == "min_coverage" else _from(0)
        add(f"--{name.replace('_', '-')}", type=kind, default=value, metavar="N", help=f"{text} (default: {value:g})")
    add_format(plan)


def run_map(args: argparse.Namespace) -> int:
    """Map a whole scene, compare a map with a truth, or plan a scene."""
    if args.action:
        return {"check": _check, "plan": _plan}[args.action](args)
    for name in ("scene", "output"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is needed", fix="floodrepro map --help")
    from floodrepro.mapping.checks import list_problems
    from floodrepro.mapping.scene import name_of, read_scene

    scene = read_scene(args.scene)  # what is wrong with it is answered before the slow import
    files = sorted(args.export.glob("*.safetensors")) if args.export else [args.ckpt] if args.ckpt else []
    if len(files) != 1 or not files[0].is_file():
        raise CheckpointError("checkpoint not found", where=args.export or args.ckpt, fix="--ckpt FILE or --export DIR")
    problems = list_problems(scene, args.max_gap)
    for problem in problems:
        console.warn(problem)
    if problems and not args.anyway:
        fix = "mend scene.yaml, or map it --anyway: map.json will list them"
        many = "a problem, named" if len(problems) == 1 else f"{len(problems)} problems, listed"
        raise DataError(f"the scene has {many} above", where=args.scene, fix=fix)
    configs = [recipes.find(name) for name in args.config] if args.config else [config_beside(files[0])]
    overrides = [f"--trainer.precision={PRECISIONS[args.precision]}"] if args.precision else []
    console.say("loading TerraTorch (10 to 20 s)")
    import torch

    from floodrepro.mapping.mapper import map_scene
    from floodrepro.mapping.network import Network
    from floodrepro.training.checkpoint import read_checkpoint
    from floodrepro.training.terratorch_cli import RecipeCLI

    cli = RecipeCLI(configs, overrides)
    network = Network(cli, read_checkpoint(files[0]))
    wanted = [(m, step) for m, steps in network.steps.items() for step in steps]
    missing = [name_of(*key) for key in wanted if key not in scene.acquisitions]
    if missing and args.missing == "refuse":
        fix = "add them to scene.yaml, or --missing zero: filled as missing pixels were in training"
        raise DataError(f"the scene lacks {', '.join(missing)}", where=args.scene, fix=fix)
    record = {
        "weights": {"file": files[0].name, "sha256": sha256_of(files[0])},
        "recipe_sha256": recipes.fingerprint(cli.recipe),
        "precision": cli.recipe.get("trainer", {}).get("precision"),
        "device": str(network.device),
        "filled": missing,
        "problems": problems,
        "versions": {"floodrepro": __version__, "torch": torch.__version__},
    }
    result = map_scene(network, scene, _plan_of(args, cli.recipe, files[0]), args.output, record)
    seen = result["shares_of_area"]["seen"]
    text = "\n".join(f"{name:<16} {value:10.3f} km²" for name, value in result["km2"].items())
    console.emit(result, f"{text}\n{args.output}", args.format)
    if seen < args.min_seen:
        why = ", ".join(f"{name} {share:.0%}" for name, share in result["shares_of_area"].items() if name != "seen")
        what = f"only {seen:.0%} of the area was seen (--min-seen {args.min_seen:g}; {why})"
        raise DataError(
            what, where=args.output, fix="find a pass that shows it; the map is there and says what was seen"
        )
    return 0


def _plan_of(args: argparse.Namespace, recipe: recipes.Recipe, checkpoint: Path) -> dict[str, Any]:
    """What flags, recipe and an export's weights ask for."""
    from safetensors import safe_open

    from floodrepro.data.protocols import class_names_of, positive_class_of

    names, positive = class_names_of(recipe), positive_class_of(recipe)
    if checkpoint.suffix == ".safetensors":  # the YAML of an export has impactmesh's data module: it names no classes
        with safe_open(str(checkpoint), framework="np") as file:
            said = file.metadata() or {}
        names = json.loads(said.get("class_names", "null")) or names
        positive = int(said.get("positive_class", positive))
    permanent = next((i for i, name in enumerate(names) if "permanent" in name), None)
    if args.permanent and permanent is None:
        names, permanent = [*names, "permanent water"], len(names)
    tiles = recipe["model"]["init_args"].get("tiled_inference_parameters") or {}
    crop = args.crop or tiles.get("h_crop", _CROP)
    stride = args.stride or (None if args.crop else tiles.get("h_stride")) or crop * _STRIDE // _CROP
    if not 1 <= stride <= crop or crop % 32:
        raise UsageError(f"crop {crop} and stride {stride}: a crop is a multiple of 32, a stride at most the crop")
    plan = {"names": names, "positive": positive, "permanent": permanent, "crop": crop, "stride": stride}
    plan |= {name: getattr(args, name) for name in ("threshold", "batch", "min_hectares")}
    return plan | {"permanent_file": str(args.permanent) if args.permanent else None}


def _refuse_output(path: Path | None) -> None:
    """Say before the work that a file cannot be written."""
    if path and path.exists():
        raise UsageError("the file exists already and is not overwritten", where=path, fix="--output FILE")
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder cannot be made: {error}", where=path, fix="--output FILE") from error


def _check(args: argparse.Namespace) -> int:
    """Compare a map with a truth."""
    from floodrepro.evaluation import chip_table
    from floodrepro.evaluation.metrics import class_scores
    from floodrepro.mapping.compare import compare_map

    _refuse_output(args.output)
    table = compare_map(args.map, args.truth, args.truth_value)
    counts, unseen = table.counts.sum(axis=0), int(table.unseen.sum())
    result = {name: class_scores(counts)[name] for name in ("iou", "precision", "recall")}
    result |= {"seen_share": float(counts.sum() / max(counts.sum() + unseen, 1)), "tiles": len(table)}
    if args.output:
        chip_table.write_table(table, args.output)
    rows = [[name, "-" if value is None else f"{value:.4f}"] for name, value in result.items() if name != "tiles"]
    console.emit(result, console.columns(rows), args.format)
    return 0


def _plan(args: argparse.Namespace) -> int:
    """Write a scene from a STAC catalogue."""
    from floodrepro.mapping.plan import PLANETARY_COMPUTER, Area, make_scene, public, search
    from floodrepro.mapping.scene import STEPS, parse_time

    _refuse_output(args.output)
    event, area, url = parse_time(args.event, "--event"), Area(args.aoi or args.box), args.stac or PLANETARY_COMPUTER
    items = search(url, area, event, [*args.sensors, "DEM"])
    limits = {name: getattr(args, name) for name in _LIMITS}
    where = {"file": os.path.relpath(args.aoi, args.output.parent)} if args.aoi else {"box": args.box}
    scene: dict[str, Any] = {"area": where, "stac": public(url)}
    scene |= make_scene(items, area, event, datetime.now(UTC), limits)
    text = yaml.safe_dump(scene, sort_keys=False, width=1000, allow_unicode=True)
    write_atomically(args.output, f"# Written by floodrepro map plan; change what you like.\n{text}")
    lines = []
    for sensor, step in [(sensor, step) for sensor in args.sensors for step in STEPS]:
        found = scene[sensor][step]
        line = "{time}  orbit {orbit}  coverage {coverage:.0%}" if "time" in found else "missing"
        line += "  cloud {cloud:.0f} %" * ("cloud" in found)
        lines.append(f"{sensor}  {step:<12}  {line.format(**found)}")
    console.emit(scene, "\n".join([*lines, str(args.output)]), args.format)
    return 0
