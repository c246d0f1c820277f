"""The model card: what run.json, results.json and the recipe say, for a reader of the hub.

A card is written once. From then on it is its author's: another one never replaces it, the old one is set aside, as is
any other results.json or picture.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from floodrepro import console
from floodrepro.data.protocols import TIMESTEPS, class_names_of, data_arguments, positive_class_of, protocol_of
from floodrepro.errors import CheckpointError, RunFolderError
from floodrepro.publishing.carbon import Factors, emissions_kg, energy_lines
from floodrepro.publishing.export import ExportedWeights, read_exported
from floodrepro.recipe import Recipe, fingerprint
from floodrepro.run_folder import RunFolder, free_name, sha256_of
from floodrepro.verification import report
from floodrepro.verification.checks.run import device_of
from floodrepro.verification.report import PICTURE, score, table
from floodrepro.verification.results import architecture, base_model, load, start_of_weights, without_folders

CARD, RESULTS = "README.md", "results.json"
# The hub's names for what TerraTorch measures (https://hf.co/metrics); a class's IoU has none.
_METRICS = {"mIoU": "mean_iou", "F1_Score": "f1", "Pixel_Accuracy": "accuracy"}
_MEANING = {
    "v0": "Class 1 is what the published v0 masks call flood; permanent water is no class of its own there.",
    "v1-binary": "Class 1 is flood water; permanent water and dry land are both class 0.",
    "v1": "Class 0 is no water, class 1 permanent water, class 2 flood water.",
}


def write_card(
    folder: Path,
    name: str,
    checkpoint: Path,
    recipe: Recipe,
    run: RunFolder | None,
    *,
    licence: str | None = None,
    factors: Factors | None = None,
) -> Path:
    """Write README.md beside an exported pair, with a copy of results.json and the picture of chips.

    Args:
        folder: The export folder.
        name: Stem of the pair.
        checkpoint: What the pair was exported from.
        recipe: The recipe that it was trained with.
        run: Its run folder; None for a checkpoint that is no run's best one.
        licence: The author's choice, by its SPDX or hub id; None where none was made.
        factors: PUE and grid intensity, if they were given.

    Returns:
        The card.

    Raises:
        CheckpointError: The pair is missing, damaged, or comes from another checkpoint.
        RunFolderError: The run is not finished, or its records belong to another recipe or checkpoint.
        TableError: results.json is damaged or of another schema.
    """
    weights, digest = read_exported(folder / f"{name}.safetensors"), sha256_of(checkpoint)
    if weights.metadata.get("source_sha256") != digest:
        what, fix = f"the pair was not exported from {checkpoint.name}", "export again, into another --output DIR"
        raise CheckpointError(what, where=weights.path, fix=fix)
    record, results = read_records(run, recipe, digest)
    copies = {RESULTS: run.results, PICTURE: run.verification / "figures" / PICTURE} if run and results else {}
    copies = {target: source for target, source in copies.items() if source.is_file()}
    text = _card_text(name, weights, recipe, record, results, licence, factors, picture=PICTURE in copies)
    try:
        for old in filter(Path.exists, (folder / target for target in (CARD, RESULTS, PICTURE))):
            aside = old.replace(old.with_name(free_name(old)))
            console.say(f"{old.name}, which was there, is now {aside.name}")
        for target, source in copies.items():
            shutil.copyfile(source, folder / target)
        (folder / CARD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"the card cannot be written: {error.strerror or error}", where=folder) from error
    return folder / CARD


def _card_text(
    name: str,
    weights: ExportedWeights,
    recipe: Recipe,
    record: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
    licence: str | None,
    factors: Factors | None,
    *,
    picture: bool,
) -> str:
    """The card's text, metadata included; see `write_card`."""
    protocol, names, positive = protocol_of(recipe), class_names_of(recipe), positive_class_of(recipe)
    arguments = data_arguments(recipe)
    events = [check for check in results["checks"] if check["id"] == "events"] if results else []
    columns = results["scores"]["columns"] if results else []
    rows = [[row["label"], *map(score, row["values"])] for row in (results["scores"]["rows"] if results else [])]
    other_chips, generated = _other_chips(recipe, record), _generated(record)
    source = {
        "checkpoint": {"sha256": weights.metadata.get("source_sha256")},
        "protocol": protocol.name,
        "recipe_sha256": weights.metadata.get("recipe_sha256"),
    }
    made_from = report.how_to_reproduce(((results or {}).get("run") or without_folders(record or {})) | source)
    return report.fill_in(
        Path(__file__).parent / "README.md.j2",
        metadata=_metadata(name, recipe, record, results, licence, factors).to_yaml(),
        name=name,
        class_name=names[positive],
        positive=positive,
        results=results,
        record=record,
        banner=(results or {}).get("banner") or other_chips,
        what=_what(recipe, record),
        required=report.required_sentence(results) if results else "",
        scores=table(rows, ["score", *(column["label"] for column in columns)]) if rows else "",
        spread=[f"{value['name']}: {value['text']}" for check in events for value in check["values"][1:]],
        training=table([*_hyperparameters(recipe), *report.run_facts(record or {})]),
        energy=energy_lines(record or {}, factors),
        weights=weights.path.name,
        config=weights.config.name,
        hazard=protocol.hazard,
        data_root="ImpactMesh-Flood/data" if protocol.repo else "chips/data",
        bands={name: len(means) for name, means in (arguments.get("means") or {}).items()},
        times=[TIMESTEPS[step] for step in arguments.get("timesteps") or ()],
        meaning=_MEANING.get(protocol.name, "What the classes mean is up to the masks that the model was trained on."),
        repo=None if generated else protocol.repo,
        generated=generated,
        published=protocol.repo and record and not other_chips,
        licence=licence,
        pretrained=base_model(recipe),
        picture=picture,
        provenance=table([("weights sha256", weights.sha256), *made_from]),
    )


def read_records(
    run: RunFolder | None, recipe: Recipe, digest: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """run.json and results.json of a run, where their hashes are those of its recipe and checkpoint.

    Args:
        run: The run folder; None where there is none.
        recipe: The recipe.
        digest: The checkpoint's sha256.

    Raises:
        RunFolderError: The run is not finished, or a record is of another recipe or checkpoint.
        TableError: results.json is damaged or of another schema.
    """
    if run is None:
        return None, None
    record, fix = run.read_record(), "fit, test and verify to the end; --no-card exports the pair without a card"
    if record.get("status") != "finished":
        what = f"the run is not finished, its status is {record.get('status', 'missing')!r}"
        raise RunFolderError(what, where=run.path, fix=fix)
    if record.get("recipe_sha256") != fingerprint(recipe):
        raise RunFolderError("run.json is of another recipe than recipe.yaml", where=run.record, fix=fix)
    results = load(run.results) if run.results.exists() else None
    if results and (results["run"].get("checkpoint") or {}).get("sha256") not in (None, digest):
        raise RunFolderError("results.json is of another checkpoint than best.ckpt", where=run.results, fix=fix)
    return record, results


def _metadata(
    name: str,
    recipe: Recipe,
    record: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
    licence: str | None,
    factors: Factors | None,
) -> ModelCardData:
    protocol, base = protocol_of(recipe), base_model(recipe)
    tags = ["terratorch", "terramind", "earth-observation", "sentinel-1", "sentinel-2", protocol.hazard, "floodrepro"]
    data: dict[str, Any] = {
        "license": licence,
        "library_name": "terratorch",
        "pipeline_tag": "image-segmentation",
        "tags": tags,
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [protocol.repo] if protocol.repo and record and not _other_chips(recipe, record) else None,
    }
    if record and factors and (emissions := emissions_kg(record, factors)) is not None:
        data["co2_eq_emissions"] = {
            "emissions": round(1000 * emissions, 3),  # grams
            "source": f"measured energy x PUE ({factors.pue_source}) x grid intensity ({factors.intensity_source})",
            "training_type": "fine-tuning" if base else "pre-training",
            "hardware_used": device_of(record),
        }
    if results and results["scores"]["rows"]:
        whole, count = not results["banner"] and protocol.repo, results["run"]["n_chips"]
        other = "generated chips (floodrepro data synth)" if _generated(record) else f"{count} chips ({protocol.name})"
        names = _METRICS | {"f1": f"f1_{positive_class_of(recipe)}"}  # f1 is the mean of classes
        data["model_name"] = name
        data["eval_results"] = [
            EvalResult(
                task_type="image-segmentation",
                dataset_type=str(protocol.repo) if whole else "other",
                dataset_name=protocol.title if whole else other,
                dataset_config=protocol.name,
                dataset_split=results["run"].get("split") or "test",
                metric_type=names.get(row["metric"], row["metric"].lower()),
                metric_name=row["label"],
                metric_value=row["values"][0],
            )
            for row in results["scores"]["rows"]
            if row["values"][0] is not None
        ]
    return ModelCardData(**data)


def _what(recipe: Recipe, record: Mapping[str, Any] | None) -> str:
    """What the model is, in two sentences."""
    arguments, names = (recipe["model"].get("init_args") or {}).get("model_args") or {}, class_names_of(recipe)
    modalities = ", ".join(data_arguments(recipe).get("modalities") or arguments.get("backbone_modalities") or [])
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    start = "What the training started from is not known."
    if record or base_model(recipe):
        start = f"Training {start_of_weights(recipe, record or {})}."
    parts = architecture(recipe)
    return f"Segments image time series ({modalities}) into {classes}: {parts}, trained with TerraTorch. {start}"


def _generated(record: Mapping[str, Any] | None) -> str | None:
    """The command that generated the run's chips; None for chips that were not."""
    return ((record or {}).get("data") or {}).get("generated")


def _other_chips(recipe: Recipe, record: Mapping[str, Any] | None) -> str:
    """A sentence where the run's chips are not the published ones, in number; empty where they are."""
    protocol, chips = protocol_of(recipe), ((record or {}).get("data") or {}).get("chips") or {}
    if _generated(record):
        return f"Trained on {chips.get('train', 'unknown')} generated chips (floodrepro data synth)."
    if not protocol.counts:
        return "Trained on chips of the author's own."
    if record is None or all(chips.get(split) == protocol.counts[split] for split in ("train", "val")):
        return ""
    return f"Trained on {chips.get('train', 'unknown')} chips; {protocol.title} has {protocol.counts['train']:,}."


def _hyperparameters(recipe: Recipe) -> list[tuple[str, str]]:
    """What the recipe asks for."""

    def named(section: Mapping[str, Any]) -> str:
        arguments = [f"{key} {value}" for key, value in (section.get("init_args") or {}).items()]
        return f"{str(section.get('class_path', '')).rpartition('.')[2]} {', '.join(arguments)}".strip()

    trainer = recipe.get("trainer") or {}
    rows = {
        "loss": (recipe["model"].get("init_args") or {}).get("loss"),
        "optimizer": named(recipe.get("optimizer") or {}),
        "learning rate schedule": named(recipe.get("lr_scheduler") or {}),
        "batch": data_arguments(recipe).get("batch_size"),
        "epochs, at most": trainer.get("max_epochs"),
        "precision of the recipe": trainer.get("precision"),
    }
    return [(label, str(value)) for label, value in rows.items() if value]
