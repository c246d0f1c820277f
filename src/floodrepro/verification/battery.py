"""The checks in the order of the report, and all that they are given, read from files. Nothing is measured here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.audit import MANIFEST
from floodrepro.data.protocols import class_names_of, data_arguments, positive_class_of
from floodrepro.errors import TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.run_folder import DECLARATION, RunFolder, sha256_of
from floodrepro.verification.check import Check, Evidence, SeedRun
from floodrepro.verification.checks import artefacts, comparison, run, scores

CHECKS = {
    "parity": comparison.parity,
    "head_to_head": comparison.head_to_head,
    "variance": comparison.variance,
    "reference": comparison.reference,
    "events": scores.events,
    "calibration": scores.calibration,
    "identities": scores.identities,
    "convergence": run.convergence,
    "throughput": run.throughput,
    "data": run.data,
    "provenance": run.provenance,
    "weights": artefacts.weights,
    "load_back": artefacts.load_back,
    "round_trip": artefacts.round_trip,
    "panels": artefacts.panels,
}
MEASURED = ("weights", "load_back", "round_trip", "panels")


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check's answer, each with the name of the function that gave it."""
    return [replace(check(evidence), code=f"{check.__module__}.{check.__name__}") for check in CHECKS.values()]


def required_checks(asked: str | None) -> list[str]:
    """Which checks are required: "all", ids with commas, or None for those of thresholds.yaml.

    Raises:
        UsageError: There is no such check.
    """
    if asked is None:
        return list(load_thresholds()["required"])
    wanted = list(CHECKS) if asked == "all" else asked.split(",")
    if unknown := [name for name in wanted if name not in CHECKS]:
        known = f"one of {', '.join(CHECKS)}, or all"
        raise UsageError(f"there is no check {unknown[0]!r}", where="--require", fix=known)
    return wanted


def load_thresholds() -> dict[str, Any]:
    """The criteria by check id, and `required`: verification/thresholds.yaml of the package."""
    return recipes.read(Path(__file__).parent / "thresholds.yaml")


def load_published() -> dict[str, dict[str, Any]]:
    """Published figures with their sources, by stem: verification/reference/*.yaml of the package."""
    return {path.stem: recipes.read(path) for path in sorted((Path(__file__).parent / "reference").glob("*.yaml"))}


def gather(
    run_folder: RunFolder,
    split: str,
    reference: Path | None,
    evidence_folder: Path,
    *,
    name: str = "",
    data_root: Path | None = None,
) -> Evidence:
    """Read all that is known of a run. What is damaged, and was not asked for by name, counts as missing.

    Args:
        run_folder: The run folder.
        split: Whose chip table is judged.
        reference: Chip table to compare with.
        evidence_folder: Where measurements lie, `<name>.json`.
        name: What to call the reference; by default what its table is of.
        data_root: Where the chips lie, if not where the recipe says: their audit is looked for there.

    Raises:
        UsageError: The run folder holds no recipe.
        TableError: The reference's table is missing or damaged.
    """
    missing: dict[str, str] = {}
    damaged: dict[str, str] = {}
    recipe = recipes.read(run_folder.recipe)
    weights = sha256_of(run_folder.best) if run_folder.best.is_file() else None
    table = _own_table(run_folder, split, weights, missing, damaged)
    other = chip_table.read_table(reference) if reference else None
    home = _run_of(reference) if reference else None
    if reference is None:
        missing["reference"] = "no reference was given"
    positive, names = positive_class_of(recipe), class_names_of(recipe)
    root = data_root or data_arguments(recipe).get("data_root")
    manifests = [Path(root) / MANIFEST, Path(root).parent / MANIFEST] if root else []
    manifest = next((path for path in manifests if path.is_file()), None)
    return Evidence(
        run=run_folder,
        record=_json(run_folder.record, "record", damaged),
        recipe=recipe,
        class_name=names[positive] if positive < len(names) else f"class {positive}",
        positive=positive,
        metrics=run_folder.read_metrics(),
        table=table,
        subsets=_subsets(run_folder, split, damaged) if table else {},
        reference=other,
        reference_name=name or (f"{home.path.name}/{other.name}" if home and other else other.name if other else ""),
        reference_record=_json(home.record, "reference_record", damaged) if home else {},
        reference_metrics=home.read_metrics() if home else (),
        baselines=_tables(sorted((run_folder.evaluation / "baselines" / split).glob("*.parquet")), damaged),
        measured=_measured(evidence_folder, weights, missing, damaged),
        seeds=_seeds(run_folder, split, damaged),
        audit=(_json(manifest, "audit", damaged) or None) if manifest else None,
        thresholds=load_thresholds(),
        published=load_published(),
        missing=missing,
        damaged=damaged,
    )


def _own_table(
    run_folder: RunFolder, split: str, weights: str | None, missing: dict[str, str], damaged: dict[str, str]
) -> ChipTable | None:
    """The table of the run's best checkpoint; one of other weights counts as missing."""
    path = run_folder.evaluation / split / f"{run_folder.best.stem}.parquet"
    if not path.is_file():
        missing["table"] = f"there is no chip table: floodrepro test --ckpt {run_folder.best.name} writes it"
        return None
    table = _tables([path], damaged).get(path.stem)
    if table is None:
        damaged["table"] = damaged.pop(f"table {split}/{path.stem}")
    elif weights and (table.metadata.get("checkpoint") or {}).get("sha256") != weights:
        missing["table"] = f"the chip table was made from other weights than {run_folder.best.name}: test it again"
        return None
    return table


def _tables(paths: list[Path], damaged: dict[str, str]) -> dict[str, ChipTable]:
    """Tables by their stem; a damaged one is left out."""
    found = {}
    for path in paths:
        try:
            found[path.stem] = chip_table.read_table(path)
        except TableError as error:
            damaged[f"table {path.parent.name}/{path.stem}"] = error.what
    return found


def _subsets(run_folder: RunFolder, split: str, damaged: dict[str, str]) -> dict[str, ChipTable]:
    """Tables of further test splits that were taken from the same pass, by split."""
    found = {}
    for path in sorted(run_folder.evaluation.glob(f"*/{run_folder.best.stem}.parquet")):
        for table in _tables([path], damaged).values() if path.parent.name != split else ():
            if table.metadata.get("subset_of") == split:
                found[path.parent.name] = table
    return found


def _run_of(table: Path) -> RunFolder | None:
    """The run folder that a chip table is of: `RUN/evaluation/<split>/<checkpoint>.parquet`."""
    evaluation = table.resolve().parent.parent
    home = RunFolder(evaluation.parent)
    return home if evaluation == home.evaluation and home.recipe.is_file() else None


def _measured(
    folder: Path, weights: str | None, missing: dict[str, str], damaged: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """What was measured on these weights; that of an earlier checkpoint counts as missing."""
    found = {}
    for name in MEASURED:
        path = folder / f"{name}.json"
        entry = _json(path, name, damaged)
        if not path.is_file():
            missing[name] = "it was not measured: floodrepro verify without --no-measure does so"
        elif entry and weights and entry.get("measured_on") != weights:
            missing[name] = "it was measured on other weights: floodrepro verify without --no-measure measures anew"
        elif entry:
            found[name] = entry
    return found


def _seeds(run_folder: RunFolder, split: str, damaged: dict[str, str]) -> list[SeedRun]:
    """The runs that were declared together with this one; none if it was declared alone."""
    declaration = run_folder.path.resolve().parent / DECLARATION
    runs = []
    for seed in _json(declaration, "seeds", damaged).get("seeds") or []:
        one = RunFolder(declaration.parent / f"seed-{seed}")
        weights = sha256_of(one.best) if one.best.is_file() else None
        status = str(_json(one.record, "", {}).get("status", "not started"))
        runs.append(SeedRun(seed, status, _own_table(one, split, weights, {}, {}), one.path.name))
    return runs


def _json(path: Path, name: str, damaged: dict[str, str]) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none, or where it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        damaged[name] = f"{path.name} cannot be read: {error}"
        return {}
    return content
