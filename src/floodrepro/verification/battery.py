"""The checks in the order of the report, and all that they are given, read from files. Nothing is measured here."""

import csv
import json
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.audit import MANIFEST
from floodrepro.data.protocols import class_names_of, data_arguments, positive_class_of
from floodrepro.errors import TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.run_folder import DECLARATION, RunFolder, sha256_of
from floodrepro.verification.check import Answer, Check, Evidence, SeedRun, Status, check, from_json
from floodrepro.verification.checks import comparison, run, scores


def _measured(name: str) -> Answer:
    """A check whose answer `measure` has kept."""

    def kept(evidence: Evidence) -> Check:
        if name not in evidence.measured:
            raise evidence.without(name, "it was not measured: floodrepro verify without --no-measure does so")
        return evidence.measured[name]

    kept.__name__ = name
    return check(kept)


MEASURED = {name: _measured(name) for name in ("weights", "load_back", "round_trip", "panels")}
CHECKS = {
    one.__name__: one
    for one in (
        comparison.parity,
        comparison.head_to_head,
        comparison.variance,
        comparison.reference,
        scores.events,
        scores.calibration,
        scores.identities,
        run.convergence,
        run.throughput,
        run.data,
        run.provenance,
    )
} | MEASURED
_Absent = dict[str, tuple[Status, str]]


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check's answer."""
    return [ask(evidence) for ask in CHECKS.values()]


def required_checks(asked: str | None) -> list[str]:
    """Which checks are required: "all", ids with commas, or None for those of checks.yaml.

    Raises:
        UsageError: There is no such check.
    """
    if asked is None:
        return list(load_criteria()["required"])
    wanted = list(CHECKS) if asked == "all" else asked.split(",")
    if unknown := [name for name in wanted if name not in CHECKS]:
        known = f"one of {', '.join(CHECKS)}, or all"
        raise UsageError(f"there is no check {unknown[0]!r}", where="--require", fix=known)
    return wanted


def load_criteria() -> dict[str, Any]:
    """What each check claims, and `required`: verification/checks.yaml of the package."""
    return recipes.read_yaml(Path(__file__).parent / "checks.yaml")


def load_published() -> dict[str, dict[str, Any]]:
    """Published figures with their sources, by stem: verification/reference/*.yaml of the package."""
    return {path.stem: recipes.read_yaml(path) for path in sorted((Path(__file__).parent / "reference").glob("*.yaml"))}


def gather(
    home: RunFolder,
    split: str,
    reference: Path | None,
    measured: Path,
    *,
    name: str = "",
    data_root: Path | None = None,
) -> Evidence:
    """Read all that is known of a run. What is damaged, and was not asked for by name, counts as absent.

    Args:
        home: The run folder.
        split: Whose chip table is judged.
        reference: Chip table to compare with.
        measured: Folder of the answers that `measure` kept.
        name: What to call the reference; by default what its table is of.
        data_root: Where the chips lie, if not where the recipe says: their audit is looked for there.

    Raises:
        UsageError: The run folder holds no recipe.
        TableError: The reference's table is missing or damaged.
    """
    absent: _Absent = {}
    recipe, other, there = recipes.read_yaml(home.recipe), None, None
    if reference is not None:
        other, there = chip_table.read_table(reference), RunFolder(reference.resolve().parent.parent.parent)
        there = there if there.recipe.is_file() else None  # the table may lie in no run folder
    weights = sha256_of(home.best) if home.best.is_file() else None
    table = _own_table(home, split, weights, absent)
    subsets = {
        path.parent.name: _table(path, absent)
        for path in sorted(home.evaluation.glob(f"*/{home.best.stem}.parquet"))
        if path.parent.name != split
    }
    baselines = sorted((home.evaluation / "baselines" / split).glob("*.parquet"))
    positive, names = positive_class_of(recipe), class_names_of(recipe)
    root = data_root or data_arguments(recipe).get("data_root")
    manifests = [Path(root) / MANIFEST, Path(root).parent / MANIFEST] if root else []
    manifest = next((path for path in manifests if path.is_file()), None)
    return Evidence(
        run=home,
        record=_json(home.record, "record", absent),
        recipe=recipe,
        criteria=load_criteria(),
        class_name=names[positive] if positive < len(names) else f"class {positive}",
        positive=positive,
        metrics=_metrics(home, absent),
        table=table,
        subsets={key: one for key, one in subsets.items() if one and table and one.metadata.get("subset_of") == split},
        reference=other,
        reference_name=name or (f"{there.path.name}/{other.name}" if there and other else other.name if other else ""),
        reference_record=_json(there.record, "reference_record", absent) | {"run": there.path.name} if there else {},
        reference_metrics=_metrics(there, {}) if there else (),
        baselines={path.stem: one for path in baselines if (one := _table(path, absent))},
        measured=_answers(measured, weights, absent),
        seeds=_seeds(home, split, absent),
        audit=_json(manifest, "audit", absent) if manifest else {},
        published=load_published(),
        absent=absent,
    )


def _own_table(home: RunFolder, split: str, weights: str | None, absent: _Absent) -> ChipTable | None:
    """The table of the run's best checkpoint; one of other weights counts as missing."""
    path = home.evaluation / split / f"{home.best.stem}.parquet"
    if not path.is_file():
        absent["table"] = ("skip", f"there is no chip table: floodrepro test --ckpt {home.best.name} writes it")
        return None
    table = _table(path, absent, "table")
    if table and weights and (table.metadata.get("checkpoint") or {}).get("sha256") != weights:
        what = f"the chip table was made from other weights than {home.best.name}: test it again"
        absent["table"] = ("skip", what)
        return None
    return table


def _table(path: Path, absent: _Absent, name: str = "") -> ChipTable | None:
    """A chip table; None where it is damaged."""
    try:
        return chip_table.read_table(path)
    except TableError as error:
        absent[name or f"table {path.parent.name}/{path.stem}"] = ("fail", error.what)
        return None


def _metrics(home: RunFolder, absent: _Absent) -> list[dict[str, str]]:
    """The rows of metrics.csv, every value a number; none where it is missing or damaged."""
    try:
        rows = home.read_metrics()
        if home.metrics.is_file() and not rows:
            raise ValueError("it holds no rows")
        [float(text) for row in rows for text in row.values() if text]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        absent["metrics"] = ("fail", f"metrics.csv cannot be read: {error}")
        return []
    return rows


def _answers(folder: Path, weights: str | None, absent: _Absent) -> dict[str, Check]:
    """What `measure` found of these weights; that of an earlier checkpoint counts as missing."""
    found = {}
    for name in MEASURED:
        entry = _json(folder / f"{name}.json", name, absent)
        if entry and weights and entry.get("measured_on") != weights:
            absent[name] = ("skip", "it was measured on other weights, and not on these")
        elif entry:
            try:
                found[name] = from_json(entry["check"])
            except (KeyError, TypeError, AttributeError) as error:
                absent[name] = ("fail", f"{name}.json holds no answer of a check: {error}")
    return found


def _seeds(home: RunFolder, split: str, absent: _Absent) -> list[SeedRun]:
    """The runs that were declared together with this one; none if it was declared alone."""
    declaration = home.path.resolve().parent / DECLARATION
    runs = []
    for seed in _json(declaration, "seeds", absent).get("seeds") or []:
        one = RunFolder(declaration.parent / f"seed-{seed}")
        weights = sha256_of(one.best) if one.best.is_file() else None
        status = str(_json(one.record, "", {}).get("status", "not started"))
        runs.append(SeedRun(seed, status, _own_table(one, split, weights, {}), one.path.name))
    return runs


def _json(path: Path, name: str, absent: _Absent) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none, or where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        absent[name] = ("fail", f"{path.name} cannot be read: {error}")
        return {}
    return content
