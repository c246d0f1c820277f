"""Read a checkpoint's weights: safely, strictly, and whatever torch is installed."""

import json
import pickle
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

_PREFIX = "model."
# Keys of a Lightning state dict that come from the config (a loss with class weights keeps them as a buffer).
_NOT_WEIGHTS = ("criterion.",)
# What changes the shape of the model or what is measured. Not: pretrained, class_weights, optimiser, learning rate.
_MEASURED = ("model_factory", "loss", "ignore_index", "class_names", "tiled_inference_on_testing")
_SHAPELESS = ("backbone_pretrained", "pretrained", "head_dropout")

_SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")


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


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a Lightning ``.ckpt`` or ``.pt``, or a ``.safetensors``.

    torch.load of a ``.safetensors`` works from torch 2.13 on only, hence the safetensors library. Pickled code is never
    run: ``weights_only=True``.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, or holds more than weights.
    """
    if not path.is_file():
        raise CheckpointError(
            "checkpoint not found", where=path, fix="give runs/NAME/checkpoints/best.ckpt or an export"
        )
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError as error:
        # torch words a damaged stream and one that wants to run code much alike: tell them apart by the refused name,
        # or by the first byte of a pickle that torch did not write.
        if "Unsupported" in str(error) and (" global" in str(error).lower() or _starts_like_a_pickle(path)):
            raise CheckpointError(
                "the checkpoint holds code, not only weights, and is not opened",
                where=path,
                fix="get a .safetensors, or a file saved with tensors and plain values only",
            ) from error
        raise _damaged(path, error) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, struct.error) as error:
        raise _damaged(path, error) from error
    weights = content.get("state_dict", content)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError("the checkpoint holds no state dict", where=path)
    kept = {k.removeprefix(_PREFIX): v for k, v in weights.items() if not k.startswith(_NOT_WEIGHTS)}
    if not kept:
        raise CheckpointError("the checkpoint holds no weights", where=path)
    return Checkpoint(path, kept, content.get("hyper_parameters") or {})


def load_strictly(checkpoint: Checkpoint, task: Any, recipe: Recipe) -> None:
    """Put the weights into a task's model: every name and every shape has to fit.

    The recipe's arguments count; where the checkpoint remembers others a warning names both.

    Args:
        checkpoint: What `read_checkpoint` returned.
        task: TerraTorch task with a ``model``.
        recipe: The recipe that the task was built from.

    Raises:
        CheckpointError: The weights belong to another model.
    """
    differences = list_differences(checkpoint.hyper_parameters, recipe["model"].get("init_args") or {})
    try:
        task.model.load_state_dict(checkpoint.weights, strict=True)
    except RuntimeError as error:
        remembered = "; ".join(differences) or str(error).replace("\n\t", " ")[:300]
        raise CheckpointError(
            f"the weights are another model's than the config builds: {remembered}",
            where=checkpoint.path,
            fix="give the --config that the checkpoint was trained with",
        ) from error
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


def _read_pickle(path: Path) -> dict[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise CheckpointError(f"the checkpoint holds a {type(content).__name__}, no state dict", where=path)
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="pt", device="cpu") as file:
        remembered = json.loads((file.metadata() or {}).get("hyper_parameters", "{}"))
        return {"state_dict": {key: file.get_tensor(key) for key in file.keys()}, "hyper_parameters": remembered}  # noqa: SIM118


def _starts_like_a_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _damaged(path: Path, error: Exception) -> CheckpointError:
    if path.suffix not in _SUFFIXES:
        return CheckpointError("this is no checkpoint", where=path, fix=f"give a {' or a '.join(_SUFFIXES)}")
    lines = str(error).strip().splitlines()
    detail = lines[0][:160] if lines else repr(error)
    return CheckpointError(
        f"the checkpoint is damaged or truncated ({path.stat().st_size} bytes): {detail}",
        where=path,
        fix="copy or download it again and compare its sha256",
    )
