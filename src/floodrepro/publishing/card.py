"""The model card: what run.json and results.json say, for a reader of the hub. No figure comes from anywhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from floodrepro.publishing import card_facts as facts
from floodrepro.publishing.carbon import sentences
from floodrepro.publishing.card_metadata import Subject, metadata, other_chips, started_from
from floodrepro.publishing.markdown import figure, table
from floodrepro.publishing.shortfall import broken, shortfall

TEMPLATE = Path(__file__).parent / "templates" / "README.md.j2"


def write(subject: Subject) -> str:
    """The card's text, metadata included."""
    results, record, recipe = subject.results, subject.record, subject.recipe
    card = ModelCard.from_template(
        metadata(subject),
        template_path=str(TEMPLATE),
        name=subject.name,
        first=first_lines(subject),
        what=facts.what(recipe, record),
        verdict=results["verdict"]["sentences"] if results else [_unverified(record)],
        summary=_summary(results) if results else "",
        scores=_scores(results) if results else "",
        sources=[f"{c['label']}: {_line(c['source'])}. {_line(c['note'])}" for c in _columns(results)],
        intervals=_intervals(results) if results else "",
        checks=_checks(results) if results else "",
        warnings=[_line(text) for text in results["warnings"]] if results else [],
        training=table(facts.training(record, recipe) if record else facts.unknown(recipe)),
        energy=sentences(record, subject.factors),
        config=subject.config,
        weights=subject.weights.path.name,
        inputs=facts.inputs(recipe),
        limits=facts.limits(recipe, results),
        base_licence=" So are TerraMind's own, which they started from." if started_from(subject) else "",
        data_licence=_data_licence(subject),
        provenance=table(facts.provenance(subject.weights, record)),
    )
    return str(card).rstrip() + "\n"


def first_lines(subject: Subject) -> list[str]:
    """What a reader has to know before anything else; the first is `shortfall`'s sentence, where there is one."""
    lines = [line for line in (shortfall(subject.results),) if line]
    if subject.record is None:
        lines.append("No record of the training exists: these weights were exported from a file alone.")
    elif (note := other_chips(subject)) is not None:
        lines.append(note)
    if subject.results and subject.results["summary"]["partial"]:
        lines.append(f"The battery is not complete: {subject.results['summary']['text']}.")
    return lines


def _data_licence(subject: Subject) -> str:
    if subject.record and other_chips(subject) is None:
        return "It was used for training as published."
    return "This and the notices below hold so far as the chips came from it; the run's record does not say."


def _unverified(record: Mapping[str, Any] | None) -> str:
    return "Nothing was measured on a test split" + (", not verified: run `floodrepro verify`." if record else ".")


def _summary(results: Mapping[str, Any]) -> str:
    return f"{results['summary']['text']}; required and not passed: {', '.join(broken(results)) or 'none'}."


def _columns(results: Mapping[str, Any] | None) -> Sequence[Mapping[str, str]]:
    return results["scores"]["columns"] if results else ()


def _scores(results: Mapping[str, Any]) -> str:
    columns = _columns(results)
    rows = [
        [row["label"], f"`test/{row['metric']}`", *(figure(row.get(column["key"])) for column in columns)]
        for row in results["scores"]["rows"]
    ]
    return table(rows, ["score", "TerraTorch's name", *(column["label"] for column in columns)]) if rows else ""


def _intervals(results: Mapping[str, Any]) -> str:
    """Every figure of the battery that has an interval with a level, with the chips and events behind it."""
    rows = [
        [
            value["name"],
            f"{figure(value['value'])} {value['unit']}".strip(),
            f"{figure(value['low'])} to {figure(value['high'])} ({100 * value['level']:g} %)",
            *(figure(value[key]) for key in ("n_chips", "n_events")),
            value["method"] or "-",
        ]
        for check in results["checks"]
        for value in check["values"]
        if value.get("level") is not None and value.get("low") is not None and value.get("high") is not None
    ]
    return table(rows, ["figure", "value", "interval", "chips", "events", "method"]) if rows else ""


def _checks(results: Mapping[str, Any]) -> str:
    rows = [[check["title"], check["status"], check["reason"] or check["claim"]] for check in results["checks"]]
    return table(rows, ["check", "status", "what was found, or what passing means"])


def _line(text: str) -> str:
    return " ".join(text.split())
