"""validate, test and predict: plain TerraTorch's figures, the config before the checkpoint's memory, chips by name."""

import contextlib
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import rasterio
import torch
import zarr
from sklearn.metrics import confusion_matrix

from conftest import CHIPS
from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.protocols import EVENT, IGNORE_INDEX, NO_DATA
from floodrepro.errors import RunFolderError
from floodrepro.evaluation.chip_table import ChipTable, read_table, refuse_to_compare
from floodrepro.evaluation.intervals import jackknife
from floodrepro.evaluation.metrics import iou, scores
from floodrepro.evaluation.passes import ChipWriter

ONE_CHIP = ("--data.init_args.batch_size", "1")


def split_of(chips: Path, name: str) -> list[str]:
    return (chips / "split" / f"impactmesh_flood_{name}.txt").read_text().split()


def table_of(outcome) -> ChipTable:
    """The first chip table that a test in JSON names."""
    assert outcome.code == 0, outcome.err
    return read_table(Path(next(iter(json.loads(outcome.out)["tables"].values()))))


@pytest.fixture(scope="module")
def tested(cli, trained):
    """A test of the trained run."""
    shutil.rmtree(trained.evaluation, ignore_errors=True)
    return cli("test", "--ckpt", trained.best, "--format", "json")


@pytest.fixture(scope="module")
def metrics(tested) -> dict:
    return json.loads(tested.out)["metrics"]


@pytest.fixture(scope="module")
def predicted(cli, trained, tmp_path_factory):
    """Predictions of the test split with probabilities, and their folder."""
    folder = tmp_path_factory.mktemp("predicted") / "masks"
    arguments = ("--output", folder, "--format", "json", "--probabilities")
    return cli("predict", "--ckpt", trained.best, *arguments), folder


def test_metrics_equal_plain_terratorch_to_six_digits(metrics, trained, tmp_path: Path, monkeypatch):
    from terratorch.cli_tools import build_lightning_cli  # floodrepro's import of it undoes what it sets globally

    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):  # it sets GDAL's variables, with which GDAL makes no ENVI files
        plain = build_lightning_cli(["test", "--config", str(trained.recipe), "--ckpt_path", str(trained.best)])
    theirs = {name: float(value) for name, value in plain.trainer.callback_metrics.items()}
    for name in ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy", "Class_Accuracy_1", "loss"):
        assert metrics[f"test/{name}"] == pytest.approx(theirs[f"test/{name}"], abs=5e-7), name


def test_table_gives_terratorchs_metrics_again_and_says_what_the_model_saw(tested, metrics, trained, chips):
    table = table_of(tested)
    assert table.chips.tolist() == split_of(chips, "test")
    assert json.loads(tested.out)["disagreement"] <= 1e-6
    for name, value in scores(table.counts.sum(axis=0)).items():
        assert metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == CHIPS["size"] ** 2).all()
    metadata = table.metadata
    assert metadata["recipe_sha256"] == trained.read_record()["recipe_sha256"]
    assert (metadata["class_names"], metadata["positive_class"], table.name) == (["rest", "flood"], 1, "best.ckpt")
    assert list(metadata["data"]["digests"]) == ["test"]
    assert {"modalities", "means", "stds", "timesteps"} <= metadata["inputs"].keys()
    assert not any("/" in str(value) for value in metadata["inputs"].values())
    baselines = {f"baselines/test/{name}.parquet" for name in ("everything", "nothing", "vv-drop", "vv-vh-change")}
    files = {str(path.relative_to(trained.evaluation)) for path in trained.evaluation.rglob("*") if path.is_file()}
    assert files == {"test/best.parquet"} | baselines


def test_part_of_a_split_does_not_replace_the_table_of_the_whole(cli, tested, trained):
    whole, folder = table_of(tested), trained.evaluation / "test"
    part = table_of(cli("test", "--ckpt", trained.best, "--limit", 1, "--format", "json"))
    assert len(part) < len(whole) == len(read_table(folder / "best.parquet"))
    (folder / "best-part.parquet").unlink()


def test_validate_gives_the_loss_that_the_best_checkpoint_was_chosen_by_and_writes_nothing(
    cli, trained, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = set(trained.path.rglob("*"))
    outcome = cli("validate", "--ckpt", trained.best, "--format", "json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["metrics"]["val/loss"]
    assert found == pytest.approx(trained.read_record()["best_val_loss"], abs=1e-6)
    assert set(trained.path.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_text_says_which_iou_is_which_and_batches_change_no_count(cli, tested, trained, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "LOG_EVERY", 0.0)  # a pass of seconds shows nothing
    before = set(trained.path.rglob("*"))
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, "--no-baselines", *ONE_CHIP)
    assert re.search(r"floodrepro: batches: 100%.* 3/3 ", outcome.err), outcome.err
    metrics, ious = outcome.out.split("\n\n")
    names = ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy")
    assert [line.split()[0] for line in metrics.splitlines()] == [f"test/{name}" for name in names]
    rows = [line.split() for line in ious.splitlines()[1:]]
    assert [row[0] for row in rows] == ["pooled", "mean", "mean"]
    assert [row[-1] for row in rows] == ["chips", "chips", "events"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "test" / "best.parquet"]
    assert set(trained.path.rglob("*")) == before
    alone = read_table(tmp_path / "test" / "best.parquet")
    assert np.abs(alone.counts - table_of(tested).counts).sum() <= 4  # sums of other lengths may round a pixel over


def test_predicted_masks_are_named_after_chips_and_score_what_test_scores(predicted, metrics, chips):
    outcome, masks = predicted
    assert outcome.code == 0, outcome.err
    counts = np.zeros((2, 2), np.int64)
    for chip in split_of(chips, "test"):
        with (
            rasterio.open(masks / f"{chip}_pred.tif") as mine,
            rasterio.open(masks / f"{chip}_prob.tif") as probable,
            rasterio.open(chips / "data" / "MASK" / f"{chip}_annotation_flood.tif") as truth,
        ):
            assert (mine.crs, mine.transform, mine.shape) == (truth.crs, truth.transform, truth.shape)
            assert (probable.crs, probable.transform, probable.dtypes) == (truth.crs, truth.transform, ("float32",))
            assert np.array_equal(probable.read(1) > 0.5, mine.read(1) == 1)
            assert len(np.unique(probable.read(1))) > 100  # no zeros in a type that cannot hold them
            counts += confusion_matrix(truth.read(1).ravel(), mine.read(1).ravel(), labels=[0, 1])
    assert len(json.loads(outcome.out)["files"]) == len(list(masks.iterdir())) == 2 * len(split_of(chips, "test"))
    for name, value in scores(counts).items():
        assert metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6)


def test_a_models_predictions_as_masks_make_the_table_of_its_test(cli, trained, tested, predicted, tmp_path):
    """predict, then test --masks: the same counts as test --ckpt, so both ways are compared like with like."""
    model, arguments = table_of(tested), ("--config", trained.recipe, "--output", tmp_path, "--format", "json")
    outcome = cli("test", "--masks", predicted[1], "--name", "again", *arguments)
    masks = table_of(outcome)
    assert refuse_to_compare(masks, model) is None
    assert np.abs(masks.counts - model.counts).sum() <= 4
    assert [entry["of"] for entry in json.loads(outcome.out)["which_iou"]] == ["chips", "chips", "events"]
    probable = table_of(cli("test", "--masks", predicted[1], "--name", "prob", "--probability", *arguments))
    assert np.abs(probable.histogram - model.histogram).sum() <= 20
    assert jackknife(model.counts, iou, other=probable.counts).estimate == pytest.approx(0, abs=1e-3)


def test_events_of_a_csv_reach_the_table_of_a_model_and_of_masks(cli, trained, predicted, chips, tmp_path: Path):
    """Chips of one's own, of which the ids say nothing: the split file's second column names the event."""
    listed = split_of(chips, "test")
    rivers = [f"river {'Aa' if n else 'Ill'}" for n in range(len(listed))]
    csv = "".join(f"{chip},{river}\n" for chip, river in zip(listed, rivers, strict=True))
    (tmp_path / "test.csv").write_text(f"chip,event\n{csv}")
    own = ("protocol=custom", 'class_names=["dry", "wet"]', f"test_split={tmp_path / 'test.csv'}")
    arguments = [f"--data.init_args.{override}" for override in own] + ["--output", tmp_path, "--format", "json"]
    outcome = cli("test", "--ckpt", trained.best, "--no-baselines", *arguments)
    masks = cli("test", "--masks", predicted[1], "--name", "m", "--config", trained.recipe, *arguments)
    for one in (outcome, masks):
        assert table_of(one).events.tolist() == rivers
        assert table_of(one).class_names == ["dry", "wet"]
        pooled, _, over_events = json.loads(one.out)["which_iou"]
        assert (pooled["n"], over_events["name"], over_events["n"]) == (3, "mean over events with wet", 2)


def mark_unseen(chips: Path, chip: str, modality: str, place: tuple) -> None:
    path = chips / "data" / modality / f"{chip}_{modality}.zarr.zip"
    with zarr.ZipStore(str(path), mode="r") as store:
        bands = zarr.open_consolidated(store, mode="r")["bands"][:]
    bands[(EVENT, slice(None), *place)] = NO_DATA  # in float16 that is -10000
    path.unlink()
    with zarr.ZipStore(str(path), mode="w") as store:
        zarr.group(store).array("bands", bands)
        zarr.consolidate_metadata(store)


def test_pixels_that_no_satellite_saw_at_the_event_are_marked(cli, trained, own_chips, predicted, tmp_path: Path):
    """And probabilities in eight bits are the same to half a step."""
    chip = split_of(own_chips, "test")[0]
    mark_unseen(own_chips, chip, "S2L2A", np.s_[:4, :6])
    mark_unseen(own_chips, chip, "S1RTC", np.s_[2:9, :5])
    arguments = ("--ckpt", trained.best, "--data-root", own_chips, "--probabilities", "uint8")
    outcome = cli("predict", *arguments, "--output", tmp_path / "p")
    assert outcome.code == 0, outcome.err
    both = np.zeros((32, 32), bool)
    both[2:4, :5] = True
    with (
        rasterio.open(tmp_path / "p" / f"{chip}_pred.tif") as mask,
        rasterio.open(tmp_path / "p" / f"{chip}_prob.tif") as probable,
    ):
        assert (mask.nodata, probable.nodata, probable.dtypes) == (-1, 255, ("uint8",))
        assert np.array_equal(mask.read(1) == -1, both)
        assert np.array_equal(probable.read(1) == 255, both)
    other = split_of(own_chips, "test")[1]
    exact, scaled = (rasterio.open(folder / f"{other}_prob.tif").read(1) for folder in (predicted[1], tmp_path / "p"))
    assert np.abs(scaled / 250 - exact).max() <= 0.5 / 250 + 1e-6


@contextlib.contextmanager
def full_disk(bytes_of_a_file: int) -> Iterator[None]:
    """No file may grow beyond it, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_no_half_written_mask(trained, chips, tmp_path: Path):
    chip = split_of(chips, "test")[0]
    recipe = recipes.read_yaml(trained.recipe)
    writer = ChipWriter(trained.best, recipe, tmp_path, "float32")
    logits = torch.randn(1, 2, CHIPS["size"], CHIPS["size"], generator=torch.Generator().manual_seed(0))
    file = str(chips / "data" / "DEM" / f"{chip}_DEM.tif")
    with full_disk(2_000), pytest.raises(RunFolderError, match=r"cannot be written: File too large"):
        writer.use(logits, [file], {}, None)
    assert [path.name for path in tmp_path.iterdir()] == [f"{chip}_pred.tif"]  # 32 x 32 classes take less
    with rasterio.open(tmp_path / f"{chip}_pred.tif") as mask:
        assert np.array_equal(mask.read(1), logits[0].argmax(dim=0))


def test_full_disk_is_a_clear_error_and_leaves_the_table_that_is_there(cli, tested, trained, tmp_path: Path):
    folder = tmp_path / "tables"
    shutil.copytree(Path(json.loads(tested.out)["tables"]["test"]).parent, folder / "test")
    before = {path.name: path.read_bytes() for path in (folder / "test").iterdir()}
    with full_disk(4_000):
        outcome = cli("test", "--ckpt", trained.best, "--output", folder, "--no-baselines")
    assert (outcome.code, "cannot be written" in outcome.err, "Traceback" in outcome.err) == (1, True, False)
    assert {path.name: path.read_bytes() for path in (folder / "test").iterdir()} == before


def test_checkpoint_of_another_shape_is_refused_with_both_names(cli, trained):
    outcome = cli("test", "--ckpt", trained.best, "--model.init_args.model_args.backbone", "terramind_v1_small")
    assert outcome.code == 1
    assert "the checkpoint says 'terramind_v1_tiny', the config says 'terramind_v1_small'" in outcome.err
    assert len(outcome.report) <= 3


def test_what_cannot_be_done_is_refused_before_the_pass(cli, trained, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    lonely, two = tmp_path / "lonely.ckpt", tmp_path / "two"
    for path, configs in ((lonely, ()), (two / "best.ckpt", ("recipe.yaml", "other.yaml"))):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(trained.best, path)
        for name in configs:
            shutil.copy(trained.recipe, path.parent / name)
    ours = ("--ckpt", trained.best)
    for argv, code, says in (
        (("predict", *ours, "--output", tmp_path), 2, "not empty"),
        (("test", *ours, "--output", tmp_path / "mine.txt"), 1, "cannot be written"),
        (("test", "--ckpt", lonely), 2, "--config YAML"),
        (("test", "--ckpt", two / "best.ckpt"), 2, "2 configs lie beside"),
        (("test", *ours, "--split", "holdout"), 2, "no split 'holdout'"),
        (("test", "--config", "demo"), 2, "either --ckpt or --masks"),
    ):
        outcome = cli(*argv)
        assert (outcome.code, says in outcome.err, "batches" in outcome.err) == (code, True, False), outcome.err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_split_can_be_chosen(cli, trained, tmp_path: Path):
    outcome = cli("test", "--ckpt", trained.best, "--split", "val", "--output", tmp_path, "--format", "json")
    assert table_of(outcome).metadata["split"] == "val"


def test_config_wins_over_the_checkpoint_and_several_test_splits_are_one_pass(
    cli, trained, tested, metrics, chips, tmp_path: Path
):
    all_chips, part = split_of(chips, "test"), tmp_path / "holdout.txt"
    part.write_text("".join(f"{chip}\n" for chip in all_chips[1:]))
    several = json.dumps({"test": str(chips / "split" / "impactmesh_flood_test.txt"), "holdout": str(part)})
    arguments = ("--output", tmp_path, "--data.init_args.test_split", several, "--model.init_args.loss", "ce")
    outcome = cli("test", "--ckpt", trained.best, "--no-baselines", "--format", "json", *arguments)
    assert "the checkpoint says" not in tested.err
    assert "warning: loss: the checkpoint says 'dice', the config says 'ce'; the config counts" in outcome.err
    result, whole = json.loads(outcome.out), table_of(outcome)
    named = {name.replace("test/test/", "test/"): value for name, value in result["metrics"].items()}
    changed = {name for name, value in metrics.items() if named[name] != value}
    assert changed == {"test/loss"}  # obeyed, and nothing else has changed
    assert np.array_equal(whole.counts, table_of(tested).counts)
    holdout = read_table(Path(result["tables"]["holdout"]))
    assert (holdout.chips.tolist(), holdout.metadata["subset_of"]) == (all_chips[1:], "test")
    assert np.array_equal(holdout.counts, whole.counts[1:])
    assert result["metrics"]["test/holdout/IoU_0"] == pytest.approx(scores(holdout.counts.sum(0))["IoU_0"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_finite_weights_that_predict_nan_leave_no_table_and_no_mask(cli, trained, tmp_path: Path, command):
    content = torch.load(trained.best, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("running_var"))
    content["state_dict"][name][0] = -1.0  # its root is NaN
    torch.save(content, tmp_path / "best.ckpt")
    output = ("--output", tmp_path / "out") if command != "validate" else ()
    outcome = cli(command, "--ckpt", tmp_path / "best.ckpt", "--config", trained.recipe, *output)
    assert (outcome.code, outcome.out) == (1, "")
    assert "predicts values that are not finite for 3 chips, the first is EMSR" in outcome.err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_metric_that_is_not_finite_is_an_error_that_names_it(cli, trained, own_chips):
    """Cross-entropy is 0 / 0 where no pixel of a batch has a label."""
    for path in (own_chips / "data" / "MASK").iterdir():
        with rasterio.open(path, "r+") as mask:
            mask.write(np.full_like(mask.read(), IGNORE_INDEX))
    arguments = ("--ckpt", trained.best, "--data-root", own_chips, "--model.init_args.loss", "ce")
    outcome = cli("validate", *arguments, "--format", "json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "not finite: val/loss" in outcome.err


def test_test_of_some_batches_leaves_no_table_that_looks_whole(cli, trained, tmp_path: Path):
    some = (*ONE_CHIP, "--trainer.limit_test_batches", "2")
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, *some)
    assert outcome.code == 0
    assert "2 of 3 chips were tested" in outcome.err
    assert not list(tmp_path.rglob("*.parquet"))
