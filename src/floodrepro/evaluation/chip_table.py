"""The chip table: one row per chip, from which every figure of a report is computed. Needs no torch.

N = chips, K = classes, B = bins of probability. `docs/chip-table.md` describes the file.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from floodrepro.errors import TableError
from floodrepro.evaluation.metrics import Counts
from floodrepro.run_folder import replacing

SCHEMA = 2
BINS = 50  # of probability, equally wide from 0 to 1, each with its lower edge: thresholds in steps of 0.02
_KEY = "floodrepro"


@dataclass(frozen=True)
class ChipTable:
    """What one pass over a split counted, chip by chip; without probabilities the histogram and what follows is None.

    Pixels without a truth (ignored) or without a prediction (unseen) are in no other column.
    """

    chips: npt.NDArray[np.str_]  # ids (N,), in the split's order
    events: npt.NDArray[np.str_]  # (N,), of each chip
    counts: Counts  # confusion counts (N, K, K), rows = truth, columns = prediction
    ignored: npt.NDArray[np.int64]  # pixels (N,) whose truth has the ignore index
    unseen: npt.NDArray[np.int64]  # pixels (N,) with a truth but without a prediction
    histogram: npt.NDArray[np.int64] | None = None  # pixels (N, 2, B): of other classes, of the positive class
    confidence: npt.NDArray[np.float64] | None = None  # sum (N, B) of the positive class's probabilities
    squared_error: npt.NDArray[np.float64] | None = None  # sum (N,) of (probability - [truth is positive])^2
    metadata: dict[str, Any] = field(default_factory=dict)  # JSON types, as `docs/chip-table.md` lists them

    @classmethod
    def of_batches(cls, rows: Iterable[tuple[str, str]], batches: Sequence[Any], metadata: dict[str, Any]) -> Self:
        """The table of batches that `floodrepro.evaluation.counting.count` counted; each row's chip and its event."""
        columns: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        chips, events = np.array(list(rows), dtype=np.str_).T
        return cls(chips, events, **columns, metadata=metadata)

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.chips)

    @property
    def positive(self) -> int:
        """The class that a report speaks of, 0 to K - 1."""
        return int(self.metadata.get("positive_class", self.counts.shape[-1] - 1))

    @property
    def weights(self) -> str | None:
        """The sha256 of the checkpoint that was measured; None of masks and baselines."""
        return (self.metadata.get("checkpoint") or {}).get("sha256")

    @property
    def name(self) -> str:
        """Whose predictions these are: a checkpoint's file name, a baseline, or the name given to masks."""
        return str((self.metadata.get("predictor") or self.metadata.get("checkpoint") or {}).get("name", "unnamed"))

    def subset(self, chips: Sequence[str] | npt.NDArray[np.str_], **metadata: Any) -> "ChipTable":
        """The rows of these chips, all of which are in the table, in their order, with metadata changed as given."""
        places = {chip: row for row, chip in enumerate(self.chips.tolist())}
        rows = np.array([places[chip] for chip in chips], np.int64)
        changed = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **changed, metadata=self.metadata | metadata)


def write_table(table: ChipTable, path: Path) -> None:
    """Write a table as Parquet; a pass that is killed leaves nothing under this name."""
    columns: dict[str, Any] = {"chip": table.chips, "event": table.events}
    for name, values in vars(table).items():
        if isinstance(values, np.ndarray) and values.dtype.kind != "U":
            columns[name] = values if values.ndim == 1 else [row.ravel() for row in values]
    metadata = {"schema": SCHEMA, "classes": table.counts.shape[-1]} | table.metadata
    content = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(content, partial, compression="zstd", compression_level=9, write_page_checksum=True)


def read_table(path: Path) -> ChipTable:
    """Read a table; raises `TableError` where there is none, or it is damaged, empty or of another schema."""
    try:
        content = pq.read_table(path, page_checksum_verification=True)
        metadata = json.loads((content.schema.metadata or {})[_KEY.encode()])
        if metadata["schema"] != SCHEMA:
            raise ValueError(f"it has schema {metadata['schema']}, this version of floodrepro reads {SCHEMA}")
        if any(column.null_count for column in content.columns):
            raise ValueError("a value is missing")
        columns: dict[str, Any] = {name: np.stack(content[name].to_numpy()) for name in content.column_names}
        chips, events = (columns.pop(name).astype(np.str_) for name in ("chip", "event"))
        classes = metadata.pop("classes")
        for name, shape in {"counts": (classes, classes), "histogram": (2, BINS)}.items():
            if name in columns:
                columns[name] = columns[name].reshape(-1, *shape)
        for name in {"counts", "ignored", "unseen", "histogram"} & columns.keys():
            if columns[name].dtype.kind not in "iu" or (columns[name] < 0).any():
                raise ValueError(f"{name} holds what is no count")
        if len(set(chips)) < len(chips):
            raise ValueError("a chip is there twice")
        parts = [metadata.get(key) or {} for key in ("checkpoint", "predictor", "data", "metrics", "inputs")]
        named, positive = metadata.get("class_names") or range(classes), metadata.get("positive_class", 0)
        if len(named) != classes or positive not in range(classes) or not all(isinstance(p, dict) for p in parts):
            raise TypeError("its metadata is of other types, or of another number of classes")
        return ChipTable(chips, events, **columns, metadata=metadata)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        what = f"this is no chip table, or it is damaged: {error}"
        raise TableError(what, where=path, fix="floodrepro test writes it") from error


def refuse_to_compare(one: ChipTable, other: ChipTable) -> str | None:
    """Why two tables cannot be compared chip by chip; None if they have the same classes, chips and truth."""
    kinds = [f"{table.counts.shape[-1]} classes of {table.metadata.get('protocol')}" for table in (one, other)]
    if kinds[0] != kinds[1]:
        return f"another protocol: {kinds[0]} against {kinds[1]}"
    if not np.array_equal(one.chips, other.chips):
        only = len(set(one.chips.tolist()) ^ set(other.chips.tolist()))
        return f"other chips: {only} are in one table alone" if only else "the same chips in another order"
    if not np.array_equal(one.events, other.events):
        return "the same chips, of other events"
    differing = (one.counts.sum(axis=2) != other.counts.sum(axis=2)).any(axis=1)
    if differing.any():
        return f"another truth in {int(differing.sum())} chips, the first is {one.chips[differing][0]}"
    return None
