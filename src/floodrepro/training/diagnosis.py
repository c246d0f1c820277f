"""Which module went bad first."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ForwardOrder:
    """The order in which modules finish their forward, learnt from one step.

    Attributes:
        names: Paths of modules, first finished first.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._handles: list[RemovableHandle] = []

    def watch(self, root: nn.Module) -> None:
        """Listen to all modules below *root* until `done`."""
        self.names = []
        for name, module in root.named_modules():
            self._handles.append(module.register_forward_hook(self._noter(name)))

    def done(self) -> None:
        """Take the hooks away once they have seen a forward."""
        if self._handles and self.names:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _noter(self, name: str) -> Any:
        def note(*_: Any) -> None:
            self.names.append(name)

        return note


def not_finite(root: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold an inf or a NaN; one wait for the device for all of them."""
    named: dict[str, Tensor] = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    floating = {name: tensor for name, tensor in named.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return []
    # A sum is finite where all terms are, and no copy of them is made; it may overflow where they are: looked at again.
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in floating.values()])
    suspects = [name for name, ok in zip(floating, torch.isfinite(sums).tolist(), strict=True) if not ok]
    return [name for name in suspects if not bool(torch.isfinite(floating[name]).all())]


def first_not_finite(names: Sequence[str], order: Sequence[str]) -> str:
    """The tensor whose module runs first; buffers before parameters, for a forward poisons them before any step."""
    places = {module: place for place, module in reversed(list(enumerate(order)))}

    def rank(name: str) -> tuple[bool, int]:
        statistic = name.rsplit(".", 1)[1].startswith("running_")
        return not statistic, places.get(name.rsplit(".", 1)[0], len(places))

    return min(names, key=rank)


def first_bad_output(trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any]) -> str | None:
    """Run the batch once more and return the path of the first module whose output is not finite; None if all are.

    For a run that has ended: the forward may change running statistics.
    """
    bad: list[str] = []

    def watcher(name: str) -> Any:
        def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not bad and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                bad.append(name)

        return watch

    handles = [module.register_forward_hook(watcher(name)) for name, module in pl_module.named_modules()]
    try:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            pl_module(batch["image"])
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else None
