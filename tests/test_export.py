"""The exported pair: the same weights, a YAML of no particular machine, loaded where there is no floodrepro."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError
from floodrepro.evaluation.checkpoint import load_strictly, read_checkpoint
from floodrepro.publishing.load_back import chip_shapes, fixed_chip, load_in_plain_terratorch
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import without_files


@pytest.fixture(scope="module")
def exported(cli, trained, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("export")
    outcome = cli("export", "--run", trained.path, "--output", folder, "--format", "json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_export_holds_the_checkpoint_bit_for_bit(trained, exported):
    source = torch.load(trained.best, weights_only=True)["state_dict"]
    written = load_file(exported["weights"])
    assert written.keys() == source.keys()
    assert len(written) == exported["tensors"] == 216
    assert all(torch.equal(written[key], source[key]) for key in source)


def test_metadata_says_where_the_weights_come_from(trained, exported):
    with safe_open(exported["weights"], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["recipe_sha256"] == trained.read_record()["recipe_sha256"]
    assert len(metadata["source_sha256"]) == 64


def test_exported_yaml_belongs_to_no_machine(exported):
    recipe = recipes.read(Path(exported["config"]))
    assert recipe["trainer"]["logger"] is False
    assert "callbacks" not in recipe["trainer"]
    assert recipe["model"]["init_args"]["model_args"]["backbone_pretrained"] is False

    def strings(node):
        if isinstance(node, dict):
            node = list(node.values())
        if isinstance(node, list):
            return [text for item in node for text in strings(item)]
        return [node] if isinstance(node, str) else []

    assert [text for text in strings(recipe) if Path(text).is_absolute()] == []


def test_plain_terratorch_without_floodrepro_predicts_the_same(trained, exported):
    ours = RecipeCLI([trained.recipe])
    ours.build(lambda config: without_files(config, progress_bar=False))
    load_strictly(read_checkpoint(trained.best), ours.model, ours.recipe)
    shapes = chip_shapes(ours.recipe, 64)
    with torch.inference_mode():
        logits = ours.model.model.eval()(fixed_chip(shapes)).output
    theirs = load_in_plain_terratorch(Path(exported["config"]), Path(exported["weights"]), shapes)
    assert theirs.shape == (1, 2, 64, 64)
    torch.testing.assert_close(theirs, logits, rtol=1e-5, atol=1e-5)


def test_pair_that_does_not_load_in_plain_terratorch_is_reported(exported, tmp_path: Path):
    config = Path(shutil.copy(exported["config"], tmp_path / "pair.yaml"))
    config.write_text(config.read_text().replace("terramind_v1_tiny", "terramind_v1_base"))
    with pytest.raises(CheckpointError, match="does not load"):
        load_in_plain_terratorch(config, Path(exported["weights"]), {})


def test_export_is_tested_like_the_checkpoint_and_finds_its_own_config(cli, trained, chips, exported):
    of_run = cli("test", "--ckpt", trained.best, "--format", "json")
    of_export = cli("test", "--ckpt", exported["weights"], "--data-root", chips, "--format", "json")
    assert of_export.code == 0, of_export.err
    assert "the checkpoint says" not in of_export.err
    assert json.loads(of_export.out)["metrics"] == json.loads(of_run.out)["metrics"]


def test_export_goes_into_the_run_folder_and_is_not_written_over(cli, trained, tmp_path: Path):
    run = Path(shutil.copytree(trained.path, tmp_path / "mine"))
    assert cli("export", "--run", run).code == 0
    assert sorted(path.name for path in (run / "export").iterdir()) == ["mine.safetensors", "mine.yaml"]
    again = cli("export", "--run", run)
    assert again.code == 2
    assert "not overwritten" in again.err


def test_checkpoint_is_not_exported_with_another_models_recipe(cli, trained, tmp_path: Path):
    outcome = cli(
        *("export", "--ckpt", trained.best, "--config", "terramind_v1_base_impactmesh_flood_amd"),
        *("--output", tmp_path / "export"),
    )
    assert outcome.code == 2
    assert "terramind_v1_base" in outcome.err
    assert not (tmp_path / "export").exists()


def test_damaged_checkpoint_is_not_exported(cli, trained, tmp_path: Path):
    run = Path(shutil.copytree(trained.path, tmp_path / "mine"))
    best = run / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:5000])
    outcome = cli("export", "--run", run)
    assert outcome.code == 1
    assert "damaged or truncated" in outcome.err
    assert not (run / "export").exists()
