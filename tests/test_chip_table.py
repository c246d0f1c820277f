"""The chip table: what is counted of a batch, what the disk keeps, what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchmetrics

from floodrepro.errors import DataError, TableError
from floodrepro.evaluation.chip_table import BINS, ChipTable, read_table, refuse_to_compare, write_table
from floodrepro.evaluation.counting import count


def drawn(chips: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(chips, classes, 16, 16, generator=generator)
    return logits, torch.randint(-1, classes, (chips, 16, 16), generator=generator)


def counted(logits: torch.Tensor, truth: torch.Tensor, positive: int = -1) -> dict[str, np.ndarray]:
    p = logits.softmax(dim=1)[:, positive]
    return count(truth, logits.argmax(dim=1), p, classes=logits.shape[1], positive=positive)


def make(chips: int = 12, classes: int = 2, seed: int = 0) -> ChipTable:
    ids = [f"EMSR{i // 3}_1_35TMF_x{i}_y{i}" for i in range(chips)]
    metadata = {"split": "test", "protocol": "v0"}
    batch = counted(*drawn(chips, classes, seed))
    return ChipTable.of_batches([(chip, chip.split("_")[0]) for chip in ids], [batch], metadata)


@pytest.mark.parametrize(("classes", "positive"), [(2, -1), (3, 1)])
def test_counts_of_a_batch_are_torchmetrics_and_numpys(classes, positive):
    logits, truth = drawn(5, classes, classes)
    truth[3] = -1  # nothing is known of this chip
    found = counted(logits, truth, positive)
    assert found["unseen"].sum() == 0
    for chip in range(5):
        expected = torchmetrics.functional.confusion_matrix(
            logits[chip].argmax(0), truth[chip], task="multiclass", num_classes=classes, ignore_index=-1
        )
        assert np.array_equal(found["counts"][chip], expected)
        known = truth[chip] >= 0
        assert found["ignored"][chip] == (~known).sum()
        p, is_positive = logits[chip].softmax(0)[positive][known].numpy(), truth[chip][known] == positive % classes
        for row in (0, 1):
            histogram, _ = np.histogram(p[is_positive.numpy() == row], BINS, (0, 1))
            assert np.array_equal(found["histogram"][chip, row], histogram)
        confidence, _ = np.histogram(p, BINS, (0, 1), weights=p)
        assert found["confidence"][chip] == pytest.approx(confidence)
        assert found["squared_error"][chip] == pytest.approx(((p - is_positive.numpy()) ** 2).sum())


def test_pixels_without_a_truth_or_a_prediction_leave_no_trace_whatever_stands_there():
    logits, truth = drawn(3, 2, 1)
    known = counted(logits, truth)
    other = counted(torch.where((truth < 0)[:, None], -50 * logits, logits), truth)
    assert all(np.array_equal(known[name], other[name]) for name in known)
    gone, p = truth == 0, logits.softmax(1)[:, 1]
    unseen = count(truth, torch.where(gone, -1, logits.argmax(dim=1)), torch.where(gone, torch.nan, p), classes=2)
    assert np.array_equal(unseen["unseen"], gone.sum(dim=(1, 2)))
    assert np.array_equal(unseen["counts"][:, 1], known["counts"][:, 1])
    assert np.array_equal(unseen["histogram"][:, 1], known["histogram"][:, 1])
    assert unseen["counts"][:, 0].sum() == unseen["histogram"][:, 0].sum() == 0


@pytest.mark.parametrize("probable", [True, False])
def test_table_survives_the_disk_in_documented_columns(probable, tmp_path: Path):
    table, path = replace(make(), events=np.array([f"E{n % 2}" for n in range(12)])), tmp_path / "deep" / "t.parquet"
    if not probable:
        table = replace(table, histogram=None, confidence=None, squared_error=None)
    write_table(table, path)
    back = read_table(path)
    for name in ("chips", "events", "counts", "ignored", "unseen", "histogram", "confidence", "squared_error"):
        assert np.array_equal(getattr(back, name), getattr(table, name)), name
    assert (back.metadata["split"], len(back), back.positive) == ("test", 12, 1)
    assert list(path.parent.iterdir()) == [path]
    documented = (Path(__file__).parents[1] / "docs" / "chip-table.md").read_text()
    assert all(f"`{name}`" in documented for name in pq.read_table(path).column_names)  # for any other reader


@pytest.mark.parametrize(("truth", "prediction"), [(2, 0), (-2, 0), (0, 2)])
def test_class_beyond_the_last_is_refused_and_not_counted_for_the_next_chip(truth, prediction):
    batch = np.zeros((2, 2, 4, 4), np.int64)
    batch[:, 0, 1, 1] = truth, prediction
    with pytest.raises(DataError, match="expected 0 to 1"):
        count(*batch, classes=2)


def test_flipped_bit_or_a_cut_is_an_error_never_a_count(tmp_path: Path):
    """In any place of the file: a page's checksum, or the structure around it."""
    path, table = tmp_path / "t.parquet", make(60)
    write_table(table, path)
    content, refused = path.read_bytes(), 0
    places = range(8, len(content) - 8, 97)
    damaged = [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in places]
    damaged += [content[:keep] for keep in (0, 7, len(content) // 2, len(content) - 9)]
    for each in damaged:
        path.write_bytes(each)
        try:
            back = read_table(path)
        except TableError:
            refused += 1
        else:  # where it does not matter
            assert np.array_equal(back.counts, table.counts)
            assert np.array_equal(back.histogram, table.histogram)
    assert refused > 0.7 * len(damaged)


@pytest.mark.parametrize(
    "changes",
    [
        vars(make().subset([])),
        {"counts": -make().counts},
        {"ignored": np.full(12, -1)},
        {"unseen": np.full(12, np.nan)},
        {"histogram": make().histogram - 1},
        {"chips": np.full(12, "EMSR0_1_35TMF_x0_y0")},
        {"metadata": {"positive_class": 2}},
        {"metadata": {"positive_class": -1}},
        {"metadata": {"checkpoint": "best.ckpt"}},
        {"metadata": {"class_names": ["one"]}},
        {"metadata": {"schema": 1}},
        {"events": [None, *"E" * 11]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_empty_table_another_schema_and_impossible_counts_ids_and_classes_are_refused(tmp_path: Path, changes):
    """Each would decide a verdict: negative counts make an IoU of more than 1."""
    write_table(replace(make(), **changes), tmp_path / "t.parquet")
    with pytest.raises(TableError, match="damaged"):
        read_table(tmp_path / "t.parquet")


def test_tables_of_other_chips_protocols_or_truths_are_not_compared():
    table = make()
    assert refuse_to_compare(table, table) is None
    assert "3 classes" in refuse_to_compare(make(classes=3), table)
    assert "other chips: 2" in refuse_to_compare(table, table.subset(table.chips[2:]))
    assert "of other events" in refuse_to_compare(table, replace(table, events=table.events[::-1]))
    assert "another order" in refuse_to_compare(table, table.subset(table.chips[::-1]))
    assert "another truth in" in refuse_to_compare(table, make(seed=1))
    assert "of v0 against 2 classes of v1" in refuse_to_compare(table, table.subset(table.chips, protocol="v1-binary"))
