"""From a run folder to the card of its export: read the records, refuse contradictions, write. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floodrepro.errors import CheckpointError
from floodrepro.evaluation import chip_table
from floodrepro.publishing.bundle import read_weights, write_card
from floodrepro.publishing.carbon import Factors
from floodrepro.publishing.card import write
from floodrepro.publishing.card_metadata import Subject
from floodrepro.publishing.consistency import refuse_contradictions
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, sha256_of
from floodrepro.verification.results import load, table_scores


@dataclass(frozen=True)
class Records:
    """What is known of a checkpoint.

    Args:
        recipe: The recipe that it was trained with.
        record: The run's run.json; None where the checkpoint is no run's best one.
        results: Path of the run's results.json; None where it was not verified.
        found: Its content.
    """

    recipe: Recipe
    record: Mapping[str, Any] | None = None
    results: Path | None = None
    found: Mapping[str, Any] | None = None

    @property
    def data_digest(self) -> str | None:
        """Of the data that it was trained on, so far as the record says."""
        return (self.record or {}).get("data_digest")


def records_of(run: RunFolder | None, checkpoint: Path, recipe: Recipe) -> Records:
    """The records of a checkpoint; a run's record is that of its best one alone.

    Args:
        run: The run folder that the checkpoint lies in, if it lies in one.
        checkpoint: The checkpoint.
        recipe: Its recipe.

    Raises:
        RunFolderError: The run is not finished, or a record cannot be read or contradicts another.
        TableError: results.json is damaged, of another schema, or contradicts itself.
    """
    if run is None or checkpoint.resolve() != run.best.resolve():
        return Records(recipe)
    record, path = run.read_record(), run.results
    results = load(path) if path.exists() else None
    counted = _counted(run, results["run"].get("split") or "test") if results else None
    refuse_contradictions(run.path, record, recipe, run.read_metrics(), results, sha256_of(checkpoint), counted)
    return Records(recipe, record, path if results else None, results)


def _counted(run: RunFolder, split: str) -> dict[str, float] | None:
    """What the run's own chip table of a split scores; None where there is none."""
    path = run.evaluation / split / f"{run.best.stem}.parquet"
    if not path.is_file():
        return None
    return {name: value for name, value in table_scores(chip_table.read(path)).items() if value is not None}


def add_card(folder: Path, name: str, checkpoint: Path, records: Records, factors: Factors | None = None) -> Path:
    """Write README.md, and a copy of results.json, beside an exported pair.

    Args:
        folder: The export folder.
        name: Stem of the pair.
        checkpoint: What the pair was exported from.
        records: What is known of it.
        factors: PUE and grid intensity, if they were given.

    Returns:
        The card's path.

    Raises:
        CheckpointError: The pair is not there, is damaged, or comes from another checkpoint.
        RunFolderError: The folder cannot be written.
    """
    weights, config = read_weights(folder / f"{name}.safetensors"), folder / f"{name}.yaml"
    if not config.is_file():
        raise CheckpointError("the YAML of the pair is missing", where=config, fix="export into another --output DIR")
    if weights.metadata.get("source_sha256") != (digest := sha256_of(checkpoint)):
        raise CheckpointError(
            f"the pair was exported from {weights.metadata.get('source_sha256')}, {checkpoint.name} is {digest}",
            where=weights.path,
            fix="export into another --output DIR",
        )
    subject = Subject(name, weights, config.name, records.recipe, records.record, records.found, factors)
    return write_card(folder, write(subject), (weights.path, config), records.results)
