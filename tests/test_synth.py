"""Generated chips: the same each time, in the real data's layout, and plausible."""

from pathlib import Path

import numpy as np
import pytest

from conftest import files_of
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import BEFORE, EVENT, IGNORE_INDEX, NO_DATA, event_of
from floodrepro.data.synth import VARIANTS, generate
from floodrepro.errors import DataError, UsageError
from test_splits import ids_of

SMALL = {"events": 4, "chips": 12, "size": 32, "protocol": "v0", "seed": 7}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    generate(root, events=6, chips=24, size=64, protocol="v1", seed=1)
    return root


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_same_seed_gives_the_same_bytes(tmp_path, layout):
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        generate(tmp_path / name, **SMALL | {"seed": seed, "chips": 6}, layout=layout, variants=list(VARIANTS))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") != files_of(tmp_path / "other")


def test_version_1_tests_on_chips_of_its_training_events_and_says_which(scenes):
    names = ("train", "test", "test_seen_events", "test_holdout")
    train, test, seen, holdout = (ids_of(scenes, name) for name in names)
    assert sorted(seen + holdout) == sorted(test)
    assert {event_of(chip) for chip in seen} <= {event_of(chip) for chip in train}
    assert not {event_of(chip) for chip in holdout} & {event_of(chip) for chip in train}


def test_radar_falls_where_the_mask_says_flood_and_recovers_and_where_it_sees_nothing_is_no_class(scenes):
    source, means = Chips(scenes), {}
    masks = {chip: source.raster(chip, "MASK") for chip in sorted(source.having("MASK"))}
    radar = {chip: source.bands(chip, "S1RTC").astype(np.float32) for chip in masks}
    for step in (BEFORE, EVENT, EVENT + 1):
        pixels = np.concatenate([radar[chip][step][:, mask == 2] for chip, mask in masks.items()], axis=1)
        means[step] = np.nanmean(pixels, axis=1)
    assert means[BEFORE] == pytest.approx((-10, -15.5), abs=1)
    assert means[EVENT] == pytest.approx((-15.5, -21.5), abs=1.2)
    assert means[EVENT + 1] == pytest.approx((-10, -15.5), abs=1)
    assert {int(value) for mask in masks.values() for value in np.unique(mask)} == {-1, 0, 1, 2}
    assert 0 < sum((mask == 2).any() for mask in masks.values()) < len(masks)
    unseen = {chip: np.isnan(bands[EVENT, 0]) for chip, bands in radar.items()}
    assert sum(where.sum() for where in unseen.values()) > 0
    assert all((masks[chip][where] == IGNORE_INDEX).all() for chip, where in unseen.items())
    assert any((source.bands(chip, "S2L2A") == NO_DATA).any() for chip in masks)


def test_wrong_argument_is_named_by_its_flag_and_a_data_set_never_overwritten(tmp_path):
    for argument, value in (("events", 2), ("chips", 3), ("size", 40), ("seed", -1)):
        with pytest.raises(UsageError, match=f"--{argument} is {value}"):
            generate(tmp_path / "new", **SMALL | {argument: value})
    with pytest.raises(UsageError, match="--layout-variant"):
        generate(tmp_path / "new", **SMALL, variants=["none"])
    assert not (tmp_path / "new").exists()
    for held in ("data", "split", "train"):
        (tmp_path / held / held).mkdir(parents=True)
        with pytest.raises(UsageError, match=held):
            generate(tmp_path / held, **SMALL)
        assert [path.name for path in (tmp_path / held).iterdir()] == [held]


@pytest.mark.parametrize("place", ["data", "split", "scenes"])
def test_full_disk_is_a_data_error_that_leaves_nothing_and_with_room_the_same_call_ends(tmp_path, monkeypatch, place):
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if place in path.parts:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="No space left on device"):
            generate(tmp_path, **SMALL, scenes=True)
    assert not any(tmp_path.iterdir())
    generate(tmp_path, **SMALL, scenes=True)
    assert len(list((tmp_path / "scenes").glob("*/scene.yaml"))) == SMALL["events"]


def test_of_two_that_write_at_once_one_wins_and_what_a_killed_one_left_is_gone(tmp_path, monkeypatch):
    (tmp_path / ".synth-killed").mkdir()
    monkeypatch.setattr("floodrepro.data.synth.data_in", lambda root: [])  # both looked before either was done
    generate(tmp_path, **SMALL, layout="hub")
    before = files_of(tmp_path)
    with pytest.raises(DataError, match="not empty"):
        generate(tmp_path, **SMALL | {"seed": 8}, layout="hub")
    assert files_of(tmp_path) == before and not list(tmp_path.glob(".*"))
