"""Measure speed as ratios, side by side in one run: bench data, bench train, bench guard."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format

_AGAINST = "plain TerraTorch (default), or the options that may change roundings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="data|train|guard")
    data = actions.add_parser("data", prog=f"{parser.prog} data", help="reading chips, beside stock impactmesh")
    data.add_argument("--against", choices=("impactmesh",), default="impactmesh", help="what it is compared with")
    data.add_argument("--config", default="terramind_v1_base_impactmesh_flood_amd", metavar="YAML")
    data.add_argument("--chips", type=int, default=24, metavar="N", help="generated chips, about 60 %% are read")
    data.add_argument("--size", type=int, default=256, metavar="PX", help="a chip's edge in pixels (default: 256)")
    data.add_argument("--rounds", type=int, default=7, metavar="N", help="passes that count (default: 7)")
    _add_output(data)
    train = actions.add_parser("train", prog=f"{parser.prog} train", help="training, beside plain TerraTorch")
    train.add_argument("--against", choices=("terratorch", "options"), default="terratorch", help=_AGAINST)
    train.add_argument("--rounds", type=int, default=3, metavar="N", help="processes of each side (default: 3)")
    guard = actions.add_parser("guard", prog=f"{parser.prog} guard", help="steps with the guard, beside steps without")
    for action, steps in ((train, 16), (guard, 64)):
        action.add_argument("--config", default="terramind_v1_tiny_impactmesh_flood", metavar="YAML")
        action.add_argument("--batch", type=int, default=4, metavar="N", help="chips in a batch (default: 4)")
        action.add_argument("--size", type=int, default=64, metavar="PX", help="a chip's edge (default: 64)")
        action.add_argument(
            "--steps", type=int, default=steps, metavar="N", help=f"steps that count (default: {steps})"
        )
        action.add_argument("--precision", choices=recipes.PRECISIONS, default="fp32", help="default: fp32")
        _add_output(action)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    add_format(parser)


def _data(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from floodrepro.data.synth import generate

    recipe = recipes.read(recipes.find(args.config))
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        roots = {layout: Path(folder) / layout for layout in ("extracted", "hub")}
        for layout, root in roots.items():
            console.say(f"generating {args.chips} chips of {args.size} px, {layout}")
            generate(root, events=3, chips=args.chips, size=args.size, protocol="v0", seed=1, layout=layout)
        console.say("loading TerraTorch (10 to 20 s), then measuring")
        from floodrepro.system.bench_data import bench

        result = bench(recipe, roots["extracted"], roots["hub"], args.rounds)
    result["chip_pixels"], result["recipe_sha256"] = args.size, recipes.fingerprint(recipe)
    rows = [["chips per second", "median", "p10", "p90"]]
    rows += [
        [name, *(f"{rate[q]:.1f}" for q in ("median", "p10", "p90"))]
        for name, rate in {
            **result["chips_per_second"],
            **{f"loader, {n} workers": r for n, r in result["workers"]["chips_per_second"].items()},
        }.items()
    ]
    ratios = {**result["ratios"], "two workers / one": result["workers"]["two workers / one"]}
    rows_of_ratios = [["ratio", "median", "min", "max"]]
    rows_of_ratios += [[name, *(f"{r[q]:.2f}" for q in ("median", "min", "max"))] for name, r in ratios.items()]
    text = f"{console.columns(rows)}\n\n{console.columns(rows_of_ratios)}\n\n{result['what']}; {result['device']}"
    return result, text


def _training(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from floodrepro.data.synth import generate

    recipe = _for_bench(recipes.read(recipes.find(args.config)), args)
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        chips = 2 * args.batch
        console.say(f"generating {chips} training chips of {args.size} px")
        generate(Path(folder), events=8, chips=max(2 * chips, 16), size=args.size, protocol="v0", seed=1)
        console.say("loading TerraTorch (10 to 20 s), then measuring")
        from floodrepro.system import bench_guard, bench_train

        if args.action == "guard":
            result = bench_guard.bench_guard(recipe, Path(folder), steps=args.steps)
            share, limit = result["share_of_a_step"], result["limit"]
            text = (
                f"in the guard's hooks  {share:.2%} of a step (limit {limit:.0%})\n"
                f"steps with / without  {result['ratio']:.3f}\n\n{result['what']}"
            )
            return result, text
        sides = bench_train.SIDES[args.against]
        result = bench_train.bench(recipe, Path(folder), sides, steps=args.steps, rounds=args.rounds)
    result["chip_pixels"] = args.size
    rows = [["", "chips/s", "p10", "p90", "peak GiB", "loss at step 20"]]
    for name, rate in result["chips_per_second"].items():
        peak = ", ".join(f"{v:.2f}" for v in result["peak_memory_gib"][name].values())
        figures = [f"{rate[q]:.2f}" for q in ("median", "p10", "p90")]
        rows.append([name, *figures, peak, f"{result['loss_at_step_20'][name]:.8f}"])
    ratios = [["chips/s ratio", "median", "min", "max", "memory"]]
    ratios += [[name, *(f"{r[q]:.3f}" for q in ratios[0][1:])] for name, r in result["ratios"].items()]
    return result, f"{console.columns(rows)}\n\n{console.columns(ratios)}\n\n{result['what']}; {result['device']}"


def _for_bench(recipe: recipes.Recipe, args: argparse.Namespace) -> recipes.Recipe:
    """Random weights, the asked batch and precision, chips read by the training process itself."""
    recipe["trainer"]["precision"] = recipes.PRECISIONS[args.precision]
    recipe["data"]["init_args"] |= {"batch_size": args.batch, "num_workers": 0}
    recipe["model"]["init_args"]["model_args"]["backbone_pretrained"] = False
    return recipe


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    result, text = _data(args) if args.action == "data" else _training(args)
    if args.output:
        import json

        from floodrepro.run_folder import write_atomically

        write_atomically(args.output, json.dumps(result, indent=2) + "\n")
    console.emit(result, text, args.format)
    return 0
