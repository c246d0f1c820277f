"""The model card: every figure from one run's records, and a record that contradicts itself gets no card."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from card_runs import BEST, LOSSES, make_run, verify
from floodrepro import recipe as recipes
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.publishing.bundle import read_card
from floodrepro.publishing.carbon import add_up, carbon, factors, kwh
from floodrepro.publishing.export import export
from floodrepro.publishing.make_card import add_card, records_of

V0 = {"train": 57_067, "val": 9_028}
FACTORS = factors(1.5, "the data centre's page", 0.40, "the grid operator, 2025")


def card_of(run, *, given=None) -> str:
    recipe, folder = recipes.read(run.recipe), run.path / "export"
    shutil.rmtree(folder, ignore_errors=True)
    records = records_of(run, run.best, recipe)
    export(run.best, recipe, folder, "model", records.data_digest)
    return add_card(folder, "model", run.best, records, given).read_text()


def text_of(card: str) -> str:
    """The card without line breaks and without its metadata and seal."""
    return " ".join(ModelCard(card).text.rsplit("<!--", 1)[0].split())


@pytest.fixture
def run(tmp_path: Path):
    return make_run(tmp_path / "runs" / "mine")


def refused(run) -> FloodreproError:
    with pytest.raises(FloodreproError) as error:
        records_of(run, run.best, recipes.read(run.recipe))
    assert len(error.value.report().splitlines()) == 3
    return error.value


# What is on the card


def test_card_of_a_verified_run_has_verdict_scores_interval_and_what_was_skipped(run):
    results = verify(run)
    card = card_of(run)
    text = text_of(card)
    assert all(sentence in text for sentence in results["verdict"]["sentences"])
    for row in results["scores"]["rows"]:
        shown = [f"{row[key]:.4f}" for key in ("ours", "reference")]
        assert f"| {row['label']} | `test/{row['metric']}` | {shown[0]} | {shown[1]} |" in text
    assert "-0.4000 pp | -1.1000 to 0.3000 (90 %) | 18 | 6 | event jackknife" in text
    assert "2 passed, 0 failed, 1 skipped" in text
    assert "| Throughput | skip | no bench was run |" in text
    assert "it \\| differs" in text, "a bar in a reason does not break the table"
    assert "Tested on 18 chips of 6 events" in text


def test_no_figure_is_missing_undefined_or_a_placeholder(run):
    for verified in (False, True):
        if verified:
            verify(run)
        card = card_of(run, given=FACTORS).rsplit("<!--", 1)[0]
        assert not re.search(r"More Information Needed|\bNone\b|\bnan\b|Undefined|\{\{|\}\}", card)


def test_training_facts_are_the_records(run):
    text = text_of(card_of(run))
    for fact in (
        *("AMD Instinct MI300X; torch built for rocm 7.2", "| precision | 16-mixed |", "90 train, 18 val"),
        *("4; the weights are of epoch 2, counted from 0", "0.2500", "48 steps, 3 of them left out by GradScaler"),
        *("50 s from start to end", "15.5 (median; 10th to 90th percentile 15.1 to 15.9) chips/s", "| seed | 42 |"),
        *("terratorch 1.2.7", "process 2.25 GiB, allocated 30.5 GiB", "d" * 64, "c" * 40, "10 values"),
    ):
        assert fact in text, fact


def test_metadata_are_read_by_huggingface_hub_as_they_were_measured(run):
    results = verify(run)
    data = ModelCard(card_of(run)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "terratorch", "image-segmentation")
    measured = {row["metric"]: row["ours"] for row in results["scores"]["rows"]}
    found = {re.match(r"test/(\w+)", e.metric_name)[1]: e.metric_value for e in data.eval_results}
    assert found == measured
    assert {e.dataset_type for e in data.eval_results} == {"other"}, "18 chips are not the published test split"
    assert "18 chips" in data.eval_results[0].dataset_name


def test_run_that_was_not_verified_says_so_and_claims_no_score(run):
    card = card_of(run)
    assert ModelCard(card).text.lstrip().startswith("**Not verified: none of the required checks was run.**")
    assert "not verified: run `floodrepro verify`" in card
    assert ModelCard(card).data.get("eval_results") is None
    assert "## Scores" not in card
    assert "Tested on no chips at all" in text_of(card)


def test_required_check_that_did_not_pass_is_the_first_line(run):
    verify(run, failing="weights")
    first = ModelCard(card_of(run)).text.lstrip().partition("\n")[0]
    assert first == "**Required checks did not pass: weights (failed).**"


def test_other_numbers_of_chips_than_published_are_told_at_the_top_and_claim_no_data_set(run):
    card = card_of(run)
    assert "**Trained on 90 chips, not on the full data set, which has 57,067 (protocol v0)" in card.split("# mo")[0]
    assert ModelCard(card).data.get("datasets") is None


def test_full_data_set_is_named_in_the_metadata(tmp_path):
    hours_of = {"started": "2026-03-01T10:00:00+00:00", "ended": "2026-03-01T12:00:00+00:00"}
    rate = {"median": 60.0, "p10": 60.0, "p90": 60.0, "n": 4}
    run = make_run(tmp_path / "full", chips=V0, chips_per_second=rate, **hours_of)
    card = card_of(run)
    assert ModelCard(card).data.datasets == ["ibm-esa-geospatial/ImpactMesh-Flood"]
    assert "not on the full data set" not in card


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_base_model_is_claimed_only_where_training_started_from_it(tmp_path, size):
    recipe = recipes.read(recipes.find("demo"))
    arguments = recipe["model"]["init_args"]["model_args"]
    arguments["backbone"] = f"terramind_v1_{size}"
    scratch = card_of(make_run(tmp_path / "scratch", recipe=recipe))
    assert ModelCard(scratch).data.get("base_model") is None
    assert "Trained from random weights." in scratch
    arguments["backbone_pretrained"] = True
    card = card_of(make_run(tmp_path / "tuned", recipe=recipe))
    assert ModelCard(card).data.base_model == f"ibm-esa-geospatial/TerraMind-1.0-{size}"
    assert "random weights" not in card


def test_licences_and_notices_are_there(run):
    text = text_of(card_of(run))
    for words in (
        *("Weights: Apache-2.0", "CC-BY-4.0", "Contains modified Copernicus Sentinel data"),
        *("produced using Copernicus WorldDEM-30 © DLR e.V. 2010-2014", "Copernicus Emergency Management Service"),
    ):
        assert words in text


# Energy and carbon


def test_published_arithmetic():
    footprint = carbon(kwh(6.0, 750), pue=1.5, intensity=0.40)
    assert (footprint.kwh, footprint.kg) == (pytest.approx(6.75), pytest.approx(2.70))


def test_carbon_is_stated_with_both_sources_and_not_without(run):
    without = text_of(card_of(run))
    assert "0.0085 kWh, integrated from sampled power" in without
    assert "no carbon figure is made up" in without
    assert "CO2e" not in without
    text = text_of(card_of(run, given=FACTORS))
    assert "0.0085 kWh x PUE 1.5 (the data centre's page) = 0.01275 kWh" in text
    assert "x 0.4 kg CO2e/kWh (the grid operator, 2025) = 0.0051 kg CO2e" in text


def part(method: str, energy: float | None) -> dict:
    return {"joules": None, "kWh": energy, "method": method, "note": f"by {method}"}


def test_energies_of_different_methods_are_never_added(tmp_path):
    assert add_up([part("power", 1.0), part("power", 2.0)]).total == 3.0
    assert add_up([part("power", 1.0), part("none", None)]).total is None
    run = make_run(tmp_path / "mixed", energy=[part("counter", 1.0), part("tdp", 2.0), part("none", None)])
    text = text_of(card_of(run, given=FACTORS))
    assert "1.0000 kWh, read from the device's own energy counter" in text
    assert "2.0000 kWh, an upper estimate" in text
    assert "their figures are not added" in text
    assert "Of 1 of 3 parts of the run the energy is not known" in text
    assert "no carbon figure is made up" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((1.5, None, 0.4, "a grid"), "--pue-source is missing"),
        ((1.5, "a page", 0.4, "  "), "--grid-source is missing"),
        ((None, "a page", 0.4, "a grid"), "--pue is missing"),
        ((1.5, "a page", None, None), "--grid-intensity and --grid-source is missing"),
        ((0.7, "a page", 0.4, "a grid"), "--pue is 0.7"),
        ((float("nan"), "a page", 0.4, "a grid"), "--pue is nan"),
        ((1.5, "a page", 400.0, "a grid"), "--grid-intensity is 400"),
    ],
)
def test_factor_without_its_source_is_a_usage_error(given, says):
    with pytest.raises(UsageError) as error:
        factors(*given)
    assert says in error.value.what


# A record that contradicts itself

STEPS = {"progress": {"epochs": 4, "step": 4000, "skipped_steps": 0}}
SLOW = {"step_seconds": {"median": 60.0, "p10": 50.0, "p90": 70.0, "n": 38}}


@pytest.mark.parametrize(
    ("planted", "both"),
    [
        ({"best_epoch": 16}, ("the best epoch is 16", "4 epochs (the last is 3)")),
        ({"epochs": 22}, ("metrics.csv ends with epoch 3", "22 epochs (the last is 21)")),
        ({"best_epoch": 1}, ("epoch 1 is 0.400000 in metrics.csv", "0.250000 in run.json")),
        ({"best_val_loss": 0.2683}, ("epoch 2 is 0.250000 in metrics.csv", "0.268300 in run.json")),
        ({"ended": "2026-03-01T16:00:00+00:00"}, ("6.0 h passed", "4 epochs at 15.5 chips/s take 11.0 min at most")),
        (SLOW, ("50 s passed", "48 steps of 60.0 s (median) take 19.0 min at the very least")),
        (STEPS, ("4000 steps", "4 epochs of 90 chips have 60 at most")),
        ({"recipe_sha256": "f" * 64}, ("the recipe has sha256", "run.json names ffffffffffff…")),
        ({"schema": 1}, ("run.json has schema 1", "reads 2")),
    ],
)
def test_record_that_mixes_two_runs_gets_no_card_and_both_figures_are_named(tmp_path, planted, both):
    error = refused(make_run(tmp_path / "mixed", **planted))
    assert all(figure in error.what for figure in both), error.what
    assert "--no-card" in error.fix


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_run_that_is_not_finished_gets_no_card(tmp_path, status):
    error = refused(make_run(tmp_path / "open", status=status, reason="SIGTERM"))
    assert f"'{status}' (SIGTERM)" in error.what


def test_run_that_was_interrupted_may_have_taken_any_time(tmp_path):
    resumes = [{"when": "2026-03-03T10:00:00+00:00", "from": "checkpoints/last.ckpt", "changes": []}]
    run = make_run(tmp_path / "parts", resumes=resumes, ended="2026-03-04T10:00:00+00:00")
    assert "in 2 parts, pauses included" in text_of(card_of(run))


def test_run_that_began_from_anothers_state_may_have_more_steps_than_time(tmp_path):
    resumes = [{"when": "2026-03-01T10:00:00+00:00", "from": "runs/other/checkpoints/last.ckpt", "changes": []}]
    run = make_run(tmp_path / "fork", resumes=resumes, ended="2026-03-01T10:00:02+00:00")
    assert "on top of another run's state" in text_of(card_of(run))


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("checkpoint", "sha256"), "a" * 64, "results.json is of the checkpoint aaaaaaaaaaaa…, the run's is"),
        (("recipe_sha256",), "b" * 64, "results.json is of the recipe bbbbbbbbbbbb…, the run's is"),
        (("data_digest",), "c" * 64, "results.json is of the data cccccccccccc…, the run's is dddddddddddd…"),
        (("best_epoch",), 16, "best_epoch is 16 in results.json and 2 in run.json"),
    ],
)
def test_results_of_another_run_are_refused(run, keys, value, says):
    results = verify(run)
    place = results["run"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (run.path / "verification" / "results.json").write_text(json.dumps(results))
    assert says in refused(run).what


@pytest.mark.parametrize("metric", ["mIoU", "F1_Score"])
@pytest.mark.parametrize("column", ["ours", "reference"])
def test_scores_that_break_an_identity_are_refused(run, metric, column):
    results = verify(run)
    row = next(row for row in results["scores"]["rows"] if row["metric"] == metric)
    old, row[column] = row[column], row[column] + 0.0021
    (run.path / "verification" / "results.json").write_text(json.dumps(results))
    what = refused(run).what
    assert f"{metric} ({column}) is {row[column]:.6g}" in what
    assert f"give {old:.6g}" in what


def test_class_that_occurs_nowhere_is_in_no_mean(run):
    results = verify(run, everywhere=True)
    rows = {row["metric"]: row for row in results["scores"]["rows"]}
    for column in ("ours", "reference"):
        assert (rows["IoU_0"][column], rows["Class_Accuracy_0"][column]) == (0.0, None)
        assert rows["mIoU"][column] == rows["IoU_1"][column] == 1.0
    records_of(run, run.best, recipes.read(run.recipe))


def test_scores_that_the_chip_table_does_not_have_are_refused(run):
    results = verify(run)
    for row in results["scores"]["rows"]:  # consistent with each other, and of no counts
        row["ours"] = row["reference"]
    (run.path / "verification" / "results.json").write_text(json.dumps(results))
    assert re.search(r"IoU_1 is 0\.\d+ in results\.json, and 0\.\d+ in the chip table", refused(run).what)
    verify(run)
    (run.path / "evaluation" / "test" / "best.parquet").unlink()
    assert "the chip table that they were counted in is not there" in refused(run).what


def test_scores_of_a_split_that_training_saw_are_refused(run):
    results = verify(run)
    results["run"]["split"] = "val"
    (run.path / "verification" / "results.json").write_text(json.dumps(results))
    assert "of the split val, and a card speaks of a test" in refused(run).what


def test_other_weights_in_the_place_of_the_run_s_are_refused(run):
    other = {"state_dict": {"model.a": torch.zeros(2, 3), "model.b": torch.ones(4)}}
    torch.save(torch.load(run.best) | other, run.best)
    assert "best.ckpt has sha256" in refused(run).what


def test_claim_of_equivalence_without_the_checks_that_it_needs_is_damage(run):
    results = verify(run, failing="weights")
    results["verdict"]["equivalent"] = True
    (run.path / "verification" / "results.json").write_text(json.dumps(results))
    assert "the verdict claims equivalence" in refused(run).what


def test_results_of_a_schema_that_is_not_known_are_refused(run):
    verify(run, schema=7)
    assert "schema 7" in refused(run).what


def test_healthy_record_is_not_refused(run):
    verify(run)
    records = records_of(run, run.best, recipes.read(run.recipe))
    assert records.record["best_val_loss"] == LOSSES[BEST]
    assert records.found["summary"]["ok"] is True


# Weights of which nothing is known


def test_checkpoint_outside_a_run_folder_gets_a_card_that_says_so(cli, run, tmp_path):
    alone = Path(shutil.copy(run.best, tmp_path / "found.ckpt"))
    outcome = cli("export", "--ckpt", alone, "--config", run.recipe, "--output", tmp_path / "out", "--format", "json")
    assert outcome.code == 0, outcome.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No record of the training exists" in card
    assert "random weights" not in card, "the YAML beside an export says pretrained: false of every model"
    assert "not recorded" in card
    assert json.loads(outcome.out)["results"] is None


def test_last_state_of_a_run_is_not_described_by_the_record_of_its_best(run):
    last = Path(shutil.copy(run.best, run.checkpoints / "last.ckpt"))
    assert records_of(run, last, recipes.read(run.recipe)).record is None


def test_seal_is_of_the_card_that_was_written(run):
    card_of(run)
    card = read_card(run.path / "export")
    assert not card.edited
    assert sorted(card.files) == ["model.safetensors", "model.yaml"]
