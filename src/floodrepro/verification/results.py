"""results.json: what the checks found, in JSON types, and the only source of the report and the model card.

`docs/verification.md` documents every key.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import floodrepro
from floodrepro.data.protocols import data_arguments, protocol_of
from floodrepro.errors import RunFolderError, TableError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import class_scores, iou, scores, which_iou
from floodrepro.recipe import Recipe, beside_shipped
from floodrepro.verification.battery import required_checks
from floodrepro.verification.check import Check, Evidence, Plot

SCHEMA = 2
COMPARISONS = ("parity", "head_to_head", "variance", "reference")
"""Checks that are met, unless --require names them, if they do not fail: data that do not decide are no failure."""

_NOT_COPIED = ("schema", "process", "checkpoint")  # of run.json
_PATH = re.compile(r"""(?<![\w./])/(?:[^\s'"/]+/)*([^\s'"/]+)""")
_WORDS = {"pass": "passed", "fail": "failed", "undecided": "undecided", "skip": "skipped"}


def summarise(evidence: Evidence, checks: Sequence[Check], require: str | None, made: str) -> dict[str, Any]:
    """The content of results.json.

    Args:
        evidence: What the checks were given.
        checks: Their answers.
        require: What --require names, "all" or ids; a comparison among them has to be equivalent. None: what
            checks.yaml requires.
        made: The time, ISO 8601.
    """
    by_id = {check.id: check for check in checks}
    required = required_checks(require)
    not_met = [name for name in required if not _met(by_id[name], require is not None)]
    counted = {word: sum(check.status == status for check in checks) for status, word in _WORDS.items()}
    content = {
        "schema": SCHEMA,
        "made": made,
        "floodrepro": floodrepro.__version__,
        "run": _run(evidence),
        "reference": {
            "name": evidence.reference_name,
            **{key: evidence.reference.metadata.get(key) for key in ("checkpoint", "recipe_sha256")},
            "epochs": evidence.reference_record.get("epochs"),
            "seed": evidence.reference_record.get("seed"),
        }
        if evidence.reference
        else None,
        "verdict": _verdict(evidence, by_id, not_met),
        "summary": {
            **counted,
            "text": ", ".join(f"{number} {word}" for word, number in counted.items() if number),
            "required": required,
            "left_out": [name for name in required_checks(None) if name not in required],
            "not_met": not_met,
            "ok": not not_met,
        },
        "banner": _banner(evidence),
        "warnings": _warnings(evidence),
        "scores": _score_table(evidence),
        "forest": asdict(_forest(evidence, checks)),
        "checks": [
            asdict(one)
            | {"values": [asdict(v) | {"text": v.text, "criterion": v.criterion, "ok": v.ok} for v in one.values]}
            for one in checks
        ],
    }
    text = json.dumps(content, default=lambda array: array.tolist())
    plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)  # NaN is no JSON
    return plain


def load(path: Path) -> dict[str, Any]:
    """Read results.json.

    Raises:
        RunFolderError: There is none, or it cannot be read.
        TableError: It is damaged, or of another schema.
    """
    again = "floodrepro verify --run DIR writes it again"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = results["schema"]
    except OSError as error:
        raise RunFolderError(f"the results cannot be read: {error.strerror}", where=path, fix=again) from error
    except (ValueError, TypeError, KeyError) as error:
        raise TableError(f"the results are damaged: {error}", where=path, fix=again) from error
    if schema != SCHEMA:
        what = f"the results have schema {schema}, this version of floodrepro ({floodrepro.__version__}) reads {SCHEMA}"
        raise TableError(what, where=path, fix=again)
    return results


def _met(check: Check, by_name: bool) -> bool:
    if check.id in COMPARISONS and not by_name:
        return check.status != "fail"
    return check.status == "pass" and check.outcome in (None, "equivalent")


def _verdict(evidence: Evidence, by_id: Mapping[str, Check], not_met: Sequence[str]) -> dict[str, Any]:
    """One word and one sentence, and what was not shown.

    The word is equivalent, different or undecided; `not compared` without a comparison; `failed` or `incomplete` where
    a required check that is no comparison failed or was skipped. Equivalence is refused its name where the
    declared seeds, or the mean over events, stand against it.
    """
    parity, seeds, name = by_id["parity"], by_id["variance"], evidence.reference_name or "the reference"
    word: str = "not compared"
    outcome: str | None = parity.outcome
    sentence = "There was no comparison with a reference; the run itself was checked."
    if outcome is None and evidence.reference is not None:
        sentence = f"The run was not compared with {name}: {parity.finding}."
    elif outcome:
        sentence = f"Against {name}: {evidence.iou_name} {parity.finding}."
        doubts = [seeds] if seeds.status in ("fail", "undecided") else []
        doubts += [by_id["head_to_head"]] if by_id["head_to_head"].status == "fail" else []
        if doubts and (outcome == "equivalent" or doubts[0].outcome == "different (worse)"):
            outcome = "different (worse)" if seeds.outcome == "different (worse)" else "undecided"
            sentence = f"{sentence[:-1]}. But {doubts[0].title.lower()}: {doubts[0].finding}."
        word = outcome
    if broken := [by_id[key] for key in not_met if key not in COMPARISONS]:
        named = "; ".join(f"{check.title} ({check.finding})" for check in broken)
        sentence = f"Required checks did not pass: {named}. {sentence}"
        word = "failed" if any(check.status == "fail" for check in broken) else "incomplete"
    limits = [] if len(evidence.seeds) > 1 else ["another seed"]
    limits.append("other events, regions and chips")
    if (evidence.record.get("data") or {}).get("generated"):
        limits.append("real events or IBM's model: the chips are generated")
    numbered = ", ".join(f"({n}) {limit}" for n, limit in enumerate(limits, 1))
    return {"word": word, "outcome": outcome, "sentence": sentence, "not_shown": f"Not shown: {numbered}."}


def _forest(evidence: Evidence, checks: Sequence[Check]) -> Plot:
    """All differences to the reference that have an interval."""
    values = [v for check in checks if check.id in COMPARISONS for v in check.values if v.level]
    values.sort(key=lambda value: "mIoU" in value.name)  # the figures that are tested first
    margin, level = (float(evidence.criteria["parity"][key]) for key in ("margin_pp", "level"))
    columns = {"x": "value", "y": "name", "low": "low", "high": "high"}
    series = {axis: [getattr(value, key) for value in values] for axis, key in columns.items()}
    series["y"] = [name.removeprefix("difference in ") for name in series["y"]]
    return Plot(
        "forest",
        "forest",
        "",
        f"this run less {evidence.reference_name or 'the reference'}, percentage points",
        "",
        [{"label": "difference"} | series] if values else [],
        f"Differences to the reference with {100 * level:g} % intervals; the shaded band is the margin of "
        f"±{margin:g} pp.",
        margin,
    )


def _run(evidence: Evidence) -> dict[str, Any]:
    table, record = evidence.table, evidence.record
    metadata = table.metadata if table else {}
    data, tested = record.get("data") or {}, metadata.get("data") or {}
    digests = (data.get("digests") or {}) | (tested.get("digests") or {})
    return {key: without_folders(value) for key, value in record.items() if key not in _NOT_COPIED} | {
        "data": without_folders(data | {"digests": digests}),
        "model": [*architecture(evidence.recipe), start_of_weights(evidence.recipe, record)],
        "commands": _commands(evidence),
        "name": evidence.run.path.resolve().name,
        "protocol": protocol_of(evidence.recipe).name,
        "class_name": evidence.class_name,
        "split": metadata.get("split"),
        "checkpoint": metadata.get("checkpoint"),
        "n_chips": len(table) if table else None,
        "n_events": len(set(table.events)) if table else None,
        "seeds": [{"seed": run.seed, "status": run.status, "run": run.run} for run in evidence.seeds],
    }


def architecture(recipe: Recipe) -> list[str]:
    """Backbone and decoder of a recipe, and the shipped recipe nearest to it, in words."""
    arguments = (recipe["model"].get("init_args") or {}).get("model_args") or {}
    nearest, changed = beside_shipped(recipe)
    more = f", {len(changed)} keys changed" if changed else ""
    return [
        f"{arguments.get('backbone', 'a backbone')} with {arguments.get('decoder', 'a decoder')}",
        f"recipe {nearest}{more}",
    ]


def base_model(recipe: Recipe) -> str | None:
    """The hub's id of the backbone that the training started from; None for random weights and other backbones."""
    arguments = (recipe["model"].get("init_args") or {}).get("model_args") or {}
    size = re.fullmatch(r"terramind_v1_(tiny|small|base|large)", str(arguments.get("backbone")))
    return f"ibm-esa-geospatial/TerraMind-1.0-{size[1]}" if size and arguments.get("backbone_pretrained") else None


def start_of_weights(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """What a training started from, in words."""
    if source := record.get("started_from"):
        return f"started from {source['file']}, sha256 {source['sha256']}"
    return f"started from {base_model(recipe) or 'random weights'}"


def _commands(evidence: Evidence) -> list[str]:
    """What makes the chips, where they are generated, the run, its reference and this report again."""
    record, other, run = evidence.record, evidence.reference_record, evidence.run.path.resolve()
    root = Path(data_arguments(evidence.recipe).get("data_root") or "DIR")
    generated = (record.get("data") or {}).get("generated")
    made = [f"{generated} --root {(root.parent if root.name == 'data' else root).name}"] if generated else []
    fits = [shlex.join(without_folders(one["command"])) for one in (record, other) if one.get("command")]
    home = f"{run.parent.name}/{run.name}"
    theirs = f"{run.parent.name}/{other['run']}/checkpoints/best.ckpt" if other.get("run") else "FILE"
    after = [f"test --ckpt {home}/checkpoints/best.ckpt", f"export --run {home}"]
    after.append(f"verify --run {home}" + (f" --reference {theirs}" if evidence.reference else ""))
    return made + fits + [f"floodrepro {words}" for words in after]


def without_folders(entry: Any) -> Any:
    """A record's entry with files by their names alone: results are published, and where files lay is private."""
    if isinstance(entry, Mapping):
        return {key: without_folders(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [without_folders(value) for value in entry]
    return _PATH.sub(r"\1", entry) if isinstance(entry, str) else entry


def _score_table(evidence: Evidence) -> dict[str, Any]:
    """The run beside reference, baselines and published figures on the same chips; a row a score."""
    table, k, name = evidence.table, evidence.positive, evidence.class_name
    if table is None:
        return {"rows": [], "columns": []}
    own = evidence.run.path.resolve().name
    models = [(own, "this run", table)]
    models += [(f"{own}, {split}", "this run", part) for split, part in evidence.subsets.items()]
    if evidence.reference is not None:
        models.append((evidence.reference_name or "the reference", "the reference", evidence.reference))
    figures = [_figures(one, k) for *_, one in models]
    columns = [(label, f"{what}, {len(one):,} chips of {len(set(one.events)):,} events") for label, what, one in models]
    for label, one in evidence.baselines.items():
        figures.append(_figures(one, k))
        columns.append((label, f"baseline: {one.metadata.get('detail')}"))
    here = (protocol_of(evidence.recipe).name, table.metadata.get("split"), len(table))
    for stem, entry in evidence.published.items():
        if (entry["protocol"], entry["split"], entry["chips"]) == here:
            known = len(entry.get("contradictions") or [])
            found = f"; {known} contradictions in it, see {stem}.yaml" if known else ""
            figures.append(entry["figures"])
            columns.append((entry["name"], f"published: {entry['source']}{found}"))
    _, chips, floods = which_iou(table.counts, table.events, k)
    labels = {
        f"IoU_{k}": f"{name} IoU, pooled (primary)",
        "precision": f"{name} precision",
        f"Class_Accuracy_{k}": f"{name} recall",
        "f1": f"{name} F1",
        "iou_chips": f"{name} IoU, mean over {chips['n']:,} chips with {name}",
        "iou_events": f"{name} IoU, mean over {floods['n']:,} events",
        "mIoU": "mIoU",
        **{f"IoU_{j}": f"{other} IoU" for j, other in enumerate(table.class_names) if j != k},
        "F1_Score": "F1, mean of classes",
        "Pixel_Accuracy": "pixel accuracy",
        "truth_share": f"share of {name} in the truth",
    }
    return {
        "columns": [{"label": label, "source": source} for label, source in columns],
        "rows": [
            {"metric": key, "label": label, "values": [one.get(key) for one in figures]}
            for key, label in labels.items()
        ],
        "code": "floodrepro.evaluation.metrics",
    }


def _figures(table: ChipTable, k: int) -> dict[str, Any]:
    """Scores of one table, by TerraTorch's names where it has one."""
    pooled = table.counts.sum(axis=0)
    of_class, kinds = class_scores(pooled, k), which_iou(table.counts, table.events, k)
    more = {f"Class_Accuracy_{k}": of_class["recall"], "iou_chips": kinds[1]["iou"], "iou_events": kinds[2]["iou"]}
    return of_class | scores(pooled) | more


def _banner(evidence: Evidence) -> str:
    """That the chips are generated, or not the published ones where the protocol has published ones; else empty."""
    table = evidence.table
    if table is None:
        return ""
    here = f"{len(table):,} chips of {len(set(table.events))} events"
    if (evidence.record.get("data") or {}).get("generated"):
        return f"Generated data (floodrepro data synth): {here}. They show that the pipeline works, and no real event."
    published = protocol_of(evidence.recipe).counts.get(table.metadata.get("split", "test"))
    if published in (None, len(table)):
        return ""
    return f"Not the published data: {here}. The published split has {published:,} chips."


def _warnings(evidence: Evidence) -> list[str]:
    """Which baseline is better, how the run ended, and what went wrong or was changed on the way."""
    record, found, k = evidence.record, list[str](), evidence.positive
    tables = {"": evidence.table, **evidence.baselines} if evidence.table else {}
    pooled = {name: float(iou(one.counts.sum(axis=0), k)) for name, one in tables.items() if one}
    best = max(pooled, key=lambda name: pooled[name], default="")  # the run itself, where nothing is better
    if best:
        rule = str(evidence.baselines[best].metadata.get("detail") or "a baseline").split(";")[0]
        gap = f"{evidence.iou_name} {pooled[best]:.3f} against {pooled['']:.3f}"
        found.append(f"The baseline {best} ({rule}) scores higher than this model: {gap}.")
    if (status := record.get("status", "finished")) != "finished":
        found.append(f"The run is not finished: its status is {status}.")
    split = evidence.table.metadata.get("split") if evidence.table else None
    if split in ("train", "val"):
        found.append(f"The scores are of the split {split}, which training used: this is no test.")
    found += [f"Data: {text}." for text in (record.get("data") or {}).get("warnings") or []]
    processes, batch = record.get("processes") or 1, record.get("batch_size")
    if processes > 1 and batch:
        each = f"{batch} in each of {processes} processes"
        found.append(f"A step saw {processes * batch} chips, {each}: not the recipe's.")
    nearest, changed = beside_shipped(evidence.recipe)
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        found.append(f"The recipe differs from the shipped {nearest} in {', '.join(changed[:4])}{more}.")
    for one in record.get("incidents") or []:
        found.append(f"The guard stopped at step {one.get('step')} ({one.get('kind')}): {one.get('detail')}.")
    if back := record.get("rollback"):
        before, after = back.get("precision") or ("?", "?")
        found.append(f"The run was rolled back at step {back.get('step')} and continued in {after}, not {before}.")
    for one in record.get("resumes") or []:
        if one.get("changes"):
            found.append(f"The run was resumed after a change: {'; '.join(map(str, one['changes']))}.")
    return [str(without_folders(text)).replace("..", ".") for text in found]
