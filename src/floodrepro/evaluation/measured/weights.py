"""What a checkpoint's tensors are like: all finite, all there, of the right kind, and moved by the training."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from floodrepro.errors import CheckpointError
from floodrepro.evaluation.checkpoint import read_checkpoint
from floodrepro.evaluation.measured import build_on_cpu
from floodrepro.run_folder import sha256_of
from floodrepro.training.starting_point import SCHEMA, tensor_sha256


def measure(recipe: Path, checkpoint: Path, start: Path | None) -> dict[str, Any]:
    """Look at every parameter and buffer of a checkpoint.

    Args:
        recipe: The recipe whose model the checkpoint holds.
        checkpoint: A ``.ckpt``, ``.pt`` or ``.safetensors``.
        start: ``checkpoints/start.json``; None where the run has none.

    Returns:
        `name`, `sha256`, `bytes` of the file; `tensors`, `parameters` (values in them) and `expected` with the same two
        of the recipe's model; `dtypes`, number of tensors by dtype; `missing`, `unexpected`, `other_shape` and
        `other_dtype` against the recipe's model; `not_finite`, each with `name`, `kind`, `nan`, `inf` (numbers of
        values); `start`, recorded or absent; `trained` and `frozen`, numbers of parameter tensors that had or had no
        gradient to follow; `unmoved`, names of trained ones that are as they were, bit for bit; `largest`, `name` and
        `value` of the largest finite magnitude. The last four are None where they are not known.

    Raises:
        UsageError: The recipe does not build.
        CheckpointError: The checkpoint cannot be read, or the starting point is damaged or another model's.
    """
    found = read_checkpoint(checkpoint).weights
    model = build_on_cpu(recipe).model.model
    expected: dict[str, Tensor] = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}  # one name where two share a tensor
    common = [name for name in expected if name in found]
    return {
        "name": checkpoint.name,
        "sha256": sha256_of(checkpoint),
        "bytes": checkpoint.stat().st_size,
        "tensors": len(found),
        "parameters": sum(tensor.numel() for name, tensor in found.items() if name in parameters),
        "expected": {
            "tensors": len(expected),
            "parameters": sum(tensor.numel() for name, tensor in expected.items() if name in parameters),
        },
        "dtypes": dict(sorted(Counter(_dtype(tensor) for tensor in found.values()).items())),
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "other_shape": [
            {"name": name, "shape": list(found[name].shape), "expected": list(expected[name].shape)}
            for name in common
            if found[name].shape != expected[name].shape
        ],
        "other_dtype": [
            {"name": name, "dtype": _dtype(found[name]), "expected": _dtype(expected[name])}
            for name in common
            if found[name].dtype != expected[name].dtype
        ],
        "not_finite": _not_finite(found, parameters),
        "largest": _largest(found),
        **_movement(found, start),
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _not_finite(found: Mapping[str, Tensor], parameters: set[str]) -> list[dict[str, Any]]:
    bad = []
    for name, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            counts = {"nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}
            bad.append({"name": name, "kind": "parameter" if name in parameters else "buffer", **counts})
    return bad


def _largest(found: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The largest magnitude among finite values of floating tensors: one that grows without bound shows here first."""
    magnitudes = {
        name: float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        for name, tensor in found.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not magnitudes:
        return None
    name = max(magnitudes, key=magnitudes.__getitem__)
    return {"name": name, "value": magnitudes[name]}


def _movement(found: Mapping[str, Tensor], start: Path | None) -> dict[str, Any]:
    """Hold the parameters against where they started; buffers are no one's to train."""
    if start is None or not start.is_file():
        return {"start": "absent", "trained": None, "frozen": None, "unmoved": None}
    try:
        content = json.loads(start.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}")
        before = {name: entry for name, entry in content["tensors"].items() if entry["kind"] == "parameter"}
        trained = {name: entry["sha256"] for name, entry in before.items() if entry["trainable"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the record of the starting point cannot be read: {error}", where=start) from error
    if strange := sorted(before.keys() - found.keys()):
        raise CheckpointError(
            f"the starting point is another model's: it has {strange[0]}, which the checkpoint lacks", where=start
        )
    return {
        "start": "recorded",
        "trained": len(trained),
        "frozen": len(before) - len(trained),
        "unmoved": [name for name, digest in trained.items() if tensor_sha256(found[name]) == digest],
    }
