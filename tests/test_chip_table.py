"""The chip table: what it holds, what it refuses, and that the test loop fills it with what TerraTorch saw."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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
from floodrepro.evaluation.chip_counts import count
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.metrics import scores
from verification_fixtures import make_table, missed


def make(chips: int = 12, classes: int = 2, size: int = 16, seed: int = 0) -> ChipTable:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(chips, classes, size, size, generator=generator)
    truth = torch.randint(-1, classes, (chips, size, size), generator=generator)
    columns = {name: value.numpy() for name, value in count(logits, truth, -1).items()}
    ids = np.array([f"EMSR{i // 3}_1_35TMF_x{i}_y{i}" for i in range(chips)])
    return ChipTable(chips=ids, **columns, metadata={"split": "test", "protocol": "v0"})


@pytest.mark.parametrize("classes", [2, 3])
def test_counts_of_a_batch_equal_torchmetrics_chip_by_chip(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(5, classes, 9, 7, generator=generator)
    truth = torch.randint(-1, classes, (5, 9, 7), generator=generator)
    truth[3] = -1  # nothing is known of this chip
    counted = count(logits, truth, -1)
    probability = logits.softmax(dim=1)
    for chip in range(5):
        expected = torchmetrics.functional.confusion_matrix(
            logits[chip].argmax(0), truth[chip], task="multiclass", num_classes=classes, ignore_index=-1
        )
        known = truth[chip] >= 0
        assert torch.equal(counted["counts"][chip], expected)
        assert int(counted["ignored"][chip]) == int((~known).sum())
        for k in range(classes):
            p, is_k = probability[chip, k][known].double(), truth[chip][known] == k
            for i in range(classes):
                found, _ = np.histogram(p[truth[chip][known] == i].numpy(), bins=BINS, range=(0, 1))
                assert np.array_equal(counted["histogram"][chip, i, k].numpy(), found)
            sums, _ = np.histogram(p.numpy(), bins=BINS, range=(0, 1), weights=p.numpy())
            assert counted["confidence"][chip, k].numpy() == pytest.approx(sums)
            assert float(counted["squared_error"][chip, k]) == pytest.approx(float(((p - is_k.double()) ** 2).sum()))


def test_table_survives_the_disk(tmp_path: Path):
    table = make()
    chip_table.write(table, tmp_path / "deep" / "t.parquet")
    back = chip_table.read(tmp_path / "deep" / "t.parquet")
    assert np.array_equal(back.chips, table.chips)
    assert np.array_equal(back.counts, table.counts)
    assert np.array_equal(back.ignored, table.ignored)
    assert np.array_equal(back.histogram, table.histogram)
    assert np.allclose(back.confidence, table.confidence, rtol=1e-7)
    assert np.array_equal(back.squared_error, table.squared_error)
    assert back.metadata["split"] == "test"
    assert back.events.tolist() == [f"EMSR{i // 3}" for i in range(12)]


def test_any_parquet_reader_finds_a_row_a_chip_with_named_columns(tmp_path: Path):
    chip_table.write(make(), tmp_path / "t.parquet")
    columns = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert list(columns) == ["chip", "event", "counts", "ignored", "histogram", "confidence", "squared_error"]
    assert len(columns["chip"]) == 12
    documented = (Path(__file__).parents[1] / "docs" / "chip-table.md").read_text()
    assert all(f"`{name}`" in documented for name in columns)


def spoil_counts(table: ChipTable) -> ChipTable:
    counts = table.counts.copy()
    counts[2, 0, 0] += 1
    return replace(table, counts=counts)


def spoil_hits(table: ChipTable) -> ChipTable:
    """Every tenth miss of flood becomes a hit, as a better model's would: its probabilities stay as they were."""
    counts = table.counts.copy()
    better = (counts[:, 1, 0] + 9) // 10
    counts[:, 1, 0] -= better
    counts[:, 1, 1] += better
    return replace(table, counts=counts)


def spoil_chips(table: ChipTable) -> ChipTable:
    chips = table.chips.copy()
    chips[1] = chips[0]
    return replace(table, chips=chips)


def spoil_error(table: ChipTable) -> ChipTable:
    return replace(table, squared_error=np.full_like(table.squared_error, np.nan))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_counts, "different numbers of pixels"),
        (spoil_hits, "the predictions of EMSR0_1_35TMF_x0_y0 are not what its probabilities give"),
        (spoil_chips, "twice"),
        (spoil_error, "not finite"),
        (lambda table: replace(table, metadata={"schema": 0}), "schema 0"),
        (lambda table: table.subset([]), "no rows"),
    ],
)
def test_table_that_contradicts_itself_is_refused(spoil, says, tmp_path: Path):
    chip_table.write(spoil(make()), tmp_path / "t.parquet")
    with pytest.raises(TableError, match=says):
        chip_table.read(tmp_path / "t.parquet")


@pytest.mark.parametrize("protocol", ["v0", "v1"])
def test_hits_that_became_misses_are_read_with_their_probabilities_and_refused_without(protocol, tmp_path: Path):
    table = make_table(3, 4, protocol=protocol)
    worse = missed(table, 0.3)
    chip_table.write(worse, tmp_path / "t.parquet")
    assert np.array_equal(chip_table.read(tmp_path / "t.parquet").counts, worse.counts)
    chip_table.write(replace(worse, histogram=table.histogram), tmp_path / "t.parquet")
    with pytest.raises(TableError, match="are not what its probabilities give"):
        chip_table.read(tmp_path / "t.parquet")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_near_ties_are_counted_where_their_probabilities_are(kind, classes, tmp_path: Path):
    """The bin that holds 1/2 takes ties and their neighbours, whichever class is predicted: no table is refused."""
    generator = torch.Generator().manual_seed(classes)
    common = 5 * torch.randn(24, 1, 32, 32, generator=generator)
    gap = torch.logspace(-9, 0, 24)[:, None, None, None] * torch.randn(24, classes, 32, 32, generator=generator)
    logits, truth = (common + gap).to(kind), torch.randint(0, classes, (24, 32, 32), generator=generator)
    assert bool((logits[:, 0] == logits[:, 1]).any())
    columns = {name: value.numpy() for name, value in count(logits, truth, -1).items()}
    ids = np.array([f"EMSR1_1_35TMF_x{n}_y0" for n in range(24)])
    chip_table.write(ChipTable(chips=ids, **columns, metadata={}), tmp_path / "t.parquet")
    assert len(chip_table.read(tmp_path / "t.parquet")) == 24


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_truncated_table_is_refused(keep, tmp_path: Path):
    path = tmp_path / "t.parquet"
    chip_table.write(make(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(TableError, match="no chip table, or it is damaged"):
        chip_table.read(path)


def test_tables_of_other_chips_protocols_or_truths_are_not_compared():
    table = make()
    assert chip_table.refuse_to_compare(table, table) is None
    assert "3 classes" in chip_table.refuse_to_compare(make(classes=3), table)
    assert "other chips: 2" in chip_table.refuse_to_compare(table, table.subset(table.chips[2:]))
    assert "another order" in chip_table.refuse_to_compare(table, table.subset(table.chips[::-1]))
    assert "another truth in" in chip_table.refuse_to_compare(table, make(seed=1))
    assert "protocol v0 against v1-binary" in chip_table.refuse_to_compare(
        table, table.subset(table.chips, protocol="v1-binary")
    )


def test_published_test_split_makes_a_file_of_a_few_mb(tmp_path: Path):
    """14,556 chips with probabilities as a trained model has them: near 0 or 1, some in between."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        margin = torch.from_numpy(generator.normal(generator.uniform(-6, 6), 3, (1, 64, 64)).astype(np.float32))
        rows.append(count(torch.stack([-margin, margin], dim=1), (margin > 0).long(), -1))
    few = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}
    some = generator.integers(0, 60, 14_556)
    noise = generator.integers(0, 50, (14_556, 1, 1, 1)) * (few["histogram"][some] > 0)
    histogram = 16 * few["histogram"][some] + noise
    columns = {name: few[name][some] for name in ("ignored", "confidence", "squared_error", "counts")}
    columns["confidence"] = columns["confidence"] * generator.uniform(15, 17, (14_556, 1, 1))
    chips = np.array([f"EMSR{i % 200}_1_35TMF_x{413905 + i}_y{4537585 + i}" for i in range(14_556)])
    chip_table.write(ChipTable(chips=chips, histogram=histogram, **columns, metadata={}), tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 9e6


def test_test_leaves_a_table_that_gives_terratorchs_metrics_again(cli, trained, chips, tmp_path: Path):
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, "--format", "json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    table = chip_table.read(Path(result["tables"]["test"]))
    assert table.chips.tolist() == (chips / "split" / "impactmesh_flood_test.txt").read_text().split()
    assert result["disagreement"] <= 1e-6
    for name, value in scores(table.counts.sum(axis=0)).items():
        assert result["metrics"][f"test/{name}"] == pytest.approx(value, abs=1e-6)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == CHIPS["size"] ** 2).all()
    record = trained.read_record()
    assert table.metadata["data_digest"] == record["data_digest"]
    assert table.metadata["recipe_sha256"] == record["recipe_sha256"]
    assert table.metadata["class_names"] == ["rest", "flood"]
    assert {"modalities", "means", "stds", "timesteps"} <= table.metadata["inputs"].keys()
    assert not any("/" in str(value) for value in table.metadata["inputs"].values())


def test_batches_and_tiles_do_not_change_what_is_counted_of_a_chip(cli, trained, tmp_path: Path):
    tables = []
    for size in (1, 3):
        arguments = ("--ckpt", trained.best, "--output", tmp_path / str(size), "--data.init_args.batch_size", size)
        outcome = cli("test", *arguments, "--format", "json")
        tables.append(chip_table.read(Path(json.loads(outcome.out)["tables"]["test"])))
    assert np.abs(tables[0].counts - tables[1].counts).sum() <= 4  # sums of other lengths may round a pixel over


def test_a_split_can_be_chosen_and_an_unknown_one_is_named(cli, trained, tmp_path: Path):
    outcome = cli("test", "--ckpt", trained.best, "--split", "val", "--output", tmp_path, "--format", "json")
    assert chip_table.read(Path(json.loads(outcome.out)["tables"]["val"])).metadata["split"] == "val"
    wrong = cli("test", "--ckpt", trained.best, "--split", "holdout")
    assert wrong.code == 2
    assert "no split 'holdout'" in wrong.err


def test_table_of_another_checkpoint_is_set_aside_and_of_the_same_one_replaced(cli, trained, tmp_path: Path):
    path = tmp_path / "test" / "best.parquet"
    assert cli("test", "--ckpt", trained.best, "--output", tmp_path).code == 0
    assert cli("test", "--ckpt", trained.best, "--output", tmp_path).code == 0
    assert [file.name for file in path.parent.iterdir()] == ["best.parquet"]
    first = path.read_bytes()
    shutil.copy(trained.recipe, tmp_path / "recipe.yaml")
    changed = torch.load(trained.best, weights_only=True)
    changed["state_dict"][next(reversed(changed["state_dict"]))] += 1
    torch.save(changed, tmp_path / "best.ckpt")
    outcome = cli("test", "--ckpt", tmp_path / "best.ckpt", "--config", trained.recipe, "--output", tmp_path)
    assert "set aside" in outcome.err
    assert (path.parent / "best-2.parquet").read_bytes() == first
    assert path.read_bytes() != first


def test_weights_that_predict_nan_leave_no_table(cli, trained, tmp_path: Path):
    content = torch.load(trained.best, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("running_var"))
    content["state_dict"][name][0] = float("nan")
    torch.save(content, tmp_path / "best.ckpt")
    outcome = cli("test", "--ckpt", tmp_path / "best.ckpt", "--config", trained.recipe)
    assert outcome.code == 1
    assert "not finite for 3 chips, the first is EMSR" in outcome.err
    assert not list((tmp_path / "evaluation").rglob("*.parquet"))


def test_folder_that_takes_no_table_is_found_before_the_pass(cli, trained, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path / "file")
    assert outcome.code == 1
    assert "cannot be written" in outcome.err
    assert "batches" not in outcome.err


def test_test_of_some_batches_leaves_no_table_that_looks_whole(cli, trained, tmp_path: Path):
    some = ("--data.init_args.batch_size", "1", "--trainer.limit_test_batches", "2")
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, *some)
    assert outcome.code == 0
    assert "2 of 3 chips were tested" in outcome.err
    assert not list(tmp_path.rglob("*.parquet"))


def test_killed_test_leaves_no_table(trained, tmp_path: Path):
    """SIGKILL as soon as the pass has begun: nothing may lie under the table's name."""
    command = [sys.executable, "-W", "ignore", "-m", "floodrepro", "test", "--ckpt", trained.best, "--output", tmp_path]
    command += ["--data.init_args.batch_size", "1"]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "batches 1/" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.1)
    assert not list(tmp_path.rglob("*.parquet"))
