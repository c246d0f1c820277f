"""The shipped recipes: what they say, that TerraTorch takes them, and what is reported when one is wrong."""

import re
from pathlib import Path

import pytest
import yaml

from floodrepro import recipe as recipes
from floodrepro.data.protocols import protocol_of
from floodrepro.errors import UsageError
from floodrepro.training.terratorch_cli import RecipeCLI

BASE = "terramind_v1_base_impactmesh_flood_amd"
TINY = "terramind_v1_tiny_impactmesh_flood"
V1 = {size: f"terramind_v1_{size}_impactmesh_flood_v1" for size in ("base", "tiny")}
BINARY = {size: f"{name}_binary" for size, name in V1.items()}
NAMES = [BASE, TINY, "demo", *V1.values(), *BINARY.values()]
RANDOM_WEIGHTS = "--model.init_args.model_args.backbone_pretrained=false"
ON_CPU = "--trainer.precision=32-true"
PUBLISHED = """
seed_everything: 42
trainer: {precision: 16-mixed, max_epochs: 50}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-4, weight_decay: 0.01}}
lr_scheduler: {init_args: {monitor: val/loss, factor: 0.5, patience: 2}}
data:
  init_args: {batch_size: 16, num_workers: 8, no_data_replace: 0, timesteps: [0, 1, 2, 3], augment: true, protocol: v0}
model:
  init_args:
    loss: dice
    ignore_index: -1
    class_weights: [0.342, 1.316]
    tiled_inference_parameters: {h_crop: 256, w_crop: 256, h_stride: 208, w_stride: 208, batch_size: 64, delta: 8}
    model_args:
      backbone: terramind_v1_base
      backbone_pretrained: true
      backbone_modalities: [S2L2A, S1RTC, DEM]
      backbone_use_temporal: true
      backbone_temporal_pooling: concat
      backbone_temporal_n_timestamps: 4
      necks:
        - {name: SelectIndices, indices: [2, 5, 8, 11]}
        - {name: ReshapeTokensToImage, remove_cls_token: false}
        - {name: LearnedInterpolateToPyramidal}
      decoder: UNetDecoder
      decoder_channels: [512, 256, 128, 64]
      head_dropout: 0.1
      num_classes: 2
"""


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        (BASE, 167_800_450, 180),
        (V1["tiny"], 13_992_066 + 32 + 1, 216),  # one class more than v0: 32 weights and a bias in the head
    ],
)
def test_every_shipped_recipe_builds_the_model_it_claims(name, parameters, tensors):
    cli = RecipeCLI([recipes.find(name)], [RANDOM_WEIGHTS, ON_CPU])
    cli.build()
    assert sum(p.numel() for p in cli.model.parameters()) == parameters
    assert all(p.requires_grad for p in cli.model.parameters())
    assert len(cli.model.state_dict()) == tensors
    assert cli.trainer.max_epochs == cli.recipe["trainer"]["max_epochs"]


def test_every_shipped_recipe_is_known_here_parses_and_trains_on_one_device():
    assert set(recipes.shipped()) == set(NAMES)
    for name in NAMES:
        recipe = RecipeCLI([recipes.find(name)]).recipe
        assert recipe == recipes.read_yaml(recipes.find(name))  # merging adds no library default and loses nothing
        assert recipe["trainer"]["devices"] == 1
        assert protocol_of(recipe).name != "custom"
        assert recipe["model"]["init_args"]["model_args"]["num_classes"] == len(protocol_of(recipe).class_names)


def test_base_recipe_is_the_published_one_and_statistics_written_out_are_impactmesh_0_1_2s_own():
    from impactmesh.impactmesh_datamodule import datasets_stats

    recipe, published = recipes.read_yaml(recipes.find(BASE)), yaml.safe_load(PUBLISHED)
    assert recipes.differences(recipe, recipes.fold([recipe, published])) == {}
    assert recipe["optimizer"] == published["optimizer"]
    assert recipe["model"]["init_args"]["model_args"] == published["model"]["init_args"]["model_args"]
    callbacks = {one["class_path"].rpartition(".")[2]: one["init_args"] for one in recipe["trainer"]["callbacks"][1:]}
    assert (callbacks["EarlyStopping"]["monitor"], callbacks["EarlyStopping"]["patience"]) == ("val/loss", 10)
    assert callbacks["ModelCheckpoint"]["monitor"] == "val/loss"
    assert callbacks["ModelCheckpoint"]["save_weights_only"]
    for name in set(NAMES) - set(V1.values()):
        data = recipes.read_yaml(recipes.find(name))["data"]["init_args"]
        assert all(data[key] == datasets_stats["flood"][key] for key in ("means", "stds"))


def test_v1_recipes_differ_from_their_siblings_in_the_protocol_only():
    """Statistics: impactmesh 0.2.0's for v1 (its package was read), 0.1.2's for v1-binary, as the published ones."""
    for size, sibling in (("base", BASE), ("tiny", TINY)):
        plain, v1, binary = (recipes.read_yaml(recipes.find(name)) for name in (sibling, V1[size], BINARY[size]))
        data, task = v1["data"]["init_args"], v1["model"]["init_args"]
        assert data["means"]["S2L2A"][0] == 1460.264
        assert (data["means"]["S1RTC"], data["stds"]["DEM"]) == ([-9.871, -15.993], [368.796])
        assert (protocol_of(v1).label_map, len(protocol_of(v1).class_names)) == ((0, 1, 2), 3)
        assert list(data["test_split"]) == task["test_dataloaders_names"] == ["test", "seen_events", "holdout"]
        assert (task["model_args"]["num_classes"], task["class_weights"]) == (3, [0.044, 0.487, 0.469])
        assert protocol_of(binary).label_map == (0, 0, 1)
        assert [recipe["data"]["init_args"].pop("protocol") for recipe in (binary, plain)] == ["v1-binary", "v0"]
        assert all(binary[key] == plain[key] for key in ("data", "model", "optimizer"))
        assert v1["optimizer"] == plain["optimizer"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_opens_with_what_it_assumes_and_names_no_machine(name):
    text = recipes.find(name).read_text()
    head = text[: text.index("seed_everything:")]
    assert all(word in head for word in ("Assumes", "Launch", "Override"))
    assert f"--config {name} " in head
    assert re.findall(r"^[^#\n]*:\s+(/\S*|~\S*)", text, re.MULTILINE) == []
    assert "wandb" not in text[text.index("seed_everything:") :]


def test_overrides_inside_untyped_arguments_are_what_yaml_makes_of_them():
    place = "--model.init_args.model_args"
    overrides = [f"{place}.backbone_pretrained", "false", f"{place}.num_classes=3", f"{place}.head_dropout", "1e-2"]
    overrides += [f"{place}.decoder_channels=[64, 32, 16, 8]", f"{place}.necks", "null", f"{place}.note=2024-01-01"]
    cli = RecipeCLI([recipes.find(BASE)], [*overrides, "--trainer.max_epochs=3"])
    for model_args in (cli.recipe["model"]["init_args"]["model_args"], cli.config.model.init_args.model_args):
        assert model_args["backbone_pretrained"] is False
        assert (model_args["num_classes"], model_args["head_dropout"]) == (3, 0.01)
        assert model_args["decoder_channels"] == [64, 32, 16, 8]
        assert (model_args["necks"], model_args["note"]) == (None, "2024-01-01")
    assert cli.recipe["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize("given", [["--trainer.limit_train_batches", "1"], ["--trainer.limit_train_batches=1"]])
def test_a_limit_of_one_batch_is_not_read_as_all_of_them(given, tmp_path: Path):
    cli = RecipeCLI([recipes.find("demo")], given)
    path = tmp_path / "r.yaml"
    path.write_text(recipes.to_yaml(cli.recipe))
    for parsed in (cli, RecipeCLI([path])):
        found = parsed.config.trainer.limit_train_batches
        assert (found, type(found)) == (1, int)
    assert RecipeCLI([path], ["--trainer.limit_train_batches=0.5"]).config.trainer.limit_train_batches == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(trainr={"max_epochs": 3}), "did you mean 'trainer' instead of 'trainr'?"),
        (lambda r: r["trainer"]["callbacks"][2]["init_args"].update(patienc=1), "did you mean 'patience'"),
        (lambda r: r["model"]["init_args"].update(los="dice"), "did you mean 'loss' instead of 'los'?"),
        (lambda r: r["data"]["init_args"].update(batch_size="big"), "batch_size"),
        (lambda r: r["model"].update(class_path="no.such.Task"), "no.such.Task"),
        (lambda r: r.pop("model"), "required: model"),
        (lambda r: r["model"]["init_args"]["model_args"].update(backbone="terramind_v9"), "does not build"),
    ],
)
def test_refused_recipe_shows_the_parser_s_words_and_the_nearest_key(change, says, tmp_path: Path):
    recipe = recipes.read_yaml(recipes.find("demo"))
    change(recipe)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError) as caught:
        RecipeCLI([path]).build()
    report = str(caught.value)
    assert (says in report, str(path) in report) == (True, True), report
    assert len(report.splitlines()) <= 3
