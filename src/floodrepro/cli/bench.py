"""Measure speed as ratios, side by side in one run: bench data, bench train, bench test, bench guard."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format

_AGAINST = "plain TerraTorch, the options that may change roundings, or both (default where there is a GPU)"
# What an action takes where nothing else is given: without a GPU a run ends within a minute on two cores, and with one
# it is the published recipe that fills it.
_TINY, _BASE = "terramind_v1_tiny_impactmesh_flood", "terramind_v1_base_impactmesh_flood_amd"
_SMALL = {"config": _TINY, "precision": "fp32", "size": 64, "batch": 4, "rounds": 3}
_WHOLE = {"config": _BASE, "precision": "fp16", "size": 256, "batch": 16, "rounds": 3}
_DEFAULTS = {  # by action, then without and with a GPU
    "train": (
        _SMALL | {"against": "terratorch", "batch": 2, "steps": 12, "rounds": 2},
        _WHOLE | {"against": "all", "steps": 40},
    ),
    "test": (_SMALL | {"batches": 16, "rounds": 5}, _WHOLE | {"batches": 64}),  # 18 of them warm-up: workers read ahead
    "guard": (_SMALL | {"steps": 64}, _WHOLE | {"steps": 64}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="data|train|test|guard")
    data = actions.add_parser("data", prog=f"{parser.prog} data", help="reading chips, beside stock impactmesh")
    data.add_argument("--against", choices=("impactmesh",), default="impactmesh", help="what it is compared with")
    data.add_argument("--config", default="terramind_v1_base_impactmesh_flood_amd", metavar="YAML")
    data.add_argument("--chips", type=int, default=24, metavar="N", help="generated chips, about 60 %% are read")
    data.add_argument("--size", type=int, default=256, metavar="PX", help="a chip's edge in pixels (default: 256)")
    data.add_argument("--rounds", type=int, default=7, metavar="N", help="passes that count (default: 7)")
    _add_output(data)
    train = actions.add_parser("train", prog=f"{parser.prog} train", help="training, beside plain TerraTorch")
    train.add_argument("--against", choices=("terratorch", "options", "all"), help=_AGAINST)
    test = actions.add_parser("test", prog=f"{parser.prog} test", help="testing a split, beside plain TerraTorch")
    test.add_argument("--against", choices=("terratorch",), default="terratorch", help="what it is compared with")
    test.add_argument("--batches", type=int, metavar="N", help="batches of a pass, warm-up included")
    guard = actions.add_parser("guard", prog=f"{parser.prog} guard", help="steps with the guard, beside steps without")
    for action in (train, test):
        action.add_argument("--rounds", type=int, metavar="N", help="processes of each side")
    for action in (train, guard):
        action.add_argument("--steps", type=int, metavar="N", help="steps that count")
    for action in (train, test, guard):
        action.epilog = "What is not given depends on whether there is a GPU; the result says what was taken."
        action.add_argument("--config", metavar="YAML")
        action.add_argument("--batch", type=int, metavar="N", help="chips in a batch")
        action.add_argument("--size", type=int, metavar="PX", help="a chip's edge in pixels")
        action.add_argument("--precision", choices=recipes.PRECISIONS)
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
            **{f"workers: {name}": rate for name, rate in result["workers"]["chips_per_second"].items()},
        }.items()
    ]
    ratios = result["ratios"] | {name: ratio for name, ratio in result["workers"].items() if name.startswith("two")}
    rows_of_ratios = [["ratio", "median", "min", "max"]]
    rows_of_ratios += [[name, *(f"{r[q]:.2f}" for q in ("median", "min", "max"))] for name, r in ratios.items()]
    text = f"{console.columns(rows)}\n\n{console.columns(rows_of_ratios)}\n\n{result['what']}; {result['device']}"
    return result, text


def _model(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.config:
        recipes.find(args.config)  # a wrong name is said at once
    console.say("loading TerraTorch (10 to 20 s), then measuring")
    import torch

    from floodrepro.data.synth import generate
    from floodrepro.system import bench_guard, bench_test, bench_train

    gpu = torch.cuda.is_available()
    for name, value in _DEFAULTS[args.action][gpu].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    recipe = _for_bench(recipes.read(recipes.find(args.config)), args, gpu=gpu)
    chips = (
        args.batches * args.batch if args.action == "test" else max(4 * args.batch, 16)
    )  # half of them are trained on
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        root = Path(folder)
        console.say(f"generating {chips} chips of {args.size} px")
        generate(root, events=min(8, max(chips, 3)), chips=chips, size=args.size, protocol="v0", seed=1)
        if args.action == "guard":
            result = bench_guard.bench_guard(recipe, root, steps=args.steps)
        elif args.action == "test":
            result = bench_test.bench(recipe, root, size=args.size, rounds=args.rounds)
        else:
            sides = bench_train.SIDES[args.against]
            result = bench_train.bench(recipe, root, sides, size=args.size, steps=args.steps, rounds=args.rounds)
    result |= {"chip_pixels": args.size, "config": Path(args.config).stem}
    return result, {"guard": _guard_text, "test": _test_text, "train": _train_text}[args.action](result)


def _guard_text(result: dict[str, Any]) -> str:
    return (
        f"in the guard's hooks  {result['share_of_a_step']:.2%} of a step (limit {result['limit']:.0%})\n"
        f"steps with / without  {result['ratio']:.3f}\n\n{result['what']}; {result['device']}"
    )


def _test_text(result: dict[str, Any]) -> str:
    parts = next(iter(result["seconds"].values()))
    rows = [["", "chips/s", "p10", "p90", *(f"s: {part}" for part in parts)]]
    for name, rate in result["chips_per_second"].items():
        figures = [f"{rate[q]:.2f}" for q in ("median", "p10", "p90")]
        rows.append([name, *figures, *(f"{value:.4f}" for value in result["seconds"][name].values())])
    equal = f"largest difference of a metric: {result['largest_difference_of_metrics']:.1e}"
    return f"{console.columns(rows)}\n\n{_ratios_text(result)}\n\n{equal}\n{result['what']}; {result['device']}"


def _train_text(result: dict[str, Any]) -> str:
    matmul = f"of {result['matmul_tflops']['dtype']} matmul"
    rows = [["", "chips/s", "p10", "p90", "TFLOP/s", matmul, "peak GiB", "loss differs by"]]
    for name, rate in result["chips_per_second"].items():
        peak = ", ".join(f"{v:.2f}" for v in result["peak_memory_gib"][name].values())
        figures = [f"{rate[q]:.2f}" for q in ("median", "p10", "p90")]
        share = [f"{result['model_tflops'][name]:.3g}", f"{result['share_of_matmul_rate'][name]:.0%}"]
        differs = result["loss_difference"].get(name)
        rows.append([name, *figures, *share, peak, "-" if differs is None else f"{differs:.1e}"])
    failed = "".join(f"{name} failed: {why}\n" for name, why in result["failed"].items())
    return f"{console.columns(rows)}\n\n{_ratios_text(result)}\n\n{failed}{result['what']}; {result['device']}"


def _ratios_text(result: dict[str, Any]) -> str:
    rows = [["chips/s ratio", "median", "min", "max", "memory"]]
    rows += [[name, *(f"{r[q]:.3f}" for q in rows[0][1:])] for name, r in result["ratios"].items()]
    return console.columns(rows)


def _for_bench(recipe: recipes.Recipe, args: argparse.Namespace, *, gpu: bool) -> recipes.Recipe:
    """Random weights, the asked batch and precision; without a GPU chips are read by the measured process itself."""
    recipe["trainer"]["precision"] = recipes.PRECISIONS[args.precision]
    recipe["data"]["init_args"] |= {"batch_size": args.batch} | ({} if gpu else {"num_workers": 0})
    recipe["model"]["init_args"]["model_args"]["backbone_pretrained"] = False
    return recipe


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    result, text = _data(args) if args.action == "data" else _model(args)
    if args.output:
        import json

        from floodrepro.run_folder import write_atomically

        write_atomically(args.output, json.dumps(result, indent=2) + "\n")
    console.emit(result, text, args.format)
    return 0
