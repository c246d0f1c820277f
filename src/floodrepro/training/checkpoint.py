"""Reads and loads weights: tensors only, every name and shape, whatever torch is installed."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from floodrepro import console
from floodrepro.errors import CheckpointError
from floodrepro.recipe import Recipe

# Where files of weights keep their state dict: Lightning, IBM's .pt and TerraTorch; plain training scripts; timm.
_STATE_DICTS = ("state_dict", "model_state_dict", "model")
# What changes the shape of the model or what is measured. Not: pretrained, class_weights, optimiser, learning rate.
_MEASURED = ("model_factory", "loss", "ignore_index", "class_names", "tiled_inference_on_testing")
_SHAPELESS = ("backbone_pretrained", "backbone_ckpt_path", "pretrained", "head_dropout")
# What downloads leave in place of weights, by its first bytes.
_DOWNLOADED = {b"version https://git-lfs": "a Git LFS pointer", b"<": "a web page, such as one to log in"}
_UNREADABLE: tuple[type[Exception], ...] = (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError)
_UNREADABLE += (zipfile.BadZipFile,)
# The others come of a file in torch's old format that was cut short.
_UNREADABLE += (ValueError, LookupError, struct.error, TypeError, AssertionError, AttributeError)
_STRIP = """if you trust its author, keep its tensors only, where its code is installed: python -c "import torch;
c = torch.load('{name}', weights_only=False); torch.save({{'state_dict': c['state_dict']}}, 'weights.pt')\""""


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and what the file remembers of how they were made."""

    path: Path
    weights: Mapping[str, torch.Tensor]  # names as in the task's ``model`` (no leading ``model.``), on the CPU
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)  # of the task; empty where the file has none


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a Lightning ``.ckpt``, a ``.pt`` of IBM's or of plain torch, or a ``.safetensors``, whatever its name.

    Pickled code is never run. Prefixes of Lightning (``model.``), DDP (``module.``) and torch.compile (``_orig_mod.``)
    are taken off the names, and the buffers of a loss with class weights (``criterion.``) are left out.

    Raises:
        CheckpointError: The file is missing, or it is not a checkpoint; the message names what it is.
    """
    if not path.is_file():
        raise CheckpointError("checkpoint not found", where=path, fix="runs/NAME/checkpoints/best.ckpt, or an export")
    with path.open("rb") as file:
        first = file.read(64)
    try:
        if first[8:9] == b"{":  # the header of safetensors, after its length
            with safe_open(str(path), framework="pt", device="cpu") as opened:  # torch.load can from 2.13 on
                remembered: Any = json.loads((opened.metadata() or {}).get("hyper_parameters", "{}"))
                weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                content: Any = {"state_dict": weights, "hyper_parameters": remembered}
        else:
            if first[:2] == b"PK" and (bad := zipfile.ZipFile(path).testzip()):  # torch compares no checksums
                raise OSError(f"the checksum of {bad} is wrong")
            with path.open("rb") as file:  # of a path, torch 2.13 believes the suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch names the class that it refuses
            what = f"the checkpoint holds code, not only tensors, and is not opened: class {refused[1]}"
            raise CheckpointError(what, where=path, fix=_STRIP.format(name=path.name)) from error
        detail = (str(error).strip().splitlines() or [repr(error)])[0][:160]
        kinds = [kind for start, kind in _DOWNLOADED.items() if first.lstrip().startswith(start)]
        kind = [*kinds, "no checkpoint, or one that is damaged or cut short"][0]
        what = f"this is {kind} ({path.stat().st_size:,} bytes): {detail}"
        fix = "copy it again, or download it (hf download, git lfs pull), and compare its sha256"
        raise CheckpointError(what, where=path, fix=fix) from error
    named = content if isinstance(content, Mapping) else {}
    state = next((named[key] for key in _STATE_DICTS if isinstance(named.get(key), Mapping)), named)
    if not state or not all(isinstance(name, str) and isinstance(v, torch.Tensor) for name, v in state.items()):
        raise CheckpointError(f"the checkpoint holds a {type(content).__name__} without a state dict", where=path)
    kept = {
        name.removeprefix("module.").removeprefix("model.").replace("_orig_mod.", ""): tensor
        for name, tensor in state.items()
        if not name.startswith("criterion.")
    }
    if len(kept) < sum(not name.startswith("criterion.") for name in state):
        raise CheckpointError("two tensors have one name once prefixes (model., module.) are taken off", where=path)
    if odd := [key for key, t in kept.items() if t.layout != torch.strided or t.is_meta]:
        raise CheckpointError(f"the checkpoint holds what is no plain tensor: {odd[0]}", where=path)
    remembered = named.get("hyper_parameters")
    sound = isinstance(remembered, Mapping) and isinstance(remembered.get("model_args") or {}, Mapping)
    return Checkpoint(path, kept, remembered if sound else {})


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError for a weight or buffer that is not finite: with NaN, class 0 is predicted everywhere."""
    if bad := [name for name, tensor in checkpoint.weights.items() if not bool(tensor.isfinite().all())]:
        what = f"{len(bad)} tensors of the checkpoint are not finite: {', '.join(bad[:3])}"
        raise CheckpointError(what, where=checkpoint.path, fix="train again, or give an earlier checkpoint")


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, *, strict: bool = True) -> str:
    """Put a file's weights into a model (what a TerraTorch task calls ``model``).

    Returns:
        What did not fit and was left out, told as a warning too: counts and first names; empty where all did.

    Raises:
        CheckpointError: A value is not finite; with `strict` a name or a shape, without it everything does not fit.
    """
    check_finite(checkpoint)
    # torch would copy int8 as if it were weights, and the real part of complex ones
    own, given = (
        {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in weights.items()}
        for weights in (model.state_dict(), checkpoint.weights)
    )
    misfits = {"missing": own.keys() - given.keys(), "unexpected": given.keys() - own.keys()}
    misfits["of another shape or kind"] = {name for name in own.keys() & given.keys() if own[name] != given[name]}
    told = ", ".join(f"{len(odd)} {what} ({', '.join(sorted(odd)[:3])})" for what, odd in misfits.items() if odd)
    fitting = {name: tensor for name, tensor in checkpoint.weights.items() if given[name] == own.get(name)}
    if (strict and told) or not fitting:
        fix = "give the --config that the checkpoint was trained with"
        raise CheckpointError(f"the weights are not this model's: {told}", where=checkpoint.path, fix=fix)
    model.load_state_dict(fitting, strict=strict)
    if told:
        console.warn(f"some weights of {checkpoint.path.name} do not fit, these stay as they were: {told}")
    return told


def load_strictly(checkpoint: Checkpoint, task: Any, recipe: Recipe) -> None:
    """Put all weights into a task's model, or raise as `load_weights`; a recipe of its own in the file is only told."""
    for difference in list_differences(checkpoint.hyper_parameters, recipe["model"].get("init_args") or {}):
        console.warn(f"{difference}; the config counts")
    load_weights(task.model, checkpoint)


def list_differences(remembered: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where a checkpoint's hyper-parameters and a recipe's model arguments differ in shape or in what is measured."""
    if not remembered:
        return []
    old_args, new_args = (dict(side.get("model_args") or {}) for side in (remembered, given))
    keys = sorted({*old_args, *new_args} - set(_SHAPELESS))
    pairs = [(f"model_args.{key}", old_args.get(key), new_args.get(key)) for key in keys]
    pairs += [(key, remembered[key], given[key]) for key in _MEASURED if key in remembered and key in given]
    return [f"{key}: the checkpoint says {old!r}, the config says {new!r}" for key, old, new in pairs if old != new]
