"""What a run does to repeat its bits, and which of its operations have no deterministic form."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_SAID = re.compile(r"(\S+) does not have a deterministic implementation|^(.+?) defaults to a non-deterministic alg")
_ATTENTION = ("flash", "mem_efficient", "cudnn")


@contextlib.contextmanager
def undetermined_operations() -> Iterator[set[str]]:
    """Collect the names of such operations, instead of a warning each; other warnings go their way.

    torch says it (torch.use_deterministic_algorithms, warn_only) where ``trainer.deterministic`` is "warn".
    """
    names: set[str] = set()
    show = warnings.showwarning

    def collect(message: Any, *args: Any, **kwargs: Any) -> None:
        said = _SAID.search(str(message))
        if said:
            names.add(said[1] or said[2])
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = collect
    try:
        yield names
    finally:
        warnings.showwarning = show


@contextlib.contextmanager
def plain_attention(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Compute attention as plain products on a GPU where bits shall repeat.

    The backward passes of torch's attention kernels add in no fixed order, and torch tells it once a process only,
    where it is just to warn.

    Args:
        device: What is trained on; on a CPU nothing is changed.
        wanted: Whether the run is to be deterministic.
    """
    backends = torch.backends.cuda
    names = _ATTENTION if wanted and device.type == "cuda" else ()
    before = {name: getattr(backends, f"{name}_sdp_enabled")() for name in names}
    for name in names:
        getattr(backends, f"enable_{name}_sdp")(False)
    try:
        yield
    finally:
        for name, enabled in before.items():
            getattr(backends, f"enable_{name}_sdp")(enabled)
