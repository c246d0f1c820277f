"""Notices when a run goes wrong, before the bad state can overwrite a good one.

fp16's trap: one inf in a training forward poisons the running statistics of BatchNorm layers. GradScaler skips the step
and mends no buffer; training loss stays finite, evaluation is NaN for ever. A check of parameters alone misses it.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from floodrepro import console
from floodrepro.errors import Incident
from floodrepro.training.diagnosis import ForwardOrder, first_bad_output, first_not_finite, not_finite

_COLLAPSES = 3  # validations in a row with one class everywhere: the first epochs may do it once or twice
_AGREE_EVERY = 10  # steps between two questions to the other processes
_NORM_EVERY = 4  # steps: reading all gradients once more takes 1.5 % of a step of the tiny model on two cores
_PENDING = 2  # losses whose copy may still be on its way from the device


@dataclass(frozen=True)
class _Look:
    """A value of one step, and whether it was bad, on its way from the device."""

    step: int
    kind: str
    batch: Any
    value: Tensor
    bad: Tensor
    copied: torch.cuda.Event | None  # None on a CPU, where nothing is on its way


class Guard(Callback):
    """Watches losses, gradients, weights, buffers and predictions; raises `Incident`.

    Nothing waits for the device in a step: what a step computed is copied without blocking and looked at when it has
    arrived, one or two steps later. On a CPU it is looked at on the spot.
    """

    def __init__(self) -> None:
        self._order = ForwardOrder()
        self._pending: deque[_Look] = deque()
        self._found: Incident | None = None
        self._batch: Any = None
        self._losses: Tensor | None = None  # sum over this epoch's chips, and their number
        self._norms: Tensor | None = None  # sum, maximum and number of this epoch's finite gradient norms
        self._collapsed = 0
        self._asked = 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums, for a resumed run; losses of all processes, which call this together."""
        losses = self._losses
        if losses is not None and torch.distributed.is_initialized():
            torch.distributed.all_reduce(losses := losses.clone())
        return {"losses": losses, "norms": self._norms, "collapsed": self._collapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._losses, self._norms = state_dict["losses"], state_dict["norms"]
        if self._losses is not None and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            self._losses = torch.zeros_like(self._losses)  # the first process has the sum of all
        self._collapsed = state_dict["collapsed"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn in which order modules run, in the first forward; the hooks go after it."""
        self._order.watch(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its loss is known."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss before it can do anything to the weights."""
        self._order.done()
        self._look(trainer, pl_module, "loss", loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add up gradient norms. An inf is GradScaler's daily bread, and no one else's."""
        if trainer.global_step % _NORM_EVERY:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scaler = _scaler(trainer)
        if scaler is None:
            self._look(trainer, pl_module, "gradient", norm)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler._get_scale_async()  # AdamW in one kernel does it itself, later than this
        self._norms = _sums(self._norms, 3, norm.device)
        finite = torch.isfinite(norm)
        usable = torch.where(finite, norm, 0.0)
        self._norms[0] += usable
        self._norms[1] = torch.maximum(self._norms[1], usable)
        self._norms[2] += finite

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the loss. With several processes, let all of them stop when one has to."""
        loss, chips = outputs["loss"], len(batch["mask"])
        self._losses = _sums(self._losses, 2, loss.device)
        self._losses[0] += loss * (trainer.accumulate_grad_batches * chips)  # Lightning has divided it by the former
        self._losses[1] += chips
        if trainer.world_size > 1:
            self._asked += 1
            if self._asked % _AGREE_EVERY == 0:
                self._agree(trainer, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All weights and buffers are finite, or the run ends here: nothing has been measured or saved yet."""
        if not trainer.sanity_checking:
            self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `Incident` if a parameter or a buffer is not finite, naming the first in forward order."""
        while self._pending:
            self._judge(trainer, pl_module)
        bad = not_finite(pl_module)
        incident = None
        if bad:
            name = first_not_finite(bad, self._order.names)
            more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
            incident = self._incident(trainer, "state", name.rsplit(".", 1)[0], f"{name} is not finite{more}", None)
        self._agree(trainer, incident)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count validations in which one class was predicted everywhere."""
        if trainer.sanity_checking:
            return
        predicted = _predicted_pixels(trainer, pl_module)
        if predicted is None:
            return
        classes = torch.nonzero(predicted).flatten().tolist()
        self._collapsed = self._collapsed + 1 if len(classes) == 1 else 0
        if not self._collapsed:
            return
        detail = f"class {classes[0]} was predicted everywhere in validation, {self._collapsed} times in a row"
        if self._collapsed >= _COLLAPSES:
            raise self._incident(trainer, "collapse", None, detail, None)
        console.warn(f"epoch {trainer.current_epoch + 1}: {detail}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the epoch's losses, gradients and GradScaler were like."""
        figures: dict[str, Any] = {}
        if self._losses is not None:
            if trainer.world_size > 1:
                torch.distributed.all_reduce(self._losses)
            total, chips = self._losses.tolist()
            figures = {"train/loss_epoch": total / chips}
        if self._norms is not None:
            total, largest, count = self._norms.tolist()
            figures |= {"train/grad_norm": total / max(count, 1.0), "train/grad_norm_max": largest}
        scaler = _scaler(trainer)
        if scaler is not None:
            figures["train/loss_scale"] = float(scaler.get_scale())
            skipped = skipped_steps(trainer)
            if skipped is not None:
                figures["train/skipped_steps"] = float(skipped)
        self._losses = self._norms = None
        pl_module.log_dict(figures, on_step=False, on_epoch=True, batch_size=1)

    def _look(self, trainer: Trainer, pl_module: LightningModule, kind: str, value: Tensor) -> None:
        bad = ~torch.isfinite(value)
        copied = None
        if bad.is_cuda:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(bad, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            bad = host
        self._pending.append(_Look(trainer.global_step, kind, self._batch, value, bad, copied))
        while self._pending and (len(self._pending) > _PENDING or _arrived(self._pending[0])):
            self._judge(trainer, pl_module)

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        look = self._pending.popleft()
        if look.copied is not None:
            look.copied.synchronize()  # for this copy alone, not for all that the device was given since
        if not bool(look.bad) or self._found is not None:
            return
        state = not_finite(pl_module)
        if state:
            module: str | None = first_not_finite(state, self._order.names).rsplit(".", 1)[0]
        elif any(isinstance(m, torch.nn.SyncBatchNorm) for m in pl_module.modules()):
            module = None  # a forward of this process alone would wait for the others
        else:
            module = first_bad_output(trainer, pl_module, look.batch)
        detail = f"the {look.kind} is {float(look.value)}"
        self._found = self._incident(trainer, look.kind, module, detail, look.batch, look.step)
        if trainer.world_size == 1:
            raise self._found  # else at the next agreement: one process that leaves lets the others wait for it

    def _incident(
        self, trainer: Trainer, kind: str, module: str | None, detail: str, batch: Any, step: int | None = None
    ) -> Incident:
        chips = getattr(self._batch if batch is None else batch, "chips", ())
        return Incident(
            kind,
            detail,
            module=module,
            epoch=trainer.current_epoch,
            step=trainer.global_step if step is None else step,
            chips=tuple(chips) if kind != "collapse" else (),
        )

    def _agree(self, trainer: Trainer, incident: Incident | None) -> None:
        """Raise here what was found here, and on the other processes that it was found elsewhere."""
        incident = self._found = self._found or incident
        if trainer.world_size > 1:
            flag = torch.tensor(float(incident is not None), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            if bool(flag) and incident is None:
                incident = self._incident(trainer, "elsewhere", None, "another process found a value not finite", None)
        if incident is not None:
            raise incident


def _arrived(look: _Look) -> bool:
    return look.copied is None or bool(look.copied.query())  # type: ignore[no-untyped-call]


def _sums(sums: Tensor | None, count: int, device: torch.device) -> Tensor:
    """An epoch's sums so far, on the device; zeros where there are none."""
    return torch.zeros(count, dtype=torch.float64, device=device) if sums is None else sums.to(device)


def skipped_steps(trainer: Trainer) -> int | None:
    """Optimizer steps that GradScaler left out so far; None for an optimizer that does not count its own."""
    states = trainer.optimizers[0].state.values() if trainer.optimizers else ()
    taken = [float(state["step"]) for state in states if "step" in state]
    return trainer.global_step - int(max(taken)) if taken else None


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _predicted_pixels(trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """Pixels by predicted class in this validation, from the confusion counts that torchmetrics holds already."""
    for metric in getattr(pl_module, "val_metrics", torch.nn.Module()).modules():
        counts = getattr(metric, "confmat", None)
        if isinstance(counts, Tensor) and counts.ndim == 2:
            predicted = counts.sum(dim=0)
            if trainer.world_size > 1:  # also where this process had no pixel: the others wait for it
                torch.distributed.all_reduce(predicted)
            if bool(predicted.any()):
                return predicted
    return None
