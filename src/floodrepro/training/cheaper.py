"""The same figures for less work, and options that buy speed at the price of other roundings."""

from typing import Any

import torch
from torchmetrics import Metric, MetricCollection

BROKEN = "Boundary_mIoU"  # depends on the batch size where pixels are ignored (terratorch 1.2.7)


def trim_metrics(task: Any, *, labels_known: bool) -> None:
    """Drop the metric that means nothing, and spare the others their search for values that cannot be there.

    torchmetrics 1.9 sorts each batch's pixels on the device and waits for it, only to see that labels and predictions
    are classes. Predictions are an argmax; labels are where the data module checked them against its label map.

    Args:
        task: TerraTorch task, changed in place.
        labels_known: Whether each mask value is a class or the ignore index for sure.
    """
    for collection in [module for module in task.modules() if isinstance(module, MetricCollection)]:
        if BROKEN in collection._modules:
            del collection[BROKEN]
            collection._init_compute_groups()
        for metric in collection.modules():
            if labels_known and isinstance(metric, Metric) and hasattr(metric, "validate_args"):
                object.__setattr__(metric, "validate_args", False)


def apply_speed_options(task: Any, *, compiled: bool, channels_last: bool) -> None:
    """Compile the network, or lay its convolutions out by pixel. Both may change roundings.

    Args:
        task: TerraTorch task, changed in place; names in its state dict stay as they are.
        compiled: torch.compile, in place.
        channels_last: torch's memory format NHWC.
    """
    if channels_last:
        task.model.to(memory_format=torch.channels_last)
    if compiled:
        task.model.compile()
