"""The checks of scores: three words for a comparison, and each check on a sound run and on one with a planted fault."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from floodrepro.evaluation import intervals
from floodrepro.evaluation.metrics import iou, pool_by_event
from floodrepro.verification.check import Check, Evidence, SeedRun, Value, number, points
from floodrepro.verification.checks import comparison, scores
from verification_fixtures import declared, gather, make_run, make_table, missed, summarise

OTHER = {"name": "reference.ckpt", "sha256": "4e" * 32}
ALL = (
    comparison.parity,
    comparison.head_to_head,
    scores.events,
    scores.calibration,
    comparison.variance,
    scores.identities,
)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """A sound run, one of three that were declared together, and a reference; shared, for no test changes it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "seed-42", table=make_table(seed=42))
    seeds = [declared(seed) for seed in (42, 44, 45)]
    tables = {"table": make_table(seed=42), "reference": make_table(seed=43, checkpoint=OTHER)}
    return replace(gather(run), seeds=seeds, **tables)


def value(check: Check, name: str) -> Value:
    return next(value for value in check.values if value.name == name)


@pytest.mark.parametrize("check", ALL)
def test_sound_run_passes_and_its_answer_is_json(evidence: Evidence, check):
    answer = check(evidence)
    assert answer.status == "pass", answer.finding
    assert answer.finding
    assert json.dumps(asdict(answer), allow_nan=False)
    assert all(len(row) == len(table.columns) for table in answer.tables for row in table.rows)


@pytest.mark.parametrize("protocol", ["v1", "v1-binary"])
def test_positive_class_is_named_and_counted_in_every_protocol(evidence: Evidence, protocol: str):
    ours, theirs = make_table(seed=1, protocol=protocol), make_table(seed=2, protocol=protocol, checkpoint=OTHER)
    found = replace(evidence, table=ours, reference=theirs, positive=ours.num_classes - 1, class_name="flood water")
    answer = comparison.parity(found)
    assert answer.outcome == "equivalent"
    pooled = float(iou(ours.counts.sum(axis=0), ours.num_classes - 1))
    assert value(answer, "flood water IoU, this run").value == pytest.approx(pooled)


# Three words


def test_difference_and_interval_are_those_of_a_loop_over_events(evidence: Evidence):
    answer = comparison.parity(evidence)
    names, ours = pool_by_event(evidence.table.counts, evidence.table.events)
    _, theirs = pool_by_event(evidence.reference.counts, evidence.reference.events)

    def gap(keep: list[int]) -> float:
        return 100 * float(iou(ours[keep].sum(axis=0), 1) - iou(theirs[keep].sum(axis=0), 1))

    everything = list(range(len(names)))
    without = np.array([gap([n for n in everything if n != left]) for left in everything])
    found = value(answer, "difference in flood IoU, pooled")
    assert (found.value, found.unit, found.n_events, found.n_chips) == (pytest.approx(gap(everything)), "pp", 12, 96)
    error = math.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())
    assert 1.6 * error < found.high - found.value < 6.4 * error  # t quantiles of 11 to 1 degrees of freedom
    assert any("12 events are few" in note for note in answer.notes)


@pytest.mark.parametrize(
    ("lost", "events", "outcome", "status"),
    [
        (0.0, None, "equivalent", "pass"),
        (0.2, None, "different (worse)", "fail"),
        (-0.2, None, "different (better)", "pass"),
        (0.3, ["EMSR9001"], "undecided", "undecided"),
    ],
)
def test_comparison_ends_in_one_of_three_words(evidence: Evidence, lost, events, outcome, status):
    ours, theirs = evidence.table, evidence.reference
    if lost < 0:
        theirs = missed(theirs, -lost)
    elif lost:
        ours = missed(ours, lost, events)
    found = replace(evidence, table=ours, reference=theirs)
    answer = comparison.parity(found)
    assert (answer.outcome, answer.status) == (outcome, status)
    assert ("parity" in summarise(found)["summary"]["not_met"]) is (status == "fail")
    if outcome == "undecided":
        pooled, other = (pool_by_event(one.counts, one.events)[1] for one in (ours, theirs))
        needed = intervals.jackknife(pooled, lambda counts: iou(counts, 1), other=other, positive=1).needed(0.02)
        assert f"about {number(needed)} events like these would decide" in answer.finding


def test_undecided_run_is_no_failure_and_parity_by_name_asks_for_equivalence(evidence: Evidence):
    spoilt = replace(evidence, table=missed(evidence.table, 0.3, ["EMSR9001"]), seeds=())
    for outcome, found in (("undecided", spoilt), ("equivalent", replace(evidence, seeds=()))):
        results = summarise(found)
        assert results["verdict"]["word"] in (outcome, "incomplete")  # nothing was measured of these weights
        assert results["verdict"]["outcome"] == outcome
        assert "parity" not in results["summary"]["not_met"]
        assert summarise(found, "parity")["summary"]["ok"] is (outcome == "equivalent")
    better = replace(spoilt, table=evidence.table, reference=missed(evidence.reference, 0.2))
    assert "parity" not in summarise(better)["summary"]["not_met"]
    assert summarise(better, "parity")["summary"]["not_met"] == ["parity"]


def test_one_lucky_seed_is_not_called_equivalent(evidence: Evidence):
    """The run itself is as good as the reference; the other declared seeds are several points worse."""
    worse = [replace(run, table=missed(run.table, 0.1)) for run in evidence.seeds[1:]]
    found = replace(evidence, seeds=[evidence.seeds[0], *worse])
    assert comparison.parity(found).outcome == "equivalent"
    assert comparison.variance(found).status in ("undecided", "fail")
    verdict = summarise(found)["verdict"]
    assert verdict["outcome"] == "undecided"
    assert "spread over seeds" in verdict["sentence"]


def test_mean_over_events_decides_where_the_pooled_score_does_not(evidence: Evidence):
    """One event with most of the flood makes the pooled score's interval wide; each event counts once in the mean."""
    ours, theirs = make_table(40, 4, seed=1), make_table(40, 4, seed=2, checkpoint=OTHER)

    def with_giant(table):
        counts = table.counts.copy()
        counts[:4] *= 4000
        return replace(table, counts=counts)

    found = replace(evidence, table=with_giant(ours), reference=with_giant(missed(theirs, 0.04, ["EMSR9001"])))
    assert comparison.parity(found).outcome == "undecided"
    assert comparison.head_to_head(found).outcome == "equivalent"


def test_tiny_floods_do_not_decide_the_mean_over_events(evidence: Evidence):
    counts = evidence.table.counts.copy()
    tiny = np.isin(evidence.table.events, ["EMSR9001", "EMSR9002"])
    counts[tiny, 1] //= 200
    truth = replace(evidence.table, counts=counts)
    lost = missed(truth, 1.0, ["EMSR9001", "EMSR9002"])
    answer = comparison.head_to_head(replace(evidence, table=lost, reference=truth))
    found = value(answer, "difference in flood IoU, mean over events")
    assert (found.n_events, found.value) == (9, 0.0)


@pytest.mark.parametrize("check", [comparison.parity, comparison.head_to_head])
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (make_table(events=11), "wrong reference: other chips: 8 are in one table alone"),
        (make_table(protocol="v1-binary"), "wrong reference: protocol v0 against v1-binary"),
        (make_table(protocol="v1"), "wrong reference: 2 classes against 3"),
        (make_table(world=2), "wrong reference: another truth in"),
    ],
)
def test_wrong_reference_fails_and_is_not_called_different(evidence: Evidence, check, reference, says):
    answer = check(replace(evidence, reference=reference))
    assert (answer.status, answer.outcome) == ("fail", None)
    assert answer.finding.startswith(says)


def test_comparison_with_itself_shows_nothing(evidence: Evidence):
    resaved = replace(evidence.table, metadata=evidence.table.metadata | {"checkpoint": OTHER})
    for reference in (evidence.table, resaved):
        for check in (comparison.parity, comparison.head_to_head):
            answer = check(replace(evidence, reference=reference))
            assert (answer.status, "this very model" in answer.finding) == ("skip", True)
    surer = make_table(seed=42, sharpness=1.5)  # the same predictions with other probabilities: another model
    assert comparison.parity(replace(evidence, reference=surer)).status != "skip"


def test_reference_that_has_not_seen_every_chip_is_compared_on_the_others(evidence: Evidence):
    counts, unseen = evidence.reference.counts.copy(), np.zeros(len(evidence.reference), np.int64)
    counts[::4] //= 2
    unseen[::4] = 512
    masks = replace(evidence.reference, counts=counts, unseen=unseen)
    parity, variance = (check(replace(evidence, reference=masks)) for check in (comparison.parity, comparison.variance))
    assert parity.outcome == variance.outcome == "equivalent"
    assert parity.notes[0].startswith("24 chips")
    none = replace(evidence, reference=replace(masks, unseen=np.ones_like(unseen)))
    for check in (comparison.parity, comparison.head_to_head, comparison.variance):
        assert (check(none).status, "no chip of which both" in check(none).finding) == ("skip", True)


def test_two_models_that_never_predict_the_class_are_not_equivalent(evidence: Evidence):
    def silent(table):
        counts = table.counts.copy()
        counts[:, :, 0], counts[:, :, 1] = counts.sum(axis=2), 0
        return replace(table, counts=counts)

    found = replace(evidence, table=silent(evidence.table), reference=silent(evidence.reference))
    assert (comparison.parity(found).status, comparison.parity(found).outcome) == ("fail", None)


@pytest.mark.parametrize("kept", [["EMSR9001"], ["EMSR9001", "EMSR9012"]])
def test_one_event_with_flood_is_a_skip(evidence: Evidence, kept: list[str]):
    def few(table):
        return table.subset([chip for chip in table.chips.tolist() if chip.split("_")[0] in kept])

    found = replace(evidence, table=few(evidence.table), reference=few(evidence.reference))
    assert comparison.parity(found).status == comparison.head_to_head(found).status == "skip"


def test_what_is_missing_is_a_skip_and_what_is_damaged_a_failure(evidence: Evidence):
    bare = replace(evidence, table=None, absent={"table": ("skip", "no test was made")})
    damaged = replace(bare, absent={"table": ("fail", "this is no chip table")})
    for check in (comparison.parity, comparison.head_to_head, scores.events, scores.calibration, scores.identities):
        assert (check(bare).status, check(bare).finding) == ("skip", "no test was made")
        assert (check(damaged).status, check(damaged).finding) == ("fail", "this is no chip table")
    empty = replace(evidence.table, counts=np.zeros_like(evidence.table.counts))
    assert comparison.parity(replace(evidence, table=empty)).finding == "all pixels of the chip table are ignored"


# The reference's published figures

IBM = {
    "sha256": "4e" * 32,
    "name": "IBM",
    "protocol": "v0",
    "split": "test",
    "chips": 96,
    "decimals": 4,
    "source": "a page",
}


def test_known_reference_reproduces_its_published_figures_within_rounding(evidence: Evidence):
    found = scores.terratorch_scores(evidence.reference)
    figures = {name: round(found[name], 4) for name in ("IoU_1", "mIoU", "Class_Accuracy_1")}
    published = {"published_ibm": IBM | {"figures": figures}}
    assert comparison.reference(replace(evidence, published=published)).status == "pass"
    off = {"published_ibm": IBM | {"figures": figures | {"IoU_1": figures["IoU_1"] + 2e-4}}}
    answer = comparison.reference(replace(evidence, published=off))
    assert (answer.status, answer.finding.split(":")[0]) == ("fail", "IoU_1")
    assert "reference" in summarise(replace(evidence, published=off))["summary"]["not_met"]


def test_published_figures_of_other_chips_or_of_another_model_are_not_compared(evidence: Evidence):
    for changed in ({"chips": 14_556}, {"sha256": "0" * 64}, {"protocol": "v1"}):
        published = {"published_ibm": IBM | {"figures": {"IoU_1": 0.1}} | changed}
        assert comparison.reference(replace(evidence, published=published)).status == "skip"


# Events, probabilities, seeds, and TerraTorch's own metrics


def test_event_that_the_model_does_not_see_is_named(evidence: Evidence):
    answer = scores.events(replace(evidence, table=missed(evidence.table, 1.0, ["EMSR9003", "EMSR9005"])))
    assert answer.status == "fail"
    assert "EMSR9003, EMSR9005" in answer.finding
    assert [row[0] for row in answer.tables[0].rows[:2]] == ["EMSR9003", "EMSR9005"]
    assert [row[0] for row in answer.tables[1].rows] == ["EMSR9012"]  # dry


def test_certain_predictions_that_are_wrong_fail_calibration(evidence: Evidence):
    answer = scores.calibration(replace(evidence, table=make_table(seed=42, likeness=0.5, sharpness=30)))
    assert answer.status in ("pass", "fail")
    found = value(answer, "the same where the probability is 0.1 or more")
    sound = value(scores.calibration(evidence), "the same where the probability is 0.1 or more")
    assert found.value > 2 * sound.value


def test_collapse_to_one_class_and_too_little_area_fail_calibration(evidence: Evidence):
    answer = scores.calibration(replace(evidence, table=missed(evidence.table, 0.9)))
    assert (answer.status, "predicted over true area" in answer.finding) == ("fail", True)
    counts = evidence.table.counts.copy()
    counts[:, :, 0], counts[:, :, 1] = counts.sum(axis=2), 0
    answer = scores.calibration(replace(evidence, table=replace(evidence.table, counts=counts)))
    assert "predicted as one class: 1.000, expected at most 0.98" in answer.finding


def test_classes_without_probabilities_leave_calibration_skipped(evidence: Evidence):
    masks = replace(evidence.table, histogram=None, confidence=None, squared_error=None)
    assert scores.calibration(replace(evidence, table=masks)).status == "skip"
    masks = replace(evidence.reference, histogram=None, confidence=None, squared_error=None)
    assert comparison.parity(replace(evidence, reference=masks)).outcome == "equivalent"


def test_declared_run_without_a_result_fails_variance(evidence: Evidence):
    dropped = SeedRun(45, "failed", None, "seed-45")
    answer = comparison.variance(replace(evidence, seeds=[*evidence.seeds[:2], dropped]))
    assert (answer.status, "seed-45 (failed)" in answer.finding) == ("fail", True)


def test_copy_and_undeclared_recipe_fail_variance(evidence: Evidence):
    copy = replace(evidence.seeds[1], seed=45, run="seed-45")
    answer = comparison.variance(replace(evidence, seeds=[*evidence.seeds[:2], copy]))
    assert (answer.status, answer.finding) == ("fail", "seed-45 is a copy of seed-44")
    other = declared(45, recipe_sha256="0" * 64)
    answer = comparison.variance(replace(evidence, seeds=[*evidence.seeds[:2], other]))
    assert (answer.status, "seed-45" in answer.finding) == ("fail", True)


def test_seeds_without_a_reference_show_their_spread_and_two_are_too_few(evidence: Evidence):
    answer = comparison.variance(replace(evidence, reference=None))
    figures = [float(iou(run.table.counts.sum(axis=0), 1)) for run in evidence.seeds]
    assert answer.status == "pass"
    deviation = value(answer, "standard deviation over seeds")
    assert deviation.value == pytest.approx(100 * np.std(figures, ddof=1))
    assert comparison.variance(replace(evidence, seeds=evidence.seeds[:2])).status == "skip"
    assert comparison.variance(replace(evidence, seeds=())).status == "skip"


def test_metric_of_terratorch_that_the_counts_do_not_give_fails(evidence: Evidence):
    metrics = evidence.table.metadata["metrics"]
    wrong = metrics | {"test/IoU_1": metrics["test/IoU_1"] + 1e-4}
    table = replace(evidence.table, metadata=evidence.table.metadata | {"metrics": wrong})
    assert scores.identities(replace(evidence, table=table)).status == "fail"
    bare = replace(evidence.table, metadata=evidence.table.metadata | {"metrics": {}})
    assert scores.identities(replace(evidence, table=bare)).status == "skip"


# How figures are written


@pytest.mark.parametrize(
    ("figure", "beside", "text"),
    [
        (0.10004, (0.1,), "0.10004"),
        (0.1, (0.1,), "0.1000"),
        (13_992_066, (), "13,992,066"),
        (0.00075, (), "0.00075"),
        (0.59284, (), "0.5928"),
        (None, (), "\N{EN DASH}"),
        (math.nan, (), "\N{EN DASH}"),
    ],
)
def test_figure_is_not_rounded_onto_its_limit(figure, beside, text):
    assert number(figure, *beside) == text


@pytest.mark.parametrize(("figure", "text"), [(1.96, "+1.96"), (-2.04, "-2.04"), (0.02, "+0.02"), (4.76, "+4.8")])
def test_difference_stays_on_its_side_of_margin_and_zero(figure, text):
    assert points(figure, 2.0) == text
