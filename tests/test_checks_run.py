"""convergence, throughput, data, provenance: on a sound run, and on one with a planted fault."""

from dataclasses import replace
from pathlib import Path

import pytest

from floodrepro.verification.battery import ask
from floodrepro.verification.checks import Evidence
from floodrepro.verification.report import run_facts
from verification_fixtures import CHIPS, DIGESTS, LOSSES, demo_recipe, figure_of, gather, make_run, make_table

SAME = "test chips of training, test, reference"


def with_record(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, record=evidence.record | changes)


def with_metadata(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, table=replace(evidence.table, metadata=evidence.table.metadata | changes))


@pytest.mark.parametrize("check", ["throughput", "provenance"])
def test_run_without_a_record_is_skipped_and_with_a_damaged_one_fails(evidence: Evidence, check: str):
    bare = replace(evidence, record={})
    assert ask(check, bare)["status"] == "skip"
    assert ask(check, replace(bare, absent={"record": ("fail", "run.json cannot be read")}))["status"] == "fail"


# Training log


def test_log_is_read_as_it_was_written_and_what_is_wrong_in_it_named(evidence: Evidence):
    answer = ask("convergence", evidence)
    assert figure_of(answer, "val/loss, first")["value"] == LOSSES[0]
    assert figure_of(answer, "val/loss, best")["value"] == min(LOSSES)
    assert answer["plots"][0]["series"][0]["y"] == LOSSES
    rows = [*evidence.metrics[:4], evidence.metrics[4] | {"train/loss": "nan"}, *evidence.metrics[5:]]
    flat = [row | {"val/loss": "0.5" if row["val/loss"] else ""} for row in evidence.metrics]
    for spoilt, says in (
        (replace(evidence, metrics=rows), "train/loss at step 9"),
        (replace(evidence, metrics=flat), "fall of val/loss"),
        (with_record(evidence, best_epoch=16), "best epoch"),
    ):
        answer = ask("convergence", spoilt)
        assert (answer["status"], says in answer["finding"]) == ("fail", True)
    for few in (evidence.metrics[:2], ()):
        assert ask("convergence", replace(evidence, metrics=few))["status"] == "skip"


# Speed


def test_too_few_timed_steps_are_a_skip_and_a_laptop_that_slept_is_no_contradiction(evidence: Evidence):
    times, slept = evidence.record["epoch_times"], {"ended": "2026-03-04T10:00:00+00:00", "processes": 2}
    for changes, status in (
        ({"epoch_times": times[:1]}, "skip"),
        ({"epoch_times": times[:2]}, "pass"),
        ({"chips_per_second": None}, "skip"),
        (slept, "pass"),
    ):
        assert ask("throughput", with_record(evidence, **changes))["status"] == status
    facts = dict(run_facts(evidence.record | slept))
    assert (facts["device"], facts["from start to end"]) == ("2 x AMD Instinct MI300X", "3 days, 0:00:00")


# Data


def test_only_splits_that_both_sides_have_are_compared(evidence: Evidence):
    answer = ask("data", evidence)
    assert [v["name"] for v in answer["values"] if v["criterion"] == "the same"] == [SAME]
    other = with_metadata(evidence, data={"digests": {"test": "ff" * 32}})
    assert f"{SAME}: d3d3d3d3d3d3 and ffffffffffff" in ask("data", other)["finding"]
    other = replace(with_metadata(evidence, data={"digests": {"holdout": "ff" * 32}}), reference=None)
    assert ask("data", other)["status"] == "skip"
    assert ask("data", with_record(evidence, data={}))["status"] == "skip"
    other = with_metadata(evidence, data={"digests": DIGESTS, "commit": "0" * 40})
    assert "commit of training and test" in ask("data", other)["finding"]


def test_error_of_the_audit_other_chips_in_it_and_a_damaged_manifest_fail(evidence: Evidence):
    audit = {"digests": DIGESTS, "findings": [], "deep": True}
    assert ask("data", replace(evidence, audit=audit))["status"] == "pass"
    finding = {"severity": "error", "check": "range", "message": "2 pixels of class 7"}
    answer = ask("data", replace(evidence, audit=audit | {"findings": [finding]}))
    assert (answer["status"], "2 pixels of class 7" in answer["finding"]) == ("fail", True)
    assert ask("data", replace(evidence, audit=audit | {"digests": {"train": "0" * 64}}))["status"] == "fail"
    assert ask("data", replace(evidence, absent={"audit": ("fail", "cannot be read")}))["status"] == "fail"


def test_audit_of_the_current_folder_is_none_of_a_recipe_without_a_data_root(tmp_path: Path, monkeypatch):
    (tmp_path / "data-manifest.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    recipe = demo_recipe()
    del recipe["data"]["init_args"]["data_root"]
    assert "audit" not in gather(make_run(tmp_path / "mine", recipe=recipe)).absent


def test_table_of_a_part_of_the_split_fails(evidence: Evidence):
    data = evidence.record["data"]
    whole = with_record(evidence, data=data | {"chips": CHIPS | {"test": len(evidence.table)}})
    assert ask("data", whole)["status"] == "pass"
    part = with_record(evidence, data=data | {"chips": CHIPS | {"test": 14_556}})
    assert "chips in the table of test: 96, expected 14,556" in ask("data", part)["finding"]


# Provenance


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        ({"status": "interrupted"}, "status of the run: interrupted"),
        ({"recipe_sha256": "0" * 64}, "recipe.yaml and run.json"),
        ({"environment": {"code": {"commit": "4f" * 20, "dirty": True}}}, "working tree: with changes"),
        ({"environment": {}}, "source of the code: unknown"),
        ({"seed": 7}, "the seed was declared: no"),
    ],
)
def test_record_that_does_not_say_where_the_weights_come_from_fails(evidence: Evidence, planted, says):
    answer = ask("provenance", with_record(evidence, **planted))
    assert (answer["status"], says in answer["finding"]) == ("fail", True)


def test_table_of_another_recipe_fails_and_another_data_root_does_not(evidence: Evidence):
    other = {"recipe_sha256": "0" * 64}
    assert ask("provenance", with_metadata(evidence, **other))["status"] == "fail"
    moved = with_metadata(evidence, **other, recipe_changes=["data.init_args.data_root", "trainer.devices"])
    assert ask("provenance", moved)["status"] == "pass"
    changed = with_metadata(evidence, **other, recipe_changes=["data.init_args.means.DEM"])
    assert "changed: data.init_args.means.DEM" in ask("provenance", changed)["finding"]


def test_reference_that_sees_other_inputs_fails(evidence: Evidence):
    theirs = make_table(seed=9, inputs={"means": {"DEM": [154.914]}, "timesteps": [0, 1, 2, 3]})
    answer = ask("provenance", replace(evidence, reference=theirs))
    assert "what run and reference see of a chip: means.DEM" in answer["finding"]


def test_source_stands_in_for_the_commit(evidence: Evidence):
    code = {"commit": None, "dirty": None, "source_sha256": "5c" * 32}
    answer = ask("provenance", with_record(evidence, environment={"code": code}))
    assert (answer["status"], "source 5c5c" in answer["finding"]) == ("pass", True)
