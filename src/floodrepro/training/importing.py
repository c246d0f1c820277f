"""Import TerraTorch without what its import does to the process.

Found by running terratorch 1.2.7: the import sets torch's float32 matmul precision to "medium" (its clay_v15 backbone,
at module level), the root logger to INFO, and lets lightly and albumentations ask the network for newer versions.
"""

import logging
import os
import warnings

from floodrepro import console

# Warnings that every run would print and no user can act on: what says it, and why it is silent.
_NOISE = (
    # Lightning 2.6.1 announces that the recipe's optimizer replaces the task's own: that is what a recipe is for.
    r".*configure_optimizers` will be overridden by",
    # Lightning 2.6.1 on torch 2.14: a deprecation inside its own pytree module.
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    # torchmetrics 1.9 in Lightning's sanity check of the validation, which computes training metrics too early.
    r".*method of metric .* was called before the ``update`` method",
    # CSVLogger 2.6.1 finds the recipe in the run folder; it replaces metrics.csv only, and there is none yet.
    r"Experiment logs directory .* exists and is not empty",
    # ModelCheckpoint 2.6.1 finds the run's own checkpoints in a run that goes on.
    r"Checkpoint directory .* exists and is not empty",
    # Lightning 2.6.1 cannot know that the training sampler goes on from the very batch, as docs/run-folder.md promises.
    r"You're resuming from a checkpoint that ended before the epoch ended",
    # Said of metrics that torchmetrics has already summed over all processes, and of norms that are alike in all.
    r"It is recommended to use `self\.log\(",
    # The model summary's size in MB is of no use to anyone here.
    r"Precision .* is not supported by the model summary",
    # jsonargparse 4.53: calls of Lightning 2.6.1 that version 5 will drop, hence the bound in pyproject.toml.
    r"[\s\S]*(was deprecated in v4\.|JsonargparseDeprecationWarning)",
    # Workers are the recipe's choice; Lightning's advice on their number is for other loaders than two-core demos.
    r"The '.*_dataloader' does not have many workers",
)


def import_terratorch() -> None:
    """Import torch and TerraTorch once, with logging, matmul precision and the network left as they were."""
    # lightly 1.5.22 and albumentations 2.0.8 read these at import, and would otherwise call home.
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    import torch

    matmul_precision = torch.get_float32_matmul_precision()
    with warnings.catch_warnings(), console.stdout_to_stderr():
        # Deprecations inside the libraries' own modules: nothing that a user of a recipe could act on.
        warnings.simplefilter("ignore")
        import terratorch.cli_tools  # noqa: F401
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    # Lightning 2.6.1 advertises its own logging service at every start.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    torch.set_float32_matmul_precision(matmul_precision)
    root.setLevel(level)
    root.handlers[:] = handlers
