"""Is the verdict itself right? Events, chips and seeds with a known true gap, drawn thousands of times."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from floodrepro.evaluation.statistics import equivalence_over_events, equivalence_over_seeds, jackknife
from simulation import (
    DRAWS,
    GAPS_PP,
    MARGIN,
    REPLICATIONS,
    SEEDS,
    SPREADS_PP,
    TOO_HARD,
    WORLDS,
    Results,
    World,
    flood,
    seed_p_values,
    simulate,
    tables,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "statistics.md"
BEGIN, END = "<!-- printed by tests/simulation.py -->\n\n", "\n\n<!-- end of what is printed -->"


@pytest.fixture(scope="module")
def results() -> Results:
    return simulate()


def error(share: float, draws: int) -> float:
    """Simulation error of a share, one standard deviation."""
    return (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize("world", [World(), World(alike=0.5, tilt=0.8)], ids=["usual", "tilted"])
def test_true_gap_is_that_of_a_very_large_draw(world):
    counts = replace(world, events=200_000).draw(np.random.default_rng(0), 1)
    for other, truth in ((None, world.iou(0.0)[0]), (counts[:, :, 1], world.gap)):
        estimate, standard_error, _ = jackknife(counts[:, :, 0], flood, other=other)
        assert standard_error < 0.002
        assert estimate == pytest.approx(truth, abs=4 * standard_error.item())


def test_what_is_simulated_in_bulk_is_what_a_report_says():
    counts = World(alike=0.995).draw(np.random.default_rng(1), 40)
    estimate, standard_error, freedom = jackknife(counts[:, :, 0], flood, other=counts[:, :, 1])
    runs = 0.4 + 0.01 * np.random.default_rng(2).standard_normal((40, 5))
    verdicts = set()
    for row in range(40):
        found = equivalence_over_events(counts[row, :, 0], counts[row, :, 1], flood, margin=MARGIN)
        assert found.difference == pytest.approx(estimate[row])
        assert found.standard_error == pytest.approx(standard_error[row])
        assert found.degrees_of_freedom == pytest.approx(freedom[row])
        verdict = equivalence_over_seeds(runs[row].tolist(), 0.41, margin=MARGIN)
        assert verdict.p_value == pytest.approx(seed_p_values(runs, 0.41)[row])
        verdicts.add(verdict.equivalent)
    assert verdicts == {True, False}


def test_default_interval_covers_87_percent_from_60_events_on(results):
    enough = {name: found for name, found in results.worlds.items() if WORLDS[name].events >= 60}
    realistic = {name: found.default for name, found in enough.items() if name not in TOO_HARD}
    assert len(realistic) >= 15
    # Not luck: even two simulation errors below what was found, it is 87 %.
    assert {name: share for name, share in realistic.items() if share - 2 * error(share, REPLICATIONS) < 0.87} == {}


def test_default_interval_is_the_one_that_the_simulation_favours(results):
    for found in results.methods.values():
        [default] = [name for name in found if "default" in name]
        assert min(found, key=lambda name: abs(found[name] - 0.90)) == default
    for found in results.worlds.values():
        assert abs(found.default - 0.90) < max(abs(found.plain - 0.90), 0.035)


def test_settings_that_are_said_to_be_too_hard_are(results):
    assert all(results.worlds[name].default < 0.885 for name in TOO_HARD)
    assert results.worlds[TOO_HARD[-1]].default < 0.87


def test_equivalence_over_events_is_wrongly_given_in_at_most_7_percent(results):
    wrong = {name: found.equivalent for name, found in results.worlds.items() if WORLDS[name].gap >= MARGIN}
    assert max(wrong.values()) > 0.04  # in some settings the verdict is within reach, so that being wrong is possible
    assert {name: share for name, share in wrong.items() if share > 0.07} == {}


def test_equivalence_over_seeds_is_wrongly_given_in_at_most_5_percent(results):
    allowed = 0.05 + 3 * error(0.05, DRAWS)  # simulation error aside
    for spread in SPREADS_PP:
        for gap in (gap for gap in GAPS_PP if gap >= 100 * MARGIN):
            for seeds in SEEDS[1:]:
                assert results.seeds[spread, gap][f"{seeds} seeds"] <= allowed


def test_against_several_runs_of_the_reference_as_well():
    generator = np.random.default_rng(6)
    for runs, others in ((5, 5), (5, 3)):
        wrong = [
            equivalence_over_seeds(
                (-MARGIN + 0.01 * generator.standard_normal(runs)).tolist(),
                (0.004 * generator.standard_normal(others)).tolist(),
                margin=MARGIN,
            ).equivalent
            for _ in range(3_000)
        ]
        assert np.mean(wrong) <= 0.05 + 3 * error(0.05, 3_000)


def test_more_seeds_find_equivalence_more_often_where_it_is_true(results):
    for spread in SPREADS_PP:
        for gap in (0, 0.5, 1):
            found = [results.seeds[spread, gap][f"{seeds} seeds"] for seeds in SEEDS[1:]]
            assert found == sorted(found)
    assert results.seeds[1, 0]["5 seeds"] > 0.9


def test_rule_of_the_published_card_passes_gaps_that_it_should_not(results):
    for spread in SPREADS_PP:
        assert results.seeds[spread, 2.5]["card"] > 0.8
        for gap in GAPS_PP:  # one run against a margin, by hand
            by_hand = np.diff(norm.cdf([-2, 2], gap, spread)).item()
            found = results.seeds[spread, gap]["one run"]
            assert found == pytest.approx(by_hand, abs=4 * error(by_hand, DRAWS) + 1e-4)


def test_neither_verdict_speaks_of_seeds_and_events_together(results):
    assert min(results.both) > 0.07  # as docs/statistics.md warns


def test_document_holds_what_the_simulation_prints(results):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == tables(results)
