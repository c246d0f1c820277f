"""The shipped recipes: what they say, that TerraTorch takes them, and what is reported when one is wrong."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from jsonargparse import Namespace

from conftest import ROOT
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.run_folder import RunFolder
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import into_run_folder, without_files

BASE = "terramind_v1_base_impactmesh_flood_amd"
TINY = "terramind_v1_tiny_impactmesh_flood"
V1 = {size: f"terramind_v1_{size}_impactmesh_flood_v1" for size in ("base", "tiny")}
BINARY = {size: f"{name}_binary" for size, name in V1.items()}
NAMES = [BASE, TINY, "demo", *V1.values(), *BINARY.values()]
RANDOM_WEIGHTS = "--model.init_args.model_args.backbone_pretrained=false"
ON_CPU = "--trainer.precision=32-true"


def built(name: str) -> RecipeCLI:
    cli = RecipeCLI([recipes.find(name)], [RANDOM_WEIGHTS, ON_CPU])
    cli.build()
    return cli


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        (BASE, 167_800_450, 180),
        (TINY, 13_992_066, 216),
        ("demo", 13_992_066, 216),
        (V1["base"], 167_800_450 + 64 + 1, 180),  # one class more: 64 weights and a bias in the head
        (V1["tiny"], 13_992_066 + 32 + 1, 216),
        (BINARY["base"], 167_800_450, 180),
        (BINARY["tiny"], 13_992_066, 216),
    ],
)
def test_every_shipped_recipe_builds_the_model_it_claims(name, parameters, tensors):
    cli = built(name)
    assert sum(p.numel() for p in cli.model.parameters()) == parameters
    assert all(p.requires_grad for p in cli.model.parameters())
    assert len(cli.model.state_dict()) == tensors
    assert cli.trainer.max_epochs == cli.recipe["trainer"]["max_epochs"]


def test_no_shipped_recipe_is_left_out_of_the_test_above():
    assert set(recipes.shipped()) == set(NAMES)


def test_base_recipe_is_the_published_one():
    recipe = recipes.read(recipes.find(BASE))
    trainer, task, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    stopping = next(c for c in trainer["callbacks"] if c["class_path"].endswith("EarlyStopping"))["init_args"]
    checkpoint = next(c for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint"))["init_args"]
    assert (recipe["seed_everything"], trainer["precision"], trainer["max_epochs"]) == (42, "16-mixed", 50)
    assert (stopping["monitor"], stopping["patience"]) == ("val/loss", 10)
    assert (checkpoint["monitor"], checkpoint["save_weights_only"]) == ("val/loss", True)
    assert recipe["optimizer"]["class_path"].endswith("AdamW")
    assert recipe["optimizer"]["init_args"] == {"lr": 1e-4, "weight_decay": 0.01}
    assert recipe["lr_scheduler"]["init_args"] == {"monitor": "val/loss", "factor": 0.5, "patience": 2}
    assert (data["batch_size"], data["num_workers"], data["no_data_replace"]) == (16, 8, 0)
    assert data["timesteps"] == [0, 1, 2, 3]
    assert (data["augment"], data["label_map"]) == (True, [0, 1])
    assert (task["loss"], task["ignore_index"], task["class_weights"]) == ("dice", -1, [0.342, 1.316])
    assert task["model_args"] == {
        "backbone": "terramind_v1_base",
        "backbone_pretrained": True,
        "backbone_modalities": ["S2L2A", "S1RTC", "DEM"],
        "backbone_use_temporal": True,
        "backbone_temporal_pooling": "concat",
        "backbone_temporal_n_timestamps": 4,
        "necks": [
            {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
            {"name": "ReshapeTokensToImage", "remove_cls_token": False},
            {"name": "LearnedInterpolateToPyramidal"},
        ],
        "decoder": "UNetDecoder",
        "decoder_channels": [512, 256, 128, 64],
        "head_dropout": 0.1,
        "num_classes": 2,
    }
    tiling = task["tiled_inference_parameters"]
    assert tiling == {"h_crop": 256, "w_crop": 256, "h_stride": 208, "w_stride": 208, "batch_size": 64, "delta": 8}


def test_statistics_written_out_are_impactmesh_0_1_2s_own():
    from impactmesh.impactmesh_datamodule import datasets_stats

    for name in set(NAMES) - set(V1.values()):
        data = recipes.read(recipes.find(name))["data"]["init_args"]
        assert data["means"] == datasets_stats["flood"]["means"]
        assert data["stds"] == datasets_stats["flood"]["stds"]


def test_v1_recipes_differ_from_their_siblings_in_the_protocol_only():
    """Statistics: impactmesh 0.2.0's for v1 (its package was read), 0.1.2's for v1-binary, as the published ones."""
    for size, sibling in (("base", BASE), ("tiny", TINY)):
        plain, v1, binary = (recipes.read(recipes.find(name)) for name in (sibling, V1[size], BINARY[size]))
        data, task = v1["data"]["init_args"], v1["model"]["init_args"]
        assert data["means"]["S2L2A"][0] == 1460.264
        assert (data["means"]["S1RTC"], data["stds"]["DEM"]) == ([-9.871, -15.993], [368.796])
        assert (data["label_map"], len(data["class_names"])) == ([0, 1, 2], 3)
        assert list(data["test_split"]) == task["test_dataloaders_names"] == ["test", "seen_events", "holdout"]
        assert (task["model_args"]["num_classes"], task["class_weights"]) == (3, [0.044, 0.487, 0.469])
        assert binary["data"]["init_args"].pop("label_map") == [0, 0, 1]
        plain["data"]["init_args"].pop("label_map")
        assert binary["data"] == plain["data"]
        assert binary["model"] == plain["model"]
        assert binary["optimizer"] == v1["optimizer"] == plain["optimizer"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_opens_with_what_it_assumes_and_names_no_machine(name):
    text = recipes.find(name).read_text()
    head = text[: text.index("seed_everything:")]
    assert all(word in head for word in ("Assumes", "Launch", "Override"))
    assert f"--config {name} " in head
    values = re.findall(r"^[^#\n]*:\s+(/\S*|~\S*)", text, re.MULTILINE)
    assert values == []
    assert "wandb" not in text[text.index("seed_everything:") :]


def test_overrides_inside_untyped_arguments_keep_their_type():
    overrides = ["--model.init_args.model_args.backbone_pretrained", "false"]
    overrides += ["--model.init_args.model_args.num_classes=3", "--model.init_args.model_args.head_dropout", "1e-2"]
    overrides += ["--model.init_args.model_args.decoder_channels=[64, 32, 16, 8]", "--trainer.max_epochs=3"]
    recipe = RecipeCLI([recipes.find(BASE)], overrides).recipe
    model_args = recipe["model"]["init_args"]["model_args"]
    assert model_args["backbone_pretrained"] is False
    assert (model_args["num_classes"], model_args["head_dropout"]) == (3, 0.01)
    assert model_args["decoder_channels"] == [64, 32, 16, 8]
    assert recipe["trainer"]["max_epochs"] == 3


def test_folding_adds_no_library_default_and_loses_nothing():
    source = recipes.read(recipes.find(BASE))
    assert RecipeCLI([recipes.find(BASE)]).recipe == source


def test_fingerprint_depends_on_values_only(tmp_path: Path):
    source = recipes.read(recipes.find("demo"))
    shuffled = {key: source[key] for key in reversed(source)}
    assert recipes.fingerprint(shuffled) == recipes.fingerprint(source)
    source["seed_everything"] = 43
    assert recipes.fingerprint(shuffled) != recipes.fingerprint(source)


@pytest.mark.parametrize("given", [["--trainer.limit_train_batches", "1"], ["--trainer.limit_train_batches=1"]])
def test_a_limit_of_one_batch_is_not_read_as_all_of_them(given, tmp_path: Path):
    cli = RecipeCLI([recipes.find("demo")], given)
    path = tmp_path / "r.yaml"
    path.write_text(recipes.to_yaml(cli.recipe))
    for parsed in (cli, RecipeCLI([path])):
        for found in (parsed.recipe["trainer"]["limit_train_batches"], parsed.config.trainer.limit_train_batches):
            assert (found, type(found)) == (1, int)
    cli.build(lambda config: without_files(config, progress_bar=False))
    assert (cli.trainer.limit_train_batches, type(cli.trainer.limit_train_batches)) == (1, int)
    share = RecipeCLI([path], ["--trainer.limit_train_batches=0.5"]).config.trainer.limit_train_batches
    assert (share, type(share)) == (0.5, float)


def test_all_problems_of_a_recipe_come_in_one_report(tmp_path: Path):
    recipe = recipes.read(recipes.find("demo"))
    recipe["trainr"] = {}
    recipe["trainer"]["max_epochs"] = "many"
    recipe["trainer"]["max_epochz"] = 1
    recipe["trainer"]["callbacks"][1]["class_path"] = "nowhere.Monitor"
    recipe["trainer"]["callbacks"][2]["init_args"]["patienc"] = 1
    recipe["data"]["init_args"]["batch_size"] = "big"
    recipe["model"]["init_args"]["los"] = "dice"
    recipe["optimizer"]["init_args"]["lrr"] = 1
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError) as caught:
        RecipeCLI([path])
    report = caught.value.report()
    for part in (
        "8 problems",
        "trainr: unknown key, did you mean 'trainer'?",
        "trainer.max_epochs: expected int, got 'many'",
        "trainer.max_epochz: unknown key",
        "trainer.callbacks.1.class_path: 'nowhere.Monitor' does not import",
        "trainer.callbacks.2.init_args.patienc: unknown key of EarlyStopping",
        "data.init_args.batch_size: expected int, got 'big'",
        "model.init_args.los: unknown key of SemanticSegmentationTask",
        "optimizer.init_args.lrr: unknown key of AdamW",
        str(path),
    ):
        assert part in report
    assert len(report.splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["data"].update(class_path="floodrepro.Nothing"), "data.class_path: 'floodrepro.Nothing' does not"),
        (lambda r: r["model"].update(class_path="no.such.Task"), "model.class_path: 'no.such.Task' does not import"),
        (lambda r: r.pop("model"), "the section 'model' is missing"),
        (lambda r: r["model"]["init_args"]["model_args"].update(backbone="terramind_v9"), "does not build"),
        (lambda r: r["model"]["init_args"]["model_args"].update(decoder="NoDecoder"), "does not build"),
    ],
)
def test_recipe_that_cannot_be_built_is_a_clear_error(change, says, tmp_path: Path):
    recipe = recipes.read(recipes.find("demo"))
    change(recipe)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError) as caught:
        RecipeCLI([path]).build()
    assert says in caught.value.report()
    assert len(caught.value.report().splitlines()) <= 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.init_args.nothing=2", "unknown key 'nothing' of floodrepro"),
        ("--trainer.max_epochs=x", "trainer.max_epochs: expected int"),
        ("--trainer.nothing=1", "--trainer.nothing"),
    ],
)
def test_wrong_override_is_laid_to_the_command_line(override, says):
    with pytest.raises(UsageError) as caught:
        RecipeCLI([recipes.find("demo")], [override])
    assert says in caught.value.report()
    assert "command line" in caught.value.report()


def test_wheel_carries_the_recipes(tmp_path: Path):
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        for path in (ROOT / "configs").glob("*.yaml"):
            assert archive.read(f"floodrepro/configs/{path.name}") == path.read_bytes()


@pytest.mark.parametrize(("monitor", "mode", "k"), [("val/mIoU", "max", 1), ("val/loss", "min", 3)])
def test_best_weights_by_the_validation_loss_are_kept_beside_what_a_recipe_keeps(tmp_path, monitor, mode, k):
    arguments = Namespace(monitor=monitor, mode=mode, save_top_k=k, filename="mine")
    callbacks = [Namespace(class_path="lightning.pytorch.callbacks.ModelCheckpoint", init_args=arguments)]
    config = Namespace(trainer=Namespace(plugins=None, logger=None, callbacks=callbacks, enable_checkpointing=None))
    into_run_folder(config, RunFolder(tmp_path), progress_bar=True)
    own, best = (callback.init_args for callback in config.trainer.callbacks)
    assert own.filename == ("mine" if k == 1 else "mine-{epoch}")  # three under one name would be one
    assert (best.filename, best.monitor, best.mode, best.save_top_k) == ("best", "val/loss", "min", 1)


def test_recipe_with_another_monitor_ends_with_the_best_checkpoint_that_it_names(cli, chips, tmp_path):
    keep = ("--trainer.callbacks.monitor=val/mIoU", "--trainer.callbacks.mode=max", "--trainer.callbacks.save_top_k=2")
    outcome = cli(
        *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--name", "two"),
        *("--trainer.max_epochs=2", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"),
        *("--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", *keep, "--format", "json"),
    )
    assert outcome.code == 0, outcome.err
    assert Path(json.loads(outcome.out)["checkpoint"]).is_file()
