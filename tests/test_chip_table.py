"""The chip table: what is counted of a batch, what the disk keeps, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchmetrics

from conftest import CHIPS
from floodrepro.errors import TableError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable, TableBuilder, on_common_chips, refuse_to_compare
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.test import count


def drawn(chips: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(chips, classes, 16, 16, generator=generator)
    return logits, torch.randint(-1, classes, (chips, 16, 16), generator=generator)


def make(chips: int = 12, classes: int = 2, seed: int = 0) -> ChipTable:
    columns = {name: value.numpy() for name, value in count(*drawn(chips, classes, seed), -1).items()}
    ids = np.array([f"EMSR{i // 3}_1_35TMF_x{i}_y{i}" for i in range(chips)])
    metadata = {"split": "test", "protocol": "v0"}
    return ChipTable(chips=ids, unseen=np.zeros(chips, np.int64), **columns, metadata=metadata)


@pytest.mark.parametrize(("classes", "positive"), [(2, None), (3, 1)])
def test_counts_of_a_batch_are_torchmetrics_and_numpys(classes, positive):
    logits, truth = drawn(5, classes, classes)
    truth[3] = -1  # nothing is known of this chip
    logits[2, :, :8] = logits[2, :, :8].round() / 4  # with ties
    found = count(logits, truth, -1, positive)
    k = classes - 1 if positive is None else positive
    builder = TableBuilder(classes, k)
    for chip in range(5):
        expected = torchmetrics.functional.confusion_matrix(
            logits[chip].argmax(0), truth[chip], task="multiclass", num_classes=classes, ignore_index=-1
        )
        assert torch.equal(found["counts"][chip], expected)
        p = logits[chip].softmax(dim=0)[k].numpy()
        builder.add(str(chip), "e", truth[chip].numpy(), logits[chip].argmax(0).numpy(), None, p)
    same = builder.table({})
    for name in ("counts", "ignored", "histogram"):
        assert np.array_equal(getattr(same, name), found[name].numpy()), name
    for name in ("confidence", "squared_error"):
        assert getattr(same, name) == pytest.approx(found[name].numpy()), name


def test_ignored_pixels_leave_no_trace_whatever_their_logits_are():
    logits, truth = drawn(3, 2, 1)
    other = torch.where((truth < 0)[:, None], -50 * logits, logits)
    pairs = zip(count(logits, truth, -1).values(), count(other, truth, -1).values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("probable", [True, False])
def test_table_survives_the_disk(probable, tmp_path: Path):
    table = replace(make(), events=np.array([f"E{n % 2}" for n in range(12)]))
    if not probable:
        table = replace(table, histogram=None, confidence=None, squared_error=None)
    chip_table.write_table(table, tmp_path / "deep" / "t.parquet")
    back = chip_table.read_table(tmp_path / "deep" / "t.parquet")
    for name in ("chips", "events", "counts", "ignored", "unseen", "histogram", "squared_error"):
        assert np.array_equal(getattr(back, name), getattr(table, name)), name
    assert back.confidence is None or np.allclose(back.confidence, table.confidence, rtol=1e-7)
    assert (back.metadata["split"], len(back), back.positive) == ("test", 12, 1)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.parquet"]


def test_any_parquet_reader_finds_documented_columns(tmp_path: Path):
    chip_table.write_table(make(), tmp_path / "t.parquet")
    columns = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert len(columns["chip"]) == 12
    assert columns["event"][:4] == ["EMSR0", "EMSR0", "EMSR0", "EMSR1"]
    documented = (Path(__file__).parents[1] / "docs" / "chip-table.md").read_text()
    assert all(f"`{name}`" in documented for name in columns)


def test_subset_takes_the_rows_of_its_chips():
    table = make()
    part = table.subset(table.chips[[5, 2]], split="holdout")
    assert part.events.tolist() == ["EMSR1", "EMSR0"]
    assert np.array_equal(part.histogram, table.histogram[[5, 2]])
    assert (part.metadata["split"], table.metadata["split"]) == ("holdout", "test")
    with pytest.raises(TableError, match="1 chips are not in the chip table, the first is EMSR99"):
        table.subset(["EMSR99"])


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_truncated_table_is_refused(keep, tmp_path: Path):
    path = tmp_path / "t.parquet"
    chip_table.write_table(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(TableError, match="no chip table, or it is damaged"):
        chip_table.read_table(path)


def test_flipped_bit_is_an_error_never_a_count(tmp_path: Path):
    """In any place of the file: a page's checksum, or the structure around it."""
    path, table = tmp_path / "t.parquet", make(60)
    chip_table.write_table(table, path)
    content, refused = path.read_bytes(), 0
    places = range(8, len(content) - 8, 97)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            back = chip_table.read_table(path)
        except TableError:
            refused += 1
        else:  # where it does not matter
            assert np.array_equal(back.counts, table.counts)
            assert np.array_equal(back.histogram, table.histogram)
    assert refused > 0.7 * len(places)


def test_empty_table_and_another_schema_are_refused(tmp_path: Path):
    path = tmp_path / "t.parquet"
    chip_table.write_table(make().subset([]), path)
    with pytest.raises(TableError, match="no rows"):
        chip_table.read_table(path)
    chip_table.write_table(replace(make(), metadata={"schema": 1}), path)
    with pytest.raises(TableError, match="schema 1"):
        chip_table.read_table(path)
    with pytest.raises(TableError, match="not found"):
        chip_table.read_table(tmp_path / "none.parquet")


def test_tables_of_other_chips_protocols_or_truths_are_not_compared():
    table = make()
    assert refuse_to_compare(table, table) is None
    assert "3 classes" in refuse_to_compare(make(classes=3), table)
    assert "other chips: 2" in refuse_to_compare(table, table.subset(table.chips[2:]))
    assert "another order" in refuse_to_compare(table, table.subset(table.chips[::-1]))
    assert "another truth in" in refuse_to_compare(table, make(seed=1))
    assert "protocol v0 against v1-binary" in refuse_to_compare(table, table.subset(table.chips, protocol="v1-binary"))


def test_chips_that_one_side_has_not_seen_whole_are_left_out_of_a_comparison():
    table, unseen = make(), np.zeros(12, np.int64)
    unseen[[0, 4]] = 9
    one, other, left_out = on_common_chips(table, replace(table, unseen=unseen))
    assert (len(one), len(other), left_out) == (10, 10, 2)
    assert on_common_chips(table, table)[2] == 0
    with pytest.raises(TableError, match="no chip"):
        on_common_chips(table, replace(table, unseen=unseen + 1))


def test_test_leaves_a_table_that_gives_terratorchs_metrics_again(cli, trained, chips, tmp_path: Path):
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, "--format", "json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    table = chip_table.read_table(Path(result["tables"]["test"]))
    assert table.chips.tolist() == (chips / "split" / "impactmesh_flood_test.txt").read_text().split()
    assert result["disagreement"] <= 1e-6
    for name, value in scores(table.counts.sum(axis=0)).items():
        assert result["metrics"][f"test/{name}"] == pytest.approx(value, abs=1e-6)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == CHIPS["size"] ** 2).all()
    metadata = table.metadata
    assert metadata["recipe_sha256"] == trained.read_record()["recipe_sha256"]
    assert (metadata["class_names"], metadata["positive_class"], table.name) == (["rest", "flood"], 1, "best.ckpt")
    assert list(metadata["data"]["digests"]) == ["test"]
    assert {"modalities", "means", "stds", "timesteps"} <= metadata["inputs"].keys()
    assert not any("/" in str(value) for value in metadata["inputs"].values())


def test_batches_and_tiles_do_not_change_what_is_counted_of_a_chip(cli, trained, tmp_path: Path):
    tables = []
    for size in (1, 3):
        arguments = ("--ckpt", trained.best, "--output", tmp_path / str(size), "--data.init_args.batch_size", size)
        outcome = cli("test", *arguments, "--format", "json")
        tables.append(chip_table.read_table(Path(json.loads(outcome.out)["tables"]["test"])))
    assert np.abs(tables[0].counts - tables[1].counts).sum() <= 4  # sums of other lengths may round a pixel over


def test_table_of_another_checkpoint_is_set_aside_and_of_the_same_one_replaced(cli, trained, tmp_path: Path):
    path, arguments = tmp_path / "test" / "best.parquet", ("--output", tmp_path, "--no-baselines")
    for _ in range(2):
        assert cli("test", "--ckpt", trained.best, *arguments).code == 0
    assert [file.name for file in path.parent.iterdir()] == ["best.parquet"]
    first = path.read_bytes()
    shutil.copy(trained.recipe, tmp_path / "recipe.yaml")
    changed = torch.load(trained.best, weights_only=True)
    changed["state_dict"][next(reversed(changed["state_dict"]))] += 1
    torch.save(changed, tmp_path / "best.ckpt")
    outcome = cli("test", "--ckpt", tmp_path / "best.ckpt", "--config", trained.recipe, *arguments)
    assert "set aside" in outcome.err
    assert (path.parent / "best-2.parquet").read_bytes() == first
    assert path.read_bytes() != first


def test_published_test_split_makes_a_file_of_a_few_mb(tmp_path: Path):
    """14,556 chips with probabilities as a trained model has them: near 0 or 1, some in between."""
    generator = np.random.default_rng(0)
    margin = torch.from_numpy(
        generator.normal(generator.uniform(-6, 6, (60, 1, 1)), 3, (60, 64, 64)).astype(np.float32)
    )
    few = count(torch.stack([-margin, margin], dim=1), (margin > 0).long(), -1)
    some = generator.integers(0, 60, 14_556)
    columns = {name: value.numpy()[some] for name, value in few.items()}
    noise = generator.integers(0, 50, (14_556, 1, 1)) * (columns["histogram"] > 0)
    columns["histogram"] = 16 * columns["histogram"] + noise
    columns["confidence"] = columns["confidence"] * generator.uniform(15, 17, (14_556, 1))
    chips = np.array([f"EMSR{i % 200}_1_35TMF_x{413905 + i}_y{4537585 + i}" for i in range(14_556)])
    table = ChipTable(chips=chips, unseen=np.zeros(14_556, np.int64), **columns, metadata={})
    chip_table.write_table(table, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 4e6
