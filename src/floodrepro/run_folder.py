"""The run folder: where everything of one run lies, and the record that the run keeps of itself."""

import csv
import hashlib
import json
import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from floodrepro import recipe as recipes
from floodrepro.errors import RunFolderError, UsageError
from floodrepro.lock import hold
from floodrepro.recipe import Recipe

RECORD_SCHEMA = 2
DECLARATION = "declared.json"  # beside runs that were declared together, `seed-<seed>` each
PARTIAL = ".partial"  # ends the name of a file that is being written


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder. Nothing is created by asking for a path."""

    evaluation_name: ClassVar = "evaluation"

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, saved before the first step."""
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        """The run's own record, ``run.json``."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """What Lightning's CSV logger wrote: a row a logging step, a row a validation."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Weights of the epoch with the lowest val/loss."""
        return self.checkpoints / "best.ckpt"

    @property
    def starting_point(self) -> Path:
        """Hashes of the tensors that training started from."""
        return self.checkpoints / "start.json"

    @property
    def evaluation(self) -> Path:
        """Folder of the chip tables: `<split>/<checkpoint>.parquet`."""
        return self.path / self.evaluation_name

    @property
    def verification(self) -> Path:
        """Folder of results.json, the report, and what was measured for it."""
        return self.path / "verification"

    @property
    def results(self) -> Path:
        """What the battery of checks found."""
        return self.verification / "results.json"

    @property
    def export(self) -> Path:
        """Folder of the exported pair."""
        return self.path / "export"

    @property
    def lock(self) -> Path:
        """Held by the process that trains in this folder."""
        return self.path / ".lock"

    def locked(self) -> AbstractContextManager[None]:
        """Keep every other process from training in this folder.

        Raises:
            RunFolderError: Another process does so.
        """

        def taken(process: str) -> RunFolderError:
            what = f"another fit (process {process}) is at work in this run folder"
            return RunFolderError(what, where=self.path, fix="wait until it is done, or give another --name")

        return hold(self.lock, taken)

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise `UsageError` if *path* is taken: a run is never written over."""
        if path.exists():
            raise UsageError(
                "the run folder exists already and is never written over",
                where=path,
                fix=f"--name {free_name(path)} for a new run, or move the old one away",
            )

    def refuse_to_begin(self, resume: str) -> None:
        """Raise `UsageError` if no fit can begin in this folder: another thing lies there, or a finished run.

        Args:
            resume: auto, never, or a path; an unfinished run is refused with never.
        """
        if not self.path.exists():
            return
        old = self.recipe.exists() and self.record.exists()
        # A start that was killed may have come as far as its recipe: nothing has been trained before its record.
        names = {self.lock.name, self.recipe.name} - ({self.recipe.name} if self.record.exists() else set())
        empty = self.path.is_dir() and all(e.name in names or e.name.endswith(PARTIAL) for e in self.path.iterdir())
        if (resume == "never" and not empty) or not (old or empty):
            self.refuse_existing(self.path)
        if old and self.read_record().get("status") == "finished":
            raise UsageError(
                "the run is finished and is never written over",
                where=self.path,
                fix=f"--name {free_name(self.path)} for a new run",
            )

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make a new run folder.

        Raises:
            UsageError: The path exists already; a run is never written over.
            RunFolderError: The folder cannot be made.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            cls.refuse_existing(path)  # someone else made it a moment ago
            raise RunFolderError(
                f"the run folder cannot be made: {error.strerror}",
                where=path,
                fix="--runs-root DIR puts it elsewhere",
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run folder.

        Raises:
            UsageError: There is none, or it holds no recipe.
        """
        run = cls(path)
        if not run.recipe.is_file():
            raise UsageError("this is no run folder: it holds no recipe.yaml", where=path, fix="give runs/NAME")
        return run

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Self | None:
        """The run folder that a checkpoint lies in; None if it lies in none."""
        run = cls(checkpoint.resolve().parent.parent)
        return run if run.checkpoints.name == checkpoint.resolve().parent.name and run.recipe.is_file() else None

    def save_recipe(self, recipe: Recipe) -> str:
        """Save the resolved recipe and return its sha256."""
        digest = recipes.fingerprint(recipe)
        write_atomically(self.recipe, f"# The resolved recipe of this run, sha256 {digest}\n{recipes.to_yaml(recipe)}")
        return digest

    def update_record(self, **entries: Any) -> None:
        """Add entries to ``run.json`` or change them; the file is whole at every moment."""
        record = self.read_record() if self.record.exists() else {"schema": RECORD_SCHEMA}
        write_atomically(self.record, json.dumps(record | entries, indent=2) + "\n")

    def read_record(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            RunFolderError: It is missing or damaged.
        """
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"the run's record cannot be read: {error}", where=self.record) from error
        if not isinstance(record, dict):
            raise RunFolderError("the run's record is no JSON object", where=self.record)
        return record

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of ``metrics.csv``, values as text; none for a recipe without the CSV logger."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def config_beside(checkpoint: Path) -> Path:
    """The config that goes with a checkpoint: ``recipe.yaml`` of its run folder, or the YAML beside an export.

    Raises:
        UsageError: There is none, or more than one.
    """
    run = RunFolder.of_checkpoint(checkpoint)
    if run is not None:
        return run.recipe
    twin = checkpoint.with_suffix(".yaml")
    if twin.is_file():
        return twin
    found = sorted([*checkpoint.parent.glob("*.yaml"), *checkpoint.parent.glob("*.yml")])
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} configs lie beside the checkpoint" if found else "no config lies beside the checkpoint"
    raise UsageError(problem, where=checkpoint, fix="--config YAML")


def timestamp() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def free_name(path: Path) -> str:
    """The first of NAME-2, NAME-3, … that is not taken beside *path*."""
    number = 2
    while (path.parent / f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp gives 0600, which would hide results from the user's group
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
