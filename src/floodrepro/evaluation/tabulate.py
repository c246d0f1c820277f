"""``floodrepro test``: TerraTorch's own test loop, once, and the chip table that it leaves."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.names import IGNORE_INDEX
from floodrepro.data.presence import protocol_of
from floodrepro.errors import FloodreproError, RunFolderError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_counts import ChipCounts
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.passes import PassResult, prepare, watched
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, free_name, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.recipe_cli import RecipeCLI

AGREEMENT = 1e-6
"""TerraTorch sums counts on the device and divides in float32; the same figures from the table may differ by that."""

_SEEN = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")
_SAME = ("checkpoint", "recipe_sha256", "data_digest", "precision", "device")


@dataclass(frozen=True)
class ChosenSplit:
    """What one pass reads.

    Args:
        name: `test`, `val`, `train`, or one of several test splits.
        file: Its chip ids, one a line.
        subsets: Chip ids of further test splits, all of them in this one: their tables come from the same pass.
        several: Whether the recipe names several test splits.
    """

    name: str
    file: str
    subsets: Mapping[str, list[str]] = field(default_factory=dict)
    several: bool = False


@dataclass(frozen=True)
class SplitTest:
    """What a test left.

    Args:
        measured: TerraTorch's metrics; those of subsets are computed from the table.
        tables: The files, by split; none if the trainer was told to leave batches out.
        disagreement: Largest difference between TerraTorch's metrics and those computed from the table; None without
            a table.
    """

    measured: PassResult
    tables: dict[str, Path]
    disagreement: float | None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        tables = {split: str(path) for split, path in self.tables.items()}
        return self.measured.as_dict() | {"tables": tables, "disagreement": self.disagreement}


def run_test(cli: RecipeCLI, checkpoint: Path, *, split: str = "test", folder: Path | None = None) -> SplitTest:
    """Run TerraTorch's own test loop over a split and write the chip table.

    A table that is there already is replaced if it was made from the same checkpoint, recipe, data and device, and
    otherwise set aside under a free name.

    Args:
        cli: The parsed recipe.
        checkpoint: Weights to measure.
        split: `test`, `val`, `train`, or one of the recipe's test splits by name.
        folder: Where `<split>/<checkpoint>.parquet` goes. Default: `evaluation` of the checkpoint's run folder, or
            beside the checkpoint.

    Raises:
        UsageError: The recipe does not build or run here, or has no such split.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read, do not fit, or predict values that are not finite.
        RunFolderError: The table cannot be written.
        FloodreproError: TerraTorch's metrics and the table's differ.
    """
    chosen = choose_split(cli.recipe, split)
    path = table_path(checkpoint, chosen.name, folder)
    _refuse_unwritable(path.parent)

    def one_split(config: Namespace) -> None:
        config.data.init_args.test_split = chosen.file
        if "test_dataloaders_names" in config.model.init_args:
            config.model.init_args.test_dataloaders_names = [chosen.name] if chosen.several else None

    data = prepare(cli, checkpoint, split if split in ("train", "val") else "test", labels=True, wire=one_split)
    task = cli.recipe["model"].get("init_args") or {}
    counter = ChipCounts(checkpoint, task.get("ignore_index", IGNORE_INDEX))
    cli.trainer.callbacks.append(counter)
    with watched(cli):
        [result] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {name: float(value) for name, value in result.items() if not name.endswith("Boundary_mIoU")}
    surroundings = environment(str(cli.trainer.precision))
    device = cli.trainer.strategy.root_device.type
    digest = recipes.fingerprint(cli.recipe)
    table = counter.table(
        {
            "split": chosen.name,
            "class_names": (cli.recipe["data"].get("init_args") or {}).get("class_names"),
            "protocol": protocol_of(cli.recipe),
            "checkpoint": {"name": checkpoint.name, "sha256": sha256_of(checkpoint)},
            "recipe_sha256": digest,
            "recipe_changes": _changes(cli.recipe, checkpoint),
            "inputs": _inputs(cli.recipe),
            "data_digest": data.digest,
            "precision": str(cli.trainer.precision),
            "device": surroundings["accelerator"]["name"] if device != "cpu" else surroundings["cpu"]["model"],
            "environment": surroundings,
            "metrics": metrics,
            "speed": counter.speed(),
            "made": timestamp(),
        }
    )
    counts = {chosen.name: len(table)}
    wanted = len(_chips_in(chosen.file))
    if len(table) != wanted:
        console.warn(
            f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no chip table is written"
        )
        return SplitTest(PassResult("test", checkpoint, digest, counts, metrics), {}, None)
    prefix = f"test/{chosen.name}/" if chosen.several else "test/"
    disagreement = _disagreement(table, metrics, prefix)
    if not disagreement <= AGREEMENT:
        raise FloodreproError(
            f"TerraTorch's metrics and those from the chips' counts differ by {disagreement:g}; no table was written",
            where=checkpoint,
            fix="this is an error in floodrepro, or in a library of another version: please report it",
        )
    tables = {chosen.name: _put(table, path)}
    for name, chips in chosen.subsets.items():
        part = table.subset(chips, split=name, subset_of=chosen.name, metrics={})
        metrics |= {f"test/{name}/{metric}": value for metric, value in scores(part.counts.sum(axis=0)).items()}
        tables[name] = _put(part, table_path(checkpoint, name, folder))
        counts[name] = len(chips)
    return SplitTest(PassResult("test", checkpoint, digest, counts, metrics), tables, disagreement)


def choose_split(recipe: Recipe, split: str) -> ChosenSplit:
    """The file of a split, and which other test splits lie within it.

    Raises:
        UsageError: The recipe names no such split, or none of its test splits holds all the others.
    """
    arguments = recipe["data"].get("init_args") or {}
    tests = arguments.get("test_split")
    named: dict[str, str] = tests if isinstance(tests, dict) else {"test": tests or ""}
    files: dict[str, str] = {key: arguments.get(f"{key}_split") or "" for key in ("train", "val")} | named
    several = isinstance(tests, dict)
    if split != "test" or not several:
        if not files.get(split):
            known = ", ".join(name for name, file in files.items() if file)
            raise UsageError(f"the recipe names no split {split!r}", where="data.init_args", fix=f"--split {known}")
        return ChosenSplit(split, files[split], several=several and split in named)
    chips = {name: _chips_in(file) for name, file in named.items()}
    whole = next((name for name in chips if all(set(other) <= set(chips[name]) for other in chips.values())), None)
    if whole is None:
        raise UsageError(
            f"none of the test splits {', '.join(chips)} holds all the others, so that one pass is not enough",
            where="data.init_args.test_split",
            fix=f"test them in turn: --split {next(iter(chips))}",
        )
    return ChosenSplit(whole, named[whole], {n: c for n, c in chips.items() if n != whole}, several)


def table_path(checkpoint: Path, split: str, folder: Path | None = None) -> Path:
    """Where a checkpoint's chip table over a split lies."""
    if folder is None:
        run = RunFolder.of_checkpoint(checkpoint)
        folder = run.evaluation if run else checkpoint.resolve().parent / RunFolder.evaluation_name
    return folder / split / f"{checkpoint.stem}.parquet"


def _changes(recipe: Recipe, checkpoint: Path) -> list[str] | None:
    """Keys in which the recipe is another than that of the checkpoint's run; None outside a run folder."""
    run = RunFolder.of_checkpoint(checkpoint)
    return list(recipes.differences(recipes.read(run.recipe), recipe)) if run else None


def _inputs(recipe: Recipe) -> dict[str, Any]:
    """What the recipe makes the model see of a chip."""
    arguments = recipe["data"].get("init_args") or {}
    return {key: arguments[key] for key in _SEEN if key in arguments}


def _chips_in(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").split()
    except OSError as error:
        raise UsageError(f"a test split cannot be read: {error.strerror}", where=file, fix="--data-root DIR") from error


def _refuse_unwritable(folder: Path) -> None:
    """Before the pass, not after it: on a GPU it takes a while."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise RunFolderError("the chip table cannot be written here", where=folder, fix="--output DIR")


def _disagreement(table: ChipTable, metrics: Mapping[str, float], prefix: str) -> float:
    ours = scores(table.counts.sum(axis=0))
    common = [name for name in ours if f"{prefix}{name}" in metrics]
    return max(abs(ours[name] - metrics[f"{prefix}{name}"]) for name in common)


def _put(table: ChipTable, path: Path) -> Path:
    if path.exists() and not _same(path, table):
        aside = path.with_name(f"{free_name(path.with_suffix(''))}.parquet")
        path.replace(aside)
        console.say(f"a chip table of another checkpoint, recipe, data or device was set aside as {aside}")
    try:
        chip_table.write(table, path)
    except OSError as error:
        raise RunFolderError(f"the chip table cannot be written: {error.strerror}", where=path) from error
    return path


def _same(path: Path, table: ChipTable) -> bool:
    try:
        old = chip_table.read(path).metadata
    except TableError:
        return False
    return all(old.get(key) == table.metadata.get(key) for key in _SAME)
