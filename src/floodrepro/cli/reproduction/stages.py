"""The stages of the whole path: the commands of each, what decides whether it is done, what it leaves and costs."""

import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.data_fetch import DEFAULT_REPO
from floodrepro.cli.reproduction import costs
from floodrepro.cli.reproduction.plan import Plan
from floodrepro.cli.reproduction.stage import Command, Stage, call, digest, digests
from floodrepro.data.audit import MANIFEST
from floodrepro.data.ledger import Ledger
from floodrepro.data.sources import HubFile, fetch_file, in_cache
from floodrepro.errors import FloodreproError, TableError
from floodrepro.run_folder import RunFolder, write_atomically
from floodrepro.system.container import installed
from floodrepro.verification.references import load_thresholds


def _recipe(plan: Plan) -> dict[str, Any]:
    return {"recipe": recipes.fingerprint(plan.recipe)}


# doctor


def _doctor(plan: Plan) -> list[Command]:
    return [["floodrepro", "doctor", "--config", plan.config, "--data", str(plan.data_root), *plan.changes]]


def _examine(plan: Plan, commands: list[Command]) -> int:
    if code := call(commands[0]):
        raise FloodreproError(
            "the machine will not do for this run",
            fix="see the lines that begin with fail; --from fetch goes on all the same",
        )
    return code


# fetch


def _fetch(plan: Plan) -> list[Command]:
    where = ["--root", str(plan.data_root), "--revision", plan.revision]
    return [
        *(file.command for file in plan.weights),
        ["floodrepro", "data", "fetch", *where, "--protocol", plan.protocol],
    ]


def _commit(plan: Plan) -> dict[str, Any]:
    """The commit that the hub has for the revision now; offline, the one that lies here. A commit's sha stays."""
    from floodrepro.data.hub import Hub

    hub = Hub(DEFAULT_REPO)
    if re.fullmatch("[0-9a-f]{40}", plan.revision):
        return {"commit": plan.revision}
    if hub.offline:
        ledger = Ledger.read(plan.data_root)
        return {"commit": ledger.commit if ledger else None}
    return {"commit": hub.snapshot(plan.revision).commit}


def _download(plan: Plan, commands: list[Command]) -> int:
    """The weights first: a wrong one is found before the long download."""
    for file in plan.weights:
        console.say(f"fetching {file.name}, or finding it in the cache")
        fetch_file(file) if file is not plan.reference else plan.reference_file(fetch=True)
    return call(commands[-1])


def _files(plan: Plan) -> dict[str, str | None]:
    """Sizes and times of the data set's files: as long as they stay, what was found in them holds."""
    root = plan.data_root
    files = sorted([*root.glob("split/*.txt"), *root.glob("*/*.tar"), *root.glob("data/*")])
    return {str(file): f"{file.stat().st_size} bytes, {file.stat().st_mtime_ns}" for file in files}


# audit


def _audit(plan: Plan) -> list[Command]:
    what = ["--root", str(plan.data_root), "--protocol", plan.protocol]
    return [["floodrepro", "data", "audit", *what, "--deep", "--config", plan.config]]


def _manifest(plan: Plan) -> Path:
    return plan.data_root / MANIFEST


# fit


def _fit(plan: Plan) -> list[Command]:
    where = ["--data-root", str(plan.data_root), "--runs-root", str(plan.run_dir.parent), "--name", plan.run_dir.name]
    seeds = ["--seeds", ",".join(map(str, plan.seeds)), *(["--index", "0"] if len(plan.seeds) == 1 else [])]
    return [["floodrepro", "fit", "--config", plan.config, *where, *seeds, *plan.changes]]


def _train(plan: Plan, commands: list[Command]) -> int:
    if code := call(commands[0]):
        raise FloodreproError("a declared run is not finished", where=plan.run_dir, fix="see above; the same command")
    if torch := sys.modules.get("torch"):  # all runs may have been finished before: then nothing was imported
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # the other processes are gone: a test would wait for them for ever
    return code


def _data(plan: Plan) -> dict[str, Any]:
    """The data by its audit; nothing where there was none."""
    manifest = _manifest(plan)
    found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return {"data": found.get("digest"), "content": (found.get("deep") or {}).get("content_digest")}


# test, and the reference


def _table(run: RunFolder) -> Path:
    return run.evaluation / "test" / f"{run.best.stem}.parquet"


def _test(plan: Plan) -> list[Command]:
    return [["floodrepro", "test", "--ckpt", str(run.best)] for run in plan.runs]


def _measure(plan: Plan, commands: list[Command]) -> int:
    """Each run that has no table of its checkpoint yet: a stop costs one pass, not all."""
    for run, command in zip(plan.runs, commands, strict=True):
        if not _is_of(_table(run), digest(run.best)):
            call(command)
    return 0


def _is_of(table: Path, checkpoint: str | None) -> bool:
    from floodrepro.evaluation.chip_table import read

    try:
        return bool(checkpoint and (read(table).metadata.get("checkpoint") or {}).get("sha256") == checkpoint)
    except TableError:
        return False


def _reference(plan: Plan) -> list[Command]:
    folder = plan.reference_table.parent.parent
    name = plan.reference.name if plan.reference else ""
    file = name if isinstance(plan.reference, HubFile) else str(plan.reference)  # the first lies in the hub's cache
    return [["floodrepro", "test", "--ckpt", file, "--config", str(folder / "recipe.yaml"), "--output", str(folder)]]


def _measure_reference(plan: Plan, commands: list[Command]) -> int:
    """With the verified run's recipe, but the network that the checkpoint remembers: another size, for instance."""
    from floodrepro.evaluation.checkpoint import read_checkpoint

    checkpoint, folder = plan.reference_file(), plan.reference_table.parent.parent
    recipe = recipes.read(plan.runs[0].recipe)
    arguments = recipe["model"]["init_args"]
    arguments["model_args"] |= read_checkpoint(checkpoint).hyper_parameters.get("model_args") or {}
    arguments["model_args"]["backbone_pretrained"] = False  # all weights come from the checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", recipes.to_yaml(recipe))
    return call([*commands[0][:3], str(checkpoint), *commands[0][4:]])


def _no_reference(plan: Plan) -> str:
    if plan.reference is None:
        return "--reference none"
    return "" if plan.compares else "IBM's checkpoint has two classes, protocol v1 has three: nothing to compare with"


# verify, and the export


def _verify(plan: Plan) -> list[Command]:
    compared = ["--reference", str(plan.reference_table), "--reference-name", plan.reference_name]
    return [["floodrepro", "verify", "--run", str(plan.runs[0].path), *(compared if plan.compares else [])]]


def _judged(plan: Plan) -> dict[str, Any]:
    runs = [file for run in plan.runs for file in (run.best, run.record, _table(run))]
    return digests([*runs, plan.reference_table, _manifest(plan)]) | {"thresholds": load_thresholds()}


def _pair(plan: Plan) -> tuple[Path, Path]:
    weights = plan.runs[0].export / f"{plan.run_dir.resolve().name}.safetensors"
    return weights, weights.with_suffix(".yaml")


def _export(plan: Plan) -> list[Command]:
    return [["floodrepro", "export", "--run", str(plan.runs[0].path), "--name", plan.run_dir.resolve().name]]


def _write_pair(plan: Plan, commands: list[Command]) -> int:
    """The pair if it is not whole (it was stopped between the two files), and in any case its card."""
    if not all(file.is_file() for file in _pair(plan)):
        from floodrepro.publishing.export import export

        run, (weights, config) = plan.runs[0], _pair(plan)
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)
        export(run.best, recipes.read(run.recipe), run.export, weights.stem, run.read_record()["data_digest"])
    return call([*commands[0], "--card-only"])


TABLE: dict[str, Stage] = {
    "doctor": Stage(
        _doctor,
        lambda plan: _recipe(plan) | {"machine": platform.node(), "packages": sorted(installed())},
        lambda plan: {},
        lambda plan: "time seconds; disk none",
        _examine,
    ),
    "fetch": Stage(
        _fetch,
        lambda plan: _commit(plan) | {"weights": [f.command for f in plan.weights], "sha256": plan.reference_sha256},
        lambda plan: _files(plan) | {file.name: "cached" if in_cache(file) else None for file in plan.weights},
        costs.of_fetch,
        _download,
    ),
    "audit": Stage(_audit, lambda p: _files(p) | _recipe(p), lambda p: digests([_manifest(p)]), costs.of_audit),
    "fit": Stage(
        _fit,
        lambda plan: _recipe(plan) | _data(plan),
        lambda plan: digests([run.best for run in plan.runs]),
        costs.of_fit,
        _train,
    ),
    "test": Stage(
        _test,
        lambda plan: digests([file for run in plan.runs for file in (run.best, run.recipe)]) | _data(plan),
        lambda plan: digests([_table(run) for run in plan.runs]),
        lambda plan: costs.of_test(plan, len(plan.seeds)),
        _measure,
    ),
    "reference": Stage(
        _reference,
        lambda plan: digests([plan.reference_file(), plan.runs[0].recipe]) | _data(plan),
        lambda plan: digests([plan.reference_table]),
        lambda plan: costs.of_test(plan, 1),
        _measure_reference,
        _no_reference,
    ),
    "verify": Stage(
        _verify,
        _judged,
        lambda plan: digests([plan.runs[0].results]),
        lambda plan: "time some minutes; disk some MB",
    ),
    "export": Stage(
        _export,
        lambda plan: digests([plan.runs[0].best, plan.runs[0].record, plan.runs[0].results]),
        lambda plan: digests([*_pair(plan), plan.runs[0].export / "README.md"]),
        costs.of_export,
        _write_pair,
    ),
}
