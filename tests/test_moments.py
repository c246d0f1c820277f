"""Streaming statistics equal those of all values at once, whatever the cut, and exchanged bands are found."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floodrepro.data.chip_checks import check_chip
from floodrepro.data.moments import (
    BANDS,
    GROUPS,
    BandProducts,
    ChipRecord,
    Finding,
    Moments,
    contrary,
    exchanges,
)
from floodrepro.data.names import PROTOCOLS, S2_BANDS
from floodrepro.data.scene import make_scene
from floodrepro.data.totals import FEWEST_FLOOD_PIXELS, TOLERANCE, Statistics, Totals
from floodrepro.errors import UsageError

CROSS_GROUP = [(i, j) for i, j in combinations(range(len(S2_BANDS)), 2) if GROUPS[i] != GROUPS[j]]


@pytest.fixture(scope="module")
def reflectance():
    """Pixels (12, N) of one generated scene."""
    scene = make_scene(np.random.default_rng(5), (96, 96), s1_edge=False, s2_edge=False)
    return scene.s2.swapaxes(0, 1).reshape(len(S2_BANDS), -1)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, allow_nan=False), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_moments_of_pieces_merge_to_those_of_the_whole(values, cuts):
    whole = np.array(values)
    merged = Moments.none(1)
    for piece in np.split(whole, sorted(min(cut, len(values)) for cut in cuts)):
        merged = merged.merge(Moments.of([piece]))
    assert merged.count.tolist() == [len(values)]
    assert merged.mean[0] == pytest.approx(whole.mean(), abs=1e-8)
    assert merged.std[0] == pytest.approx(whole.std(), abs=1e-6)


def test_moments_keep_bands_apart_and_take_bands_without_values():
    moments = Moments.of([np.array([1, 3], np.int16), np.array([], np.int16)])
    both = moments.merge(Moments.of([np.array([5], np.int16), np.array([7], np.int16)]))
    assert (both.count.tolist(), both.mean.tolist()) == ([3, 1], [3, 7])
    assert both.std.tolist() == pytest.approx([np.std([1, 3, 5]), 0])


def test_a_large_mean_does_not_wash_out_a_small_deviation():
    values = 1e8 + np.random.default_rng(0).normal(0, 1, 3000)
    merged = Moments.none(1)
    for piece in np.split(values, 30):
        merged = merged.merge(Moments.of([piece]))
    assert merged.std[0] == pytest.approx(values.std(), rel=1e-6)


def test_float16_is_summed_in_float64():
    values = np.full(100_000, 30_000, np.float16)  # their sum is far beyond float16's range
    assert Moments.of([values]).mean[0] == 30_000


def test_band_products_give_the_correlation_and_merge_exactly(reflectance):
    parts = np.array_split(reflectance, 7, axis=1)
    forward, backward = BandProducts.none(12), BandProducts.none(12)
    for part in parts:
        forward = forward.merge(BandProducts.of(part))
    for part in reversed(parts):
        backward = backward.merge(BandProducts.of(part))
    assert forward.to_json() == backward.to_json() == BandProducts.of(reflectance).to_json()
    assert forward.correlation() == pytest.approx(np.corrcoef(reflectance), abs=1e-6)
    assert BandProducts.from_json(json.loads(json.dumps(forward.to_json()))).to_json() == forward.to_json()


def test_a_band_that_does_not_vary_has_no_correlation(reflectance):
    flat = reflectance.copy()
    flat[3] = 1000
    assert BandProducts.of(flat).correlation() is None
    assert exchanges(BandProducts.of(flat)) == []
    assert exchanges(BandProducts.none(12)) == []


def test_bands_in_order_need_no_exchange(reflectance):
    assert exchanges(BandProducts.of(reflectance))[0].path > 1


@pytest.mark.parametrize(("one", "other"), CROSS_GROUP, ids=lambda band: S2_BANDS[band])
def test_two_bands_in_each_others_place_are_named(reflectance, one, other):
    order = list(range(12))
    order[one], order[other] = other, one
    best = exchanges(BandProducts.of(reflectance[order]))[0]
    assert (best.first, best.second) == (one, other)
    assert best.path < 0.85


def test_means_the_other_way_round_need_a_clear_margin_on_both_sides():
    assert contrary(np.array([3000.0, 1000.0]), [1000, 3000], 0, 1)
    assert contrary(np.array([1000.0, 3000.0]), [3000, 1000], 0, 1)
    assert not contrary(np.array([1000.0, 3000.0]), [1000, 3000], 0, 1)
    assert not contrary(np.array([1050.0, 1000.0]), [1000, 3000], 0, 1)
    assert not contrary(np.array([3000.0, 1000.0]), [1000, 1100], 0, 1)


def test_reversed_bands_are_found_although_neighbours_stay_neighbours(reflectance):
    totals = Totals(PROTOCOLS["v0"])
    totals.add("train", ChipRecord("EMSR9001_1_35TMF_x0_y0", order=BandProducts.of(reflectance[::-1])))
    messages = [finding.message for finding in totals.judge(None) if finding.check == "band-order"]
    assert messages == [
        "S2L2A is darker in near infrared (B06 to B09) than in visible light (B01 to B04): reversed bands?"
    ]


def test_record_survives_json_to_the_bit():
    record = ChipRecord("EMSR9001_1_35TMF_x0_y0", {"DEM": 7}, {"DEM": "ab"}, edge=64)
    record.moments["DEM"] = Moments.of([np.array([0.1, 0.7, 1e-9])])
    record.missing["DEM"], record.classes = (1, 4096), {"0": 4, "1": 0}
    record.add("error", "dtype", "its values are int32", "DEM")
    again = ChipRecord.from_line(record.to_line())
    assert again.to_line() == record.to_line()
    assert again.findings == [
        Finding("error", "dtype", "its values are int32", record.chip, f"{record.chip}_DEM.tif"),
    ]


@pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"chip": "a"}', '{"unknown": 1}'])
def test_torn_record_is_refused(line):
    with pytest.raises((ValueError, KeyError, TypeError)):
        ChipRecord.from_line(line)


def test_statistics_are_compared_in_units_of_the_recipes_std():
    statistics = Statistics("recipe", {"S1RTC": [-10.0, -16.0]}, {"S1RTC": [4.0, 4.0]})
    values = [np.array([-12.0, -4.0]), np.array([-20.0, -12.0])]
    totals = Totals(PROTOCOLS["v0"])
    totals.add("train", ChipRecord("EMSR9001_1_35TMF_x0_y0", moments={"S1RTC": Moments.of(values)}))
    totals.add("test", ChipRecord("EMSR9002_1_35TMF_x0_y0", moments={"S1RTC": Moments.of([v + 99 for v in values])}))
    assert totals.compare(statistics) == {"S1RTC": {"z": [0.5, 0.0], "std_ratio": [1.0, 1.0]}}
    [finding] = [finding for finding in totals.judge(statistics) if finding.check == "statistics"]
    assert finding.severity == "warning"
    assert "1 of 2 bands" in finding.message
    assert "vv: z of the mean +0.50" in finding.message


@pytest.mark.parametrize(
    ("protocol", "change", "severities"),
    [
        *[("v0", -2.1, []), ("v0", -1.9, ["warning"]), ("v0", -0.6, ["warning"]), ("v0", -0.4, ["error"])],
        *[("v1", -2.1, []), ("v1", -1.9, ["error"])],
    ],
)
def test_little_change_under_flood_is_an_error_where_it_is_known_and_else_a_warning(protocol, change, severities):
    totals = Totals(PROTOCOLS[protocol])
    record = ChipRecord("EMSR9001_1_35TMF_x0_y0", flood=Moments.of([np.full(FEWEST_FLOOD_PIXELS, change)]))
    totals.add("train", record)
    findings = [finding for finding in totals.judge(None) if finding.check == "flood-signature"]
    assert [finding.severity for finding in findings] == severities
    assert all(f"{change:+.1f} dB" in finding.message for finding in findings)


def test_tolerance_tells_the_two_published_statistics_apart():
    v0 = Statistics.of("terramind_v1_base_impactmesh_flood_amd")
    v1 = Statistics.of("terramind_v1_base_impactmesh_flood_v1")
    z = np.subtract(v1.means["S2L2A"], v0.means["S2L2A"]) / v0.stds["S2L2A"]
    assert (z > TOLERANCE).all()
    assert {modality: len(means) for modality, means in v0.means.items()} == {m: len(b) for m, b in BANDS.items()}


def test_recipe_without_statistics_is_refused(tmp_path):
    (tmp_path / "bare.yaml").write_text("data: {init_args: {means: {S2L2A: [1, 2]}, stds: {S2L2A: [1, 2]}}}\n")
    with pytest.raises(UsageError, match="no means and stds"):
        Statistics.of(str(tmp_path / "bare.yaml"))


def test_a_chip_without_any_file_gives_an_empty_record():
    record = check_chip("EMSR9001_1_35TMF_x0_y0", {}, PROTOCOLS["v0"])
    assert (record.findings, record.edge, record.moments) == ([], 0, {})
