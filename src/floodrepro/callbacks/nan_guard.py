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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from floodrepro.errors import Incident

_FP16_MAX = 65504.0  # IEEE 754 binary16
_BEYOND_DATA = 1e30  # no sensor's value: nan_to_num makes 3.4e38 of an infinity


class NaNGuard(Callback):
    """Watches losses, weights, buffers and predictions; raises `floodrepro.errors.Incident`.

    In a recipe::

        trainer:
          callbacks:
            - class_path: floodrepro.callbacks.NaNGuard

    A training step never waits for the device: losses are read every N batches, and before any validation or
    checkpoint, where weights and buffers are looked at too: nothing bad is measured or saved. A step that GradScaler
    leaves out is no incident, its loss is finite. One class in all predictions of a validation is a warning.

    Args:
        every_n_steps: Batches between two looks at the losses.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self._every = every_n_steps
        self._step, self._largest = 0, torch.empty(0)  # of the batch that is being trained
        self._steps: list[tuple[int, list[str], Tensor, Tensor]] = []  # step, chips, loss, largest input of each chip
        self._bad_input: tuple[int, list[str]] | None = None  # step and chips of the first

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stand before checkpoints of weights alone too, for which `on_save_checkpoint` is not called."""
        save = trainer.save_checkpoint

        def save_if_good(filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
            if weights_only and (trainer.training or trainer.validating):
                self.check(trainer, pl_module)
            save(filepath, weights_only, storage_options)

        trainer.save_checkpoint = save_if_good  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the input: a bad one is to be told from an overflow."""
        self._step, self._largest = trainer.global_step, largest_values(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at the last ones every N batches."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._steps.append((self._step, chips_of(batch), loss.detach().mean(), self._largest))
        if (batch_idx + 1) % self._every == 0:
            self._agree(trainer, self._judge(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure nothing with a bad state."""
        if not trainer.sanity_checking:
            self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End no epoch with one."""
        self.check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save none, whoever asks for it."""
        if trainer.training or trainer.validating:
            self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `Incident` if a loss, a parameter or a buffer is not finite; all processes have to call it."""
        incident = self._judge(trainer, pl_module)
        if incident is None and not_finite(pl_module):
            incident = self._incident(trainer, pl_module, "state", "weights or buffers are not finite")
        self._agree(trainer, incident)
        self._bad_input = None  # it did no harm

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if one class was predicted everywhere: the first epochs may do it once or twice."""
        classes = [] if trainer.sanity_checking else _predicted_classes(trainer, pl_module)
        if len(classes) == 1 and trainer.is_global_zero:
            what = f"epoch {trainer.current_epoch + 1}: validation predicted class {classes[0]} for every pixel"
            print(f"floodrepro: warning: {what}", file=sys.stderr, flush=True)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> Incident | None:
        """Look at the batches since the last look, with one wait for the device."""
        batches, self._steps = self._steps, []
        flat = [tensor.reshape(-1).float() for *_, loss, largest in batches for tensor in (loss, largest)]
        values = iter(torch.cat(flat).tolist() if flat else [])
        limit = _FP16_MAX if str(trainer.precision).startswith("16") else _BEYOND_DATA
        seen: list[str] = []
        for step, chips, _, largest in batches:
            loss, inputs = next(values), [next(values) for _ in largest]
            seen = chips + seen  # the last first
            worst = _BEYOND_DATA if math.isfinite(loss) else limit  # 65504 is to blame only where something broke
            names = chips if len(chips) == len(inputs) else [f"number {i} of the batch" for i in range(len(inputs))]
            bad = [name for name, value in zip(names, inputs, strict=True) if not value < worst]
            if bad and self._bad_input is None:
                self._bad_input = step, bad
            if not math.isfinite(loss):
                return self._incident(trainer, pl_module, "loss", f"the loss is {loss}", step, seen)
        return None

    def _incident(
        self, trainer: Trainer, pl_module: LightningModule, kind: str, detail: str, step: int = -1, chips: Any = ()
    ) -> Incident:
        if self._bad_input is not None:
            kind, chips = "input", self._bad_input[1]
            detail = f"the input of step {self._bad_input[0]} is not finite or far too large; {detail}"
        step = trainer.global_step if step < 0 else step
        bad = not_finite(pl_module)
        return Incident(kind, detail, epoch=trainer.current_epoch, step=step, chips=chips, tensors=bad)

    def _agree(self, trainer: Trainer, incident: Incident | None) -> None:
        """Raise what was found here or in another process: one that stops alone lets the others wait for it."""
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, incident and incident.as_dict())
            found = [one for one in everyone if one is not None]
            incident = Incident(**min(found, key=lambda one: one["kind"])) if found else None  # "input" first
        if incident is not None:
            raise incident


def not_finite(root: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold an inf or a NaN, running statistics first; one wait for the device."""
    named = [*root.named_parameters(), *root.named_buffers()]
    floating = {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}
    if not floating:
        return []
    # A sum is finite where all terms are, and no copy of them is made; it may overflow where they are: looked at again.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in floating.values()])
    suspects = [name for name, ok in zip(floating, torch.isfinite(sums).tolist(), strict=True) if not ok]
    bad = [name for name in suspects if not bool(torch.isfinite(floating[name]).all())]
    return sorted(bad, key=lambda name: "running_" not in name)


def largest_values(batch: Any) -> Tensor:
    """Largest absolute value of each chip in a batch's input, (B,); empty where no input is floating point.

    Args:
        batch: A tensor, a tuple that begins with the input, or a dictionary: its ``image``, else all but its labels.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("image", {key: value for key, value in batch.items() if key not in ("mask", "label")})
    elif isinstance(batch, tuple | list) and batch:
        batch = batch[0]
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


def _predicted_classes(trainer: Trainer, pl_module: LightningModule) -> list[int]:
    """Classes with a pixel in this validation, from the confusion counts that torchmetrics holds already."""
    for metric in getattr(pl_module, "val_metrics", nn.Module()).modules():
        counts = getattr(metric, "confmat", None)
        if isinstance(counts, Tensor) and counts.ndim == 2:
            predicted = counts.sum(dim=0)
            if trainer.world_size > 1:  # also where this process had no pixel: the others wait for it
                torch.distributed.all_reduce(predicted)
            return [int(one) for one in torch.nonzero(predicted).flatten()]
    return []
