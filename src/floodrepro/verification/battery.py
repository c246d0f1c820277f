"""The checks in the order of the report, and all that they are given, read from files. Nothing is measured here."""

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from floodrepro import recipe as recipes
from floodrepro.data.audit import MANIFEST
from floodrepro.errors import RunFolderError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.run_folder import DECLARATION, RunFolder, sha256_of
from floodrepro.training.declared import status_of
from floodrepro.verification.check import Check, Evidence, SeedRun
from floodrepro.verification.references import load_published, load_thresholds

CHECKS = (
    *("parity", "head_to_head", "convergence", "events", "calibration", "weights", "load_back"),
    *("round_trip", "throughput", "panels", "identities", "data", "provenance", "variance"),
)
MEASURED = ("weights", "load_back", "round_trip", "panels")


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check's answer, in the order of the report."""
    modules = [importlib.import_module(f"floodrepro.verification.checks.{name}") for name in CHECKS]
    return [module.check(evidence) for module in modules]


def required_checks(asked: str | None, thresholds: Mapping[str, Any]) -> list[str]:
    """Which checks have to pass.

    Args:
        asked: "all", ids with commas, or None for those of `thresholds.yaml`.
        thresholds: Its content.

    Raises:
        UsageError: There is no such check.
    """
    wanted = thresholds["required"] if asked is None else CHECKS if asked == "all" else asked.split(",")
    if unknown := [name for name in wanted if name not in CHECKS]:
        raise UsageError(
            f"there is no check {unknown[0]!r}", where="--require", fix=f"one of {', '.join(CHECKS)}, or all"
        )
    return list(wanted)


def gather(
    run: RunFolder,
    split: str,
    reference: Path | None,
    evidence_folder: Path,
    *,
    name: str = "",
    data_root: Path | None = None,
) -> Evidence:
    """Read all that is known of a run.

    Args:
        run: The run folder.
        split: Whose chip table is judged.
        reference: Chip table to compare with.
        evidence_folder: Where measurements lie, `<name>.json`.
        name: What to call the reference; its file's name and run where empty.
        data_root: Where the chips lie, if not where the recipe says: their audit is looked for there.

    Raises:
        UsageError: The run folder holds no recipe.
        TableError: The reference's table is missing or damaged: it was asked for by name.
        RunFolderError: run.json or a measurement is damaged.
    """
    missing = {} if run.metrics.is_file() else {"metrics": "there is no metrics.csv"}
    weights = sha256_of(run.best) if run.best.is_file() else None
    table = _own_table(run, split, weights, missing)
    other = chip_table.read(reference) if reference else None
    home = run_of(reference) if reference else None
    if reference is None:
        missing["reference"] = "no reference was given"
    recipe = recipes.read(run.recipe)
    return Evidence(
        run=run,
        record=_record(run, missing),
        recipe=recipe,
        metrics=run.read_metrics(),
        table=table,
        subsets=_subsets(run, split) if table else {},
        reference=other,
        reference_name=name or _reference_name(reference, home),
        reference_record=home.read_record() if home and home.record.is_file() else {},
        reference_metrics=home.read_metrics() if home else (),
        measured=_measured(evidence_folder, weights, missing),
        seeds=_seeds(run, split),
        benchmarks={file.stem: _json(file) for file in sorted((run.path / "benchmarks").glob("*.json"))},
        card=_card(run, split),
        audit=_audit(data_root or Path((recipe["data"].get("init_args") or {}).get("data_root") or "")),
        thresholds={k: v for k, v in load_thresholds().items() if isinstance(v, dict)},
        published=load_published(),
        missing=missing,
    )


def _own_table(run: RunFolder, split: str, weights: str | None, missing: dict[str, str]) -> ChipTable | None:
    """The table of the run's best checkpoint, if it is that checkpoint's; where there are no weights, as it is."""
    path = run.evaluation / split / f"{run.best.stem}.parquet"
    try:
        table = chip_table.read(path)
    except TableError as error:
        missing["table"] = f"{error.what}: floodrepro test --ckpt {run.best.name} writes it"
        return None
    if weights and (table.metadata.get("checkpoint") or {}).get("sha256") != weights:
        missing["table"] = f"the chip table {path.name} was made from other weights than {run.best.name}: test it again"
        return None
    return table


def _record(run: RunFolder, missing: dict[str, str]) -> dict[str, Any]:
    if run.record.is_file():
        return run.read_record()
    missing["record"] = "there is no run.json"
    return {}


def _subsets(run: RunFolder, split: str) -> dict[str, ChipTable]:
    """Tables of further test splits that were taken from the same pass."""
    tables = {path.parent.name: path for path in sorted(run.evaluation.glob(f"*/{run.best.stem}.parquet"))}
    found = {name: chip_table.read(path) for name, path in tables.items() if name != split}
    return {name: table for name, table in found.items() if table.metadata.get("subset_of") == split}


def run_of(table: Path) -> RunFolder | None:
    """The run folder that a chip table is of: `RUN/evaluation/<split>/<checkpoint>.parquet`."""
    evaluation = table.resolve().parent.parent
    run = RunFolder(evaluation.parent)
    return run if evaluation == run.evaluation and run.recipe.is_file() else None


def _reference_name(table: Path | None, home: RunFolder | None) -> str:
    if table is None:
        return ""
    return f"{home.path.name}/{table.stem}" if home else table.stem


def _measured(folder: Path, weights: str | None, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What was measured on these weights; an earlier checkpoint's evidence is none."""
    found = {name: _json(folder / f"{name}.json") for name in MEASURED if (folder / f"{name}.json").is_file()}
    for name in [name for name, entry in found.items() if weights and entry.get("measured_on") != weights]:
        del found[name]
        missing[name] = "it was measured on other weights: floodrepro verify without --no-measure measures anew"
    if len(found) < len(MEASURED):
        missing["measured"] = "it was not measured: floodrepro verify without --no-measure does so"
    return found


def _seeds(run: RunFolder, split: str) -> list[SeedRun]:
    """The runs that were declared together with this one; none if it was declared alone."""
    declaration = run.path.resolve().parent / DECLARATION
    if not declaration.is_file():
        return []
    runs = []
    for seed in _json(declaration)["seeds"]:
        folder = RunFolder(declaration.parent / f"seed-{seed}")
        weights = sha256_of(folder.best) if folder.best.is_file() else None
        runs.append(SeedRun(seed, status_of(folder.path), _own_table(folder, split, weights, {}), folder.path.name))
    return runs


def _card(run: RunFolder, split: str) -> dict[str, float]:
    """What the exported model card claims of a split: `model-index` in its metadata, as the hub reads it."""
    path = run.export / "README.md"
    if not path.is_file():
        return {}
    try:
        _, metadata, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        results = (yaml.safe_load(metadata).get("model-index") or [{}])[0].get("results") or []
        here = [result for result in results if result["dataset"].get("split", split) == split]
        return {m["name"].split(" ")[0]: float(m["value"]) for result in here for m in result["metrics"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise RunFolderError(f"the model card's metadata cannot be read: {error}", where=path) from error


def _audit(root: Path) -> dict[str, Any] | None:
    """The manifest of the data, where `data audit` left one."""
    return next((_json(path) for path in _manifests(root) if path.is_file()), None)


def _manifests(root: Path) -> Iterable[Path]:
    return root / MANIFEST, root.parent / MANIFEST


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"this file cannot be read: {error}", where=path, fix="move it away, and verify again"
        ) from error
    return content
