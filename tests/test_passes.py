"""validate, test and predict: the same figures as plain TerraTorch, the config before the checkpoint's memory."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml

from floodrepro import recipe as recipes
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


def test_text_output_is_the_main_metrics(cli, trained):
    lines = cli("test", "--ckpt", trained.best).out.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"test/{name}" for name in ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy")
    ]


def test_a_pass_shows_how_far_it_has_come_in_a_log(cli, trained, tmp_path: Path):
    small = ("--data.init_args.batch_size", "1")
    for command in (["test"], ["validate"], ["predict", "--output", tmp_path / "masks"]):
        outcome = cli(*command, "--ckpt", trained.best, *small)
        assert outcome.code == 0, outcome.err
        assert "floodrepro: batches 3/3" in outcome.err


def test_a_validation_writes_nothing_and_a_test_its_chip_table_only(cli, trained, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(trained.evaluation, ignore_errors=True)
    before = set(trained.path.rglob("*"))
    assert cli("validate", "--ckpt", trained.best).code == 0
    assert set(trained.path.rglob("*")) == before
    assert cli("test", "--ckpt", trained.best).code == 0
    written = {path for path in set(trained.path.rglob("*")) - before if path.is_file()}
    assert written == {trained.evaluation / "test" / "best.parquet"}
    assert list(tmp_path.iterdir()) == []


def test_predicted_masks_are_georeferenced_and_score_what_test_scores(cli, trained, chips, tmp_path: Path):
    masks = tmp_path / "masks"
    outcome = cli("predict", "--ckpt", trained.best, "--output", masks, "--format", "json")
    assert outcome.code == 0, outcome.err
    counts = np.zeros((2, 2), np.int64)
    for chip in split_of(chips, "test"):
        with (
            rasterio.open(masks / f"{chip}_DEM_pred.tif") as mine,
            rasterio.open(chips / "data" / "MASK" / f"{chip}_annotation_flood.tif") as truth,
        ):
            assert (mine.crs, mine.transform, mine.shape) == (truth.crs, truth.transform, truth.shape)
            counts += confusion(truth.read(1), mine.read(1), 2)
    assert len(json.loads(outcome.out)["files"]) == len(split_of(chips, "test"))
    tested = json.loads(cli("test", "--ckpt", trained.best, "--format", "json").out)["metrics"]
    for name, value in scores(counts).items():
        assert tested[f"test/{name}"] == pytest.approx(value, abs=1e-6)


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


def copy_beside_recipe(trained, folder: Path, name: str = "weights.ckpt") -> Path:
    shutil.copy(trained.recipe, folder / "recipe.yaml")
    return Path(shutil.copy(trained.best, folder / name))


def test_weights_that_lack_a_tensor_or_have_one_too_many_are_refused(cli, trained, tmp_path: Path):
    path = copy_beside_recipe(trained, tmp_path)
    content = torch.load(path, weights_only=True)
    first = next(iter(content["state_dict"]))
    for change in ("less", "more"):
        damaged = {**content, "state_dict": dict(content["state_dict"])}
        if change == "less":
            del damaged["state_dict"][first]
        else:
            damaged["state_dict"]["model.stray.weight"] = torch.zeros(1)
        torch.save(damaged, path)
        outcome = cli("test", "--ckpt", path)
        assert outcome.code == 1
        assert ("stray" if change == "more" else first.removeprefix("model.")) in outcome.err


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_checkpoint_is_found(cli, trained, tmp_path: Path, suffix, keep):
    path = copy_beside_recipe(trained, tmp_path, f"weights{suffix}")
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({"model.weight": torch.zeros(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    outcome = cli("test", "--ckpt", path)
    assert outcome.code == 1
    assert "damaged or truncated" in outcome.err
    assert len(outcome.report) <= 3


class Payload:
    """Runs code where a pickle is opened carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_checkpoint_that_holds_code_is_not_opened(cli, trained, tmp_path: Path, how):
    path = copy_beside_recipe(trained, tmp_path)
    trace = tmp_path / "code-was-run"
    if how == "torch":
        torch.save({"state_dict": {}, "extra": Payload(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": Payload(trace)}))
    outcome = cli("test", "--ckpt", path)
    assert outcome.code == 1
    assert "holds code" in outcome.err
    assert len(outcome.report) <= 3
    assert not trace.exists()


def test_missing_config_beside_the_checkpoint_is_asked_for(cli, trained, tmp_path: Path):
    lonely = Path(shutil.copy(trained.best, tmp_path / "lonely.ckpt"))
    outcome = cli("test", "--ckpt", lonely)
    assert outcome.code == 2
    assert "--config YAML" in outcome.err


def test_two_configs_beside_the_checkpoint_are_not_chosen_between(cli, trained, tmp_path: Path):
    path = copy_beside_recipe(trained, tmp_path)
    shutil.copy(trained.recipe, tmp_path / "other.yaml")
    assert "2 configs lie beside" in cli("test", "--ckpt", path).err


def damage_root(chips: Path) -> str:
    shutil.rmtree(chips / "data")
    return "the data root does not exist"


def empty_root(chips: Path) -> str:
    shutil.rmtree(chips / "data")
    (chips / "data").mkdir()
    return "the data root is empty"


def remove_part(chips: Path) -> str:
    chip = split_of(chips, "test")[0]
    (chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").unlink()
    return f"1 of {len(split_of(chips, 'test'))} chips have no S1RTC file, the first is {chip}_S1RTC.zarr.zip"


def name_stranger(chips: Path) -> str:
    with (chips / "split" / "impactmesh_flood_test.txt").open("a") as file:
        file.write("EMSR1_1_35TMF_x1_y1\n")
    return "the first is EMSR1_1_35TMF_x1_y1_S2L2A.zarr.zip"


def blank_line(chips: Path) -> str:
    path = chips / "split" / "impactmesh_flood_test.txt"
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    return "1 blank lines, the first is line 2"


def empty_split(chips: Path) -> str:
    (chips / "split" / "impactmesh_flood_test.txt").write_text("")
    return "the test split is empty"


def no_split(chips: Path) -> str:
    (chips / "split" / "impactmesh_flood_test.txt").unlink()
    return "the test split cannot be read"


@pytest.mark.parametrize(
    "damage", [damage_root, empty_root, remove_part, name_stranger, blank_line, empty_split, no_split]
)
def test_missing_data_is_found_before_the_work_starts(cli, trained, own_chips, damage):
    says = damage(own_chips)
    outcome = cli("test", "--ckpt", trained.best, "--data-root", own_chips)
    assert outcome.code == 1
    assert says in outcome.err
    assert len(outcome.report) <= 3
    assert "over " not in outcome.err.split("loading TerraTorch")[-1].replace("is never written over", "")


def test_a_path_without_flood_in_its_name_reads_the_same(cli, trained, chips, tmp_path: Path):
    """impactmesh 0.1.2 guesses the disaster from the path, "fire" first; the recipes say which it is."""
    elsewhere = Path(shutil.copytree(chips, tmp_path / "firefly"))
    here = json.loads(cli("test", "--ckpt", trained.best, "--format", "json").out)["metrics"]
    there = cli("test", "--ckpt", trained.best, "--data-root", elsewhere, "--format", "json")
    assert there.code == 0, there.err
    assert json.loads(there.out)["metrics"] == here


def test_resolved_recipe_is_a_terratorch_yaml(trained):
    recipe = yaml.safe_load(trained.recipe.read_text())
    assert set(recipe) <= set(recipes.SECTIONS)
