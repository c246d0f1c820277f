"""``floodrepro doctor`` and ``bench``: what this machine can do, and how fast."""

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format, read_recipe
from floodrepro.errors import UsageError
from floodrepro.recipe import PRECISIONS
from floodrepro.system import doctor, environment

# What is not given, by whether there is a GPU. On one, train and test are made to end within 8 minutes together.
_BASE, _TINY = "terramind_v1_base_impactmesh_flood_amd", "terramind_v1_tiny_impactmesh_flood"
_ON_GPU: dict[str, Any] = {"config": _BASE, "precision": ["fp16", "bf16"], "batch": 16, "size": 256}
_ON_CPU: dict[str, Any] = {"config": _TINY, "precision": ["fp32"], "batch": 2, "size": 64}


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--config", action="append", metavar="YAML", help="judge the machine for this recipe")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="the data set's folder (default: the recipe's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision")
    add_format(parser)
    parser.epilog = "With --config, overrides as in fit: --data.init_args.num_workers 2\n"


def run_doctor(args: argparse.Namespace) -> int:
    """Look at this machine before a run does: torch, packages, GPU, memory, disk, data, and what to do about each."""
    if (args.overrides or args.data_root or args.precision) and not args.config:
        raise UsageError("overrides need the recipe that they change", fix="--config YAML")
    recipe = read_recipe(args)[2] if args.config else None
    findings = [*doctor.examine(recipe), *([doctor.check_chips(recipe)] if recipe else [])]
    count = Counter(finding.status for finding in findings)
    rows = []
    for finding in findings:
        rows.append([finding.status, finding.name, finding.detail])
        if finding.fix:
            rows.append(["", "", f"to do: {finding.fix}"])
    sums = ", ".join(f"{count[status]} {status}" for status in ("ok", "warn", "fail"))
    data = {"ok": not count["fail"], "findings": [asdict(finding) for finding in findings]}
    console.emit(data, f"{console.columns(rows, right_from=3)}\n\n{sums}", args.format)
    return 1 if count["fail"] else 0


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("action", choices=("train", "test", "data"), help="what is measured")
    add("--config", metavar="YAML", help="default: the base recipe on a GPU, the tiny one on a CPU")
    add("--precision", action="append", choices=PRECISIONS, help="may be given several times")
    add("--batch", type=int, metavar="N", help="chips in a batch")
    add("--size", type=int, metavar="PX", help="edge of a chip in pixels")
    add("--steps", type=int, default=20, metavar="N", help="steps that count (default: 20)")
    add("--rounds", type=int, default=2, metavar="N", help="processes of each side (default: 2)")
    add("--workers", type=int, metavar="N", help="loader processes (default: the recipe's; CPU: 0)")
    add("--output", type=Path, metavar="DIR", help="folder for ACTION-PRECISION.json")
    add_format(parser)


def run_bench(args: argparse.Namespace) -> int:
    """Measure speed beside plain TerraTorch, on generated chips: training, testing, or reading alone."""
    from floodrepro.data.synth import generate
    from floodrepro.system.bench import bench, describe

    gpu = bool(environment.ask_torch()["devices"])
    chosen = {name: getattr(args, name) or value for name, value in (_ON_GPU if gpu else _ON_CPU).items()}
    if args.action == "data":  # the model is built and not used
        chosen |= {"config": args.config or _TINY, "precision": chosen["precision"][:1]}
    recipe = recipes.read_yaml(recipes.find(chosen["config"]))
    changes = [f"--data.init_args.batch_size={chosen['batch']}"]
    if not gpu or args.workers is not None:
        changes.append(f"--data.init_args.num_workers={args.workers or 0}")
    # Half of the chips are for training and a quarter is for each other split.
    chips = max(16, 4 * chosen["batch"] * (args.steps + 2 if args.action == "test" else 1))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        root = Path(folder) / "chips"
        console.say(f"generating {chips} chips of {chosen['size']} px")
        generate(root, events=8, chips=chips, size=chosen["size"], protocol="v0", seed=1)
        changes += recipes.data_overrides(root, recipe)
        for name in chosen["precision"]:
            place = Path(folder) / name
            place.mkdir()
            folded = recipes.fold([recipe], [*changes, f"--trainer.precision={PRECISIONS[name]}"])
            found = bench(args.action, folded, place, steps=args.steps, rounds=args.rounds)
            results[name] = {"config": chosen["config"], "chip_pixels": chosen["size"], **found}
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                (args.output / f"{args.action}-{name}.json").write_text(json.dumps(results[name], indent=2) + "\n")
    console.emit(results, "\n\n".join(describe(found) for found in results.values()), args.format)
    return 0
