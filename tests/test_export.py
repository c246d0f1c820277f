"""The exported pair: the same weights, a YAML of no particular machine, loaded where there is no floodrepro."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from card_runs import make_run, verify
from floodrepro import recipe as recipes
from floodrepro.publishing.measured import measure_load_back
from floodrepro.run_folder import sha256_of


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
    record = trained.read_record()
    assert metadata["recipe_sha256"] == record["recipe_sha256"]
    assert metadata["data_digest"] == record["data_digest"]
    assert metadata["source_sha256"] == hashlib.sha256(trained.best.read_bytes()).hexdigest()


def test_card_of_a_real_run_has_its_figures(trained, exported):
    record, card = trained.read_record(), Path(exported["card"]).read_text()
    assert f"2; the weights are of epoch {record['best_epoch']}, counted from 0" in card
    assert f"{record['best_val_loss']:.4f}" in card
    assert f"Trained on {record['chips']['train']} chips, not on the full data set" in card
    assert f"{exported['tensors']} tensors, {exported['parameters']:,} values" in card
    assert exported["sha256"] in card


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
    pair = Path(exported["config"]), Path(exported["weights"])
    found = measure_load_back(trained.recipe, trained.best, *pair)
    assert found["logit_difference"] < 1e-5
    assert found["equal_argmax"] == 1


def test_export_is_tested_like_the_checkpoint_and_finds_its_own_config(cli, trained, chips, exported):
    of_run = cli("test", "--ckpt", trained.best, "--format", "json")
    of_export = cli("test", "--ckpt", exported["weights"], "--data-root", chips, "--format", "json")
    assert of_export.code == 0, of_export.err
    assert "the checkpoint says" not in of_export.err
    assert json.loads(of_export.out)["metrics"] == json.loads(of_run.out)["metrics"]


def test_export_goes_into_the_run_folder_and_is_not_written_over(cli, trained, tmp_path: Path):
    run = Path(shutil.copytree(trained.path, tmp_path / "mine"))
    assert cli("export", "--run", run).code == 0
    names = ["README.md", "mine.safetensors", "mine.yaml"]
    assert sorted(path.name for path in (run / "export").iterdir()) == names
    again = cli("export", "--run", run)
    assert again.code == 2
    assert "not overwritten" in again.err


@pytest.mark.parametrize("flags", [(), ("--no-card",)])
def test_checkpoint_is_not_exported_with_another_models_recipe(cli, trained, tmp_path: Path, flags):
    outcome = cli(
        *("export", "--ckpt", trained.best, "--config", "terramind_v1_base_impactmesh_flood_amd"),
        *("--output", tmp_path / "export", *flags),
    )
    assert outcome.code == 2
    assert "terramind_v1_base" in outcome.err
    assert not (tmp_path / "export").exists()


def test_damaged_checkpoint_is_not_exported(cli, trained, tmp_path: Path):
    run = Path(shutil.copytree(trained.path, tmp_path / "mine"))
    best = run / "checkpoints" / "best.ckpt"
    best.write_bytes(best.read_bytes()[:5000])
    for flags, said in (((), "best.ckpt has sha256"), (("--no-card",), "damaged or truncated")):
        outcome = cli("export", "--run", run, *flags)
        assert outcome.code == 1
        assert said in outcome.err
        assert not (run / "export").exists()


# The card of an export, and the order of export and verify


@pytest.fixture
def made(tmp_path: Path):
    """A run folder of a handful of numbers."""
    return make_run(tmp_path / "runs" / "made")


def test_run_may_be_exported_first_and_verified_later(cli, made):
    first = cli("export", "--run", made.path)
    assert first.code == 0, first.err
    assert "floodrepro verify" in first.err
    pair = {name: (made.export / name).read_bytes() for name in ("made.safetensors", "made.yaml")}
    verify(made)
    again = cli("export", "--run", made.path, "--card-only", "--format", "json")
    assert again.code == 0, again.err
    assert {name: (made.export / name).read_bytes() for name in pair} == pair
    card = (made.export / "README.md").read_text()
    assert "## Scores" in card
    assert "Not verified" not in card
    assert (made.export / "results.json").read_bytes() == (made.path / "verification" / "results.json").read_bytes()
    assert json.loads(again.out) == {
        "card": str(made.export / "README.md"),
        "results": str(made.export / "results.json"),
    }


def test_results_of_an_earlier_card_go_when_there_are_none_any_more(cli, made):
    verify(made)
    assert cli("export", "--run", made.path).code == 0
    shutil.rmtree(made.path / "verification")
    assert cli("export", "--run", made.path, "--card-only").code == 0
    assert not (made.export / "results.json").exists()
    assert "Not verified" in (made.export / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "results.json"])
def test_card_or_results_that_someone_edited_are_not_overwritten(cli, made, name):
    verify(made)
    assert cli("export", "--run", made.path).code == 0
    edited = (made.export / name).read_text().replace("flood", "FLOOD", 1)
    (made.export / name).write_text(edited)
    refusal = cli("export", "--run", made.path, "--card-only")
    assert refusal.code == 2
    assert f"{name} was changed since floodrepro wrote it" in refusal.err
    assert (made.export / name).read_text() == edited


def test_foreign_card_is_not_overwritten_by_an_export(cli, made):
    made.export.mkdir()
    (made.export / "README.md").write_text("mine\n")
    for flags in ((), ("--card-only",)):
        assert cli("export", "--run", made.path, *flags).code == 2
    assert [path.name for path in made.export.iterdir()] == ["README.md"]
    assert (made.export / "README.md").read_text() == "mine\n"


def test_card_only_needs_the_pair_of_this_very_checkpoint(cli, made):
    assert "no exported weights" in cli("export", "--run", made.path, "--card-only").err
    assert cli("export", "--run", made.path).code == 0
    torch.save({"state_dict": {"model.a": torch.zeros(1)}}, made.best)
    made.update_record(checkpoint_sha256=sha256_of(made.best))
    refusal = cli("export", "--run", made.path, "--card-only")
    assert refusal.code == 1
    assert "the weights are not those of best.ckpt" in refusal.err


def test_card_is_written_for_what_the_pair_holds_not_for_what_its_header_says(cli, made):
    """Another's weights under this run's header, and a YAML with other statistics."""
    assert cli("export", "--run", made.path).code == 0
    weights, config = made.export / f"{made.path.name}.safetensors", made.export / f"{made.path.name}.yaml"
    whole, text = weights.read_bytes(), config.read_text()
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    ones = {name: torch.ones_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(ones, weights, metadata=metadata)
    refused = cli("export", "--run", made.path, "--card-only")
    assert (refused.code, refused.report[0]) == (1, "floodrepro: error: the weights are not those of best.ckpt")
    weights.write_bytes(whole)
    changed = yaml.safe_load(text)
    changed["data"]["init_args"]["means"]["S2L2A"][0] += 1.0
    config.write_text(yaml.safe_dump(changed))
    refused = cli("export", "--run", made.path, "--card-only")
    assert refused.code == 1
    assert "the YAML was changed since the export: data.init_args.means.S2L2A is [" in refused.report[0]
    config.write_text(text)
    assert cli("export", "--run", made.path, "--card-only").code == 0


def test_export_of_the_same_weights_has_the_same_sha256(cli, made, tmp_path: Path):
    files = []
    for number in range(3):  # the order of a header's entries was another in nearly every file
        assert cli("export", "--run", made.path, "--output", tmp_path / str(number), "--no-card").code == 0
        files += (tmp_path / str(number)).glob("*.safetensors")
    assert len({file.read_bytes() for file in files}) == 1
    assert len(load_file(files[0])) == 2


def test_contradicting_record_leaves_nothing_behind_and_no_card_exports_all_the_same(cli, made):
    made.update_record(best_epoch=16)
    refusal = cli("export", "--run", made.path)
    assert refusal.code == 1
    assert len(refusal.report) == 3
    assert "the best epoch is 16" in refusal.err
    assert not made.export.exists()
    assert cli("export", "--run", made.path, "--no-card").code == 0
    assert sorted(path.name for path in made.export.iterdir()) == ["made.safetensors", "made.yaml"]


def test_carbon_on_the_command_line_needs_its_sources(cli, made):
    values = ("--pue", 1.5, "--grid-intensity", 0.4)
    refusal = cli("export", "--run", made.path, *values)
    assert refusal.code == 2
    assert "--pue-source and --grid-source is missing" in refusal.err
    assert not made.export.exists()
    assert cli("export", "--run", made.path, *values, "--pue-source", "a page", "--grid-source", "a grid").code == 0
    assert "PUE 1.5 (a page)" in (made.export / "README.md").read_text()
