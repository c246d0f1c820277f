"""Stops a run when it goes wrong, before the bad state can overwrite a good one, in any TerraTorch recipe.

fp16's trap: one inf in a training forward poisons the running statistics of BatchNorm layers. GradScaler skips the step
and mends no buffer; training loss stays finite, evaluation is NaN for ever. A check of parameters alone misses it.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from floodrepro.errors import Incident

_LOOK_EVERY = 10  # batches
_BEYOND_DATA = 1e30  # no sensor's value: nan_to_num makes 3.4e38 of an infinity


class NaNGuard(Callback):
    """Watches losses, weights, buffers and predictions; raises `floodrepro.errors.Incident`.

    In a recipe::

        trainer:
          callbacks:
            - class_path: floodrepro.callbacks.NaNGuard

    A training step never waits for the device: losses, weights and buffers are read every ten batches, and before any
    validation or checkpoint. A step that GradScaler leaves out is no incident, its loss is finite. One class in all
    predictions of a validation is a warning.
    """

    def __init__(self) -> None:
        self._step, self._largest = 0, torch.empty(0)  # of the batch that is being trained
        self._steps: list[tuple[int, list[str], Tensor]] = []  # step, chips, loss and the largest input of each chip

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stand before every checkpoint; of weights alone Lightning tells no callback."""
        save = trainer.save_checkpoint

        def save_if_good(*args: Any, **kwargs: Any) -> None:
            if trainer.training or trainer.validating:
                self._look(trainer, pl_module)
            save(*args, **kwargs)

        trainer.save_checkpoint = save_if_good

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure the input: a bad one is to be told from an overflow."""
        self._step, self._largest = trainer.global_step, largest_values(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss; look at the last ones, and at the state, every N batches."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            values = torch.cat([loss.detach().float().mean().view(1), self._largest.to(loss.device)])
            self._steps.append((self._step, chips_of(batch), values))
        if (batch_idx + 1) % _LOOK_EVERY == 0:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure nothing with a bad state, and end no epoch with one."""
        if not trainer.sanity_checking:
            self._look(trainer, pl_module)

    on_train_epoch_end = on_validation_start

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn if one class was predicted everywhere: the first epochs may do it once or twice."""
        metrics = getattr(pl_module, "val_metrics", nn.Module()).modules()
        matrices = (getattr(metric, "confmat", None) for metric in metrics)  # torchmetrics counted already
        counts = next((one for one in matrices if isinstance(one, Tensor) and one.ndim == 2), None)
        if counts is None or trainer.sanity_checking:
            return
        # Also where this process had no pixel: the others wait for it.
        predicted = trainer.strategy.reduce(counts.sum(dim=0), reduce_op="sum")
        classes = torch.nonzero(predicted).flatten().tolist()
        if len(classes) == 1 and trainer.is_global_zero:
            what = f"epoch {trainer.current_epoch + 1}: validation predicted class {classes[0]} for every pixel"
            print(f"floodrepro: warning: {what}", file=sys.stderr, flush=True)

    def _look(self, trainer: Any, pl_module: Any) -> None:
        """Raise `Incident` if a loss since the last look, a weight or a buffer is not finite; all processes call it."""
        found: dict[str, Any] = {}
        bad_input: tuple[int, list[str]] | None = None
        seen: list[str] = []
        steps, self._steps = self._steps, []
        for step, chips, values in steps:
            loss, *inputs = values.tolist()  # the first waits for the device
            seen = chips + seen  # the last first
            names = chips if len(chips) == len(inputs) else [f"number {i} of the batch" for i in range(len(inputs))]
            bad = [name for name, value in zip(names, inputs, strict=True) if not value < _BEYOND_DATA]
            bad_input = bad_input or ((step, bad) if bad else None)
            if not math.isfinite(loss):
                found = {"kind": "loss", "detail": f"the loss is {loss}", "step": step, "chips": seen}
                break
        tensors = not_finite(pl_module)
        if tensors and not found:
            what = "weights or buffers are not finite"
            found = {"kind": "state", "detail": what, "step": trainer.global_step, "chips": []}
        if found and bad_input:  # one that does no harm is none
            step, chips = bad_input
            what = f"the input of step {step} is not finite or far too large; {found['detail']}"
            found |= {"kind": "input", "detail": what, "chips": chips}
        found = found and found | {"epoch": trainer.current_epoch, "tensors": tensors}
        if trainer.world_size > 1:  # one that stopped alone would let the others wait for it
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, found)
            found = min((one for one in everyone if one), key=lambda one: one["kind"], default={})  # "input" first
        if found:
            raise Incident(found)


def not_finite(root: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold an inf or a NaN, running statistics first; one wait for the device."""
    named = [*root.named_parameters(), *root.named_buffers()]
    floating = {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}
    if not floating:
        return []
    # A sum is finite where all terms are (and none is near 1e38), and no copy of them is made.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in floating.values()])
    bad = [name for name, ok in zip(floating, torch.isfinite(sums).tolist(), strict=True) if not ok]
    return sorted(bad, key=lambda name: "running_" not in name)


def largest_values(batch: Any) -> Tensor:
    """Largest absolute value of each chip in a batch's input, (B,); empty where no input is floating point.

    The input is the batch itself, the first of a tuple, or a dictionary's ``image``, else all but its labels.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("image", {key: value for key, value in batch.items() if key not in ("mask", "label")})
    elif isinstance(batch, tuple | list):
        batch = batch[:1]
    inputs = [tensor for tensor in tensors_of(batch) if tensor.is_floating_point() and tensor.ndim > 1]
    norms = [torch.linalg.vector_norm(x.detach().flatten(1).float(), ord=math.inf, dim=1) for x in inputs if x.numel()]
    return torch.stack(norms).amax(0) if len({len(norm) for norm in norms}) == 1 else torch.empty(0)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)


def chips_of(batch: Any) -> list[str]:
    """Names of a batch's chips: its attribute ``chips``, else its file names; empty where it has neither."""
    names = getattr(batch, "chips", None) or (batch.get("filename") if isinstance(batch, Mapping) else None)
    if isinstance(names, Mapping):  # one list for each modality
        names = next(iter(names.values()), ())
    return [Path(str(name)).name for name in names or ()]
