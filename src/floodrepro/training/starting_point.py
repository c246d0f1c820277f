"""What the weights were before the first step, as hashes: a layer that never moved is found by comparing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from floodrepro.run_folder import write_atomically

SCHEMA = 1


def record_starting_point(task: Any, path: Path) -> None:
    """Write a hash of each tensor of a task's model as it is now.

    For a run that starts from the beginning, once its model is built: a resumed one has moved already. A run that is
    started anew (killed before its first state, or rolled back to the start) starts from what this call sees, so that a
    file that is there is replaced: the same seed leaves the same bytes.

    Args:
        task: TerraTorch task with a ``model``.
        path: ``checkpoints/start.json``. By name as in the model's state dict (no leading ``model.``): ``sha256`` of
            the values' bytes, ``kind`` (parameter or buffer), ``trainable``.

    Raises:
        OSError: It cannot be written.
    """
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    tensors = {
        name: {
            "sha256": tensor_sha256(tensor),
            "kind": "parameter" if name in parameters else "buffer",
            "trainable": name in parameters and parameters[name].requires_grad,
        }
        for name, tensor in task.model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"schema": SCHEMA, "tensors": tensors}, indent=1) + "\n")


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's values as bytes in C order, wherever it lies and however its memory is laid out."""
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
