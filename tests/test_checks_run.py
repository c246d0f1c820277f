"""convergence, throughput, data, provenance: on a sound run, and on one with a planted fault."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from floodrepro.verification.check import Check, Evidence, SeedRun, Value
from floodrepro.verification.checks import run as checks
from floodrepro.verification.report import run_facts
from verification_fixtures import (
    CHIPS,
    DIGESTS,
    LOSSES,
    declared,
    demo_recipe,
    gather,
    make_record,
    make_run,
    make_table,
)

ALL = (checks.convergence, checks.throughput, checks.data, checks.provenance)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """A sound run; shared, for no test changes it."""
    return gather(make_run(tmp_path_factory.mktemp("runs") / "mine"))


def value(check: Check, start: str) -> Value:
    return next(value for value in check.values if value.name.startswith(start))


def with_record(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, record=evidence.record | changes)


def with_metadata(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, table=replace(evidence.table, metadata=evidence.table.metadata | changes))


@pytest.mark.parametrize("check", ALL)
def test_sound_run_passes_and_its_answer_is_json(evidence: Evidence, check):
    answer = check(evidence)
    assert answer.status == "pass", answer.finding
    assert answer.finding
    assert json.dumps(asdict(answer), allow_nan=False)


@pytest.mark.parametrize("check", [checks.throughput, checks.provenance])
def test_run_without_a_record_is_skipped_and_with_a_damaged_one_fails(evidence: Evidence, check):
    bare = replace(evidence, record={})
    assert check(bare).status == "skip"
    assert check(replace(bare, absent={"record": ("fail", "run.json cannot be read")})).status == "fail"


# Training log


def test_log_is_read_as_it_was_written(evidence: Evidence):
    answer = checks.convergence(evidence)
    assert value(answer, "val/loss, first").value == LOSSES[0]
    assert value(answer, "val/loss, best").value == min(LOSSES)
    assert answer.plots[0].series[0]["y"] == LOSSES


def test_value_that_is_not_finite_fails_and_is_named(evidence: Evidence):
    rows = [*evidence.metrics[:4], evidence.metrics[4] | {"train/loss": "nan"}, *evidence.metrics[5:]]
    answer = checks.convergence(replace(evidence, metrics=rows))
    assert (answer.status, "train/loss at step 9" in answer.finding) == ("fail", True)


def test_loss_that_does_not_fall_and_another_best_epoch_in_the_record_fail(evidence: Evidence):
    flat = [row | {"val/loss": "0.5" if row["val/loss"] else ""} for row in evidence.metrics]
    assert "fall of val/loss" in checks.convergence(replace(evidence, metrics=flat)).finding
    assert "best epoch" in checks.convergence(with_record(evidence, best_epoch=16)).finding
    assert checks.convergence(replace(evidence, metrics=evidence.metrics[:2])).status == "skip"
    assert checks.convergence(replace(evidence, metrics=())).status == "skip"


def test_curve_of_the_reference_has_a_criterion_on_the_same_data_alone(evidence: Evidence):
    lower = [
        row | {"val/loss": str(float(row["val/loss"]) - 0.1)} if row["val/loss"] else row for row in evidence.metrics
    ]
    other = replace(evidence, reference_name="other", reference_metrics=lower, reference_record=evidence.record)
    assert checks.convergence(other).status == "fail"
    elsewhere = replace(other, reference_record={})
    assert checks.convergence(elsewhere).status == "pass"
    assert len(checks.convergence(elsewhere).plots[0].series) == 2


def test_published_curve_stands_beside_the_published_recipe(evidence: Evidence):
    recipe = demo_recipe()
    recipe["model"]["init_args"]["model_args"]["backbone"] = "terramind_v1_base"
    answer = checks.convergence(replace(evidence, recipe=recipe))
    assert [one["label"] for one in answer.plots[0].series][1] == "AMD run A"
    assert any("from other or unknown data" in note for note in answer.notes)


# Speed


def test_too_few_timed_steps_are_a_skip(evidence: Evidence):
    assert checks.throughput(with_record(evidence, epoch_times=evidence.record["epoch_times"][:1])).status == "skip"
    assert checks.throughput(with_record(evidence, epoch_times=evidence.record["epoch_times"][:2])).status == "pass"
    assert checks.throughput(with_record(evidence, chips_per_second=None)).status == "skip"


def test_laptop_that_slept_and_processes_of_a_node_are_no_contradiction(evidence: Evidence):
    long = with_record(evidence, ended="2026-03-04T10:00:00+00:00", processes=2)
    assert checks.throughput(long).status == "pass"
    facts = dict(run_facts(long.record))
    assert facts["device"] == "2 x AMD Instinct MI300X"
    assert facts["from start to end"] == "3 days, 0:00:00"
    assert facts["a step"] == "0.5 s (median epoch)"


# Data


def test_only_splits_that_both_sides_have_are_compared(evidence: Evidence):
    answer = checks.data(evidence)
    assert [v.name for v in answer.values if v.expected == "the same"] == ["test chips of training and test"]
    other = with_metadata(evidence, data={"digests": {"test": "ff" * 32}})
    assert "test chips of training and test" in checks.data(other).finding
    assert checks.data(with_metadata(evidence, data={"digests": {"holdout": "ff" * 32}})).status == "skip"
    assert checks.data(with_record(evidence, data={})).status == "skip"
    other = with_metadata(evidence, data={"digests": DIGESTS, "commit": "0" * 40})
    assert "commit of training and test" in checks.data(other).finding


def test_error_of_the_audit_other_chips_in_it_and_a_damaged_manifest_fail(evidence: Evidence):
    audit = {"digests": DIGESTS, "findings": [], "deep": True}
    assert checks.data(replace(evidence, audit=audit)).status == "pass"
    finding = {"severity": "error", "check": "range", "message": "2 pixels of class 7"}
    answer = checks.data(replace(evidence, audit=audit | {"findings": [finding]}))
    assert (answer.status, answer.tables[0].rows[0][2]) == ("fail", "2 pixels of class 7")
    assert checks.data(replace(evidence, audit=audit | {"digests": {"train": "0" * 64}})).status == "fail"
    assert checks.data(replace(evidence, absent={"audit": ("fail", "cannot be read")})).status == "fail"


def test_audit_of_the_current_folder_is_not_taken_for_that_of_a_recipe_without_a_data_root(tmp_path: Path, monkeypatch):
    (tmp_path / "data-manifest.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    recipe = demo_recipe()
    del recipe["data"]["init_args"]["data_root"]
    assert "audit" not in gather(make_run(tmp_path / "mine", recipe=recipe)).absent


def test_table_of_a_part_of_the_split_fails(evidence: Evidence):
    data = evidence.record["data"]
    whole = with_record(evidence, data=data | {"chips": CHIPS | {"test": len(evidence.table)}})
    assert checks.data(whole).status == "pass"
    part = with_record(evidence, data=data | {"chips": CHIPS | {"test": 14_556}})
    assert "chips in the table of test: 18, expected 14,556" in checks.data(part).finding


# Provenance


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        ({"status": "interrupted"}, "status of the run: interrupted"),
        ({"recipe_sha256": "0" * 64}, "recipe.yaml and run.json"),
        ({"code": {"commit": "4f" * 20, "dirty": True}}, "working tree: with changes"),
        ({"code": {}}, "source of the code: unknown"),
    ],
)
def test_record_that_does_not_say_where_the_weights_come_from_fails(evidence: Evidence, planted, says):
    answer = checks.provenance(with_record(evidence, **planted))
    assert (answer.status, says in answer.finding) == ("fail", True)


def test_table_of_another_recipe_fails_and_another_data_root_does_not(evidence: Evidence):
    other = {"recipe_sha256": "0" * 64}
    assert checks.provenance(with_metadata(evidence, **other)).status == "fail"
    moved = with_metadata(evidence, **other, recipe_changes=["data.init_args.data_root", "trainer.devices"])
    assert checks.provenance(moved).status == "pass"
    changed = with_metadata(evidence, **other, recipe_changes=["data.init_args.means.DEM"])
    assert "other data.init_args.means.DEM" in checks.provenance(changed).finding


def test_reference_that_sees_other_inputs_fails(evidence: Evidence):
    theirs = make_table(6, 3, seed=9, inputs={"means": {"DEM": [154.914]}, "timesteps": [0, 1, 2, 3]})
    answer = checks.provenance(replace(evidence, reference=theirs))
    assert "what run and reference see of a chip: means.DEM" in answer.finding


def test_declared_run_that_is_not_reported_fails(evidence: Evidence):
    seeds = [declared(42), declared(43), SeedRun(44, "finished", None, "seed-44")]
    answer = checks.provenance(replace(evidence, seeds=seeds))
    assert "declared runs that are reported: 2, expected 3" in answer.finding
    assert checks.provenance(replace(evidence, seeds=[*seeds[:2], replace(seeds[2], status="failed")])).status == "pass"
    assert checks.provenance(with_record(replace(evidence, seeds=seeds[:2]), seed=7)).status == "fail"


def test_commit_stands_in_for_the_source_and_the_source_for_the_commit(evidence: Evidence):
    record = make_record(demo_recipe(), code={"commit": None, "dirty": None, "source_sha256": "5c" * 32})
    answer = checks.provenance(replace(evidence, record=record))
    assert (answer.status, "source 5c5c" in answer.finding) == ("pass", True)
