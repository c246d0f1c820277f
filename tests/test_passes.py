"""validate, test and predict: plain TerraTorch's figures, the config before the checkpoint's memory, chips by name."""

import json
import os
import re
import resource
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import rasterio
import torch
import zarr

from conftest import CHIPS
from floodrepro import console
from floodrepro.data.protocols import EVENT, NO_DATA
from floodrepro.evaluation import passes
from floodrepro.evaluation.chip_table import ChipTable, read_table, refuse_to_compare
from floodrepro.evaluation.intervals import jackknife
from floodrepro.evaluation.metrics import iou, scores
from test_splits import ids_of

ONE_CHIP = ("--data.init_args.batch_size", "1")


def table_of(outcome) -> ChipTable:
    """The first chip table that a test in JSON names."""
    return read_table(Path(next(iter(json.loads(outcome.ok().out)["tables"].values()))))


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
    return cli("predict", "--ckpt", trained.best, *arguments).ok(), folder


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
    assert table.chips.tolist() == ids_of(chips, "test")
    assert table.events.tolist() == [chip.split("_")[0] for chip in ids_of(chips, "test")]
    for name, value in scores(table.counts.sum(axis=0)).items():
        assert metrics[f"test/{name}"] == pytest.approx(value, abs=1e-6)
    assert (table.counts.sum(axis=(1, 2)) + table.ignored == CHIPS["size"] ** 2).all()
    metadata = table.metadata
    assert metadata["recipe_sha256"] == trained.read_record()["recipe_sha256"]
    assert (metadata["class_names"], metadata["positive_class"], table.name) == (["rest", "flood"], 1, "best.ckpt")
    says = r"terramind_v1_tiny with UNetDecoder; .* random weights; .* \d+ generated chips \(v0\) for 2 epochs"
    assert re.match(says, metadata["detail"])
    assert list(metadata["data"]["digests"]) == ["test"]
    assert {"modalities", "means", "stds", "timesteps"} <= metadata["inputs"].keys()
    assert not any("/" in str(value) for value in metadata["inputs"].values())
    baselines = {f"baselines/test/{name}.parquet" for name in ("everything", "nothing", "vv-drop", "vv-vh-change")}
    files = {str(path.relative_to(trained.evaluation)) for path in trained.evaluation.rglob("*") if path.is_file()}
    assert files == {"test/best.parquet"} | baselines


def test_part_of_a_split_does_not_replace_the_table_of_the_whole_and_some_batches_make_none(cli, tested, trained):
    whole, folder, ours = table_of(tested), trained.evaluation / "test", ("--ckpt", trained.best)
    part = table_of(cli("test", *ours, "--limit", 1, "--format", "json"))
    assert len(part) < len(whole) == len(read_table(folder / "best.parquet"))
    (folder / "best-part.parquet").unlink()
    before = (folder / "best.parquet").stat().st_mtime_ns
    outcome = cli("test", *ours, *ONE_CHIP, "--trainer.limit_test_batches", "2")
    assert (outcome.code, "2 of 3 chips were tested" in outcome.err) == (0, True)
    assert (folder / "best.parquet").stat().st_mtime_ns == before


def test_validate_gives_the_loss_of_the_best_epoch_and_the_scores_of_a_test_of_its_split(cli, trained, tmp_path: Path):
    before = set(trained.path.rglob("*"))
    found = json.loads(cli("validate", "--ckpt", trained.best, "--format", "json").ok().out)["metrics"]
    assert found["val/loss"] == pytest.approx(trained.read_record()["best_metrics"]["val/loss"], abs=1e-6)
    arguments = ("--split", "val", "--output", tmp_path, "--no-baselines", "--format", "json")
    outcome = cli("test", "--ckpt", trained.best, *arguments)
    assert table_of(outcome).metadata["split"] == "val"
    assert json.loads(outcome.out)["metrics"]["test/mIoU"] == pytest.approx(found["val/mIoU"], abs=1e-6)
    (tmp_path / "best.ckpt").write_bytes(b"another model's")
    refused = cli("test", "--ckpt", tmp_path / "best.ckpt", "--config", trained.recipe, *arguments)
    assert (refused.code, "other weights" in refused.err) == (2, True), refused.err
    assert set(trained.path.rglob("*")) == before


def test_text_says_which_iou_is_which_and_batches_change_no_count(cli, tested, trained, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(console, "LOG_EVERY", 0.0)  # a pass of seconds shows nothing
    outcome = cli("test", "--ckpt", trained.best, "--output", tmp_path, "--no-baselines", *ONE_CHIP)
    assert re.search(r"floodrepro: batches: 100%.* 3/3 ", outcome.err), outcome.err
    ious = [line.split() for line in outcome.out.split("\n\n")[1].splitlines()]
    assert [(row[0], row[-1]) for row in ious[1:]] == [("pooled", "chips"), ("mean", "chips"), ("mean", "events")]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "test" / "best.parquet"]
    alone = read_table(tmp_path / "test" / "best.parquet")
    assert np.abs(alone.counts - table_of(tested).counts).sum() <= 4  # sums of other lengths may round a pixel over


def test_checkpoint_that_is_replaced_while_it_is_tested_leaves_no_table(cli, trained, tmp_path: Path, monkeypatch):
    best, run_pass = Path(shutil.copy(trained.best, tmp_path / "best.ckpt")), passes.run_pass
    monkeypatch.setattr(passes, "run_pass", lambda *a, **k: (run_pass(*a, **k), best.open("ab").write(b"0"))[0])
    outcome = cli("test", "--ckpt", best, "--config", trained.recipe, "--output", tmp_path, "--no-baselines")
    assert (outcome.code, "was replaced while it was tested" in outcome.err) == (1, True), outcome.err
    assert not list(tmp_path.rglob("*.parquet"))


def test_predicted_masks_are_named_after_chips_and_lie_on_their_grids(predicted, chips):
    outcome, masks = predicted
    listed = ids_of(chips, "test")
    for chip in listed:
        with (
            rasterio.open(masks / f"{chip}_pred.tif") as mine,
            rasterio.open(masks / f"{chip}_prob.tif") as probable,
            rasterio.open(chips / "data" / "MASK" / f"{chip}_annotation_flood.tif") as truth,
        ):
            grid = truth.crs, truth.transform, truth.shape
            assert all((one.crs, one.transform, one.shape) == grid for one in (mine, probable))
            assert mine.dtypes + probable.dtypes == ("int16", "float32")
            assert np.array_equal(probable.read(1) > 0.5, mine.read(1) == 1)
            assert len(np.unique(probable.read(1))) > 100  # no zeros in a type that cannot hold them
    assert len(json.loads(outcome.out)["files"]) == len(list(masks.iterdir())) == 2 * len(listed)


def test_a_models_predictions_as_masks_make_the_table_of_its_test(cli, trained, tested, predicted, tmp_path):
    """predict, then test --masks: the same counts as test --ckpt, so both ways are compared like with like."""
    model, arguments = table_of(tested), ("--config", trained.recipe, "--output", tmp_path, "--format", "json")
    masks = table_of(cli("test", "--masks", predicted[1], "--name", "again", *arguments))
    assert refuse_to_compare(masks, model) is None
    assert np.abs(masks.counts - model.counts).sum() <= 4
    probable = table_of(cli("test", "--masks", predicted[1], "--name", "prob", "--probability", *arguments))
    assert np.abs(probable.histogram - model.histogram).sum() <= 20
    assert jackknife(model.counts, iou, other=probable.counts).estimate == pytest.approx(0, abs=1e-3)


def test_pixels_that_no_satellite_saw_at_the_event_are_marked(cli, trained, own_chips, predicted, tmp_path: Path):
    """And probabilities in eight bits are the same to half a step."""
    chip, other = ids_of(own_chips, "test")[:2]
    for modality, place in (("S2L2A", np.s_[:4, :6]), ("S1RTC", np.s_[2:9, :5])):
        path = own_chips / "data" / modality / f"{chip}_{modality}.zarr.zip"
        with zarr.ZipStore(str(path), mode="r") as store:
            bands = zarr.open_consolidated(store, mode="r")["bands"][:]
        bands[(EVENT, slice(None), *place)] = NO_DATA  # in float16 that is -10000
        path.unlink()
        with zarr.ZipStore(str(path), mode="w") as store:
            zarr.group(store).array("bands", bands)
    arguments = ("--ckpt", trained.best, "--data-root", own_chips, "--probabilities", "uint8")
    cli("predict", *arguments, "--output", tmp_path / "p").ok()
    both = np.zeros((32, 32), bool)
    both[2:4, :5] = True
    for kind, no_data, dtype in (("pred", -1, "int16"), ("prob", 255, "uint8")):
        with rasterio.open(tmp_path / "p" / f"{chip}_{kind}.tif") as mask:
            assert (mask.nodata, mask.dtypes) == (no_data, (dtype,))
            assert np.array_equal(mask.read(1) == no_data, both)
    exact, scaled = (rasterio.open(folder / f"{other}_prob.tif").read(1) for folder in (predicted[1], tmp_path / "p"))
    assert np.abs(scaled / 250 - exact).max() <= 0.5 / 250 + 1e-6


@pytest.mark.parametrize("argv", [("test", "--no-baselines"), ("predict", "--probabilities")])
def test_full_disk_is_a_clear_error_and_leaves_nothing_half_written(cli, tested, trained, chips, tmp_path, argv):
    """The table that was there stays; of masks, 32 x 32 classes take less than 2,000 bytes, probabilities more."""
    if argv[0] == "test":
        shutil.copytree(trained.evaluation / "test", tmp_path / "test")
    before = [path.read_bytes() for path in tmp_path.rglob("*.parquet")]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))
    try:
        outcome = cli(argv[0], "--ckpt", trained.best, "--output", tmp_path, *argv[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert outcome.code == 1
    assert re.search("error: a file cannot be used: .*File too large", outcome.err), outcome.err
    names = {"test": ["best.parquet"], "predict": [f"{ids_of(chips, 'test')[0]}_pred.tif"]}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == names[argv[0]]
    assert [path.read_bytes() for path in tmp_path.rglob("*.parquet")] == before


def test_what_cannot_be_done_is_refused_before_the_pass(cli, trained, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    lonely, ours = shutil.copy(trained.best, tmp_path / "lonely.ckpt"), ("--ckpt", trained.best)
    backbone = "--model.init_args.model_args.backbone"
    for argv, code, says in (
        (("predict", *ours, "--output", tmp_path), 2, "not empty"),
        (("test", *ours, "--output", tmp_path / "mine.txt"), 1, "a file cannot be used: Not a directory"),
        (("test", "--ckpt", lonely), 2, "--config YAML"),
        (("test", *ours, "--split", "holdout"), 2, "no split 'holdout'"),
        (("test", *ours, backbone, "terramind_v1_small"), 1, "the config says 'terramind_v1_small'"),
        (("test", "--config", "demo"), 2, "--masks is required"),
    ):
        outcome = cli(*argv)
        assert (outcome.code, says in outcome.err, "batches" in outcome.err) == (code, True, False), outcome.err
        assert len(outcome.report) <= 3
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_config_wins_and_several_test_splits_make_one_pass(cli, trained, tested, metrics, chips, tmp_path):
    all_chips, part = ids_of(chips, "test"), tmp_path / "holdout.txt"
    part.write_text("".join(f"{chip}\n" for chip in all_chips[1:]))
    several = json.dumps({"test": str(chips / "split" / "impactmesh_flood_test.txt"), "holdout": str(part)})
    arguments = ("--output", tmp_path, "--data.init_args.test_split", several, "--model.init_args.loss", "ce")
    outcome = cli("test", "--ckpt", trained.best, "--no-baselines", "--format", "json", *arguments)
    assert "the checkpoint says" not in tested.err
    assert "warning: loss: the checkpoint says 'dice', the config says 'ce'; the config counts" in outcome.err
    result, whole = json.loads(outcome.out), table_of(outcome)
    changed = {name for name, value in metrics.items() if result["metrics"][name] != value}
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
    assert "predicts values that are not finite for 3 chips, the first is EMSR" in outcome.report[0]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
