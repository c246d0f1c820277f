"""Reads and loads weights: tensors only, every name and shape, whatever torch is installed."""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from floodrepro import console
from floodrepro.errors import CheckpointError
from floodrepro.recipe import Recipe

# Keys of a Lightning state dict that come from the config (a loss with class weights keeps them as a buffer).
_NOT_WEIGHTS = ("criterion.",)
# Where files of weights keep their state dict: Lightning, IBM's .pt and TerraTorch; plain training scripts; timm.
_STATE_DICTS = ("state_dict", "model_state_dict", "model")
# What changes the shape of the model or what is measured. Not: pretrained, class_weights, optimiser, learning rate.
_MEASURED = ("model_factory", "loss", "ignore_index", "class_names", "tiled_inference_on_testing")
_SHAPELESS = ("backbone_pretrained", "pretrained", "head_dropout")

_AGAIN = "copy or download it again and compare its sha256"


@dataclass(frozen=True)
class Checkpoint:
    """Weights, and what the file remembers of how they were made.

    Args:
        path: The file.
        weights: Tensors by name, names as in the task's ``model`` (no leading ``model.``), on the CPU.
        hyper_parameters: Arguments of the task that was trained; empty where the file holds none.
    """

    path: Path
    weights: Mapping[str, torch.Tensor]
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mismatch:
    """Names that did not fit a model; empty, and false, where all did.

    Args:
        missing: The model has them and the file does not.
        unexpected: The file has them and the model does not.
        other_shape: Both have them, with different shapes.
    """

    missing: list[str]
    unexpected: list[str]
    other_shape: list[str]

    def __str__(self) -> str:
        """The counts and the first names, in one line."""
        named = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.other_shape}
        parts = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in named.items() if names]
        return ", ".join(parts)

    def __bool__(self) -> bool:
        """Whether anything did not fit."""
        return bool(self.missing or self.unexpected or self.other_shape)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a Lightning ``.ckpt``, a ``.pt`` of IBM's or of plain torch, or a ``.safetensors``.

    torch.load of a ``.safetensors`` works from torch 2.13 on only, hence the safetensors library. Pickled code is never
    run: ``weights_only=True``. Prefixes of Lightning (``model.``), DDP (``module.``) and torch.compile (``_orig_mod.``)
    are taken off the names.

    Raises:
        CheckpointError: The file is missing, or it is not a checkpoint; the message names what it is.
    """
    if not path.is_file():
        raise CheckpointError(
            "checkpoint not found", where=path, fix="give runs/NAME/checkpoints/best.ckpt or an export"
        )
    if problem := _what_it_is(path):
        raise CheckpointError(problem[0], where=path, fix=problem[1])
    try:
        content = (
            _read_safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    weights: Any = content
    if isinstance(content, Mapping):
        weights = next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"the checkpoint holds a {type(content).__name__} without a state dict", where=path)
    kept = {
        name.removeprefix("module.").removeprefix("model.").replace("_orig_mod.", ""): tensor
        for name, tensor in weights.items()
        if not name.startswith(_NOT_WEIGHTS)
    }
    if not kept:
        raise CheckpointError("the checkpoint holds no weights", where=path)
    return Checkpoint(path, kept, content.get("hyper_parameters") or {})


def load_weights(model: torch.nn.Module, checkpoint: Path | Checkpoint, *, strict: bool = True) -> Mismatch:
    """Put a file's weights into a model; what is left out is told as a warning.

    Args:
        model: A TerraTorch task, or what it calls ``model``.
        checkpoint: The file, or what `read_checkpoint` returned.
        strict: Whether every name and every shape has to fit.

    Returns:
        What did not fit and was left out.

    Raises:
        CheckpointError: The file cannot be read; with `strict`, something does not fit; without, nothing fits.
    """
    given = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    inner = getattr(model, "model", None)
    model = inner if isinstance(inner, torch.nn.Module) else model
    own = model.state_dict()
    fitting = {k: v for k, v in given.weights.items() if k in own and v.shape == own[k].shape}
    mismatch = Mismatch(
        [name for name in own if name not in given.weights],
        [name for name in given.weights if name not in own],
        [name for name in given.weights if name in own and name not in fitting],
    )
    if (strict and mismatch) or not fitting:
        raise CheckpointError(
            f"the weights are not this model's: {mismatch}",
            where=given.path,
            fix="give the --config that the checkpoint was trained with",
        )
    model.load_state_dict(fitting, strict=strict)
    if mismatch:
        console.warn(f"{given.path.name} fits in part, the rest of the model stays as it was: {mismatch}")
    return mismatch


def load_strictly(checkpoint: Checkpoint, task: Any, recipe: Recipe) -> None:
    """Put all weights into a task's model; the recipe counts, and a checkpoint that remembers another is named.

    Args:
        checkpoint: What `read_checkpoint` returned.
        task: TerraTorch task with a ``model``.
        recipe: The recipe that the task was built from.

    Raises:
        CheckpointError: The weights belong to another model.
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
    pairs = [(f"model_args.{key}", old_args.get(key), new_args.get(key)) for key in sorted({*old_args, *new_args})]
    pairs = [pair for pair in pairs if pair[0].removeprefix("model_args.") not in _SHAPELESS]
    pairs += [(key, remembered[key], given[key]) for key in _MEASURED if key in remembered and key in given]
    return [f"{key}: the checkpoint says {old!r}, the config says {new!r}" for key, old, new in pairs if old != new]


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt", device="cpu") as file:
        remembered = json.loads((file.metadata() or {}).get("hyper_parameters", "{}"))
        return {"state_dict": {key: file.get_tensor(key) for key in file.keys()}, "hyper_parameters": remembered}  # noqa: SIM118


def _what_it_is(path: Path) -> tuple[str, str] | None:
    """What is wrong and what to do, where a file's first bytes show that it is something else; otherwise None."""
    with path.open("rb") as file:
        first = file.read(512)
    size = path.stat().st_size
    if not size:
        return "the file is empty", _AGAIN
    if first.startswith(b"version https://git-lfs"):
        return f"this is a Git LFS pointer ({size} bytes), not the weights", "git lfs pull, or hf download REPO FILE"
    if first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not a checkpoint: a link or a login page was saved", "hf download REPO FILE"
    torch_file, safetensors_file = first[:1] == b"\x80" or first[:2] == b"PK", first[8:9] == b"{"
    if path.suffix == ".safetensors" and torch_file:
        return "this is a torch file that is named .safetensors", f"rename it to {path.stem}.pt"
    if path.suffix != ".safetensors" and safetensors_file:
        return f"this is a safetensors file that is named {path.suffix}", f"rename it to {path.stem}.safetensors"
    if path.suffix == ".safetensors" and safetensors_file:
        header = int.from_bytes(first[:8], "little")
        with path.open("rb") as file:
            ends = re.findall(rb'"data_offsets":\[\d+,(\d+)\]', file.read(min(8 + header, size)))
        whole = 8 + header + max((int(end) for end in ends), default=0)
        if size < whole:
            return f"the file is cut short: {size:,} of {whole:,} bytes", _AGAIN
    return None


def _refused(path: Path, error: Exception) -> CheckpointError:
    """Whether an UnpicklingError means code or damage: torch names the class that it refused after GLOBAL."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None and not _starts_with(path, pickle.PROTO):
        return _damaged(path, error)
    return CheckpointError(
        f"the checkpoint holds code, not only tensors, and is not opened: class {named[1] if named else 'unknown'}",
        where=path,
        fix='if you trust its author, keep its tensors only, where its code is installed: python -c "import torch; '
        f"c = torch.load('{path.name}', weights_only=False); "
        "torch.save({'state_dict': c['state_dict']}, 'weights.pt')\"",
    )


def _starts_with(path: Path, first: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(first)) == first


def _damaged(path: Path, error: Exception) -> CheckpointError:
    detail = (str(error).strip().splitlines() or [repr(error)])[0][:160]
    return CheckpointError(
        f"the file is no checkpoint, or it is damaged or cut short ({path.stat().st_size:,} bytes): {detail}",
        where=path,
        fix=_AGAIN,
    )
