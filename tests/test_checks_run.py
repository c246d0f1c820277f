"""convergence, data, provenance: on a sound run, and on one with a planted fault."""

from dataclasses import replace
from pathlib import Path

from floodrepro.evaluation.chip_table import read_table, write_table
from floodrepro.run_folder import RunFolder
from floodrepro.verification import battery
from floodrepro.verification.battery import ask
from floodrepro.verification.checks import Evidence
from verification_fixtures import CHIPS, DIGESTS, LOSSES, OTHER, demo_recipe, figure_of, gather, make_run, make_table

SAME = "test chips of training, test, reference"


def with_record(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, record=evidence.record | changes)


def with_metadata(evidence: Evidence, **changes) -> Evidence:
    return replace(evidence, table=replace(evidence.table, metadata=evidence.table.metadata | changes))


def test_log_is_read_as_it_was_written_and_what_is_wrong_in_it_named(evidence: Evidence):
    answer = ask("convergence", evidence)
    assert figure_of(answer, "fall of val/loss")["value"] == LOSSES[0] - min(LOSSES)
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
    mine = with_record(evidence, data=evidence.record["data"] | {"listed": {"test": "1" * 64}})
    answer = ask("data", with_metadata(mine, data={"digests": DIGESTS, "listed": {"test": "2" * 64}}))
    assert "list of test at training and test: 222222222222 and 111111111111" in answer["finding"]
    for chips, status in ((len(evidence.table), "pass"), (14_556, "fail")):  # the table is of a part of the split
        data = evidence.record["data"] | {"chips": CHIPS | {"test": chips}}
        assert ask("data", with_record(evidence, data=data))["status"] == status


def test_table_of_other_weights_or_chips_stands_in_no_column(tmp_path: Path):
    evaluation = make_run(tmp_path / "mine").evaluation
    write_table(make_table(6, 3, checkpoint=OTHER, subset_of="test"), evaluation / "part" / "best.parquet")
    write_table(make_table(5, 3), evaluation / "baselines" / "test" / "other.parquet")
    write_table(read_table(evaluation / "test" / "best.parquet"), evaluation / "baselines" / "test" / "same.parquet")
    found = gather(RunFolder(tmp_path / "mine"))
    assert (found.subsets, list(found.baselines)) == ({}, ["same"])


def test_error_of_the_audit_and_other_chips_in_it_fail(evidence: Evidence):
    error, sound = {"severity": "error", "message": "2 pixels of class 7"}, {"digests": DIGESTS, "findings": []}
    assert ask("data", replace(evidence, audit=sound))["status"] == "pass"
    others = {"digests": {"train": "0" * 64}}
    for audit, says in (({"findings": [error]}, "2 pixels of class 7"), (others, "train chips of training, audit")):
        answer = ask("data", replace(evidence, audit=sound | audit))
        assert (answer["status"], says in answer["finding"]) == ("fail", True)


def test_damaged_manifest_fails_and_one_of_the_current_folder_is_not_asked_for(tmp_path: Path, monkeypatch):
    (tmp_path / "data-manifest.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    run, recipe = make_run(tmp_path / "mine"), demo_recipe()
    del recipe["data"]["init_args"]["data_root"]
    assert "audit" not in gather(make_run(tmp_path / "rootless", recipe=recipe)).absent
    damaged = battery.gather(run, "test", None, tmp_path, data_root=tmp_path)
    assert (ask("data", damaged)["status"], "manifest" in ask("data", damaged)["finding"]) == ("fail", True)


def test_record_that_does_not_say_where_the_weights_come_from_fails(evidence: Evidence):
    for planted, says in (
        ({"status": "interrupted"}, "status of the run: interrupted"),
        ({"recipe_sha256": "0" * 64}, "recipe.yaml and run.json"),
        ({"environment": {"code": {"commit": "4f" * 20, "dirty": True}}}, "working tree: with changes"),
        ({"environment": {}}, "source of the code: unknown"),
        ({"seed": 7}, "the seed was declared: no"),
        ({"checkpoint_sha256": "0" * 64}, "weights of table and run"),
    ):
        answer = ask("provenance", with_record(evidence, **planted))
        assert (answer["status"], says in answer["finding"]) == ("fail", True)


def test_table_of_another_recipe_fails_and_another_data_root_does_not(evidence: Evidence):
    harmless = ["trainer.devices", "data.init_args.data_root", "data.init_args.batch_size"]
    harmful = "data.init_args.means.DEM"
    for changes, says in (([], "recipe of table and run"), (harmless, ""), ([harmful], f"recipe ({harmful})")):
        answer = ask("provenance", with_metadata(evidence, recipe_sha256="0" * 64, recipe_changes=changes))
        assert (answer["status"], says in answer["finding"]) == ("fail" if says else "pass", True)


def test_reference_that_sees_other_inputs_fails_no_record_is_a_skip_and_source_stands_for_a_commit(evidence: Evidence):
    theirs = make_table(seed=9, inputs={"means": {"DEM": [154.914]}, "timesteps": [0, 1, 2, 3]})
    answer = ask("provenance", replace(evidence, reference=theirs))
    assert "run and reference see of a chip (means.DEM)" in answer["finding"]
    for commit, says in ((None, "code source 5c5c"), ("4f" * 20, "code 4f4f")):  # of a wheel, of an image
        code = {"commit": commit, "dirty": None, "source_sha256": "5c" * 32}
        answer = ask("provenance", with_record(evidence, environment={"code": code}))
        assert (answer["status"], says in answer["finding"]) == ("pass", True)
    assert ask("provenance", replace(evidence, record={}))["status"] == "skip"
