"""What a card is about, and its metadata by huggingface_hub's classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.names import PROTOCOLS, SPLITS
from floodrepro.data.presence import protocol_of
from floodrepro.publishing import card_facts as facts
from floodrepro.publishing.bundle import Weights
from floodrepro.publishing.carbon import Factors
from floodrepro.recipe import Recipe

DATA_SET = "ibm-esa-geospatial/ImpactMesh-Flood"

# The hub's names for what TerraTorch measures (https://hf.co/metrics); a class's IoU has none of its own.
_METRICS = {"mIoU": "mean_iou", "F1_Score": "f1", "Pixel_Accuracy": "accuracy"}
_TAGS = ["terratorch", "terramind", "flood", "segmentation", "earth-observation", "sentinel-1", "sentinel-2"]


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        name: The model's.
        weights: The exported weights.
        config: File name of the exported YAML.
        recipe: The recipe that was trained, not the exported one.
        record: Its run.json; None where the weights do not come from a run folder.
        results: Its results.json; None where it was not verified.
        factors: PUE and grid intensity, if they were given.
    """

    name: str
    weights: Weights
    config: str
    recipe: Recipe
    record: Mapping[str, Any] | None
    results: Mapping[str, Any] | None
    factors: Factors | None


def started_from(subject: Subject) -> str | None:
    """The hub's id of the backbone that the training started from; None for random weights and for what is not known.

    An exported YAML says ``backbone_pretrained: false`` of every model: without a record only a "true" tells something.
    """
    size = facts.terramind_size(subject.recipe)
    return f"ibm-esa-geospatial/TerraMind-1.0-{size}" if size and facts.pretrained(subject.recipe) else None


def metadata(subject: Subject) -> ModelCardData:
    """The card's metadata; ``datasets`` only where all published chips were trained on, scores where there are any."""
    results, base = subject.results, started_from(subject)
    data: dict[str, Any] = {
        **{"license": "apache-2.0", "library_name": "terratorch", "pipeline_tag": "image-segmentation"},
        **{"tags": [*_TAGS, "floodrepro"], "base_model": base},
        "datasets": [DATA_SET] if subject.record and other_chips(subject) is None else None,
    }
    if base:
        data["base_model_relation"] = "finetune"
    if results and results["scores"]["rows"]:
        data |= {"metrics": [*_METRICS.values()], "model_name": subject.name}
        data["eval_results"] = _eval_results(subject, results)
    return ModelCardData(**data)


def _eval_results(subject: Subject, results: Mapping[str, Any]) -> list[EvalResult]:
    chips, published = facts.tested_chips(results), _published(subject)
    whole = published is not None and chips == published["test"]
    name = "ImpactMesh-Flood" if whole else f"{chips or 'some'} chips in ImpactMesh-Flood's layout, not its test split"
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=DATA_SET if whole else "other",
            dataset_name=name,
            dataset_config=_protocol(subject),
            dataset_split=results["run"].get("split") or "test",
            metric_type=_METRICS.get(row["metric"], row["metric"].lower()),
            metric_name=f"test/{row['metric']} ({row['label']})",  # TerraTorch's name, whatever the split
            metric_value=row["ours"],
        )
        for row in results["scores"]["rows"]
        if row.get("ours") is not None
    ]


def _protocol(subject: Subject) -> str | None:
    tested = subject.results["run"].get("protocol") if subject.results else None
    return str(tested) if tested else protocol_of(subject.recipe)


def _published(subject: Subject) -> dict[str, int] | None:
    """Chips by split that the published version of the data has; None for a protocol that is not known."""
    protocol = _protocol(subject)
    return dict(zip(SPLITS, PROTOCOLS[DATA_OF[protocol]].chip_counts, strict=True)) if protocol in DATA_OF else None


def other_chips(subject: Subject) -> str | None:
    """A sentence where the run's chips are not the published ones, in number."""
    chips, published = (subject.record or {})["chips"], _published(subject)
    if published is None:
        return f"Trained on {chips.get('train')} chips of a protocol that floodrepro does not know."
    if all(chips.get(split) == published[split] for split in ("train", "val")):
        return None
    return (
        f"Trained on {chips.get('train'):,} chips, not on the full data set, which has {published['train']:,} "
        f"(protocol {_protocol(subject)}): generated chips or a part; figures do not speak of the whole."
    )
