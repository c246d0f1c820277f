"""Convergence, throughput, identities, data and provenance: what each lets pass, and the fault that each finds."""

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from floodrepro import recipe as recipes
from floodrepro.evaluation.metrics import scores
from floodrepro.verification.check import Check, Evidence, SeedRun, Value
from floodrepro.verification.checks import convergence, data, identities, provenance, throughput
from floodrepro.verification.references import load_published
from floodrepro.verification.results import summarise
from floodrepro.verification.wording import interval, run_facts
from verification_fixtures import all_ignored, demo_recipe, healthy, make_record, make_table

LOSSES = [0.50, 0.42, 0.36, 0.33, 0.335, 0.334, 0.336, 0.31, 0.312]
RATES = [1e-4] * 7 + [5e-5] * 2  # patience 2: the third epoch without a better loss is the last with the old rate
STEPS = 12


def trajectory(losses: Sequence[float] = LOSSES, rates: Sequence[float] | None = RATES) -> list[dict[str, str]]:
    """Rows of metrics.csv in Lightning's order: rate (without an epoch), step, validation, end of epoch."""
    columns = ["epoch", "lr-AdamW", "step", "train/loss", "train/loss_epoch", "val/loss"]
    rows: list[dict[str, str]] = []
    for epoch, loss in enumerate(losses):
        step = str((epoch + 1) * STEPS - 1)
        if rates:
            rows.append({"lr-AdamW": repr(rates[epoch]), "step": str(epoch * STEPS)})
        rows.append({"epoch": str(epoch), "step": step, "train/loss": repr(loss + 0.03)})
        rows.append({"epoch": str(epoch), "step": step, "val/loss": repr(loss)})
        rows.append({"epoch": str(epoch), "step": step, "train/loss_epoch": repr(loss + 0.02)})
    return [{column: row.get(column, "") for column in columns} for row in rows]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Evidence of a healthy run on which all five checks pass."""
    evidence = healthy(tmp_path_factory.mktemp("record"))
    assert evidence.table is not None
    rows = trajectory()
    record = make_record(rows, evidence.recipe)
    rate = {"median": 24.0, "p10": 22.0, "p90": 25.0, "n": 30}
    speed = {"batch_seconds": rate | {"median": 0.32, "p10": 0.3, "p90": 0.4}, "chips_per_second": rate}
    table = replace(
        evidence.table, metadata=evidence.table.metadata | {"speed": speed | {"memory_gib": {"process": 1}}}
    )
    return replace(
        evidence,
        table=table,
        record=record,
        metrics=rows,
        reference_record=record,
        reference_metrics=rows,
        measured={"weights": {"sha256": table.metadata["checkpoint"]["sha256"]}},
        published=load_published(),
    )


def with_record(evidence: Evidence, **entries: Any) -> Evidence:
    return replace(evidence, record={**evidence.record, **entries})


def with_metadata(evidence: Evidence, which: str = "table", **entries: Any) -> Evidence:
    table = getattr(evidence, which)
    return replace(evidence, **{which: replace(table, metadata=table.metadata | entries)})


def with_losses(evidence: Evidence, losses: Sequence[float], rates: Sequence[float] | None = None) -> Evidence:
    """Another trajectory, with the record that goes with it and the rates that its losses give."""
    due = convergence.plateau_rates(losses, 1e-4, 0.5, 2, 1e-4)
    rows = trajectory(losses, due if rates is None else rates)
    return replace(evidence, metrics=rows, record=make_record(rows, evidence.recipe))


def value_of(answer: Check, start: str) -> Value:
    [value] = [value for value in answer.values if value.name.startswith(start)]
    return value


@pytest.mark.parametrize("room", [convergence, throughput, identities, data, provenance])
def test_healthy_run_passes(room: Any, good: Evidence):
    answer = room.check(good)
    assert (answer.id, answer.status, answer.reason) == (room.ID, "pass", "")
    assert room.__name__.endswith(room.ID)
    assert any(value.ok for value in answer.values)


@pytest.mark.parametrize("room", [convergence, throughput, identities, data, provenance])
def test_no_evidence_is_a_skip_with_its_reason_never_a_pass(room: Any, good: Evidence):
    bare = Evidence(run=good.run, record={}, recipe=good.recipe, thresholds=good.thresholds)
    answer = room.check(bare)
    assert answer.status == "skip" and answer.reason


def test_the_checks_need_neither_torch_nor_terratorch():
    code = (
        "import sys\n"
        "from floodrepro.verification import references\n"
        "from floodrepro.verification.checks import convergence, data, identities, provenance, throughput\n"
        "print(sorted({'torch', 'terratorch', 'lightning', 'rasterio', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Convergence


def test_the_schedule_is_recomputed_as_torch_does_it():
    import torch

    draw = np.random.default_rng(0)
    for patience in (0, 1, 2, 4):
        losses = np.round(0.3 + 0.05 * draw.standard_normal(60) + 0.3 / np.arange(1, 61), 3).tolist()
        losses[17] = math.nan
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
        rates = []
        for loss in losses:
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step(loss)
        assert convergence.plateau_rates(losses, 1e-4, 0.5, patience, 1e-4) == rates
        assert rates[-1] < rates[0]


def test_both_curves_are_drawn(good: Evidence):
    [plot] = convergence.check(good).plots
    assert [series["label"] for series in plot.series] == ["healthy", "reference.ckpt"]
    assert plot.series[0]["y"] == LOSSES


def test_loss_that_hardly_falls_fails(good: Evidence):
    answer = convergence.check(with_losses(good, [0.50, 0.495, 0.49]))
    assert answer.status == "fail" and "fall of val/loss" in answer.reason


def test_best_epoch_that_is_the_first_fails(good: Evidence):
    answer = convergence.check(with_losses(good, [0.30, 0.35, 0.34, 0.33]))
    assert value_of(answer, "best epoch, from 0").ok is False
    assert answer.status == "fail"


def test_best_epoch_that_is_the_last_is_told(good: Evidence):
    answer = convergence.check(with_losses(good, [0.50, 0.40, 0.31]))
    assert answer.status == "pass"
    assert any("may not have converged" in note for note in answer.notes)
    assert not any("may not have converged" in note for note in convergence.check(good).notes)


@pytest.mark.parametrize("column", ["train/loss", "val/loss", "train/loss_epoch"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_one_value_that_is_not_finite_fails(good: Evidence, column: str, text: str):
    rows = [dict(row) for row in good.metrics]
    bad = [row for row in rows if row[column]][-1]
    bad[column] = text
    answer = convergence.check(replace(good, metrics=rows))
    assert answer.status == "fail"
    assert f"values that are not finite: {column} at step {bad['step']}: 1" in answer.reason


def test_rate_that_stays_where_the_schedule_was_due_fails(good: Evidence):
    answer = convergence.check(replace(good, metrics=trajectory(rates=[1e-4] * 9)))
    assert answer.status == "fail" and "2, the first is 7" in answer.reason


def test_rate_that_falls_before_the_schedule_was_due_fails(good: Evidence):
    answer = convergence.check(replace(good, metrics=trajectory(rates=[1e-4] * 6 + [5e-5] * 3)))
    assert answer.status == "fail" and "1, the first is 6" in answer.reason


def test_schedule_that_was_never_due_is_told_apart_from_one_that_is_unknown(good: Evidence):
    answer = convergence.check(with_losses(good, [0.50, 0.40, 0.31, 0.30, 0.305]))
    assert answer.status == "pass" and any("no fall of the rate was due" in note for note in answer.notes)
    unlogged = convergence.check(replace(good, metrics=trajectory(rates=None)))
    assert any("not logged" in note for note in unlogged.notes)
    assert not any("learning rate" in value.name for value in unlogged.values)


@pytest.mark.parametrize("wrong", [{"best_epoch": 16}, {"best_val_loss": 0.2683}])
def test_record_that_names_another_best_epoch_than_the_log_fails(good: Evidence, wrong: dict[str, Any]):
    answer = convergence.check(with_record(good, **wrong))
    assert answer.status == "fail" and "in run.json" in answer.reason


def test_worse_than_the_reference_curve_fails_and_better_does_not(good: Evidence):
    worse = replace(good, reference_metrics=trajectory([loss - 0.1 for loss in LOSSES]))
    assert convergence.check(worse).status == "fail"
    assert "minus that of reference.ckpt: 0.1" in convergence.check(worse).reason
    better = replace(good, reference_metrics=trajectory([loss + 0.1 for loss in LOSSES]))
    assert convergence.check(better).status == "pass"


def test_curve_on_other_data_is_shown_and_not_judged(good: Evidence):
    other = {**good.reference_record, "data_digest": "ab" * 32}
    lower = replace(good, reference_record=other, reference_metrics=trajectory([loss - 0.1 for loss in LOSSES]))
    answer = convergence.check(lower)
    assert answer.status == "pass"
    assert value_of(answer, "best val/loss minus").ok is None
    assert any("its distance is not judged" in note for note in answer.notes)


def test_published_curve_is_for_the_published_recipe_on_the_whole_data(good: Evidence):
    base = recipes.read(recipes.find("terramind_v1_base_impactmesh_flood_amd"))
    published = replace(good, recipe=base, reference_metrics=())
    whole = with_record(published, chips={"train": 57_067, "val": 9_028})
    distance = value_of(convergence.check(whole), "best val/loss minus that of AMD run A")
    assert distance.value == pytest.approx(0.31 - 0.2683) and distance.ok
    far = replace(whole, metrics=trajectory([loss + 0.05 for loss in LOSSES]))
    far = with_record(far, best_val_loss=0.36)
    assert convergence.check(far).status == "fail"
    assert value_of(convergence.check(published), "best val/loss minus").ok is None, "80 chips are not the whole data"
    assert not any("minus" in value.name for value in convergence.check(replace(good, reference_metrics=())).values)


INCIDENT = {"kind": "loss", "detail": "the loss is nan", "module": None, "epoch": 4, "step": 51, "chips": []}
ROLLBACK = {"step": 51, "state": "last.ckpt", "precision": ["16-mixed", "bf16-mixed"], "when": "2026-01-02"}


def test_incidents_and_rollback_are_told_first_even_where_the_check_is_skipped(good: Evidence):
    disturbed = with_record(good, incidents=[INCIDENT], rollback=ROLLBACK)
    for evidence in (disturbed, replace(disturbed, metrics=()), replace(disturbed, metrics=trajectory([0.5]))):
        notes = convergence.check(evidence).notes
        assert "step 51, epoch 4" in notes[0] and "bf16-mixed in place of 16-mixed" in notes[1]


def test_one_validation_is_no_trajectory(good: Evidence):
    answer = convergence.check(replace(good, metrics=trajectory([0.5])))
    assert answer.status == "skip" and "needs two" in answer.reason
    assert convergence.check(replace(good, metrics=trajectory([math.nan]))).status == "fail"


# Throughput


def test_few_timed_steps_are_a_skip(good: Evidence):
    answer = throughput.check(with_record(good, step_seconds=good.record["step_seconds"] | {"n": 19}))
    assert answer.status == "skip" and "19 steps" in answer.reason
    assert throughput.check(with_record(good, step_seconds=None)).status == "skip"


def test_rate_of_a_progress_bar_that_the_steps_do_not_allow_fails(good: Evidence):
    rate = {"median": 48.0, "p10": 47.0, "p90": 49.0, "n": 9}
    answer = throughput.check(with_record(good, chips_per_second=rate))
    assert answer.status == "fail" and "training, chips/s over" in answer.reason


def test_slow_epochs_pass_only_where_waiting_for_data_explains_them(good: Evidence):
    rate = {"median": 5.0, "p10": 4.8, "p90": 5.2, "n": 9}
    assert throughput.check(with_record(good, chips_per_second=rate)).status == "fail"
    assert throughput.check(with_record(good, chips_per_second=rate, share_waiting_for_data=0.7)).status == "pass"


@pytest.mark.parametrize(("ended", "status"), [("03:00:20", "fail"), ("03:10:00", "pass"), ("09:00:00", "fail")])
def test_hours_that_do_not_fit_the_steps_fail(good: Evidence, ended: str, status: str):
    answer = throughput.check(with_record(good, ended=f"2026-01-02T{ended}+00:00"))
    assert answer.status == status
    assert (value_of(answer, "from start to end").ok is False) == (status == "fail")


@pytest.mark.parametrize(
    ("seconds", "shown", "asked", "ok"),
    [
        (115_812, 32.17, "12.34 to 32.20 h", True),  # 32.2 would be on the bound
        (115_990, 32.22, "12.34 to 32.20 h", False),
        (300_000, 83.3, "12.3 to 32.2 h", False),
    ],
)
def test_hours_are_shown_so_that_they_do_not_contradict_the_answer(good: Evidence, seconds, shown, asked, ok):
    ended = datetime.fromisoformat(good.record["started"]) + timedelta(seconds=seconds)
    chips, epochs = {"train": 57_067, "val": 9_028}, 10
    training = 1.5 * (12.34 * 3600 + 1)
    rate = {"median": epochs * chips["train"] / training, "p10": 1.0, "p90": 99.0, "n": 9}
    waste = 32.2 * 3600 - 900 - 1.5 * training * (1 + chips["val"] / chips["train"])
    record = {"ended": ended.isoformat(), "chips": chips, "chips_per_second": rate, "seconds_writing_states": waste}
    evidence = with_record(good, progress=good.record["progress"] | {"epochs": epochs}, **record)
    hours = value_of(throughput.check(evidence), "from start to end")
    assert (hours.value, hours.ok) == (shown, ok)
    assert hours.threshold.startswith(asked)


def test_hours_of_a_resumed_run_are_not_judged(good: Evidence):
    resumed = with_record(good, ended="2026-01-03T03:00:00+00:00", resumes=[{"when": "x", "from": "y", "changes": []}])
    answer = throughput.check(resumed)
    assert answer.status == "pass" and any("several parts" in note for note in answer.notes)


def gpu_record(good: Evidence, *, allocated: float | None) -> Evidence:
    environment = good.record["environment"] | {
        "accelerator": {"count": 1, "name": "AMD Instinct MI300X", "memory_gib": 191.7, "drivers": {}},
        "torch": {"version": "2.9.1+rocm7.2", "build": "rocm", "build_version": "7.2"},
    }
    peaks = {"process": 4.0} | ({"allocated": allocated, "reserved": allocated} if allocated else {})
    return with_record(good, environment=environment, memory_gib={"with_warm_up": peaks, "after_warm_up": peaks})


def test_gpu_that_trained_is_named(good: Evidence):
    answer = throughput.check(gpu_record(good, allocated=29.5))
    device = value_of(answer, "device of training")
    assert answer.status == "pass"
    assert device.value == "AMD Instinct MI300X" and "rocm 7.2" in device.method
    assert value_of(answer, "timed steps").value == 20 * good.record["step_seconds"]["n"]


def test_gpu_that_was_merely_there_is_not_claimed(good: Evidence):
    answer = throughput.check(gpu_record(good, allocated=None))
    assert value_of(answer, "device of training").value == "x86_64"
    assert any("training was not on it" in note for note in answer.notes)


def test_memory_beyond_the_devices_own_fails(good: Evidence):
    answer = throughput.check(gpu_record(good, allocated=200.0))
    assert answer.status == "fail" and "training memory, allocated: 200 GiB" in answer.reason


def test_rates_without_a_device_fail(good: Evidence):
    answer = throughput.check(with_record(good, environment={}))
    assert answer.status == "fail" and "device of training: None" in answer.reason


def test_test_rate_that_its_batches_do_not_allow_fails(good: Evidence):
    assert good.table is not None
    speed = good.table.metadata["speed"]
    faster = speed | {"batch_seconds": speed["batch_seconds"] | {"median": 3.0, "p10": 2.9, "p90": 3.1}}
    answer = throughput.check(with_metadata(good, speed=faster))
    assert answer.status == "fail" and "test, chips/s over" in answer.reason


def test_percentiles_out_of_order_fail_in_a_run_and_in_a_benchmark(good: Evidence):
    swapped = {"median": 14.8, "p10": 15.2, "p90": 14.1, "n": 9}
    assert throughput.check(with_record(good, chips_per_second=swapped)).status == "fail"
    bench = {"chips_per_second": {"floodrepro": swapped}, "device": "NVIDIA H100"}
    answer = throughput.check(replace(good, benchmarks={"train": bench}))
    assert answer.status == "fail" and "benchmark train, floodrepro" in answer.reason


def test_benchmarks_stand_beside_the_run_with_their_own_device(good: Evidence):
    bench = {"chips_per_second": {"floodrepro": {"median": 100.0, "p10": 90.0, "p90": 110.0}}, "device": "NVIDIA H100"}
    answer = throughput.check(replace(good, benchmarks={"train": bench}))
    assert answer.status == "pass"
    assert list(answer.tables[0].rows[0]) == ["train", "floodrepro", 100.0, 90.0, 110.0, "NVIDIA H100"]
    assert value_of(answer, "device of training").value == "x86_64"


# Identities


def spoiled(metadata: Mapping[str, Any], name: str, by: float) -> dict[str, float]:
    return {**metadata["metrics"], name: metadata["metrics"][name] + by}


def test_three_classes_pass_as_two_do(tmp_path: Path):
    assert identities.check(healthy(tmp_path, protocol="v1")).status == "pass"


@pytest.mark.parametrize("which", ["table", "reference"])
@pytest.mark.parametrize("by", [1e-5, math.nan])
def test_metric_that_the_counts_do_not_give_fails(good: Evidence, which: str, by: float):
    metrics = spoiled(getattr(good, which).metadata, "test/IoU_1", by)
    answer = identities.check(with_metadata(good, which, metrics=metrics))
    named = "run" if which == "table" else "reference"
    assert answer.status == "fail" and f"{named}: difference to TerraTorch's metrics" in answer.reason


def test_class_accuracy_is_compared_too(good: Evidence):
    assert good.table is not None
    (_, missed), (_, hit) = good.table.counts.sum(axis=0).T.tolist()
    for accuracy, status in ((hit / (hit + missed), "pass"), (0.5, "fail")):
        metrics = good.table.metadata["metrics"] | {"test/Class_Accuracy_1": accuracy}
        assert identities.check(with_metadata(good, metrics=metrics)).status == status


def test_scores_that_are_computed_wrongly_fail(good: Evidence, monkeypatch: pytest.MonkeyPatch):
    real = identities.scores
    monkeypatch.setattr(identities, "scores", lambda counts: real(counts) | {"F1_Score": real(counts)["mIoU"]})
    metrics_follow = with_metadata(good, metrics={})  # only the identity is left to notice it
    answer = identities.check(metrics_follow)
    assert answer.status == "fail" and "run: deviation from the identities" in answer.reason


def test_absent_class_is_left_out_of_the_means():
    counts = np.array([[90, 0, 10], [0, 0, 0], [5, 0, 45]])
    assert identities.deviation(counts) == pytest.approx(0, abs=1e-15)


def test_subset_is_part_of_the_whole_or_fails(good: Evidence):
    assert good.table is not None
    chips = good.table.chips[:16].tolist()
    part = good.table.subset(chips, split="holdout", subset_of="test", metrics={})
    whole = replace(good, subsets={"holdout": part})
    assert identities.check(whole).status == "pass"
    counts = part.counts.copy()
    counts[3, 0, 0] += 1
    answer = identities.check(replace(good, subsets={"holdout": replace(part, counts=counts)}))
    assert answer.status == "fail" and "with other counts: 1" in answer.reason
    stranger = replace(part, chips=np.array(["EMSR1_1_35TMF_x0_y0", *chips[1:]]))
    assert identities.check(replace(good, subsets={"holdout": stranger})).status == "fail"


def test_metrics_of_one_of_several_test_splits_are_found_under_its_name(good: Evidence):
    assert good.table is not None
    metrics = good.table.metadata["metrics"]
    named = {name.replace("test/", "test/holdout/"): value for name, value in metrics.items()}
    of_several = with_metadata(good, split="holdout", metrics=named)
    assert identities.check(of_several).status == "pass"
    wrong = {name: value + 0.01 for name, value in named.items()}
    assert identities.check(with_metadata(of_several, metrics=wrong)).status == "fail"


def test_table_without_terratorchs_metrics_is_a_skip(good: Evidence):
    answer = identities.check(with_metadata(good, metrics={}))
    assert answer.status == "skip" and "none of TerraTorch's metrics" in answer.reason


def test_table_of_ignored_pixels_is_a_skip(good: Evidence):
    assert good.table is not None
    assert identities.check(replace(good, table=all_ignored(good.table))).status == "skip"


def test_published_row_that_breaks_the_identities_is_told(good: Evidence):
    amd = good.published["published_amd"]
    broken = {**amd, "figures": {**amd["figures"], "mIoU": 0.6842}}
    answer = identities.check(replace(good, published={**good.published, "published_amd": broken}))
    assert answer.status == "pass", "what others published is no fault of this run"
    assert any("AMD run, model card: mIoU is 0.6842, its IoUs give 0.6642" in note for note in answer.notes)
    assert not any("Published figures" in note for note in identities.check(good).notes)


# Data

OTHER = "0f" * 32


def audit_of(good: Evidence, **entries: Any) -> Evidence:
    """With an audit of all splits that the recipe names."""
    assert good.audit is not None and good.table is not None
    chips = {"train": 80, "val": 24, "test": len(good.table)}
    splits = {split: {"chips": count, "events": 4, "expected": None} for split, count in chips.items()}
    return replace(good, audit={**good.audit, "splits": splits, **entries})


def finding(severity: str) -> dict[str, Any]:
    return {"severity": severity, "check": "damaged", "message": "cannot be read", "chip": "EMSR1", "file": "MASK"}


def test_constants_of_the_audit_are_the_audits():
    from floodrepro.data import audit, survey

    assert (data._AUDIT_SCHEMA, data._SEEN) == (audit.SCHEMA, survey.SEEN)


def test_test_on_other_data_than_training_fails(good: Evidence):
    answer = data.check(with_metadata(good, data_digest=OTHER))
    assert answer.status == "fail" and "data of training and of the test (digests): different" in answer.reason
    assert any("every split that the recipe names" in note for note in answer.notes)


@pytest.mark.parametrize("side", ["record", "table"])
def test_unknown_digest_is_a_skip(good: Evidence, side: str):
    evidence = with_record(good, data_digest=None) if side == "record" else with_metadata(good, data_digest=None)
    assert data.check(evidence).status == "skip"


def test_error_of_the_audit_fails_and_a_warning_does_not(good: Evidence):
    answer = data.check(audit_of(good, findings=[finding("warning"), finding("error")]))
    assert answer.status == "fail" and "errors of the audit: 1" in answer.reason
    assert answer.tables[0].rows[0] == ["error", "damaged", "EMSR1, MASK: cannot be read"]
    assert data.check(audit_of(good, findings=[finding("warning")])).status == "pass"


def test_absent_and_quick_audits_are_told(good: Evidence):
    absent = data.check(replace(good, audit=None))
    assert "audit" not in absent.claim and "the data's audit found no error" in data.check(good).claim
    assert absent.status == "pass" and any("No audit" in note for note in absent.notes)
    assert any("no pixel was read" in note for note in data.check(good).notes)
    assert not any("no pixel" in note for note in data.check(audit_of(good, deep={"chips": {}})).notes)
    old = data.check(audit_of(good, schema=0, findings=[finding("error")]))
    assert not any(value.name == "errors of the audit" for value in old.values) and "audit" not in old.claim


def test_audit_of_other_data_fails_where_it_can_be_compared(good: Evidence):
    answer = data.check(audit_of(good, digest=OTHER))
    assert answer.status == "fail" and "data of the run and of the audit" in answer.reason
    fewer = audit_of(good, digest=OTHER, splits={"train": {"chips": 80, "events": 4, "expected": None}})
    told = data.check(fewer)
    assert told.status == "pass" and any("cannot be compared" in note for note in told.notes)


def test_audit_against_another_version_of_the_data_fails(good: Evidence):
    assert data.check(audit_of(good, protocol="v1")).status == "fail"
    binary = with_metadata(with_metadata(good, protocol="v1-binary"), "reference", protocol="v1-binary")
    assert data.check(audit_of(binary, protocol="v1")).status == "pass", "both read version 1"


@pytest.mark.parametrize("key", ["data_digest", "protocol"])
def test_reference_tested_on_other_data_or_protocol_fails(good: Evidence, key: str):
    answer = data.check(with_metadata(good, "reference", **{key: "v1" if key == "protocol" else OTHER}))
    assert answer.status == "fail" and "run and reference" in answer.reason


def test_reference_trained_on_other_data_fails_and_on_unknown_is_told(good: Evidence):
    other = replace(good, reference_record={**good.reference_record, "data_digest": OTHER})
    assert data.check(other).status == "fail"
    unknown = data.check(replace(good, reference_record={}))
    assert unknown.status == "pass"
    assert value_of(unknown, "data of training, run and reference").value == "unknown"
    assert any("unknown" in note for note in unknown.notes)


def test_table_with_a_chip_missing_fails(good: Evidence):
    assert good.table is not None
    short = good.table.subset(good.table.chips[1:].tolist())
    answer = data.check(replace(audit_of(good), table=short))
    assert answer.status == "fail" and f"chips in the table of test: {len(short)}" in answer.reason
    of_val = replace(good, table=replace(short, metadata=short.metadata | {"split": "val"}))
    assert data.check(of_val).status == "fail", "run.json counts val: 24"


def test_generated_data_is_no_failure_and_is_told(good: Evidence):
    notes = data.check(good).notes
    assert "Generated or partial data: 96 of the 14,556 published chips of test (v0)." in notes


# Provenance


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_run_that_is_not_finished_fails(good: Evidence, status: str):
    answer = provenance.check(with_record(good, status=status))
    assert answer.status == "fail" and f"status of the run: {status}" in answer.reason


def with_git(good: Evidence, commit: str | None, dirty: bool | None, **code: Any) -> Evidence:
    environment = {**good.record["environment"], "code": {"commit": commit, "dirty": dirty, "note": "no repository"}}
    return with_record(good, environment=environment, code=good.record["code"] | code)


def test_dirty_tree_fails(good: Evidence):
    answer = provenance.check(with_git(good, "4f" * 20, True))
    assert answer.status == "fail" and "working tree: dirty" in answer.reason
    assert provenance.check(with_git(good, "4f" * 20, False)).status == "pass"
    assert provenance.check(with_git(good, "4f" * 20, None)).status == "fail", "unknown is not clean"


def test_installed_wheel_needs_version_and_source_hash(good: Evidence):
    wheel = provenance.check(with_git(good, None, None))
    assert wheel.status == "pass" and any("source hash stand in" in note for note in wheel.notes)
    assert provenance.check(with_git(good, None, None, source_sha256=None)).status == "fail"
    assert provenance.check(with_git(good, None, None, floodrepro=None)).status == "fail"


@pytest.mark.parametrize("wrong", [None, "", "c0" * 31, "c0" * 33, "zz" * 32, "C0" * 32])
def test_hash_that_is_missing_or_malformed_fails(good: Evidence, wrong: Any):
    assert provenance.check(with_record(good, data_digest=wrong)).status == "fail"
    assert provenance.check(with_record(good, recipe_sha256=wrong)).status == "fail"
    anonymous = with_metadata(good, checkpoint={"name": "best.ckpt", "sha256": wrong})
    assert "weights that were tested" in provenance.check(replace(anonymous, measured={})).reason


def test_recipe_that_was_changed_after_the_run_fails(good: Evidence):
    answer = provenance.check(replace(good, recipe=demo_recipe(seed_everything=43)))
    assert answer.status == "fail" and "recipe.yaml and run.json" in answer.reason


def test_table_of_another_recipe_fails(good: Evidence):
    answer = provenance.check(with_metadata(good, recipe_sha256=OTHER))
    assert answer.status == "fail" and "recipe of the table and of the run" in answer.reason


def test_table_tested_elsewhere_at_another_precision_is_told_and_with_other_statistics_fails(good: Evidence):
    elsewhere = ["data.init_args.data_root", "data.init_args.test_split", "trainer.precision"]
    answer = provenance.check(with_metadata(good, recipe_sha256=OTHER, recipe_changes=elsewhere))
    assert answer.status == "pass"
    assert any(
        "another data.init_args.data_root, data.init_args.test_split, trainer.precision" in n for n in answer.notes
    )
    changes = [*elsewhere, "data.init_args.means.DEM"]
    answer = provenance.check(with_metadata(good, recipe_sha256=OTHER, recipe_changes=changes))
    assert answer.status == "fail" and "another data.init_args.means.DEM" in answer.reason


def test_table_of_other_weights_fails_and_unhashed_ones_are_told(good: Evidence):
    answer = provenance.check(replace(good, measured={"weights": {"sha256": OTHER}}))
    assert answer.status == "fail" and "weights of the table and in the run folder" in answer.reason
    for measured in ({}, {"weights": {"problem": "the file is damaged"}}):
        told = provenance.check(replace(good, measured=measured))
        assert told.status == "pass" and any("were not hashed" in note for note in told.notes)


def test_subset_of_other_weights_fails(good: Evidence):
    assert good.table is not None
    part = good.table.subset(good.table.chips[:8].tolist(), split="holdout")
    assert provenance.check(replace(good, subsets={"holdout": part})).status == "pass"
    other = replace(part, metadata=part.metadata | {"checkpoint": {"name": "best.ckpt", "sha256": OTHER}})
    assert provenance.check(replace(good, subsets={"holdout": other})).status == "fail"


def test_reference_that_is_the_run_itself_fails(good: Evidence):
    answer = provenance.check(replace(good, reference=good.table))
    assert answer.status == "fail" and "reference: it is this very checkpoint" in answer.reason
    assert good.table is not None
    renamed = replace(good.table, metadata=good.table.metadata | {"checkpoint": {"name": "other.pt", "sha256": OTHER}})
    answer = provenance.check(replace(good, reference=renamed))
    assert answer.status == "fail" and "reference: it predicts every chip alike" in answer.reason


def test_reference_tested_otherwise_than_it_was_trained_fails(good: Evidence):
    elsewhere = with_metadata(good, "reference", recipe_sha256=OTHER, recipe_changes=["data.init_args.data_root"])
    assert provenance.check(elsewhere).status == "pass"
    changes = ["data.init_args.data_root", "data.init_args.timesteps"]
    for record in (good.reference_record, {}):
        other = with_metadata(good, "reference", recipe_sha256=OTHER, recipe_changes=changes)
        answer = provenance.check(replace(other, reference_record=record))
        assert answer.status == "fail" and "recipe of the reference's table and of its run: another" in answer.reason
        assert "data.init_args.timesteps" in answer.reason and "data_root" not in answer.reason
    assert provenance.check(with_metadata(good, "reference", recipe_sha256=OTHER)).status == "fail"


def test_reference_without_a_run_has_to_see_what_the_run_sees(good: Evidence):
    assert good.table is not None
    bare = replace(with_metadata(good, "reference", recipe_sha256=OTHER, recipe_changes=None), reference_record={})
    assert provenance.check(bare).status == "pass"
    inputs = {**good.table.metadata["inputs"], "means": {"DEM": [0.0]}}
    answer = provenance.check(with_metadata(bare, "reference", inputs=inputs))
    assert answer.status == "fail" and "what run and reference saw of a chip: another means.DEM" in answer.reason
    unknown = provenance.check(with_metadata(bare, "reference", inputs=None))
    assert unknown.status == "pass" and any("the reference was tested is unknown" in note for note in unknown.notes)


def test_reference_that_is_not_the_published_checkpoint_is_told_and_no_failure(good: Evidence):
    answer = provenance.check(good)
    assert answer.status == "pass" and any("no published checkpoint" in note for note in answer.notes)
    known = {"name": "flood.pt", "sha256": good.published["published_ibm"]["sha256"]}
    answer = provenance.check(with_metadata(good, "reference", checkpoint=known))
    assert answer.status == "pass" and not any("no published checkpoint" in note for note in answer.notes)


def test_resume_with_changes_is_told(good: Evidence):
    resume = {"when": "2026-01-02", "from": "last.ckpt", "changes": ["trainer.max_epochs: 8 became 16"]}
    notes = provenance.check(with_record(good, resumes=[resume])).notes
    assert any("although something had changed: trainer.max_epochs: 8 became 16" in note for note in notes)
    compiled = provenance.check(with_record(good, numerics={"compiled": True, "fused": False})).notes
    assert any("roundings were on: compiled" in note for note in compiled)


def seeds(good: Evidence, *statuses: str, untested: int | None = None) -> Evidence:
    table = make_table(events=2, chips_per_event=2, pixels=64)
    runs = [
        SeedRun(42 + n, status, None if status != "finished" or n == untested else table, f"seed-{42 + n}")
        for n, status in enumerate(statuses)
    ]
    return replace(good, seeds=runs)


def test_every_declared_run_is_reported_or_the_check_fails(good: Evidence):
    answer = provenance.check(seeds(good, "finished", "finished", "failed"))
    assert answer.status == "pass"
    assert (value_of(answer, "runs declared").value, value_of(answer, "runs reported").value) == (3, 3)
    assert list(answer.tables[0].rows[2]) == [44, "failed", "no", "seed-44"]
    missing = provenance.check(seeds(good, "finished", "finished", untested=1))
    assert missing.status == "fail" and "1; not seed 43 (not tested)" in missing.reason
    for status in ("not started", "running", "interrupted"):
        assert provenance.check(seeds(good, "finished", status)).status == "fail"


def test_run_whose_seed_was_not_declared_fails(good: Evidence):
    answer = provenance.check(with_record(seeds(good, "finished", "finished"), seed=7))
    assert answer.status == "fail" and "seed of this run: 7" in answer.reason


def test_run_without_a_table_is_a_skip(good: Evidence):
    assert provenance.check(replace(good, table=None)).status == "skip"


def test_card_that_says_other_figures_than_the_table_fails_identities(good: Evidence):
    counts = good.table.counts.sum(axis=0)
    card = {f"test/{name}": value for name, value in scores(counts).items()}
    assert identities.check(replace(good, card=card)).status == "pass"
    answer = identities.check(replace(good, card=card | {"test/IoU_1": card["test/IoU_1"] + 0.01}))
    assert answer.status == "fail" and "card: difference to the counts" in answer.reason
    assert identities.check(replace(good, card={"test/unheard_of": 1.0})).status == "fail"


# Wording


def facts(evidence: Evidence) -> dict[str, str]:
    return dict(run_facts(summarise(evidence, [], [], "2026-01-02T05:00:00+00:00")["run"]))


def test_commit_of_the_report_is_the_environments(good: Evidence):
    assert facts(good)["commit"] == f"{'4f' * 20} (clean)"
    assert facts(with_git(good, "4f" * 20, True))["commit"] == f"{'4f' * 20} (with changes)"
    assert "commit" not in facts(with_git(good, None, None))


def test_device_of_the_report_is_the_one_that_trained(good: Evidence):
    assert facts(gpu_record(good, allocated=29.5))["device"] == "AMD Instinct MI300X, 1 in the machine"
    assert facts(gpu_record(good, allocated=None))["device"] == "x86_64"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-1.9996, 0.3, "-1.9996 to 0.30"),
        (-2.0004, 0.3, "-2.0004 to 0.30"),
        (-1.2345, 1.2345, "-1.23 to 1.23"),
        (-0.004, 0.3, "-0.004 to 0.30"),
    ],
)
def test_end_of_an_interval_stays_on_its_side_of_the_margin(low: float, high: float, text: str):
    value = Value("difference", -0.8, "pp", low, high, threshold="interval within ±2 pp", ok=low > -2)
    assert interval(asdict(value)) == text
