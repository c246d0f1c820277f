"""parity, head_to_head, events, calibration, variance: on a healthy run, and on one with a planted fault."""

import dataclasses
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.verification.check import Check, Evidence, SeedRun, Value
from floodrepro.verification.checks import calibration, events, head_to_head, parity, variance
from verification_fixtures import all_ignored, declared, healthy, make_table, missed, with_counts

CHECKS = (parity, head_to_head, events, calibration, variance)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """A healthy run, one of three that were declared together; shared, for no test changes it."""
    seeds = [declared(seed) for seed in (42, 44, 45)]
    return replace(healthy(tmp_path_factory.mktemp("healthy")), seeds=seeds)


def value(check: Check, name: str) -> Value:
    return next(value for value in check.values if value.name == name)


def table_of(check: Check, title: str) -> list[dict]:
    table = next(table for table in check.tables if table.title.startswith(title))
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def iou(counts: np.ndarray, k: int) -> float:
    """By hand; NaN for 0 / 0."""
    union = int(counts[k].sum()) + int(counts[:, k].sum()) - int(counts[k, k])
    return int(counts[k, k]) / union if union else math.nan


def flood(counts: np.ndarray) -> float:
    return iou(counts, len(counts) - 1)


def miou(counts: np.ndarray) -> float:
    return sum(iou(counts, k) for k in range(len(counts))) / len(counts)


def by_event(table: ChipTable) -> dict[str, np.ndarray]:
    """Counts of each event, added up chip by chip."""
    found: dict[str, np.ndarray] = {}
    for chip, counts in zip(table.chips, table.counts, strict=True):
        name = str(chip).split("_")[0]
        found[name] = found.get(name, 0) + counts
    return found


def of_events(table: ChipTable, *names: str) -> ChipTable:
    return table.subset([chip for chip in table.chips.tolist() if chip.split("_")[0] in names])


OTHER = {"name": "reference.ckpt", "sha256": "4e" * 32}


# --- all five


@pytest.mark.parametrize("protocol", ["v0", "v1", "v1-binary"])
def test_a_healthy_run_passes_and_its_answer_is_json(tmp_path, protocol):
    found = healthy(tmp_path, protocol=protocol)
    found = replace(found, seeds=[declared(seed, protocol=protocol) for seed in (42, 44, 45)])
    for check in CHECKS:
        answer = check.check(found)
        assert (answer.id, answer.status) == (check.ID, "pass"), answer.reason
        assert json.loads(json.dumps(dataclasses.asdict(answer), allow_nan=False))["values"]
        assert all(len(row) == len(table.columns) for table in answer.tables for row in table.rows)
        assert all(len(one["x"]) == len(one["y"]) for plot in answer.plots for one in plot.series)


def test_all_pixels_ignored_is_a_skip_everywhere(evidence):
    nothing = all_ignored(evidence.table)
    spoiled = replace(evidence, table=nothing, reference=nothing)
    for check in (parity, head_to_head, events, calibration):
        answer = check.check(spoiled)
        assert (answer.status, answer.reason) == ("skip", "all pixels of the chip table are ignored")
    seeds = [replace(run, table=nothing) for run in evidence.seeds]
    assert variance.check(replace(spoiled, seeds=seeds)).status == "skip"


def test_what_is_missing_is_a_skip_with_the_reason_that_was_found(evidence):
    bare = replace(evidence, table=None, missing={"table": "no test was made"})
    for check in (parity, head_to_head, events, calibration):
        assert (check.check(bare).status, check.check(bare).reason) == ("skip", "no test was made")
    alone = replace(evidence, reference=None)
    for check in (parity, head_to_head):
        assert (check.check(alone).status, check.check(alone).reason) == ("skip", "no reference was given")


def test_a_comparison_with_itself_is_never_a_pass(evidence):
    for check in (parity, head_to_head):
        answer = check.check(replace(evidence, reference=evidence.table))
        assert (answer.status, "this very checkpoint" in answer.reason) == ("skip", True)
        resaved = replace(evidence.table, metadata=evidence.table.metadata | {"checkpoint": OTHER})
        answer = check.check(replace(evidence, reference=resaved))
        assert (answer.status, "predicts every chip alike" in answer.reason) == ("skip", True)
        surer = make_table(seed=42, sharpness=1.5)  # the same predictions, with other probabilities: another model
        assert np.array_equal(surer.counts, evidence.table.counts)
        assert "itself" not in check.check(replace(evidence, reference=surer)).reason


def test_two_models_that_never_predict_flood_are_not_at_parity(evidence):
    blind = [missed(table, 1.0, alarms=0.0) for table in (evidence.table, evidence.reference)]
    assert not any(table.counts[..., 1].any() for table in blind)
    answer = parity.check(replace(evidence, table=blind[0], reference=blind[1]))
    assert (answer.status, "ever predicts flood" in answer.reason) == ("fail", True)
    assert "ever predicts flood" not in parity.check(replace(evidence, table=blind[0])).reason
    could = head_to_head.check(replace(evidence, table=blind[0], reference=blind[1]))
    assert could.reason == "0 of 11 events with flood differ: the test's smallest p is 1, it could not fail"


@pytest.mark.parametrize("check", [parity, head_to_head, variance])
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (make_table(events=11), "wrong reference: other chips: 8 are in one table alone"),
        (make_table(protocol="v1-binary"), "wrong reference: protocol v0 against v1-binary"),
        (make_table(protocol="v1"), "wrong reference: 2 classes against 3: another protocol"),
        (make_table(world=2), "wrong reference: another truth in"),
    ],
)
def test_a_wrong_reference_fails(evidence, check, reference, says):
    answer = check.check(replace(evidence, reference=reference))
    assert answer.status == "fail"
    assert answer.reason.startswith(says)


# --- parity


def test_parity_gives_the_jackknife_over_events_that_a_loop_gives(evidence):
    answer = parity.check(evidence)
    ours, theirs = by_event(evidence.table), by_event(evidence.reference)
    for name, figure in (("flood IoU", flood), ("mIoU", miou)):
        gap = 100 * (figure(sum(ours.values())) - figure(sum(theirs.values())))
        without = {
            left: 100 * figure(sum(c for e, c in ours.items() if e != left))
            - 100 * figure(sum(c for e, c in theirs.items() if e != left))
            for left in ours
        }
        error = math.sqrt(11 / 12 * sum((x - sum(without.values()) / 12) ** 2 for x in without.values()))
        found = value(answer, f"{name}, difference to the reference")
        assert found.value == pytest.approx(gap)
        assert (found.unit, found.level, found.n_events, found.n_chips, found.ok) == ("pp", 0.9, 12, 96, True)
        freedom = float(found.method.split("t with ")[1].split()[0])
        assert 1 <= freedom <= 11
        half = stats.t.ppf(0.95, freedom) * error
        assert [found.low, found.high] == pytest.approx([gap - half, gap + half], rel=0.005)
        mover = max(without, key=lambda event: abs(without[event] - gap))
        left = value(answer, f"{name}, difference without {mover}, the event that moves it most")
        extremes = [without[mover], min(without.values()), max(without.values())]
        assert [left.value, left.low, left.high] == pytest.approx(extremes)
        assert value(answer, name).value == pytest.approx(figure(evidence.table.counts.sum(axis=0)))
        assert value(answer, f"{name}, reference").value == pytest.approx(figure(evidence.reference.counts.sum(axis=0)))


def test_parity_shows_the_paired_bootstrap_beside_it(evidence):
    answer, generator = parity.check(evidence), np.random.default_rng(5)
    ours, theirs = (np.array(list(by_event(table).values())) for table in (evidence.table, evidence.reference))
    drawn = [
        100 * (flood(ours[picked].sum(axis=0)) - flood(theirs[picked].sum(axis=0)))
        for picked in generator.integers(0, 12, (4000, 12))
    ]
    found = value(answer, "flood IoU, by bootstrap, difference to the reference")
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.05, 0.95]).tolist(), abs=0.03)


def test_parity_says_equivalent_within_the_margin_and_that_twelve_events_are_few(evidence):
    answer = parity.check(evidence)
    assert answer.reason.startswith(
        "flood IoU is equivalent within ±2 pp (90 % CI -0.5 to +0.02 pp, 12 events); mIoU is "
    )
    assert any("12 events, fewer than 60: the interval is approximate" in note for note in answer.notes)
    many = parity.check(
        replace(evidence, table=make_table(60, 4, seed=1), reference=make_table(60, 4, seed=2, checkpoint=OTHER))
    )
    assert many.status == "pass"
    assert not any("approximate" in note for note in many.notes)


def test_worse_flood_at_equal_miou_fails_parity_by_flood_alone(evidence):
    table = make_table(protocol="v1")
    ours = missed(table, 0.08)
    shares = np.linspace(0, 0.3, 601)  # of permanent water that the reference misses, until mIoU is the same
    gaps = [abs(miou(missed(table, s, k=1).counts.sum(axis=0)) - miou(ours.counts.sum(axis=0))) for s in shares]
    theirs = missed(table, float(shares[int(np.argmin(gaps))]), k=1)
    answer = parity.check(replace(evidence, table=ours, reference=theirs))
    assert value(answer, "mIoU, difference to the reference").value == pytest.approx(0, abs=0.05)
    assert value(answer, "mIoU, difference to the reference").ok
    assert not value(answer, "flood IoU, difference to the reference").ok
    assert answer.status == "fail"
    assert answer.reason.startswith("flood IoU is different: ")
    assert "pp worse than the reference, the interval -" in answer.reason
    assert "; mIoU is equivalent within ±2 pp" in answer.reason


def test_equal_flood_at_worse_miou_fails_parity_too(evidence):
    table = make_table(protocol="v1")
    answer = parity.check(replace(evidence, table=missed(table, 0.3, k=1), reference=table))
    assert answer.status == "fail"
    assert answer.reason.startswith("flood IoU is equivalent within ±2 pp (90 % CI +0.0 to +0.0 pp")
    assert "; mIoU is different: " in answer.reason


def test_an_interval_that_reaches_beyond_the_margin_is_not_called_different(evidence):
    spoiled = missed(evidence.table, 0.3, ["EMSR9001"])
    answer = parity.check(replace(evidence, table=spoiled, reference=evidence.table))
    found = value(answer, "flood IoU, difference to the reference")
    assert found.low < -2 < found.high
    assert answer.status == "fail"
    assert answer.reason.startswith(
        f"flood IoU is not shown to be equivalent: the interval {found.low:+.1f} to {found.high:+.1f} pp "
        "reaches beyond ±2 pp (90 % CI, 12 events)"
    )


def test_a_better_run_is_not_equivalent_either_and_is_called_better(evidence):
    answer = parity.check(replace(evidence, table=evidence.table, reference=missed(evidence.table, 0.1)))
    assert answer.status == "fail"
    assert "pp better than the reference, the interval +" in answer.reason


def test_an_interval_beyond_the_margin_on_one_side_of_zero_is_called_worse_but_not_different(evidence):
    answer = parity.check(replace(evidence, table=missed(evidence.table, 0.027), reference=evidence.table))
    found = value(answer, "flood IoU, difference to the reference")
    assert found.low < -2 < found.high < 0
    assert answer.reason.startswith("flood IoU is not shown to be equivalent: the interval ")
    assert "(90 % CI, 12 events); worse than the reference; mIoU is " in answer.reason


@pytest.mark.parametrize("margin", [0.5, 0.523])
def test_an_end_just_beyond_the_margin_is_not_rounded_onto_it_or_within(evidence, margin):
    tight = evidence.thresholds | {"parity": evidence.thresholds["parity"] | {"margin_pp": margin}}
    answer = parity.check(replace(evidence, thresholds=tight))
    found = value(answer, "flood IoU, difference to the reference")
    assert -0.55 < found.low < -margin
    assert f"the interval {found.low:+.2f} to " in answer.reason


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (["EMSR9001"], "one event only (EMSR9001): no interval over events can be made"),
        (["EMSR9001", "EMSR9012"], "flood in 1 of 2 events: two at least are needed"),
    ],
)
def test_one_event_with_flood_is_a_skip(evidence, kept, says):
    few = replace(evidence, table=of_events(evidence.table, *kept), reference=of_events(evidence.reference, *kept))
    answer = parity.check(few)
    assert (answer.status, answer.reason) == ("skip", says)
    assert head_to_head.check(few).status == "skip"
    assert events.check(few).status == "skip"


# --- head to head


def test_wins_ties_and_losses_are_those_that_a_loop_counts(evidence):
    answer = head_to_head.check(evidence)
    pairs = [(flood(a), flood(b)) for a, b in zip(evidence.table.counts, evidence.reference.counts, strict=True)]
    assert not any(math.isnan(figure) for pair in pairs for figure in pair)
    assert value(answer, "chips won").value == sum(a > b for a, b in pairs)
    assert value(answer, "chips tied").value == sum(a == b for a, b in pairs)
    assert value(answer, "chips lost").value == sum(a < b for a, b in pairs)
    worst = min(range(96), key=lambda n: pairs[n][0] - pairs[n][1])
    first, *rest = table_of(answer, "Largest regressions by chip")
    assert first["chip"] == evidence.table.chips[worst]
    assert first["difference in pp"] == pytest.approx(100 * (pairs[worst][0] - pairs[worst][1]))
    assert first["flood pixels"] == evidence.table.counts[worst, 1].sum()
    assert len(rest) == 9


def test_sign_flips_over_events_are_those_that_a_loop_counts(evidence):
    ours, theirs = by_event(evidence.table), by_event(evidence.reference)
    gaps = np.array([flood(ours[e]) - flood(theirs[e]) for e in ours if ours[e][1].sum()])
    assert len(gaps) == 11
    means = [abs(float((gaps * signs).mean())) for signs in itertools.product((1, -1), repeat=len(gaps))]
    found = value(head_to_head.check(evidence), "p of the mean difference")
    assert found.value == pytest.approx(np.mean(np.array(means) >= abs(gaps.mean()) - 1e-12))


def test_a_dry_chip_left_dry_by_one_alone_is_won_by_that_one_and_by_both_left_out(evidence):
    def dried(places):
        counts = evidence.table.counts.copy()
        counts[places] = np.array([[counts[n, 0].sum(), 0] for n in places])[:, None] * [[1], [0]]
        return with_counts(evidence.table, counts)

    dry = np.flatnonzero(evidence.table.counts[:, 1].sum(axis=1) == 0).tolist()
    answer = head_to_head.check(replace(evidence, table=dried(dry[:5]), reference=dried(dry[3:9])))
    assert value(answer, "of the chips won, dry ones left dry by this run alone").value == 3
    assert value(answer, "of the chips lost, dry ones left dry by the reference alone").value == 4
    assert value(answer, "chips left out: dry, and left dry by both").value == 2
    assert value(answer, "chips left out: all pixels ignored").value == 0
    assert [value(answer, f"chips {what}").value for what in ("won", "lost", "tied")] == [3, 4, 96 - 9]


def test_a_chip_of_ignored_pixels_is_not_called_dry(evidence):
    def without(table, places):
        nothing = all_ignored(table)
        fields = {name: getattr(table, name).copy() for name in ("counts", "ignored", "histogram")}
        for name, field in fields.items():
            field[places] = getattr(nothing, name)[places]
        return replace(table, **fields)

    tables = [without(table, [3, 90]) for table in (evidence.table, evidence.reference)]
    answer = head_to_head.check(replace(evidence, table=tables[0], reference=tables[1]))
    assert value(answer, "chips left out: all pixels ignored").value == 2
    assert value(answer, "chips left out: dry, and left dry by both").value == 0


def test_a_loss_in_every_event_fails_head_to_head(evidence):
    answer = head_to_head.check(replace(evidence, table=missed(evidence.table, 0.05), reference=evidence.table))
    assert answer.status == "fail"
    assert answer.reason.startswith("significantly worse: ")
    assert answer.reason.endswith("pp of flood IoU on average over 11 events, p = 0.00098")  # 2 of 2^11 patterns


def test_a_gain_in_every_event_is_no_failure(evidence):
    answer = head_to_head.check(replace(evidence, reference=missed(evidence.table, 0.05)))
    assert value(answer, "p of the mean difference").value < 0.05
    assert answer.status == "pass"


def test_the_event_that_lost_most_is_named_first(evidence):
    spoiled = missed(evidence.table, 0.5, ["EMSR9004"])
    rows = table_of(
        head_to_head.check(replace(evidence, table=spoiled, reference=evidence.table)), "Largest regressions by event"
    )
    assert [row["event"] for row in rows] == ["EMSR9004"]


def test_a_test_that_could_not_fail_is_a_skip(evidence):
    five = [f"EMSR900{n}" for n in range(1, 6)]
    few = replace(
        evidence, table=missed(of_events(evidence.table, *five), 0.5), reference=of_events(evidence.table, *five)
    )
    answer = head_to_head.check(few)
    assert answer.status == "skip"
    assert answer.reason == "5 of 5 events with flood differ: the test's smallest p is 0.0625, it could not fail"
    one = head_to_head.check(
        replace(evidence, table=missed(evidence.table, 0.5, ["EMSR9004"]), reference=evidence.table)
    )
    assert one.status == "skip"
    assert one.reason == "1 of 11 events with flood differ: the test's smallest p is 1, it could not fail"


def test_many_chips_are_thinned_out_to_the_same_points_each_time(evidence):
    reference = make_table(40, 80, seed=2, pixels=64, checkpoint=OTHER)
    many = replace(evidence, table=make_table(40, 80, seed=1, pixels=64), reference=reference)
    one, other = (head_to_head.check(many).plots[0] for _ in range(2))
    assert len(one.series[0]["x"]) == 2000
    assert "chips, evenly thinned out" in one.caption
    assert one == other


# --- events


def test_events_are_those_that_a_loop_pools(evidence):
    answer = events.check(evidence)
    pooled = by_event(evidence.table)
    wet = {name: counts for name, counts in pooled.items() if counts[1].sum()}
    rows = table_of(answer, "All events with flood")
    assert [row["event"] for row in rows] == sorted(wet, key=lambda name: flood(wet[name]))
    everything = sum(int(counts[1].sum()) for counts in wet.values())
    for row in rows:
        counts = wet[row["event"]]
        assert row["flood IoU"] == pytest.approx(flood(counts))
        assert (row["chips"], row["flood pixels"]) == (8, counts[1].sum())
        assert row["share of all flood pixels in %"] == pytest.approx(100 * counts[1].sum() / everything)
    [dry] = table_of(answer, "Events without flood")
    counts = pooled["EMSR9012"]
    assert (dry["event"], dry["called flood"]) == ("EMSR9012", counts[0, 1])
    assert dry["false alarms in %"] == pytest.approx(100 * counts[0, 1] / counts.sum())
    [forest] = answer.plots[0].series
    assert len(forest["x"]) == 11
    assert all(low <= x <= high for low, x, high in zip(forest["low"], forest["x"], forest["high"], strict=True))


def test_flood_iou_of_zero_everywhere_fails_and_names_the_events(evidence):
    answer = events.check(replace(evidence, table=missed(evidence.table, 1.0)))
    assert answer.status == "fail"
    assert answer.reason.startswith("almost no flood is found in 11 of 11 events: EMSR9")


def test_two_blind_events_of_eleven_fail_and_one_does_not(evidence):
    one = events.check(replace(evidence, table=missed(evidence.table, 1.0, ["EMSR9002"])))
    two = events.check(replace(evidence, table=missed(evidence.table, 1.0, ["EMSR9002", "EMSR9007"])))
    assert (one.status, two.status) == ("pass", "fail")
    assert value(two, "share of events in which almost no flood is found").value == pytest.approx(2 / 11)
    assert two.reason == "almost no flood is found in 2 of 11 events: EMSR9002, EMSR9007"


def test_floods_of_a_few_pixels_do_not_decide(evidence):
    tiny = replace(evidence, table=missed(make_table(pixels=16, ignored=0.0), 1.0))
    assert events.check(tiny).status == "skip"


# --- calibration


def test_calibration_figures_are_those_of_the_sums(evidence):
    table, answer = evidence.table, calibration.check(evidence)
    counts, pixels = table.counts.sum(axis=0), table.counts.sum()
    error = 0.0
    for first in range(0, 50, 5):  # ten bins of five
        here = table.histogram[:, :, 1, first : first + 5].sum(axis=(0, 2))
        error += abs(table.confidence[:, 1, first : first + 5].sum() - here[1]) / pixels
    assert value(answer, "expected calibration error of flood").value == pytest.approx(error)
    assert value(answer, "Brier score, 0 to 2").value == pytest.approx(table.squared_error.sum() / pixels)
    area = value(answer, "predicted over true flood area")
    assert area.value == pytest.approx(counts[:, 1].sum() / counts[1].sum())
    assert value(answer, "flood IoU at 0.5").value == pytest.approx(flood(counts))  # two classes: that is the argmax
    best = value(answer, "flood IoU at the best threshold").value
    swept = next(plot for plot in answer.plots if plot.name == "thresholds").series[0]
    assert best == pytest.approx(max(swept["y"]), abs=1e-6)
    assert best >= flood(counts)
    assert swept["x"][swept["y"].index(max(swept["y"]))] == value(answer, "best threshold of flood").value
    of_flood, diagonal = next(plot for plot in answer.plots if plot.name == "reliability").series
    assert diagonal["x"] == diagonal["y"] == [0.0, 1.0]
    assert np.abs(np.subtract(of_flood["x"], of_flood["y"])).max() < 0.05  # the model gives the true posterior


@pytest.mark.parametrize(("bias", "area"), [(-50.0, 0.0), (50.0, 6.0)])
def test_collapse_to_one_class_fails(evidence, bias, area):
    answer = calibration.check(replace(evidence, table=make_table(flood_bias=bias)))
    assert answer.status == "fail"
    assert value(answer, "predicted over true flood area").value == pytest.approx(area, rel=0.1)
    share = value(answer, "share of chips with flood and other ground that are predicted as all flood or no flood")
    assert (share.value, share.n_chips, share.ok) == (1.0, 66, False)
    assert "all flood or no flood: 1, asked is below 0.98" in answer.reason


def test_twice_the_flood_that_there_is_fails_without_a_collapse(evidence):
    answer = calibration.check(replace(evidence, table=make_table(flood_bias=4.5)))
    assert answer.status == "fail"
    assert "predicted over true flood area: 2." in answer.reason
    assert value(answer, "predicted over true flood area").threshold == "0.5 to 2"
    assert "all flood or no flood" not in answer.reason


def test_over_confident_probabilities_fail_though_few_pixels_are_wrong(evidence):
    told = {"skill": 1.6, "dry_events": 9}
    honest, sure = make_table(**told), make_table(**told, sharpness=30.0)
    assert np.array_equal(honest.counts, sure.counts)
    assert calibration.check(replace(evidence, table=honest)).reason.count("calibration error") == 0
    answer = calibration.check(replace(evidence, table=sure))
    assert answer.status == "fail"
    assert "where its probability is 0.1 or more: " in answer.reason
    assert value(answer, "expected calibration error of flood").ok  # which background drowns


def test_probabilities_that_are_wrong_all_over_fail(evidence):
    answer = calibration.check(replace(evidence, table=make_table(skill=1.0, sharpness=30.0)))
    assert "expected calibration error of flood: " in answer.reason


def test_a_split_without_flood_has_no_calibration_of_flood(evidence):
    answer = calibration.check(replace(evidence, table=make_table(events=3, dry_events=3)))
    assert (answer.status, answer.reason) == ("skip", "no flood in the truth of any chip")


# --- variance


def test_mean_sd_and_interval_over_seeds_are_those_of_scipy(evidence):
    answer = variance.check(evidence)
    reference = evidence.reference.counts.sum(axis=0)
    for name, figure in (("flood IoU", flood), ("mIoU", miou)):
        figures = [figure(run.table.counts.sum(axis=0)) for run in evidence.seeds]
        assert [row[name] for row in table_of(answer, "All declared runs")] == pytest.approx(figures)
        assert value(answer, f"{name}, mean over 3 runs").value == pytest.approx(np.mean(figures))
        assert value(answer, f"{name}, SD over 3 runs").value == pytest.approx(100 * np.std(figures, ddof=1))
        expected = stats.ttest_1samp(figures, figure(reference)).confidence_interval(0.9)
        found = value(answer, f"{name}, mean over 3 seeds, difference to the reference")
        shift = figure(reference)
        assert [found.low, found.high] == pytest.approx([100 * (x - shift) for x in expected])
    assert answer.reason.startswith("flood IoU is equivalent within ±2 pp (90 % CI ")
    assert ", 3 seeds)" in answer.reason


def test_a_dropped_run_fails_and_is_named(evidence):
    seeds = [*evidence.seeds[:2], SeedRun(46, "failed", None, "seed-46"), evidence.seeds[2]]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert answer.status == "fail"
    assert answer.reason.startswith("dropped: seed-46 (seed 46, failed)")
    rows = table_of(answer, "All declared runs")
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "finished"]
    assert rows[2]["flood IoU"] is None


@pytest.mark.parametrize(
    ("runs", "says"), [(0, "one run: variance unknown"), (1, "one run: variance unknown"), (2, "2 runs: at least 3")]
)
def test_too_few_runs_are_a_skip(evidence, runs, says):
    answer = variance.check(replace(evidence, seeds=evidence.seeds[:runs]))
    assert answer.status == "skip"
    assert answer.reason.startswith(says)


def test_runs_that_are_all_worse_fail(evidence):
    seeds = [replace(run, table=missed(run.table, 0.1)) for run in evidence.seeds]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert answer.status == "fail"
    assert answer.reason.startswith("flood IoU is different: ")
    assert "pp worse than the reference" in answer.reason


def test_runs_that_scatter_are_not_called_equivalent(evidence):
    seeds = [
        replace(run, table=missed(run.table, share)) for run, share in zip(evidence.seeds, (0, 0.03, 0.08), strict=True)
    ]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert answer.status == "fail"
    assert answer.reason.startswith("flood IoU is not shown to be equivalent: the interval -")


def test_a_run_on_other_chips_fails(evidence):
    seeds = [*evidence.seeds[:2], SeedRun(46, "finished", make_table(events=11), "seed-46")]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert answer.status == "fail"
    assert answer.reason.startswith("seed-46 cannot be held against seed-42: other chips")


@pytest.mark.parametrize("resaved", [False, True])
def test_a_run_that_is_a_copy_of_another_fails_and_is_named(evidence, resaved):
    first = evidence.seeds[0].table
    last = evidence.seeds[2].table.metadata
    metadata = last | {"checkpoint": OTHER if resaved else first.metadata["checkpoint"]}
    copy = replace(evidence.seeds[2], table=replace(first, metadata=metadata))
    answer = variance.check(replace(evidence, seeds=[*evidence.seeds[:2], copy]))
    assert answer.status == "fail"
    assert answer.reason.startswith("seed-45 is a copy of seed-42: it ")


def test_a_reference_that_is_one_of_the_runs_fails(evidence):
    answer = variance.check(replace(evidence, reference=evidence.seeds[1].table))
    assert (answer.status, "the reference is a copy of seed-44" in answer.reason) == ("fail", True)


def test_a_run_of_another_seed_or_recipe_than_declared_fails(evidence):
    seeds = [*evidence.seeds[:2], replace(declared(46), seed=45, run="seed-45")]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert answer.status == "fail"
    assert answer.reason == "seed-45 has not this run's recipe with the declared seed, 45"
    own = [replace(evidence.seeds[0], run="healthy"), *evidence.seeds[1:]]
    assert variance.check(replace(evidence, seeds=own)).status == "pass"
    answer = variance.check(replace(evidence, seeds=own, record={**evidence.record, "seed": 7}))
    assert (answer.status, answer.reason) == ("fail", "healthy was trained with seed 7, declared was 42")


def test_a_run_tested_with_other_paths_is_not_held_against_the_declared_recipe(evidence):
    elsewhere = declared(45, recipe_sha256="0f" * 32, recipe_changes=["data.init_args.data_root"])
    assert variance.check(replace(evidence, seeds=[*evidence.seeds[:2], elsewhere])).status == "pass"


def test_without_a_reference_only_the_spread_is_claimed(evidence):
    answer = variance.check(replace(evidence, reference=None))
    assert answer.status == "pass"
    assert "equivalent" not in answer.reason
    assert any("nothing is said about equivalence" in note for note in answer.notes)


def test_a_run_that_is_tested_but_not_finished_is_counted_and_said(evidence):
    seeds = [*evidence.seeds[:2], replace(evidence.seeds[2], status="interrupted")]
    answer = variance.check(replace(evidence, seeds=seeds))
    assert any("seed-45 (interrupted)" in note for note in answer.notes)
