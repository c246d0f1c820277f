"""What torch measures of a real run that is spoilt; a sound one passes in tests/test_verify.py."""

import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors.torch import load_file, save_file

from floodrepro import recipe as recipes
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import BEFORE, EVENT
from floodrepro.data.synth import generate
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.publishing.export import export
from floodrepro.run_folder import RunFolder
from floodrepro.training.terratorch_cli import RecipeCLI
from floodrepro.verification import figures, measure
from floodrepro.verification.battery import ask
from verification_fixtures import gather, make_run, make_table

VARIANCE = "decoder.decoder.blocks.2.conv1.1.running_var"
FILTERS = "decoder.decoder.blocks.2.conv1.0.weight"
# Runs in the process that exported_pair starts, after its own work: no floodrepro, and torch's precision as here.
THERE_TOO = """
import os
os.chdir({folder!r})
exec(open("example.py").read())
import runpy
sys.argv = ["run_inference", "--config", "trained.yaml", "--ckpt", "trained.safetensors", "--output_dir", "stock"]
runpy.run_module("impactmesh.run_inference", run_name="__main__")
"""


@pytest.fixture(scope="module")
def pair(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory):
    return export(trained.best, recipes.read_yaml(trained.recipe), tmp_path_factory.mktemp("export"), "pair")


def test_what_was_not_measured_is_a_skip_and_a_checkpoint_that_is_none_a_failure(tmp_path: Path):
    run = make_run(tmp_path / "mine")
    assert ask("weights", gather(run))["status"] == "skip"
    measure.measure_all(run, run.verification / "evidence", "test", None)  # of no checkpoint, and without a pair
    evidence = gather(run)
    assert (ask("weights", evidence)["status"], ask("exported_pair", evidence)["status"]) == ("fail", "skip")
    assert "export/ holds no pair" in ask("exported_pair", evidence)["finding"]
    assert ask("weights", evidence)["code"] == "floodrepro.verification.measure.weights"


def test_spoilt_tensors_fail_and_are_named(trained: RunFolder, tmp_path: Path):
    content = torch.load(trained.best, weights_only=True)
    state = content["state_dict"]
    plain = [name.removeprefix("model.") for name in state if name.endswith("conv1.0.weight") and FILTERS not in name]
    missing, shape = plain[:2]
    state[f"model.{FILTERS}"][3, 2, 1, 0] = float("nan")
    state[f"model.{VARIANCE}"][5] = float("inf")
    state[f"model.{shape}"] = torch.ones(3)
    del state[f"model.{missing}"]
    state["model.stray.weight"] = torch.zeros(2)
    torch.save(content, tmp_path / "spoilt.ckpt")
    answer = measure.weights(trained.recipe, tmp_path / "spoilt.ckpt")
    assert answer["status"] == "fail"
    for name in (FILTERS, VARIANCE, missing, shape, "stray.weight"):
        assert name in answer["finding"], name


def test_export_holds_the_checkpoint_is_of_no_machine_and_is_not_overwritten(trained: RunFolder, pair, tmp_path: Path):
    source, written = torch.load(trained.best, weights_only=True)["state_dict"], load_file(pair.path)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], source[key]) for key in source)
    text, recipe = pair.config.read_text(), recipes.read_yaml(pair.config)
    assert (recipe["trainer"]["logger"], "callbacks" in recipe["trainer"]) == (False, False)
    assert not re.search(rf": /|{re.escape(str(trained.path))}", text)
    again = (trained.best, recipes.read_yaml(trained.recipe), tmp_path, "pair")
    assert export(*again).sha256 == pair.sha256
    (tmp_path / "pair.safetensors").unlink()  # as where it was killed before it was there
    assert export(*again) == export(*again)
    again[1]["model"]["init_args"]["model_args"]["backbone_ckpt_path"] = "/home/me/private.pt"
    with pytest.raises(UsageError, match="not overwritten"):
        export(*again)
    private = export(*again[:3], "private")
    assert "/home/me" not in private.config.read_text() + str(private.metadata)


@pytest.fixture(scope="module")
def elsewhere(cli, trained: RunFolder, pair, tmp_path_factory: pytest.TempPathFactory):
    """exported_pair's answer for a pair with another tensor, recipe and statistics, and a folder in which the same
    process ran the card's example and impactmesh's own inference: with an export and a chip of 256 px."""
    folder = tmp_path_factory.mktemp("elsewhere")
    root = folder / "ImpactMesh-Flood"
    generate(root, events=3, chips=3, size=256, protocol="v0", seed=3)
    [shown] = (root / "split" / "impactmesh_flood_test.txt").read_text().split()
    for file in (root / "data").glob("*/*"):
        if not file.name.startswith(shown):
            file.unlink()  # one chip is enough
    assert cli("export", "--run", trained.path, "--output", folder, "--licence", "mit").code == 0
    card = (folder / "README.md").read_text()
    (folder / "example.py").write_text(re.search(r"```python\n(.*?)```", card, re.S)[1])
    recipe, other = recipes.read_yaml(pair.config), folder / "other"
    recipe["data"]["init_args"]["means"]["S1RTC"] = [-9.871, -15.993]  # impactmesh 0.2.0's
    other.mkdir()
    (other / "pair.yaml").write_text(yaml.safe_dump(recipe))
    tensors = load_file(pair.path)
    tensors[f"model.{FILTERS}"][0, 0, 0, 0] += 1e-6
    save_file(tensors, other / "pair.safetensors", pair.metadata | {"recipe_sha256": "0" * 64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_READS_SAFETENSORS", (99, 0))  # as on torch 2.9
        then = THERE_TOO.format(folder=str(folder))
        patch.setattr(measure, "_WITHOUT_FLOODREPRO", measure._WITHOUT_FLOODREPRO + then)
        answer = measure.exported_pair(trained.recipe, trained.best, other)
    return answer, folder


@pytest.mark.slow
def test_pair_with_another_tensor_recipe_and_statistics_fails_also_through_a_twin(elsewhere):
    """The pair itself is loaded, and predicts the same, in tests/test_verify.py."""
    answer, _ = elsewhere
    assert (answer["status"], "a .pt twin was loaded" in answer["notes"][0]) == ("fail", True)
    assert [value["ok"] for value in answer["values"][:3]] == [False] * 3
    assert FILTERS in answer["finding"]


def test_pair_that_plain_terratorch_does_not_load_is_an_error(trained: RunFolder, pair, monkeypatch):
    monkeypatch.setattr(measure, "_WITHOUT_FLOODREPRO", "raise SystemExit('size mismatch')")
    with pytest.raises(CheckpointError, match="does not load the pair: size mismatch"):
        measure.exported_pair(trained.recipe, trained.best, pair.path.parent)


@pytest.mark.slow
def test_cards_example_and_impactmeshs_own_inference_give_the_pixels_of_predict(cli, trained: RunFolder, elsewhere):
    folder = elsewhere[1]
    root = folder / "ImpactMesh-Flood"
    split = root / "split" / "impactmesh_flood_test.txt"
    # impactmesh tiles; the demo's recipe does not, the published ones do as impactmesh.
    tiles = "{h_crop: 256, w_crop: 256, h_stride: 208, w_stride: 208, batch_size: 64, delta: 8}"
    for theirs, more in (
        ("*_DEM_mask.tif", ()),
        ("stock/*_prediction.tif", ("--model.init_args.tiled_inference_parameters", tiles)),
    ):
        output = folder / f"masks-{len(more)}"
        place = ("--data-root", root, "--data.init_args.predict_split", split, "--output", output)
        cli("predict", "--ckpt", trained.best, *place, *more).ok()
        ours, other = (rasterio.open(next(where)).read(1) for where in (output.glob("*_pred.tif"), folder.glob(theirs)))
        assert (ours >= 0).any()
        assert (ours != other)[ours >= 0].sum() == 0


def test_pictures_show_what_is_on_the_disk(chips: Path):
    source = Chips(chips / "data")
    for chip in sorted(source.having("S1RTC"))[:3]:
        optical, radar = source.bands(chip, "S2L2A"), source.bands(chip, "S1RTC")
        shown = figures.take_pictures(optical, radar)
        for name, step in (("before", BEFORE), ("event", EVENT)):
            vv, on_disk = shown[f"{name}_vv"], radar[step, 0].astype(np.float32)
            assert np.array_equal(vv[~np.isnan(vv)], on_disk[~np.isnan(vv)])  # dB, not logged again
            for colour, band in enumerate((3, 2, 1)):  # B04, B03, B02
                order = np.argsort(optical[step, band], axis=None)
                assert (np.diff(shown[f"{name}_rgb"][..., colour].ravel()[order].astype(int)) >= 0).all()


def test_pictures_of_another_input_than_the_tables_are_found(trained: RunFolder, tmp_path: Path):
    recipe = recipes.read_yaml(trained.recipe)
    recipe["data"]["init_args"]["stds"]["S1RTC"] = [1.0, 1.0]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    table = measure.table_of(trained, trained.best, "test", None)
    answer = measure.panels(RecipeCLI([tmp_path / "recipe.yaml"]), trained.best, table, tmp_path)
    assert (answer["status"], "predicted otherwise than in the table" in answer["finding"]) == ("fail", True)


def test_chips_to_show_are_chosen_by_rule():
    table = make_table(4, 4)
    rows = figures.choose_chips_to_show(table)
    scores = table.counts[:, 1, 1] / (table.counts.sum(axis=(1, 2)) - table.counts[:, 0, 0])
    having = np.flatnonzero(table.counts[:, 1].sum(axis=1))
    assert rows["best"] == having[np.argmax(scores[having])]
    assert rows["worst"] == having[np.argmin(scores[having])]
    empty = np.flatnonzero(table.counts[:, 1].sum(axis=1) == 0)
    assert rows["empty"] == empty[np.argmax(table.counts[empty, 0, 1])]
