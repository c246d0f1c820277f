"""The card's tables and sentences about training, input and limits, each from the record that it is given."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from floodrepro.data.names import TIMESTEPS
from floodrepro.data.presence import protocol_of
from floodrepro.publishing.bundle import Weights
from floodrepro.publishing.consistency import begun_elsewhere, hours
from floodrepro.publishing.markdown import figure
from floodrepro.recipe import Recipe
from floodrepro.verification.wording import on_gpu

_MEANING = {
    "v0": "Class 1 is what the published v0 masks call flood; permanent water is no class of its own there.",
    "v1-binary": "Class 1 is flood water; permanent water and dry land are both class 0.",
    "v1": "Class 0 is no water, class 1 permanent water, class 2 flood water.",
}
_PACKAGES = ("python", "torch", "terratorch", "lightning", "impactmesh", "torchvision", "torchgeo", "floodrepro")


def what(recipe: Recipe, record: Mapping[str, Any] | None) -> str:
    """What the model is, in two sentences."""
    arguments = _model(recipe)
    parts = f"`{arguments.get('backbone', 'a backbone')}` with {arguments.get('decoder', 'a decoder')}"
    modalities = ", ".join(
        _data(recipe).get("modalities") or arguments.get("backbone_modalities") or ["its modalities"]
    )
    made = f"Segments floods in image time series ({modalities}): {parts}, trained with TerraTorch."
    return f"{made} {_start(recipe, record)}"


def _start(recipe: Recipe, record: Mapping[str, Any] | None) -> str:
    if pretrained(recipe):
        return "Training started from the published TerraMind backbone."
    return "Trained from random weights." if record else "What the training started from is not known."


def pretrained(recipe: Recipe) -> bool:
    """Whether the recipe starts from a published backbone."""
    return bool(_model(recipe).get("backbone_pretrained"))


def terramind_size(recipe: Recipe) -> str | None:
    """`tiny`, `small`, `base` or `large`; None for another backbone."""
    match = re.fullmatch(r"terramind_v1_(tiny|small|base|large)", str(_model(recipe).get("backbone")))
    return match[1] if match else None


def _step(record: Mapping[str, Any], recipe: Recipe) -> str:
    """Of all processes, accumulation included."""
    batch, processes = record.get("batch_size"), record.get("processes")
    if not batch or not processes:
        return "not recorded"
    accumulated = int((recipe.get("trainer") or {}).get("accumulate_grad_batches") or 1)
    return f"{batch * processes * accumulated} ({processes} process{'es' * (processes > 1)} with {batch} each)"


def training(record: Mapping[str, Any], recipe: Recipe) -> list[list[str]]:
    """Rows of the table of training, from run.json."""
    environment, progress = record["environment"], record["progress"]
    packages = environment["packages"]
    accelerator, build, numerics = environment["accelerator"], environment["torch"], environment["numerics"]
    device = accelerator["name"] if on_gpu(record) else f"CPU, {environment['cpu']['model']}"
    optimizer = (recipe.get("optimizer") or {}).get("class_path", "as in the recipe").rpartition(".")[2]
    chips = ", ".join(f"{count:,} {split}" for split, count in record["chips"].items())
    rows = [
        ["device", f"{device}; torch built for {build['build']} {build['build_version'] or ''}".strip()],
        ["precision", str(numerics["precision"])],
        ["chips", chips],
        ["chips in a step", _step(record, recipe)],
        ["epochs", f"{record['epochs']}; the weights are of epoch {record['best_epoch']}, counted from 0"],
        ["val/loss of that epoch", figure(record["best_val_loss"])],
        ["optimizer", f"{optimizer}, {progress['step']:,} steps" + _skipped(progress)],
        ["time", _time(record)],
        ["speed", _rate(record.get("chips_per_second"), "chips/s in training, over epochs")],
        ["a step", _rate(record.get("step_seconds"), "s, warm-up left out")],
        ["peak memory", _memory(record)],
        ["seed", str(record.get("seed"))],
        ["versions", ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)],
    ]
    if on := [name for name, used in record.get("numerics", {}).items() if used]:
        rows.append(["options that may change roundings", ", ".join(on)])
    if back := record.get("rollback"):
        rows.append(
            ["precision changed", f"from {back['precision'][0]} to {back['precision'][1]} at step {back['step']}"]
        )
    return rows


def unknown(recipe: Recipe) -> list[list[str]]:
    """Rows where no record exists: only what the recipe asks for."""
    precision = (recipe.get("trainer") or {}).get("precision", "not given")
    return [["device, epochs, hours, versions", "not recorded"], ["precision that the recipe asks for", str(precision)]]


def inputs(recipe: Recipe) -> list[str]:
    """What goes into the network and what comes out."""
    data, yaml = _data(recipe), "as in the YAML"
    times = ", ".join(TIMESTEPS[step] for step in data.get("timesteps") or ()) or yaml
    bands = ", ".join(f"{name} {len(means)}" for name, means in (data.get("means") or {}).items()) or yaml
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.get("class_names") or ())) or yaml
    return [
        f"Input: a dictionary of float tensors (batch, band, time, height, width) by modality; bands: {bands}.",
        f"Times: {times}. All of them are needed.",
        "Normalise with the means and stds in the YAML; missing values become 0 before that.",
        f"Output: logits (batch, class, height, width); classes: {classes}.",
    ]


def limits(recipe: Recipe, results: Mapping[str, Any] | None) -> list[str]:
    """What the model was not shown to do."""
    protocol = protocol_of(recipe)
    chips, events = tested_chips(results), _most(results, "n_events")
    tested = f"{figure(chips)} chips of {figure(events)} events" if chips and events else "no chips at all"
    if results and not (chips and events):
        tested = "a number of chips and events that the results do not list"
    return [
        _MEANING.get(protocol or "", "What the classes mean is in the YAML."),
        f"Tested on {tested}; other regions, seasons and sensors were not looked at.",
        _seeds(results),
        "ImpactMesh-Flood's chips come from Copernicus EMS activations: it holds nothing of where there was none.",
        "A mask has the grid and the clouds of its input; depth of water and damage are not in it.",
        "Check it against local ground truth before anything depends on it.",
    ]


def _seeds(results: Mapping[str, Any] | None) -> str:
    seeds = (results["run"].get("seeds") or []) if results else []
    if len(seeds) < 2:
        return "A single training run: what another seed would give was not measured."
    status = ", ".join(f"{seed['seed']} {seed['status']}" for seed in seeds)
    return f"One of {len(seeds)} runs that were declared together (seeds {status}); see the check of variance."


def provenance(weights: Weights, record: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows of hashes."""
    metadata = weights.metadata
    rows = [
        ["weights", f"`{weights.sha256}`, {weights.tensors} tensors, {weights.values:,} values"],
        ["checkpoint that they come from", f"`{metadata.get('source_sha256', 'not recorded')}`"],
        ["recipe", f"`{metadata.get('recipe_sha256', 'not recorded')}`"],
        ["data", f"`{metadata.get('data_digest', 'not recorded')}`"],
    ]
    if record:
        code, git = record["code"], (record.get("environment") or {}).get("code") or {}
        dirty = ", with changes" if git.get("dirty") else ""
        rows.append(["code", f"`{code['source_sha256']}`, commit {git.get('commit') or 'not known'}{dirty}"])
    return rows


def tested_chips(results: Mapping[str, Any] | None) -> int | None:
    """Number of chips behind the scores: the largest number that any figure of the battery stands on."""
    return _most(results, "n_chips")


def _most(results: Mapping[str, Any] | None, key: str) -> int | None:
    found = [v[key] for check in (results or {}).get("checks", ()) for v in check["values"] if v.get(key) is not None]
    return max(found, default=None)


def _time(record: Mapping[str, Any]) -> str:
    seconds = (datetime.fromisoformat(record["ended"]) - datetime.fromisoformat(record["started"])).total_seconds()
    parts = 1 + len(record.get("resumes") or [])
    if begun_elsewhere(record):
        return f"{hours(seconds)} from start to end, on top of another run's state"
    return f"{hours(seconds)} from start to end" + (f", in {parts} parts, pauses included" if parts > 1 else "")


def _rate(value: Mapping[str, Any] | None, unit: str) -> str:
    if value is None:
        return "not measured: too few steps"
    return f"{value['median']:g} (median; 10th to 90th percentile {value['p10']:g} to {value['p90']:g}) {unit}"


def _memory(record: Mapping[str, Any]) -> str:
    peaks = (record.get("memory_gib") or {}).get("after_warm_up") or {}
    return ", ".join(f"{name} {value:g} GiB" for name, value in peaks.items()) or "not measured"


def _skipped(progress: Mapping[str, Any]) -> str:
    return f", {progress['skipped_steps']:,} of them left out by GradScaler" if progress.get("skipped_steps") else ""


def _model(recipe: Recipe) -> Mapping[str, Any]:
    return (recipe["model"].get("init_args") or {}).get("model_args") or {}


def _data(recipe: Recipe) -> Mapping[str, Any]:
    return recipe["data"].get("init_args") or {}
