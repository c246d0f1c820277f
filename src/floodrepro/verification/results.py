"""results.json: what the checks found, the only source of report and card (docs/verification.md has every key)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

import floodrepro
from floodrepro.console import public
from floodrepro.data.protocols import protocol_of
from floodrepro.data.weights import describe_model
from floodrepro.errors import TableError
from floodrepro.evaluation.metrics import class_scores, iou, scores, which_iou
from floodrepro.verification import report
from floodrepro.verification.battery import DAMAGED, ask, required_checks
from floodrepro.verification.checks import CRITERIA, Check, Evidence

SCHEMA = 3
_OF_REFERENCE = ("detail", "checkpoint", "recipe_sha256")  # of its table
_WHOLE = re.compile(r"""(^(?:--[\w.-]+=)?|['"])(?:file:/)?/(?:[^'":/]|(?<! )/)*(?<! )/""")  # a path with spaces
_PATH = re.compile(r"""(?:file:/|(?<![\w./]))/(?:[^\s'"/]+/)*([^\s'"/]+)""")
_WORDS = {"pass": "passed", "fail": "failed", "undecided": "undecided", "skip": "skipped"}


def summarise(evidence: Evidence, require: str | None, made: str) -> dict[str, Any]:
    """The content of results.json: every check's answer in the order of the report, and what they say together.

    `require` is what --require names, "all" or ids: a comparison among them has to be equivalent. With None, what
    checks.yaml requires counts, and a comparison is met if it does not fail: data that do not decide are no failure.
    """
    by_id, other = {name: ask(name, evidence) for name in CRITERIA}, evidence.reference
    summary, about = _summary(by_id, require), other.metadata if other else {}
    content = {
        "schema": SCHEMA,
        "made": made,
        "floodrepro": floodrepro.__version__,
        "run": _run(evidence),
        "reference": other and {"name": evidence.reference_name} | {key: about.get(key) for key in _OF_REFERENCE},
        "verdict": _verdict(evidence, by_id, summary["not_met"]),
        "summary": summary,
        "banner": _banner(evidence),
        "warnings": _warnings(evidence),
        "scores": _score_table(evidence),
        "forest": _forest(evidence, by_id),
        "checks": list(by_id.values()),
    }
    text = json.dumps(content, default=lambda array: array.tolist())
    plain: dict[str, Any] = without_folders(json.loads(text, parse_constant=lambda name: None))  # NaN is no JSON
    return plain


def load(path: Path, weights: str | None = None) -> dict[str, Any]:
    """Read results.json, which must not be of other weights than those of this sha256, if one is given.

    Raises:
        TableError: It cannot be read, is damaged, or of another schema or checkpoint.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if results["schema"] != SCHEMA:
            raise ValueError(f"schema {results['schema']}, this version of floodrepro reads {SCHEMA}")
        report.render(results, {})  # raises where something is missing, or is not what verify writes
        if weights and (results["run"].get("checkpoint") or {}).get("sha256") not in (None, weights):
            raise ValueError("it is of another checkpoint")
    except (OSError, TemplateError, *DAMAGED) as error:
        what = f"the results are missing, damaged, or of another version or checkpoint: {error}"
        raise TableError(what, where=path, fix="floodrepro verify --run DIR writes it again") from error
    return results


def _summary(by_id: Mapping[str, Check], require: str | None) -> dict[str, Any]:
    def is_met(check: Check) -> bool:
        if require is None and CRITERIA[check["id"]].get("comparison"):
            return bool(check["status"] != "fail")
        return check["status"] == "pass" and check["outcome"] in (None, "equivalent")

    def say(label: str, named: Sequence[str]) -> str:
        return f"{label}: {', '.join(named)}. " if named else ""

    required, titles = required_checks(require), {name: check["title"] for name, check in by_id.items()}
    not_met = [name for name in required if not is_met(by_id[name])]
    left_out = [name for name in required_checks(None) if name not in required]
    met = [by_id[name] for name in required if name not in not_met]
    counted = {word: sum(check["status"] == status for check in by_id.values()) for status, word in _WORDS.items()}
    against = say("Required and not met", [titles[name] for name in not_met])
    against += say("The list of required checks was shortened; not asked for", [titles[name] for name in left_out])
    compared = [check for check in met if check["outcome"] or check["status"] != "pass"]
    outcomes = [f"{check['title']} ({check['outcome'] or 'not made'})" for check in compared]
    others = say("Comparisons, where they could be made", outcomes)
    others += say("All checks", [f"{number} {word}" for word, number in counted.items() if number])
    others += say("Failed", [f"{one['title']} ({one['finding']})" for one in by_id.values() if one["status"] == "fail"])
    about = {"required": required, "left_out": left_out, "not_met": not_met, "ok": not not_met}
    return counted | about | {"objection": against.strip(), "text": f"{against}{others}".strip()}


def _verdict(evidence: Evidence, by_id: Mapping[str, Check], not_met: Sequence[str]) -> dict[str, Any]:
    """One word (docs/verification.md lists them) and one sentence, and what was not shown."""
    parity, seeds, mean, published = (by_id[key] for key in ("parity", "variance", "head_to_head", "reference"))
    outcome, name = parity["outcome"], evidence.reference_name or "the reference"
    word, sentence = "not compared", "There was no comparison with a reference; the run itself was checked."
    generated = (evidence.record.get("data") or {}).get("generated")
    if outcome and evidence.table:
        on = f"{len(evidence.table):,} {'generated ' if generated else ''}chips"
        sentence = f"Against {name}, on {on}: {evidence.iou_name} {parity['finding']}."
        doubts = [seeds] if seeds["status"] in ("fail", "undecided") else []
        doubts += [mean] if "different" in str(mean["outcome"]) else []
        # Equivalence is refused its name where the declared seeds, or the mean over events, stand against it.
        doubts = [one for one in doubts if outcome == "equivalent" or one["outcome"] == "different (worse)"]
        if doubts and outcome != "different (worse)":
            outcome = "different (worse)" if seeds["outcome"] == "different (worse)" else "undecided"
            sentence = f"{sentence[:-1]}. But {doubts[0]['title'].lower()}: {doubts[0]['finding']}."
        word = outcome
    elif evidence.reference is not None:
        sentence = f"The run was not compared with {name}: {parity['finding']}."
    if published["status"] == "pass":
        sentence += f" The published figures of {name} came out here."
    if broken := [by_id[key] for key in not_met if not CRITERIA[key].get("comparison")]:
        named = "; ".join(f"{check['title']} ({check['finding']})" for check in broken)
        sentence = f"Required checks did not pass: {named}. {sentence}"
        word = "failed" if any(check["status"] == "fail" for check in broken) else "incomplete"
    # Of a published result, the reference has to come out as published, and this run as the reference.
    reasons = {"pass": "" if word == "equivalent" else f'the verdict is "{word}"', "skip": published["finding"]}
    reason = reasons.get(published["status"], f"{published['title']} did not come out")
    limits = [f"a published result reproduced: {reason}"] if reason else []
    if better := _better_baseline(evidence):
        limits.append(f"a model better than simple rules: the baseline {better[0]} scores higher")
    limits += [] if len(evidence.seeds) > 1 else ["another seed"]
    limits.append("other regions, and events unlike these")
    if generated:
        limits.append("real events, or IBM's model on them: the chips are generated")
    numbered = ", ".join(f"({n}) {limit}" for n, limit in enumerate(limits, 1))
    return {"word": word, "outcome": outcome, "sentence": sentence, "not_shown": f"Not shown: {numbered}."}


def _forest(evidence: Evidence, by_id: Mapping[str, Check]) -> dict[str, Any]:
    """All differences to the reference that have an interval, as a plot."""
    values = [value for check in by_id.values() for value in check["values"] if value["level"]]
    values.sort(key=lambda value: "mIoU" in value["name"])  # the figures that are tested first
    margin, level = CRITERIA["parity"]["margin_pp"], CRITERIA["parity"]["level"]
    x, low, high = ([value[key] for value in values] for key in ("value", "low", "high"))
    named = [value["name"].removeprefix("difference in ") for value in values]
    n = max((value["n_events"] or 0 for value in values), default=0)
    return {
        "name": "forest",
        "kind": "forest",
        "x_label": "this run less the reference, percentage points",
        "series": [{"label": "difference", "x": x, "y": named, "low": low, "high": high}] if values else [],
        "caption": f"Differences over {n} events with {level:.0%} intervals; the margin of ±{margin:g} pp is shaded.",
        "margin": margin,
    }


def _run(evidence: Evidence) -> dict[str, Any]:
    table, record = evidence.table, evidence.record
    metadata, data = table.metadata if table else {}, record.get("data") or {}
    tested = (metadata.get("data") or {}).get("digests") or {}
    return {key: value for key, value in record.items() if key != "schema"} | {
        "data": data | {"digests": (data.get("digests") or {}) | tested},
        "model": describe_model(evidence.recipe, record),
        "name": evidence.run.path.resolve().name,
        "protocol": protocol_of(evidence.recipe).name,
        "class_name": evidence.class_name,
        "split": metadata.get("split"),
        "checkpoint": metadata.get("checkpoint"),
        "n_chips": len(table) if table else None,
        "n_events": len(set(table.events)) if table else None,
        "seeds": [{"seed": run.seed, "status": run.status, "run": run.run} for run in evidence.seeds],
    }


def without_folders(entry: Any) -> Any:
    """A record's entry without secrets and folders: results are published, and where files lay is private."""
    if isinstance(entry, Mapping):
        return {key: without_folders(value) for key, value in public(entry).items()}
    if isinstance(entry, list):
        return [without_folders(value) for value in public(entry)]
    return _PATH.sub(r"\1", _WHOLE.sub(r"\1", public(entry))) if isinstance(entry, str) else entry


def _score_table(evidence: Evidence) -> dict[str, Any]:
    """The run beside reference, baselines and published figures on the same chips; a row a score."""
    table, k, name = evidence.table, evidence.positive, evidence.class_name
    if table is None:
        return {"rows": [], "columns": []}
    own, protocol = evidence.run.path.resolve().name, protocol_of(evidence.recipe).name
    models = [(own, "this run", table)]
    models += [(f"{own}, {split}", "this run", part) for split, part in evidence.subsets.items()]
    if evidence.reference is not None:
        detail = evidence.reference.metadata.get("detail") or "its table does not say what it is"
        models.append((evidence.reference_name or "the reference", f"the reference: {detail}", evidence.reference))
    models += [(label, f"baseline: {one.metadata.get('detail')}", one) for label, one in evidence.baselines.items()]
    columns, figures = [], list[Mapping[str, float | None]]()
    for label, what, one in models:
        pooled, (_, chips, floods) = one.counts.sum(axis=0), which_iou(one.counts, one.events, k)
        columns.append({"label": label, "source": f"{what}; {len(one):,} chips of {len(set(one.events)):,} events"})
        means = {"iou_chips": chips["iou"], "iou_events": floods["iou"]}
        figures.append(class_scores(pooled, k) | scores(pooled) | means)  # TerraTorch's names, where it has one
    for stem, entry in evidence.published.items():
        if (entry["protocol"], entry["split"], entry["chips"]) == (protocol, table.metadata.get("split"), len(table)):
            source = f"published: {entry['source']}; what contradicts it is in {stem}.yaml"
            columns.append({"label": entry["name"], "source": source})
            figures.append(entry["figures"] | {"recall": entry["figures"].get(f"Class_Accuracy_{k}")})
    _, chips, floods = which_iou(table.counts, table.events, k)
    labels = {
        f"IoU_{k}": f"{name} IoU, pooled (primary)",
        "precision": f"{name} precision",
        "recall": f"{name} recall",
        "f1": f"{name} F1",
        "iou_chips": f"{name} IoU, mean over {chips['n']:,} chips with {name}",
        "iou_events": f"{name} IoU, mean over {floods['n']:,} events",
        "mIoU": "mIoU",
        **{f"IoU_{j}": f"{other} IoU" for j, other in enumerate(table.metadata["class_names"]) if j != k},
        "F1_Score": "F1, mean of classes",
        "Pixel_Accuracy": "pixel accuracy",
        "truth_share": f"share of {name} in the truth",
    }
    rows = [{"metric": key, "label": one, "values": [each.get(key) for each in figures]} for key, one in labels.items()]
    return {"columns": columns, "rows": rows, "code": "floodrepro.evaluation.metrics"}


def _banner(evidence: Evidence) -> str:
    """That the chips are generated, or not the published ones where the protocol has published ones; else empty."""
    if (table := evidence.table) is None:
        return ""
    here = f"{len(table):,} chips of {len(set(table.events))} events"
    if (evidence.record.get("data") or {}).get("generated"):
        return f"Generated data (floodrepro data synth): {here}. They show that the pipeline works, and no real event."
    whole = protocol_of(evidence.recipe).counts.get(table.metadata.get("split", "test"), len(table))
    return f"Not the published data: {here}. The published split has {whole:,} chips." if whole != len(table) else ""


def _better_baseline(evidence: Evidence) -> tuple[str, str] | None:
    """The best baseline, and its score against the model's, if it is the better one."""
    tables = {"": evidence.table, **evidence.baselines} if evidence.table else {}
    pooled = {name: float(iou(one.counts.sum(axis=0), evidence.positive)) for name, one in tables.items()}
    best = max(pooled, key=pooled.__getitem__, default="")
    return (best, f"{evidence.iou_name} {pooled[best]:.3f} against {pooled['']:.3f}") if best else None


def _warnings(evidence: Evidence) -> list[str]:
    """Which baseline is better, how the run ended, and what went wrong or was changed on the way."""
    record = evidence.record
    found = [f"Data: {text}." for text in (record.get("data") or {}).get("warnings") or []]
    if better := _better_baseline(evidence):
        rule = str(evidence.baselines[better[0]].metadata.get("detail")).split(";")[0]
        found.append(f"The baseline {better[0]} ({rule}) scores higher than this model: {better[1]}.")
    if evidence.table and (split := evidence.table.metadata.get("split")) in ("train", "val"):
        found.append(f"The scores are of the split {split}, which training used: this is no test.")
    for one in record.get("incidents") or []:
        found.append(f"The guard stopped at step {one.get('step')} ({one.get('kind')}): {one.get('detail')}.")
    if back := record.get("rollback"):
        before, after = back.get("precision") or ("?", "?")
        found.append(f"The run was rolled back at step {back.get('step')} and continued in {after}, not {before}.")
    changes = [one["changes"] for one in record.get("resumes") or [] if one.get("changes")]
    found += [f"The run was resumed after a change: {'; '.join(map(str, one))}." for one in changes]
    return [text.replace("..", ".") for text in found]
