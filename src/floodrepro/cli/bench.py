"""Measure speed beside plain TerraTorch, on generated chips: training, testing, or reading alone."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.doctor import fold_recipe
from floodrepro.cli.shared import add_format
from floodrepro.recipe import PRECISIONS

ACTIONS = ("train", "test", "data")
# What is not given, by whether there is a GPU. On one, train and test are made to end within 8 minutes together.
_BASE, _TINY = "terramind_v1_base_impactmesh_flood_amd", "terramind_v1_tiny_impactmesh_flood"
_ON_GPU: dict[str, Any] = {"config": _BASE, "precision": ["fp16", "bf16"], "batch": 16, "size": 256}
_ON_CPU: dict[str, Any] = {"config": _TINY, "precision": ["fp32"], "batch": 2, "size": 64}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("action", choices=ACTIONS, help="what is measured")
    parser.add_argument("--config", metavar="YAML", help="default: the base recipe on a GPU, the tiny one on a CPU")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="may be given several times")
    parser.add_argument("--batch", type=int, metavar="N", help="chips in a batch")
    parser.add_argument("--size", type=int, metavar="PX", help="edge of a chip in pixels")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps that count (default: 20)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="processes of each side (default: 2)")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes (default: the recipe's; CPU: 0)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for ACTION-PRECISION.json")
    add_format(parser)


def run_bench(args: argparse.Namespace) -> int:
    """Measure speed beside plain TerraTorch, on generated chips: training, testing, or reading alone."""
    from floodrepro.system.doctor import ask_torch

    gpu = bool(ask_torch()["devices"])
    chosen = {name: getattr(args, name) or value for name, value in (_ON_GPU if gpu else _ON_CPU).items()}
    if args.action == "data":  # the model is built and not used
        chosen |= {"config": args.config or _TINY, "precision": chosen["precision"][:1]}
    recipe = recipes.read(recipes.find(chosen["config"]))
    from floodrepro.data.synth import generate
    from floodrepro.system.bench import bench

    batch, size = chosen["batch"], chosen["size"]
    # Half of the chips are for training and a quarter is for each other split.
    chips = 4 * batch * (args.steps + 2 if args.action == "test" else 1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        root = Path(folder) / "chips"
        console.say(f"generating {max(chips, 16)} chips of {size} px")
        generate(root, events=8, chips=max(chips, 16), size=size, protocol="v0", seed=1)
        for precision in chosen["precision"]:
            workers = [] if gpu and args.workers is None else [f"--data.init_args.num_workers={args.workers or 0}"]
            changes = [f"--trainer.precision={PRECISIONS[precision]}", f"--data.init_args.batch_size={batch}", *workers]
            folded = fold_recipe([recipe], [*recipes.data_overrides(root, recipe), *changes])
            place = Path(folder) / precision
            place.mkdir()
            found = bench(args.action, folded, place, steps=args.steps, rounds=args.rounds)
            results[precision] = {"config": chosen["config"], "chip_pixels": size, **found}
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                file = args.output / f"{args.action}-{precision}.json"
                file.write_text(json.dumps(results[precision], indent=2) + "\n", encoding="utf-8")
    console.emit(results, "\n\n".join(_text(found) for found in results.values()), args.format)
    return 0


def _text(found: dict[str, Any]) -> str:
    rows = [["", "chips/s", "p10", "p90", "peak GiB"]]
    for side, rate in found["chips_per_second"].items():
        peak = ", ".join(
            f"{kind.removesuffix('_gib')} {value:.2f}" for kind, value in found["peak_memory"][side].items()
        )
        rows.append([side, *(f"{rate[q]:.2f}" for q in ("median", "p10", "p90")), peak])
    ratio = found["ratio"]
    lines = [f"times as fast: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f} by round)"]
    lines.append(f"times the memory: {found['memory_ratio']:.3f}")
    for kind in ("loss", "metrics"):
        if f"{kind}_difference" in found:
            lines.append(f"largest difference of the {kind}: {found[f'{kind}_difference']:.1e}")
    lines.append(f"{found['what']}; {found['precision']}, batches of {found['batch_size']}")
    return console.columns(rows) + "\n\n" + "\n".join(lines)
