"""The model card: from one run's records, for a reader who knows nothing, and its author's once it is written."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from floodrepro import recipe as recipes
from floodrepro.data.weights import REFERENCE
from floodrepro.errors import CheckpointError, RunFolderError, TableError, UsageError
from floodrepro.publishing.card import energy_of, factors_of, write_card
from floodrepro.run_folder import RunFolder
from floodrepro.verification.report import md, render
from verification_fixtures import demo_recipe, gather, keep, make_run, make_table, missed, summarise, write_pair

PRETRAINED = "ibm-esa-geospatial/TerraMind-1.0-base"
PUE, GRID = ["1.5", "a page"], ["0.4", "a grid "]
FACTORS = (1.5, "the data centre's page", 0.40, "the grid operator, 2025")


def verified(run: RunFolder) -> dict:
    """The run's results.json, written."""
    other = make_table(6, 3, seed=1, checkpoint={"name": "ibm.pt", "sha256": "4e" * 32})
    return keep(summarise(replace(gather(run), reference=other, reference_name="IBM's model")), run)


def card_of(run: RunFolder, **options) -> str:
    shutil.rmtree(run.export, ignore_errors=True)
    return write_card(write_pair(run), run.best, recipes.read_yaml(run.recipe), run, **options).read_text()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs" / "mine")


def test_card_says_what_the_report_says(run: RunFolder):
    results = verified(run)
    card = card_of(run)
    assert md(results["verdict"]["sentence"]) in card
    for row in results["scores"]["rows"]:
        assert f"| {row['label']} | {row['values'][0]:.4f} |" in card
    assert results["summary"]["text"].startswith("Required and not met: Weights and buffers")
    assert f"{md(results['summary']['text'])} Verified on {results['made']}" in card
    assert ("](panels.png)" in card, "| reference (FILE) | IBM's model: its" in card) == (False, True)  # no picture
    assert json.loads((run.export / "results.json").read_text()) == results


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """Results and card of a verified run with a licence and factors for carbon."""
    run = make_run(tmp_path_factory.mktemp("full") / "mine")
    return verified(run), card_of(run, licence="cc-by-4.0", factors=FACTORS)


def test_card_has_the_sections_that_a_reader_of_the_hub_looks_for(full: tuple[dict, str]):
    card = full[1]
    wanted = ["Results", "Intended use", "Out of scope", "How to use", "Training", "Energy", "Licence and sources"]
    assert re.findall(r"^## (.+)$", card, re.M) == [*wanted, "Citation"]
    for text in ("loss | dice", "lr 0.0001", "batch | 8", "@misc{terramind2025", "data revision | da7ada7a"):
        assert text in card, text
    assert re.search(r"flood IoU, worst event: 0\.\d+", card)
    text = re.sub("(?s)```.*?```", "", card)
    assert not re.search(r"More Information Needed|\bNone\b|\bnan\b|Undefined|\{\{|\}\}", text)


def test_metadata_has_scores_emissions_in_grams_and_the_chosen_licence(full: tuple[dict, str]):
    results, data = full[0], ModelCard(full[1]).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", "terratorch", "image-segmentation")
    assert data.co2_eq_emissions["emissions"] == pytest.approx(1000 * 0.0085 * 1.5 * 0.4)
    assert data.co2_eq_emissions["hardware_used"] == "AMD Instinct MI300X"
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores["iou_1"] == results["scores"]["rows"][0]["values"][0]
    assert set(scores) == {"iou_1", "precision", "recall", "f1_1", "mean_iou", "iou_0", "f1", "accuracy"}
    assert data.eval_results[0].dataset_type == "other"  # 18 chips are not the published split
    assert data.get("datasets") is None


def test_data_set_is_claimed_only_where_training_used_all_of_it(tmp_path: Path):
    recipe = demo_recipe()
    part = card_of(make_run(tmp_path / "part", recipe=recipe))
    assert [ModelCard(part).data.get(key) for key in ("base_model", "license", "co2_eq_emissions")] == [None] * 3
    assert ("0.0085" in part, "CO2e" in part, "has not chosen a licence" in part) == (True, False, True)
    for says in ("Training started from random weights.", "Trained on 80 chips", "hold where chips came from it"):
        assert says in part
    data = {"chips": {"train": 57_067, "val": 9_028}, "digests": {}, "commit": None}
    whole = ModelCard(card_of(make_run(tmp_path / "whole", recipe=recipe, data=data))).data
    assert whole.datasets == ["ibm-esa-geospatial/ImpactMesh-Flood"]


@pytest.mark.parametrize(
    ("changes", "weights", "start", "base"),
    [
        ({"backbone": "terramind_v1_base_tim"}, None, PRETRAINED, PRETRAINED),
        ({"backbone": "prithvi_eo_v2_300"}, None, "the backbone's own pretrained weights", None),
        ({"backbone_ckpt_path": "/home/me/own.pt"}, None, "weights of own.pt", None),
        ({"backbone": "terramind_v1_base"}, "5a" * 32, f"own.ckpt, sha256 {'5a' * 32}", None),
        ({"backbone": "terramind_v1_base"}, REFERENCE.sha256, f"own.ckpt, sha256 {REFERENCE.sha256}", REFERENCE.repo),
    ],
)
def test_card_names_the_weights_that_training_started_from(tmp_path: Path, changes: dict, weights, start, base):
    recipe = demo_recipe()
    arguments = recipe["model"]["init_args"]["model_args"]
    arguments |= {"backbone_pretrained": True} | changes
    record = {"started_from": {"file": "own.ckpt", "sha256": weights}} if weights else {}  # fit --weights
    card = card_of(make_run(tmp_path / "mine", recipe=recipe, **record), factors=FACTORS)
    data = ModelCard(card).data
    assert f"Training started from {start}." in card
    assert (data.get("base_model"), data.co2_eq_emissions["training_type"]) == (base, "fine-tuning")
    assert ("terramind" in data.tags, "@misc{terramind2025" in card) == (arguments["backbone"][:9] == "terramind",) * 2


def test_generated_chips_a_better_rule_and_comparisons_not_made_are_named_in_report_and_card(tmp_path: Path):
    data = {"chips": {"train": 80}, "digests": {}, "generated": "floodrepro data synth --events 6"}
    rule, own = make_table(6, 3, detail="VV falls by more than 5 dB; chosen on training chips"), make_table(6, 3)
    run = make_run(tmp_path / "mine", table=missed(own, 0.5), data=data)
    results = keep(summarise(replace(gather(run), baselines={"vv-drop": rule})), run)
    report, card = render(results, {}), card_of(run)
    figures = [f"{results['scores']['rows'][0]['values'][n]:.3f}" for n in (1, 0)]
    better = f"(VV falls by more than 5 dB) scores higher than this model: flood IoU {' against '.join(figures)}"
    simple = "a model better than simple rules: the baseline vv-drop scores higher"
    made = "Against the reference (not made), Spread over seeds (not made)"
    for text in (report[: report.index("## Scores")], card[: card.index("## Intended use")]):
        for says in (better, simple, "Generated data", made):
            assert says in text
        assert "comparison failed" not in text
    assert not re.search("Sentinel data|WorldDEM|Emergency Management|EMS|ImpactMesh-Flood \\(IBM", card)
    assert ModelCard(card).data.eval_results[0].dataset_name == "18 chips (generated by floodrepro data synth)"


def test_checkpoint_without_a_run_gets_a_card_that_says_so_and_the_authors_own_is_set_aside(run: RunFolder):
    pair = write_pair(run)
    (run.export / "README.md").write_text("my own")
    card = write_card(pair, run.best, recipes.read_yaml(run.recipe), None).read_text()
    assert card.startswith("---")
    for says in ("What the training started from is not known", "were not compared with", "an unknown number of chips"):
        assert says in card
    assert (run.export / "README-2.md").read_text() == "my own"


def test_pair_or_record_of_another_checkpoint_or_recipe_and_a_damaged_pair_are_refused(run: RunFolder):
    results, weights = verified(run), write_pair(run)
    results["run"]["checkpoint"]["sha256"] = "a" * 64
    keep(results, run)
    with pytest.raises(TableError, match="of another checkpoint"):
        card_of(run)
    run.update_record(recipe_sha256="a" * 64)
    with pytest.raises(RunFolderError, match="of another recipe"):
        card_of(run)
    write_pair(run)
    run.best.write_bytes(b"other weights")
    for says in ("not exported from", "damaged"):
        with pytest.raises(CheckpointError, match=says):
            write_card(weights, run.best, recipes.read_yaml(run.recipe), run)
        weights.write_bytes(weights.read_bytes()[:50])


def part(kwh: float | None, method: str = "power", devices: int = 1) -> dict:
    return {"kWh": kwh, "method": method, "devices": devices, "note": f"by {method}"}


def test_energy_is_of_all_devices_or_said_to_be_of_some():
    for record, says in (
        ({"energy": [part(6.0 * 750 / 1000, "tdp")]}, "= 2.700 kg CO2e"),  # the published card's arithmetic
        ({"energy": [part(1.0), part(2.0)]}, "= 1.800 kg CO2e"),
        ({"energy": [part(4.0, devices=8)], "processes": 8}, "of all 8 devices"),
        ({"energy": [part(4.0)], "processes": 8}, "of 1 of 8 devices, without"),
        ({"energy": [part(1.0), part(None)]}, "1 of 2 parts of the run is not known"),
        ({"energy": [part(1.0, "counter"), part(2.0, "tdp")]}, "Different methods are not added"),
        ({}, "was not measured"),
    ):
        text, emitted = energy_of(record, FACTORS)
        assert (says in text, "CO2e" in text) == (True, emitted is not None)


def test_factor_without_its_source_is_a_usage_error():
    for pue, grid in [(PUE, None), (PUE, ["0.4", "  "]), (["nan", "a page"], GRID), (PUE, ["400", "a grid"])]:
        with pytest.raises(UsageError, match="each with its source"):
            factors_of(pue, grid)
    assert factors_of(None, None) is None
    assert factors_of(PUE, GRID) == (1.5, "a page", 0.4, "a grid")
