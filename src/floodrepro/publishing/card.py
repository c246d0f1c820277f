"""The model card, from run.json, results.json and the recipe. It is its author's then: a new one sets it aside."""

import contextlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.weights import REFERENCE, backbone_weights, describe_model, describe_weights, model_args
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.publishing.export import read_exported
from floodrepro.recipe import Recipe, fingerprint
from floodrepro.run_folder import RunFolder, replacing, sha256_of, write_atomically
from floodrepro.verification import report, results
from floodrepro.verification.checks import number

CARD, RESULTS = "README.md", "results.json"
_TAGS = ("terratorch", "terramind", "earth-observation", "sentinel-1", "sentinel-2")
Factors = tuple[float, str, float, str] | None
"""Power usage effectiveness (ISO/IEC 30134-2), its source, the grid's kg CO2e per kWh, and its source; or None."""


def write_card(
    pair: Path, checkpoint: Path, recipe: Recipe, run: RunFolder | None, licence: str = "", factors: Factors = None
) -> Path:
    """Write README.md beside an exported pair, with a copy of results.json and the picture of chips; return the card.

    `pair` is its safetensors. `run` is None for a checkpoint that is no run's best one, `licence` an SPDX or hub id.

    Raises:
        CheckpointError: The pair is missing, damaged, or comes from another checkpoint.
        RunFolderError, TableError: As `read_records`.
    """
    weights, digest, folder = read_exported(pair), sha256_of(checkpoint), pair.parent
    if weights.metadata.get("source_sha256") != digest:
        what, fix = f"the pair was not exported from {checkpoint.name}", "export again, into another --output DIR"
        raise CheckpointError(what, where=weights.path, fix=fix)
    record, found = read_records(run, recipe, digest)
    copied = [run.results, run.verification / "figures" / report.PICTURE] if run and found else []
    source = {"checkpoint": {"sha256": digest}, "recipe_sha256": weights.metadata.get("recipe_sha256")}
    protocol, arguments = protocols.protocol_of(recipe), model_args(recipe)
    hub, pretrained, backbone = backbone_weights(arguments), describe_weights(arguments), str(arguments.get("backbone"))
    if start := record.get("started_from"):  # fit --weights
        hub, pretrained = REFERENCE if start["sha256"] == REFERENCE.sha256 else None, start["file"]
    base, other = hub.repo if hub else None, () if backbone.startswith("terramind") else ("terramind",)
    about = (found["run"] if found else results.without_folders(record)) | source | {"protocol": protocol.name}
    facts, (energy, emissions) = report.run_facts(about, (found or {}).get("reference")), energy_of(record, factors)
    used = record.get("data") or {}
    whole = all((used.get("chips") or {}).get(split) == protocol.counts.get(split) for split in ("train", "val"))
    published = bool(protocol.repo and whole and not used.get("generated"))
    metadata: dict[str, Any] = {
        "license": licence or None,
        "library_name": "terratorch",
        "pipeline_tag": "image-segmentation",
        "tags": [tag for tag in (*_TAGS, protocol.hazard, "floodrepro") if tag not in other],
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [protocol.repo] if published else None,
    }
    if emissions:
        kind = "fine-tuning" if pretrained else "pre-training"
        metadata["co2_eq_emissions"] = emissions | {"training_type": kind, "hardware_used": facts.get("device")}
    if found and found["scores"]["rows"]:
        metadata |= {"model_name": pair.stem, "eval_results": _eval_results(protocol, found)}
    text = report.fill_in(
        Path(__file__).parent / "README.md.j2",
        metadata=ModelCardData(**metadata).to_yaml(),
        protocol=protocol,
        recipe=recipe,
        results=found,
        record=record,
        model=describe_model(recipe, record),
        facts=[*facts.items(), ("weights sha256", weights.sha256)],
        energy=energy,
        weights=weights,
        timesteps=protocols.TIMESTEPS,
        used=used,
        published=published,
        licence=licence,
        pretrained=pretrained,
        backbone=backbone,
        picture=any(file.name == report.PICTURE and file.is_file() for file in copied),
    )
    if (folder / CARD).exists():
        places = (folder / f"README-{number}.md" for number in itertools.count(2))
        aside = (folder / CARD).replace(next(place for place in places if not place.exists()))
        console.say(f"{CARD}, which was there, is now {aside.name}")
    for file in filter(Path.is_file, copied):
        with replacing(folder / file.name) as partial:
            shutil.copyfile(file, partial)
    write_atomically(folder / CARD, text)
    return folder / CARD


def read_records(run: RunFolder | None, recipe: Recipe, digest: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """run.json (empty without a run) and results.json of a run, for this recipe and the checkpoint of this sha256.

    Raises:
        RunFolderError: The run is not finished, or its record is of another recipe.
        TableError: As `floodrepro.verification.results.load`.
    """
    if run is None:
        return {}, None
    record, fix = run.read_record(), "fit, test and verify to the end; --no-card exports the pair without a card"
    if record.get("status") != "finished":
        what = f"the run is not finished, its status is {record.get('status', 'missing')!r}"
        raise RunFolderError(what, where=run.path, fix=fix)
    if record.get("recipe_sha256") != fingerprint(recipe):
        raise RunFolderError("run.json is of another recipe than recipe.yaml or --config", where=run.record, fix=fix)
    return record, results.load(run.results, digest) if run.results.exists() else None


def factors_of(pue: Sequence[str] | None, grid: Sequence[str] | None) -> Factors:
    """`Factors` from the two flags, each a figure and its source; None where neither was given.

    Raises:
        UsageError: One is missing, without its source, or out of range.
    """
    if pue is None and grid is None:
        return None
    (x, x_source), (y, y_source) = pue or ("", ""), grid or ("", "")
    with contextlib.suppress(ValueError):
        found = (float(x), x_source.strip(), float(y), y_source.strip())
        if 1 <= found[0] < 10 and 0 <= found[2] < 10 and found[1] and found[3]:
            return found
    what = "a carbon figure needs a PUE of 1 or more and 0 to about 1 kg CO2e per kWh, each with its source"
    raise UsageError(f"{what}, not {x or '?'} and {y or '?'}", fix="--pue X SOURCE --grid X SOURCE")


def energy_of(record: Mapping[str, Any], factors: Factors) -> tuple[str, dict[str, Any] | None]:
    """Energy of a run by method, and which devices it is of, in sentences; and its emissions in grams CO2e.

    Emissions, with their source, are None unless a PUE and a grid intensity were given and all parts of the run, on
    all devices, were measured by one method.
    """
    parts, devices = record.get("energy") or [], int(record.get("processes") or 1)
    known = [part for part in parts if part.get("kWh") is not None]
    if not known:
        return "The energy was not measured, so there is no carbon figure.", None
    lines, methods = [], list(dict.fromkeys(part["method"] for part in known))
    for method in methods:
        ones = [part for part in known if part["method"] == method]
        kwh, notes = sum(part["kWh"] for part in ones), dict.fromkeys(str(part.get("note", method)) for part in ones)
        lines.append(f"{number(kwh)} kWh ({'; '.join(notes)}).")
    if len(known) < len(parts):
        lines.append(f"The energy of {len(parts) - len(known)} of {len(parts)} parts of the run is not known.")
    metered = min(int(part.get("devices") or 1) for part in parts)
    share = f"{metered} of {devices} devices" if metered < devices else f"all {devices} devices"
    whose = "the device" if devices == 1 else share
    lines.append(f"This is the energy of {whose}, without host and cooling. Validation is included, the test is not.")
    emissions = None
    if len(methods) > 1 or len(known) < len(parts) or metered < devices:
        lines.append("Different methods are not added and nothing is scaled up, so there is no carbon figure.")
    elif factors is None:
        lines.append("No PUE and grid intensity were given with a source, so there is no carbon figure.")
    else:
        pue, pue_source, intensity, intensity_source = factors
        emitted = kwh * pue * intensity
        source = f"{number(kwh)} kWh x PUE {pue:g} ({pue_source}) x {intensity:g} kg CO2e/kWh ({intensity_source})"
        lines.append(f"Data centre and grid: {source} = {number(emitted)} kg CO2e.")
        emissions = {"emissions": round(1000 * emitted, 3), "source": source}
    return " ".join(lines), emissions


def _eval_results(protocol: protocols.Protocol, found: Mapping[str, Any]) -> list[EvalResult]:
    run, whole = found["run"], not found["banner"] and protocol.repo
    kind = "generated by floodrepro data synth" if run["data"].get("generated") else protocol.name
    classes = range(len(protocol.class_names))
    # The hub's names (https://hf.co/metrics); a class's IoU and F1 have none.
    types = {"mIoU": "mean_iou", "F1_Score": "f1", "Pixel_Accuracy": "accuracy", "f1": f"f1_{protocol.positive_class}"}
    types |= {name: name for name in ("precision", "recall")} | {f"IoU_{k}": f"iou_{k}" for k in classes}
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=str(protocol.repo) if whole else "other",
            dataset_name=protocol.title if whole else f"{run['n_chips']} chips ({kind})",
            dataset_config=protocol.name,
            dataset_split=run.get("split") or "test",
            metric_type=types[row["metric"]],
            metric_name=row["label"],
            metric_value=row["values"][0],
        )
        for row in found["scores"]["rows"]
        if row["metric"] in types and row["values"][0] is not None
    ]
