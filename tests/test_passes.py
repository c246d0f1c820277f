"""validate, test and predict: plain TerraTorch's figures, the config before the checkpoint's memory, chips by name."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import zarr

from floodrepro.data.protocols import EVENT, NO_DATA
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.metrics import confusion, scores

PLAIN_TERRATORCH = """
import json, sys, torch
from terratorch.cli_tools import build_lightning_cli
torch.set_float32_matmul_precision("highest")  # the import leaves "medium": bf16 on CPUs that have it, 3e-4 in mIoU
cli = build_lightning_cli(["test", "--config", sys.argv[1], "--ckpt_path", sys.argv[2]])
print(json.dumps({name: float(value) for name, value in cli.trainer.callback_metrics.items()}))
"""


def split_of(chips: Path, name: str) -> list[str]:
    return (chips / "split" / f"impactmesh_flood_{name}.txt").read_text().split()


def test_metrics_equal_plain_terratorch_to_six_digits(cli, trained, tmp_path: Path):
    ours = json.loads(cli("test", "--ckpt", trained.best, "--format", "json").out)["metrics"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN_TERRATORCH, str(trained.recipe), str(trained.best)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name in ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy", "Class_Accuracy_1", "loss"):
        assert ours[f"test/{name}"] == pytest.approx(theirs[f"test/{name}"], abs=5e-7), name


def test_validate_gives_the_loss_that_the_best_checkpoint_was_chosen_by(cli, trained):
    outcome = cli("validate", "--ckpt", trained.best, "--format", "json")
    assert outcome.code == 0, outcome.err
    metrics = json.loads(outcome.out)["metrics"]
    assert metrics["val/loss"] == pytest.approx(trained.read_record()["best_val_loss"], abs=1e-6)


def test_text_output_is_the_main_metrics_and_which_iou_is_which(cli, trained):
    text = cli("test", "--ckpt", trained.best).out
    metrics, ious = text.split("\n\n")
    assert [line.split()[0] for line in metrics.splitlines()] == [
        f"test/{name}" for name in ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy")
    ]
    rows = [line.split() for line in ious.splitlines()[1:]]
    assert [row[0] for row in rows] == ["pooled", "mean", "mean"]
    assert [row[-1] for row in rows] == ["chips", "chips", "events"]


def test_a_pass_shows_how_far_it_has_come_in_a_log(cli, trained, tmp_path: Path):
    small = ("--data.init_args.batch_size", "1")
    for command in (["test"], ["validate"], ["predict", "--output", tmp_path / "masks"]):
        outcome = cli(*command, "--ckpt", trained.best, *small)
        assert outcome.code == 0, outcome.err
        assert re.search(r"floodrepro: batches: 100%.* 3/3 ", outcome.err), outcome.err


def test_a_validation_writes_nothing_and_a_test_its_tables_only(cli, trained, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(trained.evaluation, ignore_errors=True)
    before = set(trained.path.rglob("*"))
    assert cli("validate", "--ckpt", trained.best).code == 0
    assert set(trained.path.rglob("*")) == before
    assert cli("test", "--ckpt", trained.best).code == 0
    written = {path for path in set(trained.path.rglob("*")) - before if path.is_file()}
    baselines = {f"baselines/test/{name}.parquet" for name in ("everything", "nothing", "vv-drop", "vv-vh-change")}
    assert {str(path.relative_to(trained.evaluation)) for path in written} == {"test/best.parquet"} | baselines
    assert list(tmp_path.iterdir()) == []


def test_baselines_can_be_left_out(cli, trained, tmp_path: Path):
    assert cli("test", "--ckpt", trained.best, "--output", tmp_path, "--no-baselines").code == 0
    assert [path.name for path in tmp_path.rglob("*.parquet")] == ["best.parquet"]


def test_predicted_masks_are_named_after_chips_and_score_what_test_scores(cli, trained, chips, tmp_path: Path):
    masks = tmp_path / "masks"
    outcome = cli("predict", "--ckpt", trained.best, "--output", masks, "--format", "json", "--probabilities")
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
            counts += confusion(truth.read(1), mine.read(1), 2)
    assert len(json.loads(outcome.out)["files"]) == len(list(masks.iterdir())) == 2 * len(split_of(chips, "test"))
    tested = json.loads(cli("test", "--ckpt", trained.best, "--format", "json").out)["metrics"]
    for name, value in scores(counts).items():
        assert tested[f"test/{name}"] == pytest.approx(value, abs=1e-6)


def test_pixels_that_no_satellite_saw_at_the_event_are_marked(cli, trained, own_chips, tmp_path: Path):
    chip, seen = split_of(own_chips, "test")[0], {"S2L2A": np.s_[:4, :6], "S1RTC": np.s_[2:9, :5]}
    for modality, place in seen.items():
        path = own_chips / "data" / modality / f"{chip}_{modality}.zarr.zip"
        with zarr.ZipStore(str(path), mode="r") as store:
            bands = zarr.open_consolidated(store, mode="r")["bands"][:]
        bands[(EVENT, slice(None), *place)] = NO_DATA  # in float16 that is -10000
        path.unlink()
        with zarr.ZipStore(str(path), mode="w") as store:
            zarr.group(store).array("bands", bands)
            zarr.consolidate_metadata(store)
    arguments = ("--ckpt", trained.best, "--data-root", own_chips, "--probabilities", "--output", tmp_path / "p")
    outcome = cli("predict", *arguments)
    assert outcome.code == 0, outcome.err
    both = np.zeros((32, 32), bool)
    both[2:4, :5] = True
    with (
        rasterio.open(tmp_path / "p" / f"{chip}_pred.tif") as mask,
        rasterio.open(tmp_path / "p" / f"{chip}_prob.tif") as probable,
    ):
        assert mask.nodata == -1
        assert np.array_equal(mask.read(1) == -1, both)
        assert np.array_equal(np.isnan(probable.read(1)), both)


def test_predict_overwrites_nothing(cli, trained, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    outcome = cli("predict", "--ckpt", trained.best, "--output", tmp_path)
    assert outcome.code == 2
    assert "not empty" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_config_wins_over_the_checkpoint_and_the_difference_is_named(cli, trained):
    plain = cli("test", "--ckpt", trained.best, "--format", "json")
    other = cli("test", "--ckpt", trained.best, "--format", "json", "--model.init_args.loss", "ce")
    assert "the checkpoint says" not in plain.err
    assert "warning: loss: the checkpoint says 'dice', the config says 'ce'; the config counts" in other.err
    of_plain, of_other = (json.loads(outcome.out)["metrics"] for outcome in (plain, other))
    assert of_other.pop("test/loss") != of_plain.pop("test/loss")  # obeyed, and nothing else has changed
    assert of_other == of_plain


def test_checkpoint_of_another_shape_is_refused_with_both_names(cli, trained, chips):
    outcome = cli(
        *("test", "--ckpt", trained.best, "--config", "terramind_v1_base_impactmesh_flood_amd"),
        *("--data-root", chips, "--precision", "fp32"),
    )
    assert outcome.code == 1
    assert "the checkpoint says 'terramind_v1_tiny', the config says 'terramind_v1_base'" in outcome.err
    assert len(outcome.report) <= 3


def test_config_beside_the_checkpoint_has_to_be_one(cli, trained, tmp_path: Path):
    path = Path(shutil.copy(trained.best, tmp_path / "lonely.ckpt"))
    assert "--config YAML" in cli("test", "--ckpt", path).err
    for name in ("recipe.yaml", "other.yaml"):
        shutil.copy(trained.recipe, tmp_path / name)
    assert "2 configs lie beside" in cli("test", "--ckpt", path).err


def test_missing_chips_are_found_before_the_work_starts(cli, trained, own_chips):
    chip = split_of(own_chips, "test")[0]
    (own_chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").unlink()
    outcome = cli("test", "--ckpt", trained.best, "--data-root", own_chips)
    assert outcome.code == 1
    assert f"{chip}_S1RTC.zarr.zip" in outcome.err
    assert "batches" not in outcome.err


def test_a_split_can_be_chosen_and_an_unknown_one_is_named(cli, trained, tmp_path: Path):
    outcome = cli("test", "--ckpt", trained.best, "--split", "val", "--output", tmp_path, "--format", "json")
    assert chip_table.read_table(Path(json.loads(outcome.out)["tables"]["val"])).metadata["split"] == "val"
    wrong = cli("test", "--ckpt", trained.best, "--split", "holdout")
    assert wrong.code == 2
    assert "no split 'holdout'" in wrong.err


def test_several_test_splits_are_tested_in_one_pass(cli, trained, chips, tmp_path: Path):
    all_chips, part = split_of(chips, "test"), tmp_path / "holdout.txt"
    part.write_text("".join(f"{chip}\n" for chip in all_chips[1:]))
    several = json.dumps({"test": str(chips / "split" / "impactmesh_flood_test.txt"), "holdout": str(part)})
    arguments = ("--ckpt", trained.best, "--output", tmp_path, "--data.init_args.test_split", several)
    outcome = cli("test", *arguments, "--format", "json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    whole, holdout = (chip_table.read_table(Path(result["tables"][name])) for name in ("test", "holdout"))
    assert (holdout.chips.tolist(), holdout.metadata["subset_of"]) == (all_chips[1:], "test")
    assert np.array_equal(holdout.counts, whole.counts[1:])
    assert result["metrics"]["test/holdout/IoU_0"] == pytest.approx(scores(holdout.counts.sum(0))["IoU_0"])


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
