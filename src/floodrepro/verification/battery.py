"""The checks' answers, and all that they are given, read from files. Nothing is measured here."""

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
from floodrepro.verification.checks import CHECKS, CRITERIA, Check, Evidence, SeedRun, Status, Unanswered

MEASURED = "measured.json"
"""What `measure` found: `measured_on`, the sha256 of the weights, and `checks`, an answer a check."""
DAMAGED = (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError)
"""What comes of a record that someone has edited."""
_Absent = dict[str, tuple[Status, str]]


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check's answer, in the order of the report."""
    return [ask(name, evidence) for name in CRITERIA]


def ask(name: str, evidence: Evidence) -> Check:
    """A check's answer; of a check that has no function in `checks/`, the one that `measure` kept."""
    function = CHECKS.get(name)
    try:
        if function:
            found = function(evidence)
        elif name in evidence.measured:
            found = evidence.measured[name]
        else:
            raise evidence.without(MEASURED, "it was not measured: floodrepro verify without --no-measure does so")
        found = {**found, "status": found["status"], "finding": str(found["finding"])}
    except Unanswered as unanswered:
        found = dict(zip(("status", "finding"), unanswered.args, strict=True))
    except DAMAGED as error:
        found = {"status": "fail", "finding": f"the record is damaged: {error!r:.200}"}
    about, margin = CRITERIA[name], CRITERIA["parity"]["margin_pp"]
    split = evidence.table.metadata.get("split", "test") if evidence.table else "test"
    answer: Check = {"values": [], "tables": [], "plots": [], "notes": [], "outcome": None, **found, "id": name}
    answer["title"], answer["evidence"] = about["title"], [file.format(split=split) for file in about["files"]]
    answer["claim"] = about["claim"].format(iou=evidence.iou_name, positive=evidence.class_name, margin=margin, **about)
    answer["code"] = f"{function.__module__ if function else 'floodrepro.verification.measure'}.{name}"
    return answer


def required_checks(asked: str | None) -> list[str]:
    """Which checks are required: "all", ids with commas, or None for those of checks.yaml.

    Raises:
        UsageError: There is no such check.
    """
    if asked is None:
        return [name for name, about in CRITERIA.items() if about.get("required")]
    wanted = list(CRITERIA) if asked == "all" else asked.split(",")
    if unknown := [name for name in wanted if name not in CRITERIA]:
        known = f"one of {', '.join(CRITERIA)}, or all"
        raise UsageError(f"there is no check {unknown[0]!r}", where="--require", fix=known)
    return wanted


def load_published() -> dict[str, dict[str, Any]]:
    """Published figures with their sources, by stem: verification/reference/*.yaml of the package."""
    return {path.stem: recipes.read_yaml(path) for path in sorted((Path(__file__).parent / "reference").glob("*.yaml"))}


def gather(
    home: RunFolder, split: str, reference: Path | None, measured: Path, name: str = "", data_root: Path | None = None
) -> Evidence:
    """Read all that is known of a run. What is damaged, and was not asked for by name, counts as absent.

    `reference` is a chip table, called `name` or by what it is of, and `measured` the folder of what `measure` kept.
    The data's audit is looked for in `data_root`, or where the recipe has it.

    Raises:
        UsageError: The run folder holds no recipe.
        TableError: The reference's table is missing or damaged.
    """
    absent: _Absent = {}
    recipe, other = recipes.read_yaml(home.recipe), chip_table.read_table(reference) if reference else None
    if reference and other and not name:
        there = RunFolder(reference.resolve().parent.parent.parent)  # if the table lies in a run folder
        name = f"{there.path.name}/{other.name}" if there.recipe.is_file() else other.name
    weights = sha256_of(home.best) if home.best.is_file() else None
    table = _own_table(home, split, weights, absent)
    parts = {path.parent.name: path for path in sorted(home.evaluation.glob(f"*/{home.best.stem}.parquet"))}
    subsets = {part: _table(path, absent) for part, path in parts.items() if part != split}
    baselines = sorted((home.evaluation / "baselines" / split).glob("*.parquet"))
    kept = _json(measured / MEASURED, MEASURED, absent)
    if kept and weights and kept.get("measured_on") != weights:
        absent[MEASURED], kept = ("skip", "it was measured on other weights, and not on these"), {}
    root = data_root or data_arguments(recipe).get("data_root")
    manifests = [Path(root) / MANIFEST, Path(root).parent / MANIFEST] if root else []
    positive, names = positive_class_of(recipe), class_names_of(recipe)
    return Evidence(
        run=home,
        record=_json(home.record, "record", absent),
        recipe=recipe,
        class_name=names[positive] if positive < len(names) else f"class {positive}",
        positive=positive,
        metrics=_metrics(home, absent),
        table=table,
        subsets={key: one for key, one in subsets.items() if one and table and one.metadata.get("subset_of") == split},
        reference=other,
        reference_name=name,
        baselines={path.stem: one for path in baselines if (one := _table(path, absent))},
        measured=kept.get("checks") or {},
        seeds=_seeds(home, split, absent),
        audit=next((_json(path, "audit", absent) for path in manifests if path.is_file()), {}),
        published=load_published(),
        absent=absent,
    )


def _own_table(home: RunFolder, split: str, weights: str | None, absent: _Absent) -> ChipTable | None:
    """The table of the run's best checkpoint; one of other weights counts as missing."""
    path = home.evaluation / split / f"{home.best.stem}.parquet"
    table = _table(path, absent, "table") if path.is_file() else None
    if not path.is_file():
        absent["table"] = ("skip", f"there is no chip table: floodrepro test --ckpt {home.best.name} writes it")
    elif table and weights and (table.metadata.get("checkpoint") or {}).get("sha256") != weights:
        absent["table"] = ("skip", f"the chip table was made from other weights than {home.best.name}: test it again")
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


def _seeds(home: RunFolder, split: str, absent: _Absent) -> list[SeedRun]:
    """The runs that were declared together with this one; none if it was declared alone."""
    declaration = home.path.resolve().parent / DECLARATION
    runs, seeds = [], _json(declaration, "seeds", absent).get("seeds") or []
    if not (isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)):
        absent["seeds"], seeds = ("fail", f"{declaration.name} is damaged: its seeds are no whole numbers"), []
    for seed in seeds:
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
    except (OSError, ValueError, RecursionError) as error:
        absent[name] = ("fail", f"{path.name} cannot be read: {error}")
        return {}
    return content
