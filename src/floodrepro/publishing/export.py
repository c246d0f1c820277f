"""Export a checkpoint as safetensors and a YAML that TerraTorch loads with floodrepro uninstalled."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from floodrepro import __version__, recipe as recipes
from floodrepro.data import protocols
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import replacing, sha256_of, write_atomically

_STOCK = ("data_root", "batch_size", "num_workers", "modalities", "timesteps", "means", "stds", "no_data_value")
_STOCK_ARGUMENTS = (*_STOCK, "no_data_replace", "train_split", "val_split", "test_split", "predict_split")
_HEADER = """\
# Exported from {checkpoint}; recipe sha256 {sha256}.
# Plain TerraTorch loads it with the .safetensors of the same name (torch 2.13 or newer):
#   LightningInferenceModel.from_config(THIS_FILE, WEIGHTS)
# and so does python -m impactmesh.run_inference --config THIS_FILE --ckpt WEIGHTS --output_dir DIR.
# To test it with floodrepro from tars, or where the recipe maps labels (v1-binary), add --config RECIPE.
"""


@dataclass(frozen=True)
class ExportedWeights:
    """A safetensors file that `export` wrote, as its header describes it."""

    path: Path
    config: Path  # the YAML of the same name
    sha256: str  # of the safetensors file
    metadata: Mapping[str, str]  # recipe_sha256, source_sha256 (of the checkpoint), hyper_parameters (JSON), …


def export(checkpoint_path: Path, recipe: Recipe, output: Path, name: str) -> ExportedWeights:
    """Write NAME.yaml and NAME.safetensors of a checkpoint and the recipe of its training, or find the same two there.

    Raises:
        CheckpointError: The checkpoint cannot be read, or holds values that are not finite.
        UsageError: The recipe is another model's, or another export has that name already.
    """
    from safetensors.torch import save_file  # here, as recipes can be rewritten for plain TerraTorch without torch

    from floodrepro.training.checkpoint import check_finite, list_differences, read_checkpoint

    checkpoint = read_checkpoint(checkpoint_path)
    check_finite(checkpoint)
    given = recipe["model"].get("init_args") or {}
    if differences := list_differences(checkpoint.hyper_parameters, given):
        what = f"the checkpoint was made with another recipe: {'; '.join(differences)}"
        raise UsageError(what, where=checkpoint_path, fix="give the --config that it was trained with")
    weights, config = output / f"{name}.safetensors", output / f"{name}.yaml"
    protocol, fingerprint = protocols.protocol_of(recipe), recipes.fingerprint(recipe)
    metadata = {
        "class_names": json.dumps(protocol.class_names),
        "floodrepro": __version__,
        "format": "pt",
        "hyper_parameters": json.dumps(_portable(recipe)["model"].get("init_args") or {}, sort_keys=True),
        "positive_class": str(protocol.positive_class),
        "recipe_sha256": fingerprint,
        "source_sha256": sha256_of(checkpoint_path),
    }
    # The names of Lightning's state dict, of which TerraTorch strips one leading "model."; clone, for safetensors
    # refuses tensors that share memory.
    tensors = {f"model.{name}": tensor.contiguous().clone() for name, tensor in checkpoint.weights.items()}
    text = _HEADER.format(checkpoint=checkpoint_path.name, sha256=fingerprint) + recipes.to_yaml(_portable(recipe))
    there = read_exported(weights) if weights.exists() else None
    if (there and there.metadata != metadata) or (config.exists() and config.read_text(encoding="utf-8") != text):
        fix = "move it away, or --output DIR"
        raise UsageError("another export is here already and is not overwritten", where=weights, fix=fix)
    if there:  # made by the same command, which was interrupted later on
        return there
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(config, text)
    with replacing(weights) as partial:
        save_file(tensors, partial, metadata=metadata)
        _sort_header(partial)
        partial.chmod(0o644)
    return read_exported(weights)


def read_exported(path: Path) -> ExportedWeights:
    """Read the header of an exported safetensors file, and hash all of it. Needs no torch.

    Raises `CheckpointError` where it is missing or damaged, or the YAML beside it is missing.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        what, fix = f"the exported weights are missing or damaged: {error}", "floodrepro export --run DIR"
        raise CheckpointError(what, where=path, fix=fix) from error
    config = path.with_suffix(".yaml")
    if not config.is_file():
        raise CheckpointError("the YAML of the pair is missing", where=config, fix="export into another --output DIR")
    return ExportedWeights(path, config, sha256_of(path), metadata)


def with_stock_data(recipe: Recipe) -> Recipe:
    """The recipe with impactmesh's own data module, its statistics as here, to predict and to test.

    That module reads extracted chips only, masks as they are, and all bands.
    """
    stock = copy.deepcopy(recipe)
    if not protocols.uses_flood_data_module(stock):
        return stock
    arguments, suffix = stock["data"]["init_args"], protocols.protocol_of(recipe).mask_suffix
    kept = {key: arguments[key] for key in _STOCK_ARGUMENTS if key in arguments}
    kept["predict_data_root"] = arguments.get("predict_data_root") or arguments["data_root"]
    stock["data"] = {
        "class_path": "impactmesh.impactmesh_datamodule.ImpactMeshDataModule",
        "init_args": kept,
        # Else impactmesh guesses it from the path, "fire" first. It knows these two, and their masks by their suffix.
        "dict_kwargs": {"disaster_type": "fire" if "wildfire" in suffix else "flood"},
    }
    return stock


def _sort_header(file: Path) -> None:
    """Sort the header's metadata: safetensors writes it in a new order each time, and with it another sha256."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _portable(recipe: Recipe) -> Recipe:
    """The recipe without what belongs to one machine or one run: loggers, callbacks, paths, pretrained weights."""
    stock = with_stock_data(recipe)
    trainer = stock.setdefault("trainer", {})
    for key in ("callbacks", "default_root_dir"):
        trainer.pop(key, None)
    trainer["logger"] = False
    model_args = stock["model"].get("init_args", {}).get("model_args") or {}
    if "backbone_pretrained" in model_args:
        model_args["backbone_pretrained"] = False
    model_args.pop("backbone_ckpt_path", None)

    data, folder = stock["data"].get("init_args") or {}, Path(protocols.protocol_of(recipe).folder)
    data |= {key: str(folder / "data") for key, value in data.items() if key.endswith("data_root") and value}
    splits = [override for override in recipes.data_overrides(folder, stock) if "_split=" in override]
    return recipes.fold([stock], splits)
