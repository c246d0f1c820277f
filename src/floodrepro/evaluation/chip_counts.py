"""What a test loop leaves of each chip, counted on the device from the very logits that TerraTorch's metrics see.

B = chips of a batch, K = classes, H, W = pixels.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from floodrepro.data.names import SUFFIXES
from floodrepro.errors import CheckpointError, DataError
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.training.recorder import memory, percentiles, reset_peaks

_WARM_UP = 3  # batches: allocators and autotuning settle
_FIELDS = ("counts", "ignored", "histogram", "confidence", "squared_error")


class ChipCounts(Callback):
    """Counts, chip by chip, what TerraTorch's test loop predicts.

    Args:
        checkpoint: Whose predictions they are, for messages.
        ignore_index: Truth of the pixels that do not count.
    """

    def __init__(self, checkpoint: Path, ignore_index: int) -> None:
        self._checkpoint, self._ignore_index = checkpoint, ignore_index
        self._logits: Tensor | None = None
        self._chips: list[str] = []
        self._parts: list[dict[str, np.ndarray[Any, Any]]] = []
        self._seconds: list[float] = []
        self._rates: list[float] = []
        self._memory: dict[str, float] = {}
        self._start = self._end = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen where a task turns images into logits, tiled or whole: the test step hands them to no one."""
        infer = pl_module.handle_full_or_tiled_inference
        reset_peaks(pl_module.device)  # a training before it in this process used more

        def listen(*args: Any, **kwargs: Any) -> Any:
            output = infer(*args, **kwargs)
            self._logits = output.output
            return output

        pl_module.handle_full_or_tiled_inference = listen
        self._end = time.perf_counter()

    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Begin the batch's clock."""
        self._start = time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Count the batch; fetching the counts waits for the device, so that the clock has seen all of its work."""
        assert self._logits is not None
        chips = _chip_ids(batch)
        truth = pl_module.squeeze_ground_truth(batch["mask"])
        if not bool(torch.isfinite(self._logits).all()):
            bad = (~torch.isfinite(self._logits.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
            raise CheckpointError(
                f"the model predicts values that are not finite for {len(bad)} chips, the first is {chips[bad[0]]}",
                where=self._checkpoint,
                fix="floodrepro verify names weights and buffers that are not finite; no chip table was written",
            )
        self._parts.append({k: v.cpu().numpy() for k, v in count(self._logits, truth, self._ignore_index).items()})
        self._chips += chips
        now = time.perf_counter()
        self._seconds.append(now - self._start)
        self._rates.append(len(chips) / (now - self._end))
        self._end = now
        self._memory = memory(pl_module.device)

    def speed(self) -> dict[str, Any]:
        """Seconds a batch and chips per second with waiting for data (median, p10, p90, n), and memory in GiB.

        The first batches are left out where there are enough others.
        """
        skip = _WARM_UP if len(self._seconds) > 2 * _WARM_UP else 0
        return {
            "batch_seconds": percentiles(self._seconds[skip:]),
            "chips_per_second": percentiles(self._rates[skip:]),
            "memory_gib": self._memory,
        }

    def table(self, metadata: dict[str, Any]) -> ChipTable:
        """All chips seen so far."""
        fields = {name: np.concatenate([part[name] for part in self._parts]) for name in _FIELDS}
        return ChipTable(chips=np.array(self._chips, dtype=np.str_), **fields, metadata=metadata)


def count(logits: Tensor, truth: Tensor, ignore_index: int) -> dict[str, Tensor]:
    """The chip table's columns for a batch.

    Args:
        logits: (B, K, H, W).
        truth: (B, H, W), integers.
        ignore_index: Truth of the pixels that do not count.

    Returns:
        counts (B, K, K), ignored (B,), histogram (B, K, K, BINS), confidence (B, K, BINS), squared_error (B, K), as
        `floodrepro.evaluation.chip_table.ChipTable` has them; probabilities are the softmax in float32.
    """
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # a weighted bincount has no such form there
        logits, truth = logits.cpu(), truth.cpu()
    chips, classes = logits.shape[:2]
    counted = truth != ignore_index
    # Ignored pixels go to a last row, which is dropped: to leave them out by a mask takes seven times as long on a CPU,
    # and on a GPU waits for their number.
    chip = torch.arange(chips, dtype=torch.int32, device=logits.device)[:, None, None]
    row = torch.where(counted, chip * classes + truth.int(), chips * classes)  # (B, H, W): chip and truth of a pixel
    chip = torch.where(counted, chip, chips)
    probability = logits.float().softmax(dim=1)
    histogram, confidence, squared_error = [], [], []
    for k in range(classes):
        p = probability[:, k].double()
        place = (p * BINS).int().clamp_(max=BINS - 1)
        histogram.append(_bincount(row * BINS + place, (chips * classes + 1, BINS)))
        confidence.append(_bincount(chip * BINS + place, (chips + 1, BINS), p))
        squared_error.append(_bincount(chip, (chips + 1,), (p - (truth == k).double()).square_()))
    counts = _bincount(row * classes + _argmax(logits), (chips * classes + 1, classes))
    return {
        "counts": counts[:-1].reshape(chips, classes, classes),
        "ignored": (~counted).sum(dim=(1, 2)),
        "histogram": torch.stack(histogram, dim=1)[:-1].reshape(chips, classes, classes, BINS),
        "confidence": torch.stack(confidence, dim=1)[:-1],
        "squared_error": torch.stack(squared_error, dim=1)[:-1],
    }


def _argmax(logits: Tensor) -> Tensor:
    """The first of the largest, (B, H, W), as `argmax(dim=1)` has it; torch 2.14's takes 7 ms a chip on a CPU."""
    largest, index = logits[:, 0], torch.zeros_like(logits[:, 0], dtype=torch.int32)
    for k in range(1, logits.shape[1]):
        index = torch.where(logits[:, k] > largest, k, index)
        largest = torch.maximum(largest, logits[:, k])
    return index


def _bincount(index: Tensor, shape: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    size = int(np.prod(shape))
    return torch.bincount(index.flatten(), None if weights is None else weights.flatten(), size).reshape(shape)


def _chip_ids(batch: Any) -> list[str]:
    """Ids as floodrepro's data module hands them on, or from the files that impactmesh's names."""
    if chips := getattr(batch, "chips", ()):
        return list(chips)
    names = [Path(name).name for name in batch["filename"]]
    ids = [next((name.removesuffix(s) for s in SUFFIXES.values() if name.endswith(s)), "") for name in names]
    if not all(ids):
        raise DataError(f"which chip is {names[ids.index('')]}? Its name ends as no part of a chip does")
    return ids
