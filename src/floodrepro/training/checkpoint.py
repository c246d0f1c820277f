"""Reads and loads weights: tensors only, every name and shape, whatever torch is installed."""

import json
import pickle
import re
import struct
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
_SHAPELESS = ("backbone_pretrained", "pretrained", "head_dropout")
_PAGE = "this is a web page: a link or a login page was saved"
# What downloads leave in place of weights, by its first bytes.
_NO_WEIGHTS = {
    b"version https://git-lfs": "this is a Git LFS pointer, not the weights",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
}
_UNREADABLE: tuple[type[Exception], ...] = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
)
_UNREADABLE += (struct.error, TypeError, AssertionError, AttributeError)  # of a file in torch's old format, cut short
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

    torch.load of a ``.safetensors`` works from torch 2.13 on only, hence the safetensors library. Pickled code is never
    run: ``weights_only=True``. Prefixes of Lightning (``model.``), DDP (``module.``) and torch.compile (``_orig_mod.``)
    are taken off the names, and the buffers of a loss with class weights (``criterion.``) are left out.

    Raises:
        CheckpointError: The file is missing, or it is not a checkpoint; the message names what it is.
    """
    if not path.is_file():
        fix = "give runs/NAME/checkpoints/best.ckpt or an export"
        raise CheckpointError("checkpoint not found", where=path, fix=fix)
    with path.open("rb") as file:
        first = file.read(64)
    for start, what in _NO_WEIGHTS.items():
        if first.lstrip().lower().startswith(start):
            raise CheckpointError(what, where=path, fix="hf download REPO FILE, or git lfs pull")
    try:
        if first[8:9] == b"{":  # the header of safetensors, after its length
            with safe_open(str(path), framework="pt", device="cpu") as opened:
                remembered: Any = json.loads((opened.metadata() or {}).get("hyper_parameters", "{}"))
                weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                content: Any = {"state_dict": weights, "hyper_parameters": remembered}
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch names the class that it refuses
            what = f"the checkpoint holds code, not only tensors, and is not opened: class {refused[1]}"
            raise CheckpointError(what, where=path, fix=_STRIP.format(name=path.name)) from error
        detail = (str(error).strip().splitlines() or [repr(error)])[0][:160]
        what = f"the file is no checkpoint, or it is damaged or cut short ({path.stat().st_size:,} bytes): {detail}"
        raise CheckpointError(what, where=path, fix="copy or download it again and compare its sha256") from error
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
    remembered = named.get("hyper_parameters")
    if odd := [key for key, t in kept.items() if t.layout != torch.strided or t.is_meta]:
        raise CheckpointError(f"the checkpoint holds what is no plain tensor: {odd[0]}", where=path)
    sound = isinstance(remembered, Mapping) and isinstance(remembered.get("model_args") or {}, Mapping)
    return Checkpoint(path, kept, remembered if sound else {})


def check_finite(checkpoint: Checkpoint) -> None:
    """Refuse weights to be used or passed on that are not finite: a network with NaN predicts class 0 everywhere.

    Raises:
        CheckpointError: A weight or a buffer holds NaN or an infinity.
    """
    floats = {key: t if t.is_complex() else t.double() for key, t in checkpoint.weights.items()}
    bad = [name for name, tensor in floats.items() if not bool(tensor.isfinite().all())]
    if bad:
        what = f"{len(bad)} tensors of the checkpoint are not finite: {', '.join(bad[:3])}"
        raise CheckpointError(what, where=checkpoint.path, fix="train again, or give an earlier checkpoint")


def load_weights(model: torch.nn.Module, checkpoint: Checkpoint, *, strict: bool = True) -> str:
    """Put a file's weights into a model; what is left out is told as a warning.

    Args:
        model: What a TerraTorch task calls ``model``.
        checkpoint: What `read_checkpoint` returned.
        strict: Whether every name and every shape has to fit.

    Returns:
        What did not fit and was left out: counts and first names; empty where all did.

    Raises:
        CheckpointError: A value is not finite; with `strict` something, without it everything does not fit.
    """
    check_finite(checkpoint)
    own, given = model.state_dict(), checkpoint.weights

    def kind(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.is_floating_point()

    misfits = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        # torch would copy int8 as if it were weights, and the real part of complex ones
        "of another shape or kind": [name for name in own if name in given and kind(given[name]) != kind(own[name])],
    }
    left_out = {name for names in misfits.values() for name in names}
    fitting = {name: tensor for name, tensor in given.items() if name not in left_out}
    told = ", ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in misfits.items() if names)
    if (strict and told) or not fitting:
        fix = "give the --config that the checkpoint was trained with"
        raise CheckpointError(f"the weights are not this model's: {told}", where=checkpoint.path, fix=fix)
    model.load_state_dict(fitting, strict=strict)
    if told:
        console.warn(f"some weights of {checkpoint.path.name} do not fit, these stay as they were: {told}")
    return told


def load_strictly(checkpoint: Checkpoint, task: Any, recipe: Recipe) -> None:
    """Put all weights into a task's model; the recipe counts, and a checkpoint that remembers another is named.

    Raises:
        CheckpointError: The weights belong to another model, or are not finite.
    """
    differences = list_differences(checkpoint.hyper_parameters, recipe["model"].get("init_args") or {})
    try:
        load_weights(task.model, checkpoint)
    except CheckpointError as error:
        raise CheckpointError("; ".join([error.what, *differences]), where=error.where, fix=error.fix) from error
    for difference in differences:
        console.warn(f"{difference}; the config counts")


def list_differences(remembered: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where a checkpoint's hyper-parameters and a recipe's model arguments differ in shape or in what is measured."""
    if not remembered:
        return []
    old_args, new_args = (dict(side.get("model_args") or {}) for side in (remembered, given))
    keys = sorted({*old_args, *new_args} - set(_SHAPELESS))
    pairs = [(f"model_args.{key}", old_args.get(key), new_args.get(key)) for key in keys]
    pairs += [(key, remembered[key], given[key]) for key in _MEASURED if key in remembered and key in given]
    return [f"{key}: the checkpoint says {old!r}, the config says {new!r}" for key, old, new in pairs if old != new]
