"""What is here: the shipped recipes (configs), your runs (runs), this machine (doctor) and its speed (bench)."""

import contextlib
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from floodrepro import console, recipe as recipes
from floodrepro.cli import main, model
from floodrepro.errors import FloodreproError
from floodrepro.run_folder import RunFolder
from floodrepro.system import doctor, environment

# What is not given, by whether there is a GPU. On one, train and test are made to end within 8 minutes together.
_BASE, _TINY = "terramind_v1_base_impactmesh_flood_amd", "terramind_v1_tiny_impactmesh_flood"
_ON_GPU: dict[str, Any] = {"config": _BASE, "precision": ["fp16", "bf16"], "batch": 16, "size": 256}
_ON_CPU: dict[str, Any] = {"config": _TINY, "precision": ["fp32"], "batch": 2, "size": 64}


def _configs(parser: main.Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show")
    actions.add_parser("ls", help="names, and the first line of each")
    actions.add_parser("show", help="print one; > mine.yaml keeps it").add_argument("name")
    args = parser.read()
    if args.action == "show":
        print(recipes.find(args.name).read_text(encoding="utf-8"), end="")
        return
    rows = [[name, file.read_text(encoding="utf-8").partition("\n")[0][2:]] for name, file in recipes.shipped().items()]
    console.emit(dict(rows), console.columns(rows, right_from=2), args.format)


def _runs(parser: main.Parser) -> None:
    parser.add_argument("action", choices=("ls",), help="one line a run, the newest first")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    args = parser.read()
    shipped = {recipes.fingerprint(recipes.read_yaml(file)): name for name, file in recipes.shipped().items()}
    shown, found = ("name", "recipe", "status", "monitor", "best", "age"), []
    for file in filter(Path.is_file, args.runs_root.rglob("run.json")):  # a FIFO would wait
        entry = dict.fromkeys(shown) | {"name": file.parent.name, "path": str(file.parent), "started": ""}
        # One odd record hides no other run.
        with contextlib.suppress(FloodreproError, AttributeError, LookupError, TypeError, ValueError, OverflowError):
            record = RunFolder(file.parent).read_record()
            digest, monitor, started = record["recipe_sha256"], record.get("monitor"), record["started"]
            age = datetime.now(UTC).replace(microsecond=0) - datetime.fromisoformat(started)
            best = (record.get("best_metrics") or {}).get(monitor)  # a running run has none yet
            entry |= {"recipe": shipped.get(digest) or f"sha256 {digest[:12]}", "status": record["status"]}
            entry |= {"monitor": monitor, "best": best and float(best), "age": str(age), "started": started}
        found.append(entry)
    found.sort(key=lambda run: run["started"] or "", reverse=True)
    text = console.columns([shown, *([run[name] for name in shown] for run in found)], right_from=9)
    console.emit({"runs": found}, text if found else f"no runs below {args.runs_root}", args.format)


def _doctor(parser: main.Parser) -> int:
    model.add_recipe_flags(parser, default="none; the machine alone is looked at")
    args = parser.read(overrides=True)
    of_recipe = [value for name, value in vars(args).items() if name != "format" and value]
    recipe = model.read_recipe(args)[2] if of_recipe else None
    findings = [*doctor.examine(recipe), *([doctor.check_chips(recipe)] if recipe else [])]
    rows, statuses = [], [finding.status for finding in findings]
    for finding in findings:
        rows.append([finding.status, finding.name, finding.detail])
        if finding.fix:
            rows.append(["", "", f"to do: {finding.fix}"])
    sums = ", ".join(f"{statuses.count(status)} {status}" for status in ("ok", "warn", "fail"))
    data = {"ok": "fail" not in statuses, "findings": [vars(finding) for finding in findings]}
    console.emit(data, f"{console.columns(rows, right_from=3)}\n\n{sums}", args.format)
    return 0 if data["ok"] else 1


def _bench(parser: main.Parser) -> None:
    add = parser.add_argument
    add("action", choices=("train", "test", "data"), help="what is measured")
    add("--config", metavar="YAML", help="default: the base recipe for train and test on a GPU, else the tiny one")
    add("--precision", action="append", choices=recipes.PRECISIONS, help="may be given several times")
    count = main.between(1, 10**6, int)
    add("--batch", type=count, metavar="N", help="chips in a batch")
    add("--size", type=count, metavar="PX", help="edge of a chip in pixels")
    add("--steps", type=count, default=20, metavar="N", help="steps that count (default: 20)")
    add("--rounds", type=count, default=2, metavar="N", help="processes of each side (default: 2)")
    add("--output", type=Path, metavar="DIR", help="folder for ACTION-PRECISION.json")
    parser.epilog = "Overrides as in fit: --data.init_args.num_workers 8 (default: the recipe's; on a CPU 0)\n"
    args = parser.read(overrides=True)
    from floodrepro.data.synth import generate
    from floodrepro.system.bench import bench, describe

    gpu = bool(environment.ask_torch()["devices"])
    chosen = {name: getattr(args, name) or value for name, value in (_ON_GPU if gpu else _ON_CPU).items()}
    if args.action == "data":  # the model is built and not used
        chosen |= {"config": args.config or _TINY, "precision": chosen["precision"][:1]}
    recipe, batch, size = recipes.read_yaml(recipes.find(chosen["config"])), chosen["batch"], chosen["size"]
    changes = [f"--data.init_args.batch_size={batch}", *([] if gpu else ["--data.init_args.num_workers=0"])]
    # Half of the chips are for training and a quarter is for each other split.
    chips = max(16, 4 * batch * (args.steps + 2 if args.action == "test" else 1))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="floodrepro-bench-") as folder:
        root = Path(folder) / "chips"
        console.say(f"generating {chips} chips of {size} px")
        generate(root, events=8, chips=chips, size=size, protocol="v0", seed=1)
        changes += [*recipes.data_overrides(root, recipe), *args.overrides]
        for name in chosen["precision"]:
            place = Path(folder) / name
            place.mkdir()
            folded = recipes.fold([recipe], [*changes, f"--trainer.precision={recipes.PRECISIONS[name]}"])
            found = bench(args.action, folded, place, steps=args.steps, rounds=args.rounds)
            results[name] = {"config": chosen["config"], "chip_pixels": size, **found}
            if args.output:
                args.output.mkdir(parents=True, exist_ok=True)
                (args.output / f"{args.action}-{name}.json").write_text(json.dumps(results[name], indent=2) + "\n")
    console.emit(results, "\n\n".join(describe(found) for found in results.values()), args.format)
