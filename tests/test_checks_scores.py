"""The checks of scores: three words for a comparison, and each check on a sound run and on one with a planted fault."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from floodrepro.evaluation import intervals, metrics
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import iou, pool_by_event
from floodrepro.verification.battery import ask
from floodrepro.verification.checks import CRITERIA, NOTHING, Evidence, SeedRun, number
from floodrepro.verification.checks.scores import points
from verification_fixtures import OTHER, declared, figure_of, make_table, missed, summarise

OUTCOMES = [(0.0, None, "equivalent", "pass"), (0.3, ["EMSR9001"], "undecided", "undecided")]
OUTCOMES += [(0.2, None, "different (worse)", "fail"), (-0.2, None, "different (better)", "pass")]


@pytest.fixture(scope="module")
def published(evidence: Evidence) -> dict:
    """What is published of the reference."""
    found = metrics.scores(evidence.reference.counts.sum(axis=0))
    figures = {name: round(found[name], 4) for name in ("IoU_1", "mIoU", "Class_Accuracy_1")}
    about = {"name": "IBM", "protocol": "v0", "split": "test", "chips": 96, "source": "a page"}
    return about | {"sha256": OTHER["sha256"], "decimals": 4, "figures": figures}


def silent(table: ChipTable) -> ChipTable:
    """The table of a model that never predicts the class."""
    counts = np.zeros_like(table.counts)
    counts[:, :, 0] = table.counts.sum(axis=2)
    return replace(table, counts=counts)


@pytest.mark.parametrize("name", CRITERIA)
def test_sound_run_passes_every_check_and_its_answer_is_json(evidence: Evidence, published: dict, name: str):
    answer = ask(name, replace(evidence, published={"published_ibm": published}))
    assert answer["status"] == "pass", answer["finding"]
    assert answer["finding"]
    assert json.dumps(answer)
    assert all(len(row) == len(table["columns"]) for table in answer["tables"] for row in table["rows"])


def test_difference_is_that_of_the_scores_over_events_and_the_positive_class_need_not_be_the_last(evidence: Evidence):
    flipped = [replace(one, counts=one.counts[:, ::-1, ::-1]) for one in (evidence.table, evidence.reference)]
    found = replace(evidence, table=flipped[0], reference=flipped[1], positive=0, class_name="water")
    answer = ask("parity", evidence)
    value = figure_of(answer, "difference in flood IoU")["value"]
    assert figure_of(ask("parity", found), "difference in water IoU")["value"] == value
    found = figure_of(answer, "difference in flood IoU, pooled")
    assert (found["n_events"], found["n_chips"]) == (12, 96)
    by_event = [pool_by_event(one.counts, one.events)[1] for one in (evidence.table, evidence.reference)]
    result = intervals.jackknife(by_event[0], lambda counts: iou(counts, 1), other=by_event[1], positive=1)
    ends = (result.estimate, *result.interval())
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx([100 * end for end in ends])
    assert "rough: 12 events" in answer["finding"]


@pytest.mark.parametrize(("lost", "events", "outcome", "status"), OUTCOMES)
def test_comparison_ends_in_one_of_three_words(evidence: Evidence, lost, events, outcome, status):
    changed = missed(evidence.reference if lost < 0 else evidence.table, abs(lost), events)
    found = replace(evidence, **{"reference" if lost < 0 else "table": changed})
    answer = ask("parity", found)
    assert (answer["outcome"], answer["status"]) == (outcome, status)
    assert ("parity" in summarise(found)["summary"]["not_met"]) is (status == "fail")
    assert summarise(replace(found, seeds=()))["verdict"]["outcome"] == outcome
    assert bool(re.search(r"about [\d,]+ events like these would decide", answer["finding"])) is (status == "undecided")


def test_required_comparison_is_met_unless_it_fails_and_by_name_if_it_is_equivalent(evidence: Evidence):
    undecided = replace(evidence, table=missed(evidence.table, 0.3, ["EMSR9001"]), seeds=())
    better = replace(evidence, reference=missed(evidence.reference, 0.2), seeds=())
    for found, met in ((undecided, False), (better, False), (replace(evidence, seeds=()), True)):
        assert "parity" not in summarise(found)["summary"]["not_met"]
        assert summarise(found, "parity")["summary"]["ok"] is met


def test_one_lucky_seed_is_not_called_equivalent(evidence: Evidence):
    """The run itself is as good as the reference; the other declared seeds are several points worse."""
    worse = [replace(run, table=missed(run.table, 0.1)) for run in evidence.seeds[1:]]
    found = replace(evidence, seeds=[evidence.seeds[0], *worse])
    assert ask("parity", found)["outcome"] == "equivalent"
    verdict = summarise(found)["verdict"]
    assert (verdict["outcome"], "spread over seeds" in verdict["sentence"]) == ("undecided", True)


@pytest.mark.parametrize("check", ["parity", "head_to_head"])
def test_wrong_reference_fails_and_the_model_itself_shows_nothing(evidence: Evidence, check: str):
    answer = ask(check, replace(evidence, reference=make_table(events=11)))
    assert (answer["status"], answer["outcome"]) == ("fail", None)
    assert answer["finding"].startswith("wrong reference: other chips: 8 are in")
    resaved = replace(evidence.table, metadata=evidence.table.metadata | {"checkpoint": OTHER})
    for reference in (evidence.table, resaved):
        answer = ask(check, replace(evidence, reference=reference))
        assert (answer["status"], "this very model" in answer["finding"]) == ("skip", True)
    surer = make_table(seed=42, sharpness=1.5)  # the same predictions with other probabilities: another model
    assert ask(check, replace(evidence, reference=surer))["status"] != "skip"


def test_reference_that_has_not_seen_every_chip_is_compared_on_the_others(evidence: Evidence):
    counts, unseen = evidence.reference.counts.copy(), np.zeros(len(evidence.reference), np.int64)
    counts[::4] //= 2
    unseen[::4] = 512
    masks = replace(evidence.reference, counts=counts, unseen=unseen)
    none = replace(masks, unseen=np.ones_like(unseen))
    assert ask("parity", replace(evidence, reference=masks))["notes"][0].startswith("24 chips")
    for check in ("parity", "head_to_head", "variance"):
        some, answer = (ask(check, replace(evidence, reference=one)) for one in (masks, none))
        assert some["outcome"] == "equivalent"
        assert (answer["status"], "no chip of which both" in answer["finding"]) == ("skip", True)


def test_two_models_that_never_predict_the_class_fail_and_one_event_with_flood_is_a_skip(evidence: Evidence):
    answer = ask("parity", replace(evidence, table=silent(evidence.table), reference=silent(evidence.reference)))
    assert (answer["status"], answer["outcome"]) == ("fail", None)
    for kept in (["EMSR9001"], ["EMSR9001", "EMSR9012"]):
        chips = [chip for chip in evidence.table.chips.tolist() if chip.split("_")[0] in kept]
        found = replace(evidence, table=evidence.table.subset(chips), reference=evidence.reference.subset(chips))
        assert ask("parity", found)["status"] == ask("head_to_head", found)["status"] == "skip"


def test_what_is_missing_is_a_skip_and_what_is_damaged_a_failure(evidence: Evidence):
    bare = replace(evidence, table=None, absent={"table": ("skip", "no test was made")})
    damaged = replace(bare, absent={"table": ("fail", "this is no chip table")})
    for check in ("parity", "head_to_head", "events", "calibration", "identities"):
        for found in (bare, damaged):
            assert (ask(check, found)["status"], ask(check, found)["finding"]) == found.absent["table"]
    empty = replace(evidence.table, counts=np.zeros_like(evidence.table.counts))
    assert ask("parity", replace(evidence, table=empty))["finding"] == "all pixels of the chip table are ignored"


def test_known_reference_that_misses_its_figures_fails_and_another_is_not_compared(evidence: Evidence, published: dict):
    off = published | {"figures": published["figures"] | {"IoU_1": published["figures"]["IoU_1"] + 2e-4}}
    found = replace(evidence, published={"published_ibm": off})
    answer = ask("reference", found)
    assert (answer["status"], answer["finding"].split(":")[0]) == ("fail", "IoU_1")
    assert "reference" in summarise(found)["summary"]["not_met"]
    sound = replace(evidence, published={"published_ibm": published})
    rough = replace(sound, table=missed(evidence.table, 0.3, ["EMSR9001"]), seeds=())
    reasons = {"Reference's published figures": found, "no figures of": evidence, 'the verdict is "undecided"': rough}
    for reason, case in reasons.items():
        assert f"(1) a published result reproduced: {reason}" in summarise(case)["verdict"]["not_shown"]
    verdict = summarise(sound)["verdict"]
    assert verdict["sentence"].endswith("The published figures of IBM's model came out here.")
    assert "published result" not in verdict["not_shown"]
    for changed in ({"chips": 14_556}, {"sha256": "0" * 64}, {"protocol": "v1"}):  # another split, model or task
        assert ask("reference", replace(evidence, published={"a": off | changed}))["status"] == "skip"


def test_event_that_the_model_does_not_see_is_named(evidence: Evidence):
    answer = ask("events", replace(evidence, table=missed(evidence.table, 1.0, ["EMSR9003", "EMSR9005"])))
    assert answer["status"] == "fail"
    assert "EMSR9003, EMSR9005" in answer["finding"]
    named = [row[0] for row in answer["tables"][0]["rows"]]
    assert (named[:2], named[-1]) == (["EMSR9003", "EMSR9005"], "EMSR9012")  # the last one is dry


def test_wrong_certainty_collapse_and_too_little_area_fail_calibration_and_classes_alone_are_a_skip(evidence: Evidence):
    def calibration(table: ChipTable) -> dict:
        return ask("calibration", replace(evidence, table=table))

    tables = (make_table(seed=42, likeness=0.5, sharpness=30), evidence.table)
    certain, sound = (figure_of(calibration(table), "the same where")["value"] for table in tables)
    assert certain > 2 * sound
    answer = calibration(missed(evidence.table, 0.9))
    assert (answer["status"], "predicted over true area" in answer["finding"]) == ("fail", True)
    assert "predicted as one class: 1.000, expected at most 0.98" in calibration(silent(evidence.table))["finding"]
    without = {"histogram": None, "confidence": None, "squared_error": None}
    assert calibration(replace(evidence.table, **without))["status"] == "skip"
    masks = replace(evidence, reference=replace(evidence.reference, **without))
    assert ask("parity", masks)["outcome"] == "equivalent"


def test_declared_run_that_is_no_training_of_its_own_fails_variance(evidence: Evidence):
    for third, says in (
        (SeedRun(45, "failed", None, "seed-45"), "without a chip table: seed-45 (failed)"),
        (replace(evidence.seeds[1], seed=45, run="seed-45"), "seed-45 is a copy of seed-44"),
        (declared(45, recipe_sha256="0" * 64), "seed-45 is not of this recipe"),
    ):
        answer = ask("variance", replace(evidence, seeds=[*evidence.seeds[:2], third]))
        assert (answer["status"], says in answer["finding"]) == ("fail", True), answer["finding"]


def test_seeds_without_a_reference_show_their_spread_and_two_are_too_few(evidence: Evidence):
    answer = ask("variance", replace(evidence, reference=None))
    figures = [float(iou(run.table.counts.sum(axis=0), 1)) for run in evidence.seeds]
    assert answer["status"] == "pass"
    assert figure_of(answer, "standard deviation over seeds")["value"] == pytest.approx(100 * np.std(figures, ddof=1))
    for few in (evidence.seeds[:2], ()):
        assert ask("variance", replace(evidence, seeds=few))["status"] == "skip"


def test_metric_of_terratorch_that_the_counts_do_not_give_fails(evidence: Evidence):
    metrics = evidence.table.metadata["metrics"]
    for found, status in ((metrics | {"test/IoU_1": metrics["test/IoU_1"] + 1e-4}, "fail"), ({}, "skip")):
        table = replace(evidence.table, metadata=evidence.table.metadata | {"metrics": found})
        assert ask("identities", replace(evidence, table=table))["status"] == status


def test_figure_is_not_rounded_onto_its_limit_nor_a_difference_onto_margin_or_zero():
    assert [number(figure, 0.1) for figure in (0.10004, 0.1, 0.59284)] == ["0.10004", "0.1000", "0.5928"]
    assert [number(figure) for figure in (13_992_066, None, math.nan)] == ["13,992,066", NOTHING, NOTHING]
    assert [points(gap / 100) for gap in (1.96, -2.04, 0.02, 4.76)] == ["+1.96", "-2.04", "+0.020", "+4.8"]
