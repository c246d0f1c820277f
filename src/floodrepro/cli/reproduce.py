"""Every stage from the download to the verdict, as a list of commands. Run the same command again to resume."""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from floodrepro import __version__, console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.data.protocols import PROTOCOLS
from floodrepro.errors import SIGNALLED, RunFolderError, UsageError
from floodrepro.recipe import PRECISIONS
from floodrepro.run_folder import DECLARATION, RunFolder, timestamp, write_atomically

SIZES = ("base", "tiny")
STAGES = ("doctor", "weights", "fetch", "synth", "audit", "fit", "test", "reference", "export", "verify", "card")
DEMO_CHIPS = ("--events", "16", "--chips", "128", "--size", "64", "--protocol", "v0", "--seed", "42")
DEMO_REFERENCE_EPOCHS = 4  # of the demo's second model: enough to have learnt something, few enough to differ
DEMO_MIN_IOU = 0.5  # flood IoU that the demo promises on events that its model has not seen
_DEMO_NOTE = "generated chips: the demo shows that every stage works, not how well floods are mapped"

_EPILOG = """\
examples:
  floodrepro reproduce --demo
  floodrepro reproduce --data-root /data/ImpactMesh-Flood --dry-run
  floodrepro reproduce --seeds 42,43,44,45,46 --precision bf16
  floodrepro reproduce --from verify

Any key of the recipe can be overridden as in fit. A finished stage is skipped while its command, floodrepro's version
and its outputs stay the same. The exit code is that of the first stage that fails.
"""


@dataclass(frozen=True)
class Stage:
    """One command of the list.

    Args:
        name: One of STAGES, with a seed where there are several.
        command: Arguments after ``floodrepro``.
        outputs: Files whose size and time say whether the stage is still done.
    """

    name: str
    command: list[str]
    outputs: list[Path]


def add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    published = [name for name in PROTOCOLS if name != "custom"]
    parser.add_argument("--demo", action="store_true", help="generated chips and TerraMind tiny, on a CPU in minutes")
    parser.add_argument("--protocol", choices=published, default="v1-binary", help="default: v1-binary")
    parser.add_argument("--size", choices=SIZES, default="base", help="TerraMind's size (default: base)")
    parser.add_argument("--config", metavar="YAML", help="another recipe than that of --protocol and --size")
    parser.add_argument("--seeds", metavar="S,S,…", help="declared runs, each is tested (default: the recipe's seed)")
    parser.add_argument("--precision", choices=PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="default: ImpactMesh-Flood, the demo's: below it")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/RECIPE-reproduction, or demo")
    parser.add_argument("--revision", metavar="SHA", default="main", help="of the data: branch, tag or commit")
    parser.add_argument("--reference", metavar="FILE|none", help="a checkpoint (default: IBM's, from the hub)")
    parser.add_argument("--from", dest="first", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    parser.add_argument("--until", dest="last", choices=STAGES, metavar="STAGE", help="the last stage to run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    add_format(parser)
    parser.epilog = _EPILOG


def run_reproduce(args: argparse.Namespace) -> int:
    """Every stage from the download to the verdict, as a list of commands. Run the same command again to resume."""
    stages, run_dir, seeds = demo_stages(args) if args.demo else real_stages(args)
    first, last = STAGES.index(args.first or STAGES[0]), STAGES.index(args.last or STAGES[-1])
    stages = [stage for stage in stages if first <= STAGES.index(stage.name.split("-")[0]) <= last]
    if args.dry_run:
        lines = [f"floodrepro {shlex.join(stage.command)}" for stage in stages]
        console.emit({"commands": {stage.name: stage.command for stage in stages}}, "\n".join(lines), args.format)
        return 0
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".reproduce.lock", timeout=0):
            _declare(run_dir, seeds, stages)
            for number, stage in enumerate(stages, 1):
                if code := _run(stage, run_dir, f"[{number}/{len(stages)}] {stage.name}"):
                    console.say(f"stage {stage.name} ended with exit code {code}; run the same command again to resume")
                    return code
    except Timeout as error:
        raise RunFolderError("another reproduction is running here", where=run_dir, fix="another --run-dir") from error
    return _conclude(RunFolder(run_dir / f"seed-{seeds[0]}"), args)


def real_stages(args: argparse.Namespace) -> tuple[list[Stage], Path, list[int]]:
    """The commands of a reproduction, the folder of its runs, and its seeds."""
    protocol = PROTOCOLS[args.protocol]
    config = args.config or _recipe_name(args.size, protocol.recipe)
    recipe = recipes.read(recipes.find(config))
    run_dir = (args.run_dir or Path("runs") / f"{recipes.find(config).stem}-reproduction").resolve()
    root = args.data_root or Path("ImpactMesh-Flood")
    seeds = _seeds(args.seeds) if args.seeds else [int(recipe.get("seed_everything") or 0)]
    runs = [RunFolder(run_dir / f"seed-{seed}") for seed in seeds]
    weights = run_dir / "weights"
    compared = args.reference != "none" and (args.reference is not None or len(protocol.class_names) == 2)
    reference = Path(args.reference) if args.reference and compared else weights / "reference.pt"
    changes = [*(["--precision", args.precision] if args.precision else []), *args.overrides]
    where, data = ["--config", config, "--data-root", str(root)], root / "data-manifest.json"
    fetch = ["data", "fetch", "--root", str(root), "--revision", args.revision, "--protocol", args.protocol]
    hub = ["data", "weights", "--config", config, *(["--reference", str(reference)] if compared else [])]
    stages = [
        Stage("doctor", ["doctor", *where[:2], "--data", str(root), *args.overrides], []),
        Stage("weights", hub if not args.reference else hub[:4], [reference] if compared else []),
        Stage("fetch", fetch, [root / "split"]),
        Stage("audit", ["data", "audit", "--root", str(root), "--config", config], [data]),
    ]
    for run, seed in zip(runs, seeds, strict=True):
        place = ["--runs-root", str(run_dir), "--name", run.path.name, "--seed", str(seed)]
        stages.append(Stage(f"fit-{seed}", ["fit", *where, *place, *changes], [run.best]))
    for run, seed in zip(runs, seeds, strict=True):
        stages.append(Stage(f"test-{seed}", ["test", "--ckpt", str(run.best)], [run.evaluation / "test/best.parquet"]))
    table = run_dir / "reference" / "test" / f"{reference.stem}.parquet"
    if compared:
        base = _recipe_name("base", protocol.recipe)  # the published checkpoints' network
        test = ["test", "--ckpt", str(reference), "--config", base, *where[2:], "--output", str(run_dir / "reference")]
        stages.append(Stage("reference", test, [table]))
    beside = ["--reference", str(table)] if compared else []
    return stages + _last_stages(runs[0], run_dir.name, beside, []), run_dir, seeds


def demo_stages(args: argparse.Namespace) -> tuple[list[Stage], Path, list[int]]:
    """The same list at toy size: generated chips in place of the download, a shorter run in place of IBM's weights."""
    folder = (args.run_dir or Path("demo")).resolve()
    root, run_dir = args.data_root or folder / "ImpactMesh-Flood", folder / "runs"
    run, reference = RunFolder(run_dir / "seed-42"), RunFolder(run_dir / "shorter")
    fit = ["fit", "--config", "demo", "--data-root", str(root), "--runs-root", str(run_dir), *args.overrides]
    short = ["--name", "shorter", "--trainer.max_epochs", str(DEMO_REFERENCE_EPOCHS)]
    stages = [
        Stage("synth", ["data", "synth", "--root", str(root), *DEMO_CHIPS], [root / "split"]),
        Stage("fit-42", [*fit, "--name", "seed-42"], [run.best]),
        Stage("test-42", ["test", "--ckpt", str(run.best)], [run.evaluation / "test" / "best.parquet"]),
        Stage("fit-reference", [*fit, *short], [reference.best]),
    ]
    beside = ["--reference", str(reference.best), "--reference-name", "the shorter-trained model"]
    return stages + _last_stages(run, "demo", beside, []), run_dir, [42]


def _last_stages(run: RunFolder, name: str, beside: list[str], more: list[str]) -> list[Stage]:
    export = ["export", "--run", str(run.path), "--name", name]
    return [
        Stage("export", [*export, "--no-card"], [run.export / f"{name}.safetensors"]),
        Stage("verify", ["verify", "--run", str(run.path), *beside, *more], [run.results]),
        Stage("card", [*export, "--card-only"], [run.export / "README.md"]),
    ]


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds is {text!r}, not whole numbers with commas", fix="--seeds 42,43,44") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds is {text!r}: a seed is negative or named twice", fix="--seeds 42,43,44")
    return seeds


def _declare(run_dir: Path, seeds: list[int], stages: list[Stage]) -> None:
    """Write down the seeds before the first fit begins, so that no run can be dropped afterwards."""
    file = run_dir / DECLARATION
    fits = [stage.command for stage in stages if stage.name.startswith("fit")]
    if file.exists() and (declared := json.loads(file.read_text(encoding="utf-8")))["seeds"] != seeds:
        what = f"seeds {declared['seeds']} were declared here on {declared['declared']}, now they are {seeds}"
        raise UsageError(what, where=file, fix="ask for the same seeds, or give another --run-dir")
    if fits and not file.exists():
        content = {"schema": 1, "declared": timestamp(), "seeds": seeds, "commands": fits}
        write_atomically(file, json.dumps(content, indent=2) + "\n")


def _run(stage: Stage, run_dir: Path, heading: str) -> int:
    """Run one stage unless its record says that it is done; returns the exit code."""
    file = run_dir / f".done-{stage.name}.json"
    asked = {"command": stage.command, "floodrepro": __version__}
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == asked | {"outputs": _sizes(stage.outputs)}:
        console.say(f"{heading}: done already")
        return 0
    console.say(f"{heading}: floodrepro {shlex.join(stage.command)}")
    start = time.monotonic()
    # In a group of its own, so that Ctrl-C in a terminal and a batch system's SIGTERM arrive once, through us.
    with subprocess.Popen([sys.executable, "-m", "floodrepro", *stage.command], process_group=0) as process:
        handlers = {
            number: signal.signal(number, lambda number, _: process.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if code == 0:
        write_atomically(file, json.dumps(asked | {"outputs": _sizes(stage.outputs)}, indent=1) + "\n")
        console.say(f"{heading}: {time.monotonic() - start:.0f} s")
    return code if code >= 0 else SIGNALLED - code


def _sizes(files: list[Path]) -> dict[str, Any]:
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else None for file in files}


def _recipe_name(size: str, suffix: str | None) -> str:
    name = f"terramind_v1_{size}_{suffix}"
    return name if name in recipes.shipped() else f"{name}_amd"


def _conclude(run: RunFolder, args: argparse.Namespace) -> int:
    """Print the verdict and where everything lies; the demo also has to have learnt something."""
    if not run.results.is_file():
        return 0
    found = json.loads(run.results.read_text(encoding="utf-8"))
    where = {
        "run": str(run.path),
        "report": str(run.verification / "report.html"),
        "card": str(run.export / "README.md"),
        "weights": str(run.export),
    }
    verdict, summary = found["verdict"], found["summary"]
    lines = [f"{verdict['word']}: {verdict['sentence']}", f"checks: {summary['text']}"]
    code = 0
    if args.demo:
        iou = next(row["values"][0] for row in found["scores"]["rows"] if row["metric"] == "IoU_1")
        lines.append(_DEMO_NOTE)
        if iou < DEMO_MIN_IOU:
            code = 1
            lines.append(f"flood IoU {iou:.3f} is below {DEMO_MIN_IOU}: the demo's model has not learnt enough")
    text = "\n".join([*lines, "", console.columns([[key, value] for key, value in where.items()], right_from=2)])
    console.emit({"verdict": verdict, "summary": summary, "where": where}, text, args.format)
    return code
