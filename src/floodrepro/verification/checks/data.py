"""Which data was it: the same in training and test, whole by its audit, and the same as the reference's?"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.names import SPLITS
from floodrepro.recipe import Recipe
from floodrepro.verification.check import Cell, Check, Evidence, Table, Value
from floodrepro.verification.comparison import table_file
from floodrepro.verification.judging import judge

ID = "data"
_TITLE = "Data"
_CLAIM = (
    "The checkpoint was trained and tested on one state of the data, {}and the reference saw the same data as far as "
    "that is known."
)
_AUDITED = "the data's audit found no error, "
_AUDIT_SCHEMA = 1  # of data-manifest.json, as `floodrepro.data.audit` writes it
_SEEN = "test_seen_events"  # the fit's digest takes this list in wherever it is there, named by the recipe or not
_SHOWN = 20
_SEVERITIES = ("error", "warning", "info")


def check(evidence: Evidence) -> Check:
    """Compare digests, protocols and numbers of chips, and read the audit.

    A digest is over ids and file sizes of all splits that a recipe names and whose files are there: a split that was
    fetched, or named, between fit and test gives another one. Two are comparable where the splits are the same.
    """
    record, table = evidence.record, evidence.table
    metadata = table.metadata if table else {}
    trained, tested = record.get("data_digest"), metadata.get("data_digest")
    values = [_same("data of training and of the test (digests)", trained, tested)]
    notes: list[str] = []
    if values[0].ok is False:
        notes.append(
            "A data digest covers every split that the recipe names and whose file is there: another split file, or "
            "one fetched after training, changes it as other chips do."
        )
    skip = ""
    if values[0].ok is None:
        why = [evidence.missing.get(name, "") for name, found in (("record", trained), ("table", tested)) if not found]
        skip = "; ".join(filter(None, why)) or "the data digest of the training or of the test is not known"
    findings, judged = _audit(evidence, trained or tested, notes)
    values += judged
    values += _reference(evidence, notes)
    values += _chips(evidence, notes)
    status, reason = judge(values, skip)
    tables = [Table("Findings of the audit", ["severity", "check", "what"], findings)] if findings else []
    files = [*(["run.json"] if record else []), *([table_file(table)] if table else [])]
    claim = _CLAIM.format(_AUDITED if judged else "")  # without an audit it says nothing of one
    return Check(ID, _TITLE, claim, status, reason, values, tables, notes=notes, evidence=files)


def _audit(evidence: Evidence, digest: str | None, notes: list[str]) -> tuple[list[list[Cell]], list[Value]]:
    """The audit's findings, worst first, and what is asked of it."""
    audit = evidence.audit
    if audit is None:
        notes.append("No audit of the data: names and sizes alone were looked at, before training and before the test.")
        return [], []
    if audit.get("schema") != _AUDIT_SCHEMA:
        notes.append(f"The audit has schema {audit.get('schema')}, which is not {_AUDIT_SCHEMA}: it was not used.")
        return [], []
    findings = sorted(audit["findings"], key=lambda finding: _SEVERITIES.index(finding["severity"]))
    kinds = Counter(finding["severity"] for finding in findings)
    depth = "every chip was read" if audit.get("deep") else "names and sizes, no pixel was read"
    errors, shown = kinds["error"], findings[:_SHOWN]
    values = [
        Value("errors of the audit", errors, method=depth, threshold="none", ok=not errors),
        Value("warnings of the audit", kinds["warning"], method=depth),
    ]
    if len(findings) > _SHOWN:
        notes.append(f"{len(findings) - _SHOWN} further findings are in data-manifest.json.")
    if not audit.get("deep"):
        notes.append("The audit looked at names and sizes only: no pixel was read (data audit --deep reads them).")
    if protocol := evidence.table and evidence.table.metadata.get("protocol"):
        ours, theirs = (DATA_OF.get(str(name)) for name in (protocol, audit.get("protocol")))
        values.append(_same("version of the data, run and audit", ours, theirs))
    audited = {split for split, counts in audit["splits"].items() if counts["chips"]} - {_SEEN}
    named = _splits(evidence.recipe) - {_SEEN}
    same = _same("data of the run and of the audit (digests)", digest, audit.get("digest"))
    if same.ok is False and audited != named:
        notes.append(
            f"The audit covers {', '.join(sorted(audited)) or 'no split'}, the recipe {', '.join(sorted(named))}: "
            "their digests cannot be compared, and whether the audit is of this run's data is not known."
        )
    else:
        values.append(same)
    return [[finding["severity"], finding["check"], _line(finding)] for finding in shown], values


def _line(finding: Mapping[str, Any]) -> str:
    where = ", ".join(str(finding[key]) for key in ("chip", "file") if finding.get(key))
    return f"{where}: {finding['message']}" if where else str(finding["message"])


def _splits(recipe: Recipe) -> set[str]:
    """The splits that a recipe names, as the manifest calls them."""
    arguments = (recipe.get("data") or {}).get("init_args") or {}
    names = set()
    for split in SPLITS:
        given = arguments.get(f"{split}_split")
        for name in given if isinstance(given, dict) else [split] if given else []:
            names.add(name if name in SPLITS else f"{split}_{name}")
    return names


def _reference(evidence: Evidence, notes: list[str]) -> list[Value]:
    """Protocol and data of the reference, said to be unknown where nothing tells."""
    if evidence.table is None or evidence.reference is None:
        notes.append(evidence.missing.get("reference", "There is no reference whose data could be compared."))
        return []
    ours, theirs = evidence.table.metadata, evidence.reference.metadata
    trained, trained_there = (side.get("data_digest") for side in (evidence.record, evidence.reference_record))
    if not trained_there:
        notes.append(
            "What data the reference was trained on is unknown here: it has no run.json, or that has no digest."
        )
    return [
        _same("protocol, run and reference", ours.get("protocol"), theirs.get("protocol")),
        _same("data of the test, run and reference (digests)", ours.get("data_digest"), theirs.get("data_digest")),
        _same("data of training, run and reference (digests)", trained, trained_there),
    ]


def _chips(evidence: Evidence, notes: list[str]) -> list[Value]:
    """Whether the table has all chips of its split, and how many of the published ones those are."""
    if evidence.table is None:
        return []
    metadata, found = evidence.table.metadata, len(evidence.table)
    split = str(metadata.get("split", "test"))
    expected = (evidence.record.get("chips") or {}).get(split)
    audit = evidence.audit or {}
    if expected is None and audit.get("digest") and audit["digest"] == metadata.get("data_digest"):
        counts = audit["splits"].get(split if split in SPLITS else f"test_{split}") or {}
        expected = counts.get("chips")
    asked = f"{expected:,}, as many as the split has" if expected is not None else ""
    ok = found == expected if expected is not None else None
    values = [Value(f"chips in the table of {split}", found, n_chips=found, threshold=asked, ok=ok)]
    published = evidence.published.get("dataset", {})
    version = published.get("data_of", {}).get(metadata.get("protocol"))
    whole = published.get("chips", {}).get(version, {}).get(split)
    if whole is not None:
        if found == whole:
            notes.append(f"All {whole:,} published chips of {split} ({version}).")
        else:
            notes.append(
                f"Generated or partial data: {found:,} of the {whole:,} published chips of {split} ({version})."
            )
    return values


def _same(name: str, one: Any, other: Any) -> Value:
    """Whether two are the same; unknown where either is."""
    if not one or not other:
        return Value(name, "unknown")
    return Value(name, "the same" if one == other else "different", threshold="the same", ok=one == other)
