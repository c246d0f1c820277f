"""results.json: what a battery found, in JSON types, and the only source of its report and of the model card.

`docs/verification.md` documents every key.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import numpy as np

import floodrepro
from floodrepro.errors import RunFolderError, TableError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import per_class, scores
from floodrepro.run_folder import write_atomically
from floodrepro.verification.check import Check, Evidence
from floodrepro.verification.verdict import verdict, warnings

SCHEMA = 1

_RECORD = (
    *("status", "reason", "recipe_sha256", "data_digest", "code", "environment", "seed", "epochs", "best_epoch"),
    *("best_val_loss", "started", "ended", "chips", "incidents", "rollback", "resumes", "numerics", "options"),
    *("energy", "progress", "step_seconds", "chips_per_second", "share_waiting_for_data", "memory_gib"),
    *("undetermined_operations", "checkpoint_sha256", "processes", "batch_size", "data_warnings"),
)
_PARTS = {
    **{"made": str, "floodrepro": str, "run": dict, "verdict": dict, "summary": dict, "warnings": list},
    **{"scores": dict, "subsets": dict, "checks": list},
}
_PATH = re.compile(r"""(?<![\w./])/(?:[^\s'"/]+/)*([^\s'"/]+)""")
_WORDS = {"passed": "pass", "failed": "fail", "skipped": "skip"}


def summarise(
    evidence: Evidence, checks: Sequence[Check], required: Sequence[str], made: str, standard: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        evidence: What the checks were given.
        checks: Their answers, in the order of the report.
        required: Ids of the checks without which there is no verdict; one that was not made counts as not passed.
        made: The time, ISO 8601.
        standard: Ids without which nothing is claimed or published, whatever was asked for.
    """
    needed = list(dict.fromkeys([*standard, *required]))
    statuses = {check.id: check.status for check in checks}
    counted = {word: sum(check.status == status for check in checks) for word, status in _WORDS.items()}
    broken = [id_ for id_ in required if statuses.get(id_) != "pass"]
    short = [id_ for id_ in needed if statuses.get(id_) != "pass"]
    results: dict[str, Any] = _plain(
        {
            **{"schema": SCHEMA, "made": made, "floodrepro": floodrepro.__version__},
            "run": _run(evidence),
            "reference": _reference(evidence),
            "verdict": verdict(evidence, checks, short),
            "summary": {
                **counted,
                "text": _text(counted),
                "required": required,
                "required_not_passed": broken,
                "needed": needed,
                "needed_not_passed": short,
                "ok": not broken,
                "partial": counted["skipped"] > 0 or any(id_ not in statuses for id_ in required),
            },
            "warnings": warnings(evidence),
            "scores": _score_table(evidence),
            "subsets": {
                name: {"n_chips": len(table), "n_events": len(set(table.events.tolist()))} | table_scores(table)
                for name, table in evidence.subsets.items()
            },
            "checks": [asdict(check) | {"number": number} for number, check in enumerate(checks, start=1)],
        }
    )
    return results


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write results.json, atomically.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise RunFolderError(
            f"the results cannot be written: {error.strerror}", where=path, fix="--output DIR puts them elsewhere"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read results.json and check that it is whole and that its summary is that of its checks.

    Raises:
        RunFolderError: There is none, or it cannot be read.
        TableError: It is damaged, of another schema, or contradicts itself.
    """
    again = "floodrepro verify --run DIR writes it again"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"the results cannot be read: {error.strerror}", where=path, fix=again) from error
    except ValueError as error:
        raise TableError(f"the results are no JSON, or damaged: {error}", where=path, fix=again) from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if not isinstance(schema, int):
        raise TableError("this is no results.json: it holds no schema", where=path, fix=again)
    if schema != SCHEMA:
        newer = schema > SCHEMA
        raise TableError(
            f"the results have schema {schema}, this version of floodrepro ({floodrepro.__version__}) reads {SCHEMA}",
            where=path,
            fix=f"read them with floodrepro {results.get('floodrepro', 'of a later version')}" if newer else again,
        )
    if problem := _contradiction(results):
        raise TableError(f"the results contradict themselves: {problem}", where=path, fix=again)
    return results


def _run(evidence: Evidence) -> dict[str, Any]:
    metadata = evidence.table.metadata if evidence.table else {}
    return {
        "name": evidence.run.path.name,
        "protocol": metadata.get("protocol"),
        "split": metadata.get("split"),
        "checkpoint": metadata.get("checkpoint"),
        "seeds": [{"seed": run.seed, "status": run.status, "run": run.run} for run in evidence.seeds],
        **{key: _without_paths(evidence.record[key]) for key in _RECORD if key in evidence.record},
    }


def _without_paths(entry: Any) -> Any:
    """A record's entry with files by their names alone: results are published, and where they lay is nobody's.

    In sentences as well, such as that of a resume: "'/home/a/data' became '/mnt/b'".
    """
    if isinstance(entry, Mapping):
        return {key: _without_paths(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [_without_paths(value) for value in entry]
    if not isinstance(entry, str):
        return entry
    return PurePath(entry).name if entry.startswith("/") else _PATH.sub(r"\1", entry)


def _reference(evidence: Evidence) -> dict[str, Any] | None:
    if evidence.reference is None:
        return None
    keys = ("checkpoint", "recipe_sha256", "data_digest", "protocol")
    return {"name": evidence.reference_name, **{key: evidence.reference.metadata.get(key) for key in keys}}


def table_scores(table: ChipTable) -> dict[str, float | None]:
    """TerraTorch's scores of the pooled counts and each class's recall; None where no pixel was counted."""
    counts = table.counts.sum(axis=0)
    recall = per_class(counts)["recall"]
    found = scores(counts) | {f"Class_Accuracy_{k}": float(value) for k, value in enumerate(recall)}
    return dict.fromkeys(found) if not counts.sum() else dict(found)


def _score_table(evidence: Evidence) -> dict[str, Any]:
    """The run beside the reference and the published figures of its protocol, a row a metric, flood IoU first."""
    table = evidence.table
    if table is None:
        return {"rows": [], "columns": []}
    columns = [_column("ours", evidence.run.path.name, table)]
    figures: dict[str, Mapping[str, Any]] = {"ours": table_scores(table)}
    if evidence.reference is not None:
        columns.append(_column("reference", evidence.reference_name, evidence.reference))
        figures["reference"] = table_scores(evidence.reference)
    for stem, entry in evidence.published.items():
        if entry.get("figures") and entry.get("protocol") == table.metadata.get("protocol"):
            chips = entry.get("chips")
            same = f"on {chips} chips, as many as here" if chips == len(table) else "on other chips"
            columns.append(
                {
                    "key": stem,
                    "label": str(entry.get("name", stem)),
                    "source": str(entry.get("source", "no source given")),
                    "note": f"Measured by others, {same}; not by this code.{_doubts(stem, entry)}",
                }
            )
            figures[stem] = {str(key).removeprefix("test/"): value for key, value in entry["figures"].items()}
    return {
        "rows": [
            {"metric": metric, "label": label} | {key: values.get(metric) for key, values in figures.items()}
            for metric, label in _labels(table)
        ],
        "columns": columns,
    }


def _doubts(stem: str, entry: Mapping[str, Any]) -> str:
    found = len(entry.get("contradictions") or [])
    return f" Contradictions found in it: {found}, listed in verification/reference/{stem}.yaml." if found else ""


def _column(key: str, label: str, table: ChipTable) -> dict[str, str]:
    checkpoint = (table.metadata.get("checkpoint") or {}).get("name", "a checkpoint")
    source = f"{checkpoint}, {len(table)} chips of {len(set(table.events.tolist()))} events"
    return {"key": key, "label": label, "source": source, "note": "Computed from its chip table by this code."}


def _labels(table: ChipTable) -> list[tuple[str, str]]:
    """Metrics with their labels. The last class of every protocol is flood."""
    flood = table.num_classes - 1
    names = table.metadata.get("class_names") or [f"class {k}" for k in range(table.num_classes)]
    others = range(flood)
    return [
        (f"IoU_{flood}", f"{names[flood]} IoU"),
        ("mIoU", "mIoU"),
        *((f"IoU_{k}", f"{names[k]} IoU") for k in others),
        ("F1_Score", "F1, mean of classes"),
        (f"Class_Accuracy_{flood}", f"{names[flood]} recall"),
        *((f"Class_Accuracy_{k}", f"{names[k]} recall") for k in others),
        ("Pixel_Accuracy", "pixel accuracy"),
    ]


def _text(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{counted[word]} {word}" for word in _WORDS)


def _contradiction(results: Mapping[str, Any]) -> str | None:
    for key, kind in _PARTS.items():
        if not isinstance(results.get(key), kind):
            return f"{key} is missing or of another type"
    checks, summary = results["checks"], results["summary"]
    if not all(isinstance(check, dict) and {"id", "status", "values"} <= check.keys() for check in checks):
        return "a check lacks its id, status or values"
    counted = {word: sum(check["status"] == status for check in checks) for word, status in _WORDS.items()}
    passed = {check["id"] for check in checks if check["status"] == "pass"}
    broken = [id_ for id_ in summary.get("required", []) if id_ not in passed]
    short = [id_ for id_ in summary.get("needed", []) if id_ not in passed]
    if counted != {word: summary.get(word) for word in _WORDS} or summary.get("text") != _text(counted):
        return f"the checks say {_text(counted)}, the summary says {summary.get('text')}"
    if summary.get("required_not_passed") != broken or summary.get("ok") is not (not broken):
        return "the summary names other required checks that did not pass than the checks do"
    if summary.get("needed_not_passed", []) != short:
        return "the summary names other checks that a claim needs and lacks than the checks do"
    if results["verdict"].get("equivalent") and (short or "parity" not in passed):
        return "the verdict claims equivalence, and a check that it needs did not pass"
    return None


def _plain(value: Any) -> Any:
    """JSON types only; what is not a finite number is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
