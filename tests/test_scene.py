"""Scenes of a flood: what the radar, the optical sensor and the mask show has to hang together."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from floodrepro.data import scene
from floodrepro.data.names import AFTER, BEFORE, EVENT, NO_DATA
from floodrepro.data.scene import (
    BARE,
    CROP,
    FOREST,
    GRASS,
    SCL_CLOUD,
    SCL_NO_DATA,
    SCL_SHADOW,
    SCL_THIN_CLOUD,
    SCL_WATER,
    URBAN,
    WATER,
)

SHAPE = (192, 256)


@pytest.fixture(scope="module")
def grounds():
    return [scene.make_ground(np.random.default_rng([3, index]), SHAPE) for index in range(6)]


@pytest.fixture(scope="module")
def seen():
    return [
        scene.make_scene(np.random.default_rng([3, index]), SHAPE, s1_edge=True, s2_edge=True) for index in range(3)
    ]


def test_same_generator_state_gives_the_same_scene(seen):
    again = scene.make_scene(np.random.default_rng([3, 0]), SHAPE, s1_edge=True, s2_edge=True)
    for name, values in vars(again).items():
        assert np.array_equal(values, vars(seen[0])[name], equal_nan=name == "s1"), name


def test_scene_has_the_types_and_shapes_that_it_names(seen):
    described = {name: (values.dtype.name, values.shape) for name, values in vars(seen[0]).items()}
    assert described == {
        "elevation": ("int16", SHAPE),
        "s1": ("float16", (4, 2, *SHAPE)),
        "s2": ("int16", (4, 12, *SHAPE)),
        "scl": ("uint8", (4, *SHAPE)),
        "permanent": ("bool", SHAPE),
        "flood": ("bool", SHAPE),
        "mapped": ("bool", SHAPE),
    }


@pytest.mark.parametrize("beta", [2.0, 3.0])
def test_power_of_a_fractal_surface_falls_as_its_exponent_says(beta):
    surface = scene.fractal(np.random.default_rng(0), (512, 512), beta=beta, scale=256)
    assert surface.mean() == pytest.approx(0, abs=1e-9)
    assert surface.std() == pytest.approx(1)
    power = np.abs(np.fft.fft2(surface)) ** 2
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)[None, :])
    edges = np.geomspace(8 / 256, 0.4, 12)
    rings = [(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(edges)]
    slope, _ = np.polyfit(
        [np.log(frequency[ring].mean()) for ring in rings], [np.log(power[ring].mean()) for ring in rings], 1
    )
    assert slope == pytest.approx(-beta, abs=0.15)


def test_size_of_features_does_not_grow_with_the_scene():
    def correlation_length(size):
        surface = scene.fractal(np.random.default_rng(1), (size, size), beta=3.0, scale=30)
        shifts = [np.mean(surface * np.roll(surface, shift, axis=0)) for shift in range(30)]
        return int(np.argmax(np.array(shifts) < np.exp(-1)))

    assert correlation_length(1024) == pytest.approx(correlation_length(256), abs=2)


def test_speckle_has_mean_one_and_variance_one_over_the_looks():
    speckle = scene.speckled(np.random.default_rng(0), np.ones((400, 400)))
    assert speckle.mean() == pytest.approx(1, abs=0.01)
    assert speckle.var() == pytest.approx(1 / scene.LOOKS, rel=0.03)


def test_flood_covers_the_share_asked_for_and_touches_permanent_water():
    # A plain that rises from a river on the left, and a hollow on the right that no river reaches.
    height = np.tile(np.linspace(-1, 9, 200), (100, 1))
    permanent = height < 0
    height[40:60, 150:170] = 0.5
    flood = scene.flooded_area(height, permanent, 0.2)
    assert flood.mean() == pytest.approx(0.2, abs=0.01)
    assert not flood[40:60, 150:170].any()
    assert not (flood & permanent).any()


def test_every_flood_is_connected_to_permanent_water(grounds):
    for ground in grounds:
        bodies, count = ndimage.label(ground.flood | ground.permanent)
        assert set(np.unique(bodies[ground.permanent])) == set(range(1, count + 1))
        assert 0.09 < ground.flood.mean() < 0.25
        assert 0.02 < ground.permanent.mean() < 0.07


def test_flood_lies_low_and_every_cover_occurs(grounds):
    for ground in grounds:
        dry = ~ground.flood & ~ground.permanent
        assert np.median(ground.height[ground.flood]) < np.median(ground.height[dry])
        assert np.median(ground.elevation[ground.flood]) < np.median(ground.elevation[dry])
        assert np.array_equal(ground.cover == WATER, ground.permanent)
        assert set(np.unique(ground.cover)) == {WATER, BARE, CROP, GRASS, FOREST, URBAN}


def change_at_event(ground, rng):
    s1 = scene.radar(rng, ground).astype(np.float32)
    return s1[EVENT] - s1[BEFORE], s1


def test_open_flood_falls_in_both_polarisations_and_flooded_forest_does_not(grounds):
    drops, forest = [], []
    for index, ground in enumerate(grounds):
        change, _ = change_at_event(ground, np.random.default_rng(index))
        drops.append(change[:, ground.flood & np.isin(ground.cover, (BARE, CROP, GRASS))])
        forest.append(change[:, ground.flood & (ground.cover == FOREST)])
    assert np.concatenate(drops, axis=1).mean(axis=1) == pytest.approx((-7, -8), abs=1.5)
    # The smoothing over 20 m lets some of the water beside a narrow wood show in it.
    assert np.concatenate(forest, axis=1).mean(axis=1) == pytest.approx((0, -1.5), abs=1.5)


def test_some_fields_lose_backscatter_without_a_flood(grounds):
    lost = []
    for index, ground in enumerate(grounds):
        change, _ = change_at_event(ground, np.random.default_rng(index))
        dry = ~ground.flood & np.isin(ground.cover, (BARE, CROP, GRASS))
        pixels = np.bincount(ground.field[dry], minlength=ground.field.max() + 1)
        mean = np.bincount(ground.field[dry], change[0][dry], minlength=len(pixels)) / np.maximum(pixels, 1)
        lost += (mean[pixels > 60] < -3).tolist()
    assert 0.02 < np.mean(lost) < 0.2


def test_backscatter_of_land_and_water_is_what_sentinel_1_measures(grounds):
    for index, ground in enumerate(grounds):
        _, s1 = change_at_event(ground, np.random.default_rng(index))
        land = s1[BEFORE][:, ~ground.permanent].mean(axis=1)
        water = s1[BEFORE][:, ndimage.binary_erosion(ground.permanent)].mean(axis=1)
        assert land == pytest.approx((-10, -15.5), abs=1.2)
        assert water == pytest.approx((-19.5, -25.5), abs=2)


def test_vv_of_permanent_water_barely_changes_at_the_event(grounds):
    change, _ = change_at_event(grounds[0], np.random.default_rng(0))
    assert abs(change[0][grounds[0].permanent].mean()) < 1.5


def test_optical_classes_fit_the_reflectances(seen):
    for one in seen:
        near_infrared, blue = one.s2[:, 7], one.s2[:, 1]
        cloud = one.scl == SCL_CLOUD
        assert blue[cloud].mean() > 3 * blue[~cloud & (one.scl != SCL_NO_DATA)].mean()
        assert near_infrared[BEFORE][one.scl[BEFORE] == SCL_WATER].mean() < 600
        assert np.isin(one.scl[BEFORE][one.permanent], (SCL_WATER, SCL_SHADOW, SCL_THIN_CLOUD, SCL_CLOUD)).all()
        assert one.s2[one.s2 != NO_DATA].min() > 0


def test_flood_water_is_turbid_and_gone_afterwards(seen):
    for one in seen:
        clear = one.scl[EVENT] == SCL_WATER
        wet, later = one.flood & clear, one.flood & np.isin(one.scl[AFTER], (4, 5))
        assert not (one.flood & (one.scl[AFTER] == SCL_WATER)).any()
        assert one.s2[EVENT, 7][wet].mean() < 0.6 * one.s2[AFTER, 7][later].mean()
        assert one.s2[EVENT, 3][wet].mean() > 1.5 * one.s2[EVENT, 3][one.permanent & clear].mean()


def test_clouds_are_thickest_at_the_event(seen):
    share = np.mean([np.isin(one.scl, (SCL_THIN_CLOUD, SCL_CLOUD)).mean(axis=(1, 2)) for one in seen], axis=0)
    assert int(np.argmax(share)) == EVENT
    assert share[EVENT] > 0.25


def test_swath_edges_are_missing_pixels_and_unmapped_where_the_event_was_not_seen(seen):
    for one in seen:
        assert np.isnan(one.s1).any(axis=(1, 2, 3)).tolist() == [False, True, True, False]
        assert (one.s2 == NO_DATA).any(axis=(1, 2, 3)).tolist() == [True, False, False, True]
        assert np.array_equal(one.scl == SCL_NO_DATA, (one.s2 == NO_DATA).all(axis=1))
        assert not one.mapped[np.isnan(one.s1[EVENT, 0])].any()
        assert 0.05 < (~one.mapped).mean() < 0.13


def test_scene_without_swath_edges_misses_no_pixel():
    whole = scene.make_scene(np.random.default_rng(0), (64, 64), s1_edge=False, s2_edge=False)
    assert np.isfinite(whole.s1).all()
    assert (whole.s2 != NO_DATA).all()


@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (96, 48)])
def test_smallest_scenes_hold_flood_and_permanent_water(shape):
    for seed in range(20):
        one = scene.make_scene(np.random.default_rng(seed), shape, s1_edge=True, s2_edge=True)
        assert (one.flood & one.mapped).any()
        assert one.permanent.any()
