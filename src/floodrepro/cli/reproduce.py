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
from typing import Any

from floodrepro import __version__, console, recipe as recipes
from floodrepro.cli import main
from floodrepro.data.protocols import PARTS, PROTOCOLS, protocol_of
from floodrepro.errors import SIGNALLED, UsageError
from floodrepro.run_folder import DECLARATION, RunFolder, timestamp, write_atomically

STAGES = ("doctor", "weights", "fetch", "synth", "audit", "fit", "test", "reference", "export", "verify", "card")
DEMO_CHIPS = ("--events", "16", "--chips", "128", "--size", "64", "--protocol", "v0", "--seed", "42")
DEMO_REFERENCE = ("--name", "shorter", "--trainer.max_epochs", "2")  # has learnt something, and differs
_DEMO_NOTE = """
Generated chips show that every stage works, not how well floods are mapped. Three test events are too few to judge
a model by, and after so short a training its probabilities are not calibrated: that is why some checks do not pass.
"""
Stage = tuple[str, list[str], list[Path]]  # one of STAGES, perhaps with a seed; arguments; files that say it is done


def _reproduce(parser: main.Parser) -> int:
    published = [name for name in PROTOCOLS if name != "custom"]
    add = parser.add_argument
    add("--demo", action="store_true", help="generated chips and TerraMind tiny, on a CPU in minutes")
    add("--protocol", choices=published, default="v1-binary", help="whose base recipe is run (default: v1-binary)")
    add("--config", metavar="YAML", help="another recipe, and the protocol that it names")
    add("--seeds", type=whole_numbers, metavar="S,S,...", help="declared runs (default: the recipe's seed)")
    add("--precision", choices=recipes.PRECISIONS, help="the trainer's precision; fp16 needs a GPU")
    add("--data-root", type=Path, metavar="DIR", help="default: the data set's name; the demo's lies in its --run-dir")
    add("--run-dir", type=Path, metavar="DIR", help="default: runs/RECIPE-reproduction, or demo")
    add("--revision", metavar="SHA", default="main", help="of the data: branch, tag or commit")
    add("--reference", metavar="FILE|none", help="as for verify (default: IBM's checkpoint if it has these classes)")
    add("--from", dest="first", choices=STAGES, metavar="STAGE", help=f"one of {', '.join(STAGES)}")
    add("--until", dest="last", choices=STAGES, metavar="STAGE", help="the last stage to run")
    add("--dry-run", action="store_true", help="print the commands and stop")
    parser.epilog = (
        "Overrides as in fit. A stage is skipped while its command, version, weights and outputs stay the same.\n"
    )
    args = parser.read(overrides=True)
    stages, run_dir, seeds = _stages_of(args)
    trained = list[Path]()
    inputs = {}  # of a stage: the weights that those before it have trained
    for name, command, outputs in stages:  # a test uses those that it names, what comes later uses all
        inputs[name] = [one for one in trained if str(one) in command or not name.startswith(("test", "reference"))]
        trained += outputs if name.startswith("fit") else []
    wanted = STAGES[STAGES.index(args.first or STAGES[0]) : STAGES.index(args.last or STAGES[-1]) + 1]
    stages = [stage for stage in stages if stage[0].partition("-")[0] in wanted]
    if args.dry_run:
        lines = [f"floodrepro {shlex.join(command)}" for _, command, _ in stages]
        data = {"commands": {name: command for name, command, _ in stages}}
        console.emit(data, "\n".join(lines), args.format)
        return 0
    run_dir.mkdir(parents=True, exist_ok=True)
    _declare(run_dir, seeds, [command for name, command, _ in stages if name.startswith("fit")])
    for number, stage in enumerate(stages, 1):
        if code := _run(stage, inputs[stage[0]], run_dir, f"[{number}/{len(stages)}] {stage[0]}"):
            console.say(f"stage {stage[0]} ended with exit code {code}; run the same command again to resume")
            return code
    if "card" in wanted:
        run = RunFolder(run_dir / f"seed-{seeds[0]}")
        files = {"run": run.path, "report": run.verification / "report.html", "card": run.export / "README.md"}
        where = {name: str(file) for name, file in files.items()}
        lines = [*([_DEMO_NOTE] if args.demo else []), *(f"{name:<8}{path}" for name, path in where.items())]
        console.emit({"where": where}, "\n".join(lines), args.format)
    return 0


def _stages_of(args: argparse.Namespace) -> tuple[list[Stage], Path, list[int]]:
    """All stages, the folder of the runs, and their seeds. The demo has its own chips, and a run in place of IBM's."""
    config = args.config or ("demo" if args.demo else str(PROTOCOLS[args.protocol].recipe))
    source = recipes.find(config)
    recipe = recipes.read_yaml(source)
    protocol, seeds = protocol_of(recipe), args.seeds or [recipe.get("seed_everything") or 0]
    home = (args.run_dir or Path("demo" if args.demo else f"runs/{source.stem}-reproduction")).resolve()
    run_dir = home / "runs" if args.demo else home
    root = args.data_root or (home if args.demo else Path()) / protocol.folder
    changes = [*(["--precision", args.precision] if args.precision else []), *args.overrides]
    fit = ["fit", "--config", config, "--data-root", root, "--runs-root", run_dir, *changes]
    compare = [] if args.reference in (None, "none") else ["--reference", args.reference]
    stages: list[tuple[str, list[Any], list[Path]]] = []
    second = []
    if args.demo:
        made = [root / "split", root / "data", *(root / "data" / part for part in PARTS)]
        stages.append(("synth", ["data", "synth", "--root", root, *DEMO_CHIPS], made))
        shorter = RunFolder(run_dir / "shorter").best
        second.append(("fit-reference", [*fit, *DEMO_REFERENCE], [shorter]))
        compare = ["--reference", shorter, "--reference-name", "the shorter-trained model"]
    else:
        weights, held = ["data", "weights", "--config", config], []
        is_ibm = (protocol.hazard, protocol.class_names) == (PROTOCOLS["v0"].hazard, PROTOCOLS["v0"].class_names)
        if args.reference is None and protocol.recipe and is_ibm:
            ibm, folder = run_dir / "weights" / "reference.pt", run_dir / "reference"
            weights, held = [*weights, "--reference", ibm], [ibm]
            test, table = ["test", "--ckpt", ibm, "--config", protocol.recipe], folder / "test" / "reference.parquet"
            second.append(("reference", [*test, "--data-root", root, "--output", folder], [table]))
            compare = ["--reference", table]
        fetch = ["data", "fetch", "--root", root, "--revision", args.revision, "--protocol", protocol.name]
        stages += [
            ("doctor", ["doctor", "--config", config, "--data-root", root, *changes], []),
            ("weights", weights, held),
            *([("fetch", fetch, [root / "split"])] if protocol.repo else []),
            ("audit", ["data", "audit", "--root", root, "--config", config], [root / "data-manifest.json"]),
        ]
    runs = {seed: RunFolder(run_dir / f"seed-{seed}") for seed in seeds}
    stages += [(f"fit-{s}", [*fit, "--name", run.path.name, "--seed", s], [run.best]) for s, run in runs.items()]
    trusted = recipes.fold([recipe], args.overrides).get("custom_modules_path")  # the user's own: it was named here
    compare = [*compare, "--trust-code"] if trusted else compare
    for seed, run in runs.items():
        test = ["test", "--ckpt", run.best, *(["--config", run.recipe] if trusted else [])]
        stages.append((f"test-{seed}", test, [run.evaluation / "test" / "best.parquet"]))
    run = runs[seeds[0]]
    export = ["export", "--run", run.path, "--name", home.name]
    stages += [
        *second,
        ("export", [*export, "--no-card"], [run.export / f"{home.name}.safetensors"]),
        ("verify", ["verify", "--run", run.path, *compare], [run.results]),
        ("card", [*export, "--card-only"], [run.export / "README.md"]),
    ]
    return [(name, list(map(str, command)), outputs) for name, command, outputs in stages], run_dir, seeds


def whole_numbers(text: str) -> list[int]:
    """The value of --seeds, each once."""
    return list(dict.fromkeys(map(int, text.split(","))))


def _declare(run_dir: Path, seeds: list[int], fits: list[Any]) -> None:
    """Write down the seeds before the first fit begins, so that no run can be dropped afterwards."""
    file = run_dir / DECLARATION
    if file.exists():
        declared = _read(file).get("seeds", "(a damaged file)")
        if declared != seeds:
            what = f"seeds {declared} were declared here, now they are {seeds}"
            raise UsageError(what, where=file, fix="ask for the same seeds, or give another --run-dir")
    elif fits:
        declared = {"schema": 1, "declared": timestamp(), "seeds": seeds, "commands": fits}
        write_atomically(file, json.dumps(declared, indent=2) + "\n")


def _run(stage: Stage, inputs: list[Path], run_dir: Path, heading: str) -> int:
    """The exit code of a stage, which is run unless its record says that it is done."""
    name, command, outputs = stage
    file = run_dir / f".done-{name}.json"
    asked = {"command": command, "floodrepro": __version__, "inputs": _sizes(inputs)}
    if _read(file) == asked | {"outputs": _sizes(outputs)}:
        console.say(f"{heading}: done already")
        return 0
    console.say(f"{heading}: floodrepro {shlex.join(command)}")
    start = time.monotonic()
    # In a group of its own, so that Ctrl-C in a terminal and a batch system's SIGTERM arrive once, through us.
    with subprocess.Popen([sys.executable, "-m", "floodrepro", *command], process_group=0) as process:
        before = {n: signal.signal(n, lambda n, _: process.send_signal(n)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code == 0:
        write_atomically(file, json.dumps(asked | {"outputs": _sizes(outputs)}, indent=1) + "\n")
        console.say(f"{heading}: {time.monotonic() - start:.0f} s")
    return code if code >= 0 else SIGNALLED - code


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def _sizes(files: list[Path]) -> dict[str, Any]:
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else None for file in files}
