"""``floodrepro test``: TerraTorch's own test loop, run once, and the chip table that it leaves.

B = chips of a batch, K = classes, H, W = pixels.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.callbacks.run_record import peak_memory, percentiles, reset_peaks
from floodrepro.data.protocols import (
    IGNORE_INDEX,
    SPLITS,
    class_names_of,
    data_arguments,
    positive_class_of,
    protocol_of,
    uses_flood_data_module,
)
from floodrepro.data.splits import read_splits
from floodrepro.errors import CheckpointError, FloodreproError, RunFolderError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.passes import PassResult, chip_files, chip_of, prepare, watched
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, free_name, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.terratorch_cli import RecipeCLI

AGREEMENT = 1e-6
"""TerraTorch sums counts on the device and divides in float32; the same figures from the table may differ by that."""

_WARM_UP = 3  # batches: allocators and autotuning settle
_SEEN = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")
_SAME = ("checkpoint", "recipe_sha256", "data", "precision", "device")


class ChipCounts(Callback):
    """Counts, chip by chip, what TerraTorch's test loop predicts.

    Args:
        checkpoint: Whose predictions they are, for messages.
        ignore_index: Truth of the pixels that do not count.
        positive: The class whose probabilities are kept; the last one where None.
    """

    def __init__(self, checkpoint: Path, ignore_index: int, positive: int | None = None) -> None:
        self._checkpoint, self._ignore_index, self._positive = checkpoint, ignore_index, positive
        self._logits: Tensor | None = None
        self._chips: list[str] = []
        self._parts: list[dict[str, np.ndarray[Any, Any]]] = []
        self._seconds: list[float] = []
        self._rates: list[float] = []
        self._memory: dict[str, float] = {}
        self._start = self._end = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen where a task turns images into logits, tiled or whole: the test step hands them to no callback."""
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
        files = chip_files(batch, trainer.test_dataloaders, len(self._chips))
        chips = [chip_of(file) for file in files]
        truth = pl_module.squeeze_ground_truth(batch["mask"])
        if not bool(torch.isfinite(self._logits).all()):
            bad = (~torch.isfinite(self._logits.flatten(1)).all(dim=1)).nonzero().flatten().tolist()
            raise CheckpointError(
                f"the model predicts values that are not finite for {len(bad)} chips, the first is {chips[bad[0]]}",
                where=self._checkpoint,
                fix="floodrepro verify names weights and buffers that are not finite; no chip table was written",
            )
        counted = count(self._logits, truth, self._ignore_index, self._positive)
        self._parts.append({name: value.cpu().numpy() for name, value in counted.items()})
        self._chips += chips
        now = time.perf_counter()
        self._seconds.append(now - self._start)
        self._rates.append(len(chips) / (now - self._end))
        self._end = now
        self._memory = peak_memory(pl_module.device)

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

    def table(self, metadata: dict[str, Any], events: Mapping[str, str] | None = None) -> ChipTable:
        """All chips seen so far; a chip that `events` does not name is its own event."""
        fields = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        return ChipTable(
            chips=np.array(self._chips, dtype=np.str_),
            events=np.array([(events or {}).get(chip, chip) for chip in self._chips], dtype=np.str_),
            unseen=np.zeros(len(self._chips), np.int64),
            **fields,
            metadata=metadata,
        )


def count(logits: Tensor, truth: Tensor, ignore_index: int, positive: int | None = None) -> dict[str, Tensor]:
    """The chip table's columns for a batch, counted on the device.

    Args:
        logits: (B, K, H, W).
        truth: (B, H, W), integers.
        ignore_index: Truth of the pixels that do not count.
        positive: The class whose probabilities are kept; the last one where None.

    Returns:
        counts (B, K, K), ignored (B,), histogram (B, 2, BINS), confidence (B, BINS), squared_error (B,), as
        `floodrepro.evaluation.chip_table.ChipTable` has them; probabilities are the softmax in float32.
    """
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():  # a weighted bincount has no such form there
        logits, truth = logits.cpu(), truth.cpu()
    chips, classes = logits.shape[:2]
    k = classes - 1 if positive is None else positive
    counted = truth != ignore_index
    # Ignored pixels go to a last row, which is dropped: to leave them out by a mask takes seven times as long on a CPU,
    # and on a GPU waits for their number.
    chip = torch.arange(chips, dtype=torch.int32, device=logits.device)[:, None, None]
    chip = torch.where(counted, chip, chips)
    row = torch.where(counted, chip * classes + truth.int(), chips * classes)
    counts = _bincount(row * classes + _argmax(logits), (chips * classes + 1, classes))[:-1]
    p, is_k = logits.float().softmax(dim=1)[:, k].double(), truth == k
    place = (p * BINS).int().clamp_(max=BINS - 1)
    return {
        "counts": counts.reshape(chips, classes, classes),
        "ignored": (~counted).sum(dim=(1, 2)),
        "histogram": _bincount((2 * chip + is_k.int()) * BINS + place, (2 * chips + 2, BINS))[:-2].reshape(
            chips, 2, BINS
        ),
        "confidence": _bincount(chip * BINS + place, (chips + 1, BINS), p)[:-1],
        "squared_error": _bincount(chip, (chips + 1,), (p - is_k.double()).square_())[:-1],
    }


@dataclass(frozen=True)
class ChosenSplit:
    """What one pass reads.

    Args:
        name: `test`, `val`, `train`, or one of several test splits.
        file: Its chip ids, one a line; None for a data module that knows its own files.
        events: The event of each chip; empty for such a data module.
        subsets: Chip ids of further test splits, all of them in this one: their tables come from the same pass.
        several: Whether the recipe names several test splits.
    """

    name: str
    file: str | None
    events: Mapping[str, str] = field(default_factory=dict)
    subsets: Mapping[str, list[str]] = field(default_factory=dict)
    several: bool = False


def tabulate_checkpoint(
    cli: RecipeCLI, checkpoint: Path, *, split: str = "test", folder: Path | None = None, baselines: bool | None = None
) -> PassResult:
    """Run TerraTorch's own test loop over a split and write the chip table.

    A table that is there already is replaced if it was made from the same checkpoint, recipe, data and device;
    otherwise it is set aside under a free name.

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        checkpoint: Weights to measure.
        split: `test`, `val`, `train`, or one of the recipe's test splits by name.
        folder: Where `<split>/<checkpoint>.parquet` goes. Default: `evaluation` of the checkpoint's run folder, or
            beside the checkpoint.
        baselines: Whether ``baselines/<split>/NAME.parquet`` are written too, where they are not there yet. Default:
            where no other folder is given.

    Returns:
        TerraTorch's metrics; those of subsets are computed from the table.

    Raises:
        UsageError: The recipe does not build or run here, or has no such split.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read, do not fit, or predict values that are not finite.
        RunFolderError: The table cannot be written.
        FloodreproError: TerraTorch's metrics and the table's differ.
    """
    chosen = choose_split(cli.recipe, split)
    path = table_path(checkpoint, chosen.name, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the pass: on a GPU it takes a while
    except OSError as error:
        what = f"the chip table cannot be written here: {error.strerror}"
        raise RunFolderError(what, where=path.parent, fix="--output DIR") from error

    def one_split(config: Namespace) -> None:
        if chosen.file is not None:
            config.data.init_args.test_split = chosen.file
        if chosen.file is not None and "test_dataloaders_names" in config.model.init_args:
            config.model.init_args.test_dataloaders_names = [chosen.name] if chosen.several else None

    data = prepare(cli, checkpoint, split if split in ("train", "val") else "test", wire=one_split)
    task = cli.recipe["model"].get("init_args") or {}
    arguments, positive = data_arguments(cli.recipe), positive_class_of(cli.recipe)
    counter = ChipCounts(checkpoint, task.get("ignore_index", IGNORE_INDEX), positive)
    cli.trainer.callbacks.append(counter)
    with watched(cli):
        results = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {k: float(v) for result in results for k, v in result.items() if not k.endswith("Boundary_mIoU")}
    failed: dict[str, str] = dict(getattr(cli.datamodule, "failed_chips", {}))  # left out by --skip-damaged
    surroundings = environment(str(cli.trainer.precision))
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    digest = recipes.fingerprint(cli.recipe)
    table = counter.table(
        {
            "split": chosen.name,
            "class_names": class_names_of(cli.recipe),
            "positive_class": positive,
            "protocol": protocol_of(cli.recipe).name,
            "predictor": {"kind": "model", "name": checkpoint.name},
            "checkpoint": {"name": checkpoint.name, "sha256": sha256_of(checkpoint)},
            "recipe_sha256": digest,
            "recipe_changes": _changes(cli.recipe, checkpoint),
            "inputs": {key: arguments[key] for key in _SEEN if key in arguments},
            "data": data.as_dict(),
            "failed_chips": failed,
            "precision": str(cli.trainer.precision),
            "device": surroundings["cpu"]["model"] if on_cpu else surroundings["accelerator"]["name"],
            "environment": surroundings,
            "metrics": metrics,
            "speed": counter.speed(),
            "made": timestamp(),
        },
        chosen.events,
    )
    counts = {chosen.name: len(table)}
    wanted = len(cli.trainer.test_dataloaders.dataset) - len(failed)
    if len(table) != wanted:
        console.warn(
            f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no chip table is written"
        )
        return PassResult("test", checkpoint, digest, counts, metrics)
    if not uses_flood_data_module(cli.recipe):
        console.warn("this data module names no flood events: each file counts as an event of its own")
    prefix = f"test/{chosen.name}/" if chosen.several else "test/"
    disagreement = _disagreement(table, metrics, prefix)
    if not disagreement <= AGREEMENT:
        raise FloodreproError(
            f"TerraTorch's metrics and those from the chips' counts differ by {disagreement:g}; no table was written",
            where=checkpoint,
            fix="this is an error in floodrepro, or in a library of another version: please report it",
        )
    tables = {chosen.name: keep(table, path)}
    for name, chips in chosen.subsets.items():
        read = [chip for chip in chips if chip not in failed]
        part = table.subset(read, split=name, subset_of=chosen.name, metrics={})
        found = scores(part.counts.sum(axis=0))
        metrics |= {f"test/{name}/{metric}": value for metric, value in found.items() if value is not None}
        tables[name] = keep(part, table_path(checkpoint, name, folder))
        counts[name] = len(part)
    if baselines or (baselines is None and folder is None):
        write_baselines(cli.recipe, table, path.parent.parent)
    return PassResult("test", checkpoint, digest, counts, metrics, tables, disagreement)


def choose_split(recipe: Recipe, split: str) -> ChosenSplit:
    """The file of a split, and which other test splits lie within it.

    Raises:
        UsageError: The recipe names no such split, or none of its test splits holds all the others.
    """
    arguments = data_arguments(recipe)
    if not uses_flood_data_module(recipe):
        if split != "test":
            raise UsageError(f"this data module has no split {split!r} for a test", fix="leave --split out")
        return ChosenSplit(split, None)
    several = isinstance(arguments.get("test_split"), dict)
    if split in ("train", "val") or not several:
        if split not in SPLITS:
            raise UsageError(f"the recipe names no split {split!r}", fix=f"--split {', '.join(SPLITS)}")
        return ChosenSplit(split, arguments.get(f"{split}_split"), read_splits(arguments, split)[split])
    files, chips = arguments["test_split"], read_splits(arguments, "test")
    if split in chips and split != "test":
        return ChosenSplit(split, files[split], chips[split], several=True)
    whole = next((name for name in chips if all(set(other) <= set(chips[name]) for other in chips.values())), None)
    if whole is None or split != "test":
        problem = f"names no split {split!r}" if whole else "has no test split that holds all the others"
        raise UsageError(f"the recipe {problem}", where="data.init_args.test_split", fix=f"--split {', '.join(chips)}")
    subsets = {name: list(others) for name, others in chips.items() if name != whole}
    return ChosenSplit(whole, files[whole], chips[whole], subsets, several=True)


def table_path(checkpoint: Path, split: str, folder: Path | None = None) -> Path:
    """Where a checkpoint's chip table over a split lies."""
    if folder is None:
        run = RunFolder.of_checkpoint(checkpoint)
        folder = run.evaluation if run else checkpoint.resolve().parent / RunFolder.evaluation_name
    return folder / split / f"{checkpoint.stem}.parquet"


def keep(table: ChipTable, path: Path) -> Path:
    """Write a table; one of another checkpoint, recipe, data or device is set aside first, under a free name.

    Raises:
        RunFolderError: The table cannot be written.
    """
    if path.exists() and not _same(path, table):
        aside = path.with_name(f"{free_name(path.with_suffix(''))}.parquet")
        path.replace(aside)
        console.say(f"a chip table of another checkpoint, recipe, data or device was set aside as {aside}")
    try:
        chip_table.write_table(table, path)
    except OSError as error:
        raise RunFolderError(f"the chip table cannot be written: {error.strerror}", where=path) from error
    return path


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


def _changes(recipe: Recipe, checkpoint: Path) -> list[str] | None:
    """Keys in which the recipe is another than that of the checkpoint's run; None outside a run folder."""
    run = RunFolder.of_checkpoint(checkpoint)
    return list(recipes.differences(recipes.read(run.recipe), recipe)) if run else None


def _disagreement(table: ChipTable, metrics: Mapping[str, float], prefix: str) -> float:
    """Largest difference between the table's scores and TerraTorch's; a class that is absent is 0 there."""
    ours = scores(table.counts.sum(axis=0))
    common = [name for name, value in ours.items() if value is not None and f"{prefix}{name}" in metrics]
    return max(abs((ours[name] or 0.0) - metrics[f"{prefix}{name}"]) for name in common)


def _same(path: Path, table: ChipTable) -> bool:
    try:
        old = chip_table.read_table(path).metadata
    except TableError:
        return False
    return all(old.get(key) == table.metadata.get(key) for key in _SAME)
