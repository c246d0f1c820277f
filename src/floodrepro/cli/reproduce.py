"""Every stage from the download to the verdict, as a list of commands. Run the same command again to resume."""

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from floodrepro import __version__, console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.data.protocols import PARTS, PROTOCOLS
from floodrepro.errors import SIGNALLED, RunFolderError, UsageError
from floodrepro.run_folder import DECLARATION, RunFolder, timestamp, write_atomically

STAGES = ("doctor", "weights", "fetch", "synth", "audit", "fit", "test", "reference", "export", "verify", "card")
DEMO_CHIPS = ("--events", "16", "--chips", "128", "--size", "64", "--protocol", "v0", "--seed", "42")
DEMO_REFERENCE = ("--name", "shorter", "--trainer.max_epochs", "2")  # has learnt something, and differs
_DEMO_NOTE = """
Generated chips show that every stage works, not how well floods are mapped. Three test events are too few to judge
a model by, and after so short a training its probabilities are not calibrated: that is why some checks do not pass.
"""


class Stage(NamedTuple):
    """One of STAGES, perhaps with a seed; the arguments after ``floodrepro``; files that say whether it is done."""

    name: str
    command: list[Any]
    outputs: list[Path]


def add_reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    published = [name for name in PROTOCOLS if name != "custom"]
    add = parser.add_argument
    add("--demo", action="store_true", help="generated chips and TerraMind tiny, on a CPU in minutes")
    add("--protocol", choices=published, default="v1-binary", help="default: v1-binary")
    add("--size", choices=("base", "tiny"), default="base", help="TerraMind's size (default: base)")
    add("--config", metavar="YAML", help="another recipe than that of --protocol and --size")
    add("--seeds", metavar="S,S,…", help="declared runs, each is tested (default: the recipe's seed)")
    add("--precision", choices=recipes.PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    add("--data-root", type=Path, metavar="DIR", help="default: ImpactMesh-Flood; the demo's lies in its --run-dir")
    add("--run-dir", type=Path, metavar="DIR", help="default: runs/RECIPE-reproduction, or demo")
    add("--revision", metavar="SHA", default="main", help="of the data: branch, tag or commit")
    add("--reference", metavar="FILE|none", help="a checkpoint (default: IBM's, from the hub)")
    add("--from", dest="first", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    add("--until", dest="last", choices=STAGES, metavar="STAGE", help="the last stage to run")
    add("--dry-run", action="store_true", help="print the commands and stop")
    add_format(parser)
    parser.epilog = """\
Any key of the recipe can be overridden as in fit. A finished stage is skipped while its command, floodrepro's version
and its outputs stay the same. The exit code is that of the first stage that fails."""


def run_reproduce(args: argparse.Namespace) -> int:
    """Every stage from the download to the verdict, as a list of commands. Run the same command again to resume."""
    stages, run_dir, seeds = list_stages(args)
    wanted = STAGES[STAGES.index(args.first or STAGES[0]) : STAGES.index(args.last or STAGES[-1]) + 1]
    stages = [stage for stage in stages if stage.name.partition("-")[0] in wanted]
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
    return _conclude(RunFolder(run_dir / f"seed-{seeds[0]}"), args) if stages[-1].name == "card" else 0


def list_stages(args: argparse.Namespace) -> tuple[list[Stage], Path, list[int]]:
    """The commands of a reproduction, the folder of its runs, and its seeds.

    The demo's are the same at toy size: generated chips in place of the download, a shorter run in place of IBM's.
    """
    protocol = PROTOCOLS[args.protocol]
    config = args.config or ("demo" if args.demo else _recipe_name(args.size, protocol.recipe))
    source = recipes.find(config)
    home = (args.run_dir or Path("demo" if args.demo else f"runs/{source.stem}-reproduction")).resolve()
    run_dir = home / "runs" if args.demo else home
    root = args.data_root or (home / "ImpactMesh-Flood" if args.demo else Path("ImpactMesh-Flood"))
    seeds = _seeds(args.seeds or str(recipes.read_yaml(source).get("seed_everything") or 0))
    runs = {seed: RunFolder(run_dir / f"seed-{seed}") for seed in seeds}
    changes = [*(["--precision", args.precision] if args.precision else []), *args.overrides]
    fit = ["fit", "--config", config, "--data-root", root, "--runs-root", run_dir, *changes]
    fits = [Stage(f"fit-{s}", [*fit, "--name", run.path.name, "--seed", s], [run.best]) for s, run in runs.items()]
    tables = {seed: run.evaluation / "test" / "best.parquet" for seed, run in runs.items()}
    tests = [Stage(f"test-{s}", ["test", "--ckpt", run.best], [tables[s]]) for s, run in runs.items()]
    beside: list[Any] = []
    if args.demo:
        shorter = RunFolder(run_dir / "shorter")
        beside = ["--reference", shorter.best, "--reference-name", "the shorter-trained model"]
        made = [root / "split", root / "data", *(root / "data" / part for part in PARTS)]
        before = [Stage("synth", ["data", "synth", "--root", root, *DEMO_CHIPS], made)]
        tests.append(Stage("fit-reference", [*fit, *DEMO_REFERENCE], [shorter.best]))
    else:
        compared = args.reference != "none" and (args.reference or len(protocol.class_names) == 2)
        reference = Path(args.reference) if args.reference else run_dir / "weights" / "reference.pt"
        weights = ["data", "weights", "--config", config]
        if compared:
            weights += [] if args.reference else ["--reference", reference]
            base, folder = _recipe_name("base", protocol.recipe), run_dir / "reference"  # the published network
            table = folder / "test" / f"{reference.stem}.parquet"
            test = ["test", "--ckpt", reference, "--config", base, "--data-root", root, "--output", folder]
            tests.append(Stage("reference", test, [table]))
            beside = ["--reference", table]
        fetch = ["data", "fetch", "--root", root, "--revision", args.revision, "--protocol", args.protocol]
        before = [
            Stage("doctor", ["doctor", "--config", config, "--data", root, *args.overrides], []),
            Stage("weights", weights, [reference] if compared else []),
            Stage("fetch", fetch, [root / "split"]),
            Stage("audit", ["data", "audit", "--root", root, "--config", config], [root / "data-manifest.json"]),
        ]
    run = runs[seeds[0]]
    export = ["export", "--run", run.path, "--name", home.name]
    after = [
        Stage("export", [*export, "--no-card"], [run.export / f"{home.name}.safetensors"]),
        Stage("verify", ["verify", "--run", run.path, *beside], [run.results]),
        Stage("card", [*export, "--card-only"], [run.export / "README.md"]),
    ]
    stages = [*before, *fits, *tests, *after]
    return [stage._replace(command=[str(word) for word in stage.command]) for stage in stages], run_dir, seeds


def _recipe_name(size: str, suffix: str | None) -> str:
    name = f"terramind_v1_{size}_{suffix}"
    return name if name in recipes.shipped() else f"{name}_amd"


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",") if part.isdecimal()]
    if len(set(seeds)) != len(text.split(",")):
        raise UsageError(f"--seeds is {text!r}, not different whole numbers with commas", fix="--seeds 42,43,44")
    return seeds


def _declare(run_dir: Path, seeds: list[int], stages: list[Stage]) -> None:
    """Write down the seeds before the first fit begins, so that no run can be dropped afterwards."""
    file = run_dir / DECLARATION
    fits = [stage.command for stage in stages if stage.name.startswith("fit")]
    declared = _read(file)
    if file.exists() and declared.get("seeds") != seeds:
        what = f"seeds {declared.get('seeds', '(a damaged file)')} were declared here, now they are {seeds}"
        raise UsageError(what, where=file, fix="ask for the same seeds, or give another --run-dir")
    if fits and not file.exists():
        declared = {"schema": 1, "declared": timestamp(), "seeds": seeds, "commands": fits}
        write_atomically(file, json.dumps(declared, indent=2) + "\n")


def _run(stage: Stage, run_dir: Path, heading: str) -> int:
    """The exit code of a stage, which is run unless its record says that it is done."""
    file, asked = run_dir / f".done-{stage.name}.json", {"command": stage.command, "floodrepro": __version__}
    if _read(file) == asked | {"outputs": _sizes(stage.outputs)}:
        console.say(f"{heading}: done already")
        return 0
    console.say(f"{heading}: floodrepro {shlex.join(stage.command)}")
    start = time.monotonic()
    # In a group of its own, so that Ctrl-C in a terminal and a batch system's SIGTERM arrive once, through us.
    with subprocess.Popen([sys.executable, "-m", "floodrepro", *stage.command], process_group=0) as process:
        before = {n: signal.signal(n, lambda n, _: process.send_signal(n)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code == 0:
        write_atomically(file, json.dumps(asked | {"outputs": _sizes(stage.outputs)}, indent=1) + "\n")
        console.say(f"{heading}: {time.monotonic() - start:.0f} s")
    return code if code >= 0 else SIGNALLED - code


def _read(file: Path) -> dict[str, Any]:
    """A record; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def _sizes(files: list[Path]) -> dict[str, Any]:
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else None for file in files}


def _conclude(run: RunFolder, args: argparse.Namespace) -> int:
    """Print the verdict and where everything lies."""
    found = json.loads(run.results.read_text(encoding="utf-8"))
    verdict, summary = found["verdict"], found["summary"]
    places = [("run", run.path), ("report", run.verification / "report.html"), ("card", run.export / "README.md")]
    where = {name: str(path) for name, path in places}
    lines = [f"{verdict['word']}: {verdict['sentence']}", f"checks: {summary['text']}", _DEMO_NOTE if args.demo else ""]
    text = "\n".join([*lines, *(f"{name:<8}{path}" for name, path in places)])
    console.emit({"verdict": verdict, "summary": summary, "where": where}, text, args.format)
    return 0
