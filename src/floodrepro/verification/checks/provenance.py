"""Where does it come from: code, recipe, data and weights by their hashes, and every run that was declared."""

import re
from collections.abc import Mapping
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.verification.check import Check, Evidence, Table, Value
from floodrepro.verification.comparison import same_model, table_file
from floodrepro.verification.judging import judge

ID = "provenance"
_TITLE = "Provenance"
_CLAIM = (
    "A finished run of code that can be had again, whose recipe, data and weights are named by their hashes and belong "
    "together with the table; every declared run is reported."
)
_HEX = {40: re.compile(r"[0-9a-f]{40}"), 64: re.compile(r"[0-9a-f]{64}")}
_HARMLESS = re.compile(
    r"trainer\..*|data\.init_args\.((\w+_)?data_root|\w+_split(\.\w+)?|num_workers|prefetch_factor|batch_size)"
)
_ASKED = "the same, but for paths, loaders and the trainer"
_REPORTED = ("finished", "failed")


def check(evidence: Evidence) -> Check:
    """Follow the hashes from the recipe to the table."""
    record = evidence.record
    if not record:
        return Check(ID, _TITLE, _CLAIM, "skip", evidence.missing.get("record", "there is no run.json"))
    notes = _history(record)
    status_of_run = record.get("status")
    values = [
        Value("status of the run", status_of_run, threshold="finished", ok=status_of_run == "finished"),
        *_code(record, notes),
        *_recipe(evidence),
        _hash("sha256 of the data's ids and sizes", record.get("data_digest")),
    ]
    tables, skip = [], ""
    if evidence.table is None:
        skip = evidence.missing.get("table", "the run has no chip table")
    else:
        values += _table(evidence, evidence.table, notes)
    values += _runs(evidence)
    if evidence.seeds:
        rows = [[run.seed, run.status, "yes" if run.table else "no", run.run] for run in evidence.seeds]
        tables.append(Table("Declared runs", ["seed", "status", "tested", "run"], rows))
    status, reason = judge(values, skip)
    files = ["run.json", "recipe.yaml", *([table_file(evidence.table)] if evidence.table else [])]
    return Check(ID, _TITLE, _CLAIM, status, reason, values, tables, notes=notes, evidence=files)


def _history(record: Mapping[str, Any]) -> list[str]:
    """What happened on the way that a reader has to know."""
    notes = []
    for resume in record.get("resumes") or []:
        if resume.get("changes"):
            changes = "; ".join(map(str, resume["changes"]))
            notes.append(f"Resumed on {resume.get('when')} although something had changed: {changes}.")
        else:
            notes.append(f"Resumed on {resume.get('when')} from {resume.get('from')}, unchanged.")
    if used := [name for name, used in (record.get("numerics") or {}).items() if used]:
        notes.append(f"Options that may change roundings were on: {', '.join(used)}.")
    return notes


def _code(record: Mapping[str, Any], notes: list[str]) -> list[Value]:
    """A clean commit; for an installed package, which has none, its version and the hash of its source."""
    code, git = record.get("code") or {}, (record.get("environment") or {}).get("code") or {}
    commit, dirty = (git.get(key) if git.get(key) is not None else code.get(key) for key in ("commit", "dirty"))
    values = [
        Value("floodrepro", code.get("floodrepro"), threshold="a version", ok=bool(code.get("floodrepro"))),
        _hash("sha256 of floodrepro's source", code.get("source_sha256")),
    ]
    if commit is None and dirty is None:
        notes.append(
            f"No commit is recorded ({git.get('note') or 'no reason given'}): version and source hash stand in."
        )
        return values
    state = "unknown" if dirty is None else "dirty: tracked files differ from the commit" if dirty else "clean"
    return [
        *values,
        _hash("commit", commit, 40),
        Value("working tree", state, threshold="clean", ok=dirty is False),
    ]


def _recipe(evidence: Evidence) -> list[Value]:
    recorded = evidence.record.get("recipe_sha256")
    own = recipes.fingerprint(evidence.recipe)
    return [
        _hash("sha256 of the recipe", recorded),
        _equal("recipe.yaml and run.json", own, recorded, "the recipe that was recorded"),
    ]


def _table(evidence: Evidence, table: ChipTable, notes: list[str]) -> list[Value]:
    """Whether the table belongs to this run's recipe and to the weights that were measured."""
    weights = _weights(table)
    values = [
        _hash("sha256 of the weights that were tested", weights),
        _tested_recipe(table, evidence.record.get("recipe_sha256"), notes),
    ]
    measured = evidence.measured.get("weights") or {}
    if "sha256" in measured:
        values.append(
            _equal("weights of the table and in the run folder", weights, measured["sha256"], "the same sha256")
        )
    else:
        notes.append(
            "The weights in the run folder were not hashed: the table's sha256 was not compared with the file's."
        )
    for name, subset in evidence.subsets.items():
        if _weights(subset) != weights:
            values.append(
                _equal(f"weights of subset {name} and of the table", _weights(subset), weights, "the same sha256")
            )
    return values if evidence.reference is None else [*values, *_reference(evidence, table, evidence.reference, notes)]


def _tested_recipe(table: ChipTable, recorded: Any, notes: list[str], whose: str = "run") -> Value:
    """The run's own recipe, but for where the data lies and how it is run: another machine has other paths."""
    tested, changes = table.metadata.get("recipe_sha256"), table.metadata.get("recipe_changes")
    name = "recipe of the table and of the run" if whose == "run" else f"recipe of the {whose}'s table and of its run"
    if tested == recorded or not changes:
        return _equal(name, tested, recorded, _ASKED)
    precision = table.metadata.get("precision")
    notes.append(f"The {whose} was tested with another {', '.join(changes)} than its recipe has, at {precision}.")
    other = [key for key in changes if not _HARMLESS.fullmatch(key)]
    shown = f"another {', '.join(other)}" if other else "the same, but for what the notes say"
    return Value(name, shown, threshold=_ASKED, ok=not other)


def _reference(evidence: Evidence, table: ChipTable, reference: ChipTable, notes: list[str]) -> list[Value]:
    """Whether the reference is another model than the run, tested as it was trained, or on what the run sees."""
    weights, recorded = _weights(reference), evidence.reference_record.get("recipe_sha256")
    values = [_hash("sha256 of the reference's weights", weights)]
    if same := same_model(table, reference):
        values.append(Value("reference", f"it {same}", threshold="another model than the run's own", ok=False))
    if recorded or reference.metadata.get("recipe_changes"):
        values.append(_tested_recipe(reference, recorded, notes, "reference"))
    else:
        values.append(_tested_inputs(table, reference, notes))
    known = {entry["sha256"] for entry in evidence.published.values() if "sha256" in entry}
    if known and weights not in known:
        notes.append("The reference is no published checkpoint that is known here.")
    return values


def _tested_inputs(table: ChipTable, reference: ChipTable, notes: list[str]) -> Value:
    """Of a checkpoint without a run folder nobody knows the recipe: it was to see of a chip what the run sees."""
    name = "what run and reference saw of a chip"
    ours, theirs = (one.metadata.get("inputs") for one in (table, reference))
    if not (ours and theirs):
        notes.append("With what statistics, bands and timesteps the reference was tested is unknown: it has no record.")
        return Value(name, "unknown")
    other = list(recipes.differences(ours, theirs))
    return Value(name, f"another {', '.join(other)}" if other else "the same", threshold="the same", ok=not other)


def _weights(table: ChipTable) -> Any:
    return (table.metadata.get("checkpoint") or {}).get("sha256")


def _runs(evidence: Evidence) -> list[Value]:
    """How many runs were declared, and how many of them are accounted for: tested, or listed as failed."""
    if not evidence.seeds:
        return [Value("runs declared", 1), Value("runs reported", 1, threshold="1", ok=True)]
    declared = len(evidence.seeds)
    open_ones = [
        f"seed {run.seed} ({'not tested' if run.status == 'finished' else run.status})"
        for run in evidence.seeds
        if run.status not in _REPORTED or (run.status == "finished" and run.table is None)
    ]
    reported = declared - len(open_ones)
    shown = f"{reported}; not {', '.join(open_ones)}" if open_ones else reported
    values = [
        Value("runs declared", declared),
        Value("runs reported", shown, threshold=f"all {declared}", ok=not open_ones),
    ]
    if (seed := evidence.record.get("seed")) not in {run.seed for run in evidence.seeds}:
        values.append(Value("seed of this run", seed, threshold="one of those declared", ok=False))
    return values


def _hash(name: str, value: Any, digits: int = 64) -> Value:
    """A hash, which has to be there and to look like one."""
    ok = isinstance(value, str) and _HEX[digits].fullmatch(value) is not None
    return Value(name, value, threshold=f"{digits} hexadecimal digits", ok=ok)


def _equal(name: str, one: Any, other: Any, asked: str) -> Value:
    same = one is not None and one == other
    return Value(name, "the same" if same else f"{_short(one)} and {_short(other)}", threshold=asked, ok=same)


def _short(sha256: Any) -> str:
    return f"{str(sha256)[:12]}…" if sha256 else "none"
