"""The checks' answers, and all that they are given, read from files. Nothing is measured here."""

import csv
import json
import operator
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.audit import MANIFEST
from floodrepro.data.protocols import data_arguments, protocol_of
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable, refuse_to_compare
from floodrepro.run_folder import DECLARATION, RunFolder, sha256_of
from floodrepro.verification.checks import CRITERIA, Check, Evidence, SeedRun, Status, Unanswered, run, scores

MEASURED = "measured.json"
"""What `measure` found: `measured_on`, the sha256 of the weights, and `checks`, an answer a check."""
CHECKS = {name: getattr(module, name) for name in CRITERIA for module in (scores, run) if hasattr(module, name)}
"""The checks that read files alone, the functions of their ids. Those of `measure` have the other ids."""
DAMAGED = (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError)
"""What comes of a record that someone has edited."""
_PUBLISHED = Path(__file__).parent / "reference"
_Absent = dict[str, tuple[Status, str]]


def ask(name: str, evidence: Evidence) -> Check:
    """A check's answer; of a check that has no function in `checks/`, the one that `measure` kept."""
    function = CHECKS.get(name)
    try:
        if not function and name not in evidence.measured:
            otherwise = "it was not measured: floodrepro verify without --no-measure does so"
            raise Unanswered(*evidence.absent.get(MEASURED, ("skip", otherwise)))
        found = function(evidence) if function else evidence.measured[name]
        found = {**found, "status": found["status"], "finding": str(found["finding"])}
    except Unanswered as unanswered:
        found = dict(zip(("status", "finding"), unanswered.args, strict=True))
    except DAMAGED as error:
        traceback.print_exc()  # it may be an error of ours
        found = {"status": "fail", "finding": f"the record is damaged: {error!r:.200}"}
    about, words = CRITERIA[name], {"iou": evidence.iou_name, "positive": evidence.class_name}
    split = evidence.table.metadata.get("split", "test") if evidence.table else "test"
    return {"values": [], "tables": [], "plots": [], "notes": [], "outcome": None, **found} | {
        "id": name,
        "title": about["title"],
        "evidence": [file.format(split=split) for file in about["files"]],
        "claim": about["claim"].format(**words, margin=CRITERIA["parity"]["margin_pp"], **about),
        "code": f"{function.__module__ if function else 'floodrepro.verification.measure'}.{name}",
    }


def required_checks(asked: str | None) -> list[str]:
    """Which checks are required: "all", ids with commas, or None for those of checks.yaml.

    Raises:
        UsageError: There is no such check.
    """
    if asked is None:
        return [name for name, about in CRITERIA.items() if about.get("required")]
    wanted = list(CRITERIA) if asked == "all" else asked.split(",")
    if unknown := [name for name in wanted if name not in CRITERIA]:
        fix = f"one of {', '.join(CRITERIA)}, or all"
        raise UsageError(f"there is no check {unknown[0]!r}", where="--require", fix=fix)
    return wanted


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
    table, weights = _own_table(home, split, absent)

    def tables(paths: Iterable[Path]) -> dict[Path, ChipTable]:
        named = {path: f"table {path.parent.name}/{path.stem}" for path in sorted(paths)}
        read = {path: _read(path, name, absent, chip_table.read_table) for path, name in named.items()}
        return {path: one for path, one in read.items() if one}

    parts = tables(path for path in home.evaluation.glob(f"*/{home.best.stem}.parquet") if path.parent.name != split)
    mine = {path.parent.name: one for path, one in parts.items() if table and one.weights == table.weights}
    baselines = tables((home.evaluation / "baselines" / split).glob("*.parquet"))
    kept = _read(measured / MEASURED, MEASURED, absent) or {}
    if kept and weights and kept.get("measured_on") != weights:
        absent[MEASURED], kept = ("skip", "it was measured on other weights, and not on these"), {}
    root = data_root or data_arguments(recipe).get("data_root")
    manifests = [Path(root) / MANIFEST, Path(root).parent / MANIFEST] if root else []
    declaration = home.path.resolve().parent / DECLARATION
    runs = []
    for seed in _read(declaration, "seeds", absent, _declared_seeds) or []:
        one = RunFolder(declaration.parent / f"seed-{seed}")
        status = (_read(one.record, "", {}) or {}).get("status", "not started")
        runs.append(SeedRun(seed, str(status), _own_table(one, split, {})[0], one.path.name))
    positive, names = protocol_of(recipe).positive_class, protocol_of(recipe).class_names
    return Evidence(
        run=home,
        record=_read(home.record, "record", absent) or {},
        recipe=recipe,
        class_name=names[positive] if positive < len(names) else f"class {positive}",
        positive=positive,
        metrics=_read(home.metrics, "metrics", absent, _logged_rows) or [],
        table=table,
        subsets={name: one for name, one in mine.items() if one.metadata.get("subset_of") == split},
        reference=other,
        reference_name=name,
        baselines={path.stem: one for path, one in baselines.items() if table and not refuse_to_compare(table, one)},
        measured=kept.get("checks") or {},
        seeds=runs,
        audit=next((_read(path, "audit", absent) or {} for path in manifests if path.is_file()), {}),
        published={path.stem: recipes.read_yaml(path) for path in sorted(_PUBLISHED.glob("*.yaml"))},
        absent=absent,
    )


def _own_table(home: RunFolder, split: str, absent: _Absent) -> tuple[ChipTable | None, str | None]:
    """The table of the run's best checkpoint, and its sha256; a table of other weights counts as missing."""
    path = home.evaluation / split / f"{home.best.stem}.parquet"
    table: ChipTable | None = _read(path, "table", absent, chip_table.read_table)
    weights = sha256_of(home.best) if home.best.is_file() else None
    if not path.is_file():
        absent["table"] = ("skip", f"there is no chip table: floodrepro test --ckpt {home.best.name} writes it")
    elif table and weights and table.weights != weights:
        absent["table"] = ("skip", f"the chip table was made from other weights than {home.best.name}: test it again")
        table = None
    return table, weights


def _json_object(path: Path) -> dict[str, Any]:
    return dict(**json.loads(path.read_text(encoding="utf-8")))  # TypeError of anything but an object


def _logged_rows(path: Path) -> list[dict[str, str]]:
    if not (rows := RunFolder(path.parent).read_metrics()):
        raise ValueError("it holds no rows")
    [float(text) for row in rows for text in row.values() if text]
    return rows


def _declared_seeds(path: Path) -> list[int]:
    return [operator.index(seed) for seed in _json_object(path).get("seeds") or []]  # TypeError of no integers


def _read(path: Path, name: str, absent: _Absent, reader: Callable[[Path], Any] = _json_object) -> Any:
    """What a file holds; None where there is none or, which `absent` then says under the name, where it is damaged."""
    try:
        return reader(path) if path.is_file() else None
    except (OSError, ValueError, TypeError, RecursionError, csv.Error, FloodreproError) as error:
        absent[name] = ("fail", f"{path.name} is damaged, or cannot be read: {getattr(error, 'what', error)}")
        return None
