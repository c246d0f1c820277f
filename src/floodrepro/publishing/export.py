"""Export a checkpoint as safetensors and a YAML that TerraTorch loads with floodrepro uninstalled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from floodrepro import __version__
from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.evaluation.checkpoint import Checkpoint, list_differences, read_checkpoint
from floodrepro.publishing.plain import portable
from floodrepro.recipe import Recipe
from floodrepro.run_folder import sha256_of, write_atomically


@dataclass(frozen=True)
class ExportResult:
    """The exported pair.

    Args:
        weights: The safetensors file.
        config: The YAML.
        tensors: Number of tensors.
        parameters: Number of values in them, buffers included.
        sha256: Of the safetensors file.
    """

    weights: Path
    config: Path
    tensors: int
    parameters: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {**vars(self), "weights": str(self.weights), "config": str(self.config)}


def export(
    checkpoint_path: Path, recipe: Recipe, output: Path, name: str, data_digest: str | None = None
) -> ExportResult:
    """Write NAME.safetensors and NAME.yaml and read the weights back.

    Args:
        checkpoint_path: A ``.ckpt``, ``.pt`` or ``.safetensors``.
        recipe: The recipe that it was trained with.
        output: Folder for the pair; made if it is not there.
        name: Stem of both files.
        data_digest: Of the data that it was trained on, from run.json; None where no record says.

    Returns:
        What was written.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not read back bit for bit.
        UsageError: The recipe describes another model than the checkpoint, or a file of that name is there already.
        RunFolderError: The folder cannot be written.
    """
    checkpoint = read_checkpoint(checkpoint_path)
    given = recipe["model"].get("init_args") or {}
    if differences := list_differences(checkpoint.hyper_parameters, given):
        raise UsageError(
            f"the checkpoint was made with another recipe: {'; '.join(differences)}",
            where=checkpoint_path,
            fix="give the --config that it was trained with: the exported YAML has to describe these weights",
        )
    weights, config = output / f"{name}.safetensors", output / f"{name}.yaml"
    for file in (weights, config):
        if file.exists():
            raise UsageError("the file exists already and is not overwritten", where=file, fix="--output DIR")
    try:
        output.mkdir(parents=True, exist_ok=True)
        _save_weights(checkpoint, recipe, weights, data_digest)
        write_atomically(config, _yaml_text(recipe, checkpoint_path))
    except OSError as error:
        raise RunFolderError(f"the export cannot be written: {error.strerror or error}", where=output) from error
    parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())
    return ExportResult(weights, config, len(checkpoint.weights), parameters, sha256_of(weights))


def refuse_other_pair(checkpoint_path: Path, recipe: Recipe, weights: Path, config: Path) -> None:
    """Check that a pair that lies there holds what an export of this checkpoint would write.

    The hash in its header says what it was made from, not what it holds.

    Raises:
        CheckpointError: It is missing or damaged, a tensor has other bits, or the YAML other values.
    """
    again = "move the pair away and export again, or export into another --output DIR"
    try:
        there, given = load_file(weights), yaml.safe_load(config.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"the exported pair cannot be read: {error}", where=weights, fix=again) from error
    if not _identical(_named(read_checkpoint(checkpoint_path)), there):
        raise CheckpointError(f"the weights are not those of {checkpoint_path.name}", where=weights, fix=again)
    if changed := recipes.differences(yaml.safe_load(recipes.to_yaml(portable(recipe))), given):
        key, (exported, now) = next(iter(changed.items()))
        raise CheckpointError(
            f"the YAML was changed since the export: {key} is {now!r} and was {exported!r}", where=config, fix=again
        )


def _named(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Names as in Lightning's state dict: TerraTorch's LightningInferenceModel strips one leading "model."."""
    # clone: safetensors refuses tensors that share memory.
    return {f"model.{name}": tensor.contiguous().clone() for name, tensor in checkpoint.weights.items()}


def _save_weights(checkpoint: Checkpoint, recipe: Recipe, path: Path, data_digest: str | None) -> None:
    tensors = _named(checkpoint)
    metadata = {
        "format": "pt",
        "floodrepro": __version__,
        "recipe_sha256": recipes.fingerprint(recipe),
        "source_sha256": sha256_of(checkpoint.path),
        "hyper_parameters": json.dumps(recipe["model"].get("init_args") or {}, sort_keys=True),
    }
    if data_digest is not None:
        metadata["data_digest"] = data_digest
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata=metadata)
        _sort_header(temporary)
        if not _identical(tensors, load_file(temporary)):
            raise CheckpointError("the written safetensors do not read back bit for bit", where=path)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sort_header(file: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in a new one each time, and with it another sha256."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else it was written with other escapes: whole, only not in order
            stream.seek(8)
            stream.write(text.ljust(length))


def _identical(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Same names, dtypes, shapes and bits; a NaN equals itself here."""
    return first.keys() == second.keys() and all(
        a.dtype == (b := second[name]).dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for name, a in first.items()
    )


def _yaml_text(recipe: Recipe, checkpoint: Path) -> str:
    return (
        f"# Exported from {checkpoint.name}; recipe sha256 {recipes.fingerprint(recipe)}.\n"
        "# Plain TerraTorch loads it with the .safetensors of the same name (torch 2.13 or newer):\n"
        "#   LightningInferenceModel.from_config(THIS_FILE, WEIGHTS)\n"
        "# To test it with floodrepro from tars, or where the recipe maps labels (v1-binary), add --config RECIPE.\n"
        f"{recipes.to_yaml(portable(recipe))}"
    )
