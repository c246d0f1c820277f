"""The counts of a chip table, made where the pixels are: on the GPU, or on the CPU. B = chips, K = classes."""

import math
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from floodrepro.errors import DataError
from floodrepro.evaluation.chip_table import BINS


def count(
    truth: Any, prediction: Any, probability: Any = None, *, classes: int, positive: int = -1, ignore_index: int = -1
) -> dict[str, npt.NDArray[Any]]:
    """The columns of `floodrepro.evaluation.chip_table.ChipTable` for a batch, by their names.

    `truth` and `prediction` are integers (B, H, W) from 0 to K - 1, tensors or arrays: a truth of `ignore_index` does
    not count, a prediction of -1 is none. `probability` (B, H, W) is that of the class `positive`, -1 the last; without
    it three of the columns are missing.

    Raises:
        DataError: The truth or the prediction holds a class that is none of the K.
    """
    # The sums of probabilities have no deterministic form on a GPU.
    device = "cpu" if torch.are_deterministic_algorithms_enabled() else None
    truth, prediction = (torch.as_tensor(values, device=device) for values in (truth, prediction))
    known, chips = truth != ignore_index, len(truth)
    counted = known & (prediction >= 0)
    # Other pixels go to one more chip, which is dropped: a mask takes seven times as long on a CPU, and on a GPU waits.
    chip = torch.arange(chips, dtype=torch.int32, device=truth.device)[:, None, None]
    chip = torch.where(counted, chip, chips)
    label, called = (torch.where(counted, part, 0).int() for part in (truth, prediction))
    for name, values in (("truth", label), ("prediction", called)):
        low, high = (int(end) for end in values.aminmax())
        if low < 0 or high >= classes:  # it would be counted as another class or chip
            raise DataError(f"the {name} holds classes from {low} to {high}, expected 0 to {classes - 1}")

    def bincount(index: Tensor, *shape: int, weights: Tensor | None = None) -> Tensor:
        flat = None if weights is None else weights.flatten()
        return torch.bincount(index.flatten(), flat, (chips + 1) * math.prod(shape)).reshape(-1, *shape)[:-1]

    found = {
        "counts": bincount((chip * classes + label) * classes + called, classes, classes),
        "ignored": (~known).sum(dim=(1, 2)),
        "unseen": (known & ~counted).sum(dim=(1, 2)),
    }
    if probability is not None:
        p = torch.where(counted, torch.as_tensor(probability, device=device), 0).double()
        is_positive = label == positive % classes
        place = (p * BINS).int().clamp_(max=BINS - 1)
        found["histogram"] = bincount((2 * chip + is_positive.int()) * BINS + place, 2, BINS)
        found["confidence"] = bincount(chip * BINS + place, BINS, weights=p)
        found["squared_error"] = bincount(chip, weights=(p - is_positive.double()).square_())
    return {name: value.cpu().numpy() for name, value in found.items()}
