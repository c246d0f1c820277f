"""The chip table: one row a chip, from which every figure of a report is computed again. numpy and pyarrow only.

N = chips, K = classes, B = bins of probability.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from floodrepro.errors import TableError
from floodrepro.evaluation.metrics import Counts

SCHEMA = 1
BINS = 50
"""Bins of probability, equally wide from 0 to 1, each with its lower edge: fine enough for a sweep of thresholds in
steps of 0.02, coarse enough for 14,556 chips to fit in a few MB."""

_KEY = b"floodrepro"
_COLUMNS = ("chip", "event", "counts", "ignored", "histogram", "confidence", "squared_error")


@dataclass(frozen=True)
class ChipTable:
    """What one pass over a split left.

    Args:
        chips: Ids (N,), in the split's order.
        counts: Confusion counts (N, K, K), rows = truth, columns = prediction; ignored pixels are left out.
        ignored: Ignored pixels (N,).
        histogram: Pixels (N, K, K, B): of truth i, with a probability of class j in bin b.
        confidence: Sum (N, K, B) of the probabilities of class j in bin b, over all counted pixels.
        squared_error: Sum (N, K) of (probability of class j - [truth is j])^2 over all counted pixels.
        metadata: As `docs/chip-table.md` lists it, JSON types: split, class_names, protocol, checkpoint (name and
            sha256), recipe_sha256, recipe_changes, inputs, data_digest, precision, device, versions, metrics, speed,
            made.
    """

    chips: npt.NDArray[np.str_]
    counts: Counts
    ignored: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    squared_error: npt.NDArray[np.float64]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.chips)

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.counts.shape[-1])

    @property
    def events(self) -> npt.NDArray[np.str_]:
        """Copernicus EMS event (N,) of each chip: what its id has before the first underscore."""
        return np.array([str(chip).split("_", 1)[0] for chip in self.chips], dtype=np.str_)

    def subset(self, chips: Sequence[str], **metadata: Any) -> "ChipTable":
        """The rows of these chips, in their order, with metadata changed as given.

        Raises:
            TableError: A chip is not in the table.
        """
        places = {str(chip): row for row, chip in enumerate(self.chips)}
        missing = [chip for chip in chips if chip not in places]
        if missing:
            raise TableError(f"{len(missing)} chips are not in the chip table, the first is {missing[0]}")
        rows = np.array([places[chip] for chip in chips], dtype=np.int64)
        fields = ("chips", "counts", "ignored", "histogram", "confidence", "squared_error")
        return replace(self, **{name: getattr(self, name)[rows] for name in fields}, metadata=self.metadata | metadata)


def write(table: ChipTable, path: Path) -> None:
    """Write a table, atomically: a pass that is killed leaves nothing under this name.

    Raises:
        OSError: The folder cannot be written.
    """
    columns = {
        "chip": pa.array(table.chips.tolist(), pa.string()),
        "event": pa.array(table.events.tolist(), pa.string()),
        "counts": _lists(table.counts, pa.int64()),
        "ignored": pa.array(table.ignored, pa.int64()),
        "histogram": _lists(table.histogram, pa.int32()),
        "confidence": _lists(table.confidence.astype(np.float32), pa.float32()),
        "squared_error": _lists(table.squared_error, pa.float64()),
    }
    shape = {"schema": SCHEMA, "classes": table.num_classes, "bins": table.histogram.shape[-1]}
    content = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(shape | table.metadata).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            pq.write_table(content, file, compression="zstd", compression_level=9)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> ChipTable:
    """Read a table and check that it is whole and agrees with itself.

    Raises:
        TableError: There is no such file, it is damaged, of another schema, empty, or contradicts itself.
    """
    if not path.is_file():
        raise TableError("chip table not found", where=path, fix="floodrepro test --ckpt FILE writes it")
    try:
        content = pq.read_table(path)
        metadata = json.loads((content.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise TableError(f"this is no chip table, or it is damaged: {error}", where=path) from error
    if metadata.get("schema") != SCHEMA:
        raise TableError(
            f"the chip table has schema {metadata.get('schema')}, this version of floodrepro reads {SCHEMA}",
            where=path,
            fix="test the checkpoint again with this version",
        )
    if missing := [name for name in _COLUMNS if name not in content.column_names]:
        raise TableError(f"the chip table has no column {missing[0]}", where=path)
    classes, bins, rows = metadata.pop("classes"), metadata.pop("bins"), content.num_rows
    if not rows:
        raise TableError("the chip table has no rows: the split was empty", where=path)

    def array(name: str, dtype: Any, *shape: int) -> npt.NDArray[Any]:
        values = content[name].combine_chunks()
        flat = values.flatten() if shape else values
        return np.asarray(flat.to_numpy(zero_copy_only=False), dtype).reshape(rows, *shape)

    try:
        table = ChipTable(
            np.array(content["chip"].to_pylist(), dtype=np.str_),
            array("counts", np.int64, classes, classes),
            array("ignored", np.int64),
            array("histogram", np.int64, classes, classes, bins),
            array("confidence", np.float64, classes, bins),
            array("squared_error", np.float64, classes),
            metadata,
        )
    except ValueError as error:
        raise TableError(f"the chip table is damaged: {error}", where=path) from error
    if problem := _contradiction(table):
        raise TableError(f"the chip table contradicts itself: {problem}", where=path, fix="test the checkpoint again")
    return table


def refuse_to_compare(one: ChipTable, other: ChipTable) -> str | None:
    """Why two tables cannot be held against each other chip by chip; None if they can.

    The same chips in the same order, the same classes, and the same truth: pixels of each class in each chip.
    """
    if one.num_classes != other.num_classes:
        return f"{one.num_classes} classes against {other.num_classes}: another protocol"
    if one.metadata.get("protocol") != other.metadata.get("protocol"):
        return f"protocol {one.metadata.get('protocol')} against {other.metadata.get('protocol')}"
    if not np.array_equal(one.chips, other.chips):
        only = len(set(one.chips.tolist()) ^ set(other.chips.tolist()))
        return f"other chips: {only} are in one table alone" if only else "the same chips in another order"
    differing = (one.counts.sum(axis=2) != other.counts.sum(axis=2)).any(axis=1)
    if differing.any():
        return f"another truth in {int(differing.sum())} chips, the first is {one.chips[differing][0]}"
    return None


def _lists(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A column of lists of one length: each row's values in C order."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), int(np.prod(values.shape[1:])))


def _contradiction(table: ChipTable) -> str | None:
    if len(set(table.chips.tolist())) != len(table):
        return "a chip is in it twice"
    if (table.counts < 0).any() or (table.ignored < 0).any() or (table.histogram < 0).any():
        return "negative counts"
    per_truth = table.counts.sum(axis=2)
    if (table.histogram.sum(axis=3) != per_truth[:, :, None]).any():
        return "histograms and confusion counts hold different numbers of pixels"
    if (wrong := _misplaced(table)).any():
        return f"the predictions of {table.chips[wrong][0]} are not what its probabilities give"
    if not (np.isfinite(table.confidence).all() and np.isfinite(table.squared_error).all()):
        return "values that are not finite"
    return None


def _misplaced(table: ChipTable) -> npt.NDArray[np.bool_]:
    """Which chips (N,) have confusion counts that the argmax of their probabilities cannot give.

    A class whose probability is above 1/2 is the prediction, and the prediction's is 1 / K or more. Each edge lies in
    the bin that it rounds down to: of that bin's pixels any number may be predicted, exact ties of two classes among
    them.
    """
    bins = table.histogram.shape[-1]
    least = table.histogram[..., bins // 2 + 1 :].sum(axis=-1)
    most = table.histogram[..., bins // table.num_classes :].sum(axis=-1)
    wrong: npt.NDArray[np.bool_] = ((table.counts < least) | (table.counts > most)).any(axis=(1, 2))
    return wrong
