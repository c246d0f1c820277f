"""Measure speed as ratios, side by side in one run: bench data compares readers of chips."""

import argparse
import tempfile
from pathlib import Path

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="data")
    data = actions.add_parser("data", prog=f"{parser.prog} data", help="reading chips, beside stock impactmesh")
    data.add_argument("--against", choices=("impactmesh",), default="impactmesh", help="what it is compared with")
    data.add_argument("--config", default="terramind_v1_base_impactmesh_flood_amd", metavar="YAML")
    data.add_argument("--chips", type=int, default=24, metavar="N", help="generated chips, about 60 %% are read")
    data.add_argument("--size", type=int, default=256, metavar="PX", help="a chip's edge in pixels (default: 256)")
    data.add_argument("--rounds", type=int, default=7, metavar="N", help="passes that count (default: 7)")
    data.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    add_format(data)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from floodrepro.data.synth import generate
    from floodrepro.run_folder import write_atomically

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
    if args.output:
        write_atomically(args.output, json.dumps(result, indent=2) + "\n")
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
    console.emit(result, text, args.format)
    return 0
