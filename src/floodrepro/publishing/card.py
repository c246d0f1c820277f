"""The model card: what run.json, results.json and the recipe say, for a reader of the hub. Its words are README.md.j2.

A card is written once. From then on it is its author's: another one never replaces it, the old one is set aside, as is
any other results.json or picture.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.publishing.export import ExportedWeights, read_exported
from floodrepro.recipe import Recipe, fingerprint
from floodrepro.run_folder import RunFolder, free_name, replacing, sha256_of
from floodrepro.verification import report, results
from floodrepro.verification.checks import number
from floodrepro.verification.checks.run import device_of

CARD, RESULTS = "README.md", "results.json"
_TAGS = ("terratorch", "terramind", "earth-observation", "sentinel-1", "sentinel-2")
# The hub's names for what TerraTorch measures (https://hf.co/metrics); a class's IoU has none.
_METRICS = {"mIoU": "mean_iou", "F1_Score": "f1", "Pixel_Accuracy": "accuracy"}
_METHODS = {
    "counter": "read from the device's own energy counter",
    "power": "integrated from sampled power",
    "tdp": "an upper estimate, rated power times time",
}


class Factors(NamedTuple):
    """What turns the devices' energy into a data centre's emissions, and where both figures come from."""

    pue: float  # power usage effectiveness: energy of the data centre over its computers' (ISO/IEC 30134-2)
    pue_source: str
    intensity: float  # of the grid, kg CO2e per kWh
    intensity_source: str


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
    """Write README.md beside an exported pair, with a copy of results.json and the picture of chips; return the card.

    Args:
        folder: The export folder.
        name: Stem of the pair.
        checkpoint: What the pair was exported from.
        recipe: The recipe that it was trained with.
        run: Its run folder; None for a checkpoint that is no run's best one.
        licence: The author's choice, by its SPDX or hub id; None where none was made.
        factors: PUE and grid intensity, if they were given.

    Raises:
        CheckpointError: The pair is missing, damaged, or comes from another checkpoint.
        RunFolderError, TableError: As `read_records`, or the folder cannot be written.
    """
    weights, digest = read_exported(folder / f"{name}.safetensors"), sha256_of(checkpoint)
    if weights.metadata.get("source_sha256") != digest:
        what, fix = f"the pair was not exported from {checkpoint.name}", "export again, into another --output DIR"
        raise CheckpointError(what, where=weights.path, fix=fix)
    record, found = read_records(run, recipe, digest)
    picture = run.verification / "figures" / report.PICTURE if run and found else None
    text = _fill_in(name, weights, recipe, record, found, licence, factors, picture=bool(picture and picture.is_file()))
    try:
        for old in filter(Path.exists, (folder / target for target in (CARD, RESULTS, report.PICTURE))):
            aside = old.replace(old.with_name(free_name(old)))
            console.say(f"{old.name}, which was there, is now {aside.name}")
        for source in (run.results, picture) if run and found else ():
            if source and source.is_file():
                with replacing(folder / source.name) as partial:
                    shutil.copyfile(source, partial)
        with replacing(folder / CARD) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"the card cannot be written: {error.strerror or error}", where=folder) from error
    return folder / CARD


def _fill_in(
    name: str,
    weights: ExportedWeights,
    recipe: Recipe,
    record: Mapping[str, Any],
    found: Mapping[str, Any] | None,
    licence: str | None,
    factors: Factors | None,
    *,
    picture: bool,
) -> str:
    """The card's text, metadata included; see `write_card`."""
    protocol, arguments = protocols.protocol_of(recipe), protocols.data_arguments(recipe)
    model_args = (recipe["model"].get("init_args") or {}).get("model_args") or {}
    base, (energy, emitted) = results.base_model(recipe), energy_of(record, factors)
    source = {
        "checkpoint": {"sha256": weights.metadata.get("source_sha256")},
        "protocol": protocol.name,
        "recipe_sha256": weights.metadata.get("recipe_sha256"),
    }
    run = (found["run"] if found else results.without_folders(record)) | source
    used = record.get("data") or {}
    chips = {split: (used.get("chips") or {}).get(split) for split in ("train", "val")}
    generated, counts = used.get("generated"), {split: protocol.counts.get(split) for split in chips}
    published = bool(protocol.repo and chips == counts and not generated)
    data: dict[str, Any] = {
        "license": licence,
        "library_name": "terratorch",
        "pipeline_tag": "image-segmentation",
        "tags": [*_TAGS, protocol.hazard, "floodrepro"],
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [protocol.repo] if published else None,
    }
    if emitted is not None and factors:
        data["co2_eq_emissions"] = {
            "emissions": round(1000 * emitted, 3),  # grams
            "source": f"measured energy x PUE ({factors.pue_source}) x grid intensity ({factors.intensity_source})",
            "training_type": "fine-tuning" if base else "pre-training",
            "hardware_used": device_of(record),
        }
    if found and found["scores"]["rows"]:
        data |= {"model_name": name, "eval_results": _eval_results(protocol, generated, found)}
    return report.fill_in(
        Path(__file__).parent / "README.md.j2",
        metadata=ModelCardData(**data).to_yaml(),
        name=name,
        protocol=protocol,
        results=found,
        record=record,
        chips=chips["train"],
        modalities=arguments.get("modalities") or model_args.get("backbone_modalities") or [],
        parts=results.architecture(recipe),
        start=results.start_of_weights(recipe, record) if record or base else None,
        required=report.required_sentence(found) if found else "",
        training=[*_hyperparameters(recipe), *report.run_facts(record)],
        energy=energy,
        weights=weights,
        bands={key: len(means) for key, means in (arguments.get("means") or {}).items()},
        times=[protocols.TIMESTEPS[step] for step in arguments.get("timesteps") or ()],
        generated=generated,
        published=published,
        licence=licence,
        pretrained=base,
        picture=picture,
        provenance=[("weights sha256", weights.sha256), *report.how_to_reproduce(run)],
    )


def read_records(run: RunFolder | None, recipe: Recipe, digest: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """run.json (empty without a run) and results.json of a run, if they are of this recipe and checkpoint.

    Args:
        run: The run folder; None where there is none.
        recipe: The recipe.
        digest: The checkpoint's sha256.

    Raises:
        RunFolderError: The run is not finished, or a record is of another recipe or checkpoint.
        TableError: results.json is damaged or of another schema.
    """
    if run is None:
        return {}, None
    record, fix = run.read_record(), "fit, test and verify to the end; --no-card exports the pair without a card"
    if record.get("status") != "finished":
        what = f"the run is not finished, its status is {record.get('status', 'missing')!r}"
        raise RunFolderError(what, where=run.path, fix=fix)
    if record.get("recipe_sha256") != fingerprint(recipe):
        raise RunFolderError("run.json is of another recipe than recipe.yaml", where=run.record, fix=fix)
    found = results.load(run.results) if run.results.exists() else None
    if found and (found["run"].get("checkpoint") or {}).get("sha256") not in (None, digest):
        raise RunFolderError("results.json is of another checkpoint than best.ckpt", where=run.results, fix=fix)
    return record, found


def factors_of(pue: Sequence[str] | None, grid: Sequence[str] | None) -> Factors | None:
    """`Factors` from the two flags, each a figure and its source; None where neither was given.

    Raises:
        UsageError: One is missing, without its source, or out of range.
    """
    if pue is None and grid is None:
        return None
    (x, x_source), (y, y_source) = pue or ("", ""), grid or ("", "")
    try:
        found = Factors(float(x), x_source.strip(), float(y), y_source.strip())
        fits = 1 <= found.pue < 10 and 0 <= found.intensity < 10 and found.pue_source and found.intensity_source
    except ValueError:
        fits = ""
    if not fits:
        what = "a carbon figure needs a PUE of 1 or more and 0 to about 1 kg CO2e per kWh, each with its source"
        raise UsageError(
            f"--pue {x} {x_source!r} --grid {y} {y_source!r}: {what}", fix="--pue X SOURCE --grid X SOURCE"
        )
    return found


def energy_of(record: Mapping[str, Any], factors: Factors | None) -> tuple[list[str], float | None]:
    """Energy of a run by method, and which devices it is of, in sentences; and its emissions in kg CO2e.

    Emissions are None unless a PUE and a grid intensity were given and all parts of the run, on all devices, were
    measured by one method.
    """
    parts: Sequence[Mapping[str, Any]] = record.get("energy") or []
    known = [part for part in parts if part.get("kWh") is not None]
    if not known:
        return ["The energy was not measured, so there is no carbon figure."], None
    methods = list(dict.fromkeys(str(part["method"]) for part in known))
    kwh = [sum(part["kWh"] for part in known if part["method"] == method) for method in methods]
    lines = [f"{number(used)} kWh, {_METHODS.get(how, how)}." for how, used in zip(methods, kwh, strict=True)]
    if len(methods) > 1:
        lines.append("Figures of different methods are not added.")
    if len(known) < len(parts):
        lines.append(f"The energy of {len(parts) - len(known)} of {len(parts)} parts of the run is not known.")
    metered, devices = min(int(part.get("devices") or 1) for part in parts), int(record.get("processes") or 1)
    whose = "the device" if devices == 1 else f"all {devices} devices"
    if metered < devices:
        whose = f"{metered} of {devices} devices; nothing was scaled up"
    lines.append(f"This is the energy of {whose}, without host and cooling. Validation is included, the test is not.")
    emitted = None
    if len(methods) > 1 or len(known) < len(parts) or metered < devices:
        lines.append("There is no one figure for the whole run on all devices, so there is no carbon figure.")
    elif factors is None:
        lines.append("No PUE and grid intensity were given with a source, so there is no carbon figure.")
    else:
        emitted = kwh[0] * factors.pue * factors.intensity
        lines.append(
            f"Data centre and grid: {number(kwh[0])} kWh x PUE {factors.pue:g} ({factors.pue_source}) x "
            f"{factors.intensity:g} kg CO2e/kWh ({factors.intensity_source}) = {number(emitted)} kg CO2e."
        )
    notes = dict.fromkeys(str(part["note"]) for part in known if part.get("note"))
    return [*lines, *([f"How it was measured: {'; '.join(notes)}."] if notes else [])], emitted


def _eval_results(protocol: protocols.Protocol, generated: str | None, found: Mapping[str, Any]) -> list[EvalResult]:
    """The scores that are defined, for the hub."""
    whole, chips = not found["banner"] and protocol.repo, f"{found['run']['n_chips']} chips ({protocol.name})"
    other = "generated chips (floodrepro data synth)" if generated else chips
    names = _METRICS | {"f1": f"f1_{protocol.positive_class}"}  # f1 is the mean of classes
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=str(protocol.repo) if whole else "other",
            dataset_name=protocol.title if whole else other,
            dataset_config=protocol.name,
            dataset_split=found["run"].get("split") or "test",
            metric_type=names.get(row["metric"], row["metric"].lower()),
            metric_name=row["label"],
            metric_value=row["values"][0],
        )
        for row in found["scores"]["rows"]
        if row["values"][0] is not None
    ]


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
        "batch": protocols.data_arguments(recipe).get("batch_size"),
        "epochs, at most": trainer.get("max_epochs"),
        "precision of the recipe": trainer.get("precision"),
    }
    return [(label, str(value)) for label, value in rows.items() if value]
