"""Generated chips: the same each time, in the real data's layout, and plausible for every hazard."""

import hashlib
import json
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.errors import RasterioError

from floodrepro.data import synth
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import AFTER, BEFORE, EVENT, IGNORE_INDEX, NO_DATA, PARTS, SPLITS, event_of
from floodrepro.data.splits import SYNTH_NOTE
from floodrepro.data.synth import VARIANTS, generate
from floodrepro.errors import DataError, UsageError
from test_splits import ids_of

SMALL = {"events": 4, "chips": 12, "size": 32, "protocol": "v0", "seed": 7}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    generate(root, events=6, chips=24, size=64, protocol="v1", seed=1)
    return root


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_same_seed_gives_the_same_bytes(tmp_path, layout):
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        generate(tmp_path / name, **SMALL | {"seed": seed}, layout=layout, variants=list(VARIANTS))
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")


def test_every_listed_chip_has_its_parts_and_every_event_is_in_one_split(tmp_path):
    report = generate(tmp_path, **SMALL)
    lists = {split: ids_of(tmp_path, split) for split in SPLITS}
    source = Chips(tmp_path)
    listed = {chip for chips in lists.values() for chip in chips}
    assert {part: source.having(part) for part in PARTS} == dict.fromkeys(PARTS, listed)
    events = [{event_of(chip) for chip in chips} for chips in lists.values()]
    assert [len(found) for found in events] == list(report["events"].values()) == [2, 1, 1]
    assert len(set.union(*events)) == 4
    assert json.loads(json.dumps(report)) == report


def test_version_1_tests_on_chips_of_its_training_events_and_says_which(scenes):
    lists = {name: ids_of(scenes, name) for name in ("train", "test")}
    for name in ("test_seen_events", "test_holdout"):
        lists[name] = ids_of(scenes, name)
    assert sorted(lists["test_seen_events"] + lists["test_holdout"]) == sorted(lists["test"])
    assert {event_of(chip) for chip in lists["test_seen_events"]} <= {event_of(chip) for chip in lists["train"]}


def test_radar_falls_at_the_event_where_the_mask_says_flood_and_recovers(scenes):
    source, means = Chips(scenes), {}
    masks = {chip: source.raster(chip, "MASK") for chip in sorted(source.having("MASK"))}
    radar = {chip: source.bands(chip, "S1RTC").astype(np.float32) for chip in masks}
    for step in (BEFORE, EVENT, AFTER):
        pixels = np.concatenate([radar[chip][step][:, mask == 2] for chip, mask in masks.items()], axis=1)
        means[step] = np.nanmean(pixels, axis=1)
    assert means[BEFORE] == pytest.approx((-10, -15.5), abs=1)
    assert means[EVENT] == pytest.approx((-15.5, -21.5), abs=1.2)
    assert means[AFTER] == pytest.approx((-10, -15.5), abs=1)
    assert {int(value) for mask in masks.values() for value in np.unique(mask)} == {-1, 0, 1, 2}
    dry = [chip for chip, mask in masks.items() if not (mask == 2).any()]
    assert 0 < len(dry) < len(masks)


def test_pixels_are_missing_in_both_satellites_and_never_where_radar_sees_nothing_is_a_class(scenes):
    source, missing = Chips(scenes), {"S1RTC": 0, "S2L2A": 0}
    for chip in source.having("MASK"):
        unseen = np.isnan(source.bands(chip, "S1RTC")[EVENT, 0].astype(np.float32))
        assert (source.raster(chip, "MASK")[unseen] == IGNORE_INDEX).all()
        missing["S1RTC"] += int(unseen.sum())
        missing["S2L2A"] += int((source.bands(chip, "S2L2A") == NO_DATA).sum())
    assert all(missing.values())


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


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_of_two_at_a_time_in_a_new_folder_one_is_refused(tmp_path, monkeypatch, layout):
    barrier, real = threading.Barrier(2), synth._write

    def both(path: Path, content: bytes) -> None:
        real(path, content)
        if path.name == SYNTH_NOTE:  # written last: neither has seen anything of the other
            barrier.wait()

    monkeypatch.setattr(synth, "_write", both)

    def start(seed: int) -> bool:
        try:
            generate(tmp_path / "one", **SMALL | {"seed": seed}, layout=layout)
        except DataError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, (7, 8)))
    assert sorted(done) == [False, True]
    monkeypatch.undo()
    generate(tmp_path / "alone", **SMALL | {"seed": 7 if done[0] else 8}, layout=layout)
    assert digests(tmp_path / "one") == digests(tmp_path / "alone")


@pytest.mark.parametrize("layout", ["extracted", "hub"])
def test_full_disk_is_a_data_error_and_leaves_nothing(tmp_path, monkeypatch, layout):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match="No space left on device"):
        generate(tmp_path, **SMALL, layout=layout)
    assert not any(tmp_path.iterdir())


def test_disk_that_is_full_at_the_scenes_leaves_nothing_and_the_same_command_goes_on(tmp_path, monkeypatch):
    opened = rasterio.open

    def full(name, mode="r", **more):
        if mode == "w" and "scenes" in str(name):
            raise RasterioError("No space left on device")
        return opened(name, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(rasterio, "open", full)
        with pytest.raises(DataError, match="No space left on device"):
            generate(tmp_path, **SMALL, scenes=True)
    assert not any(tmp_path.iterdir())
    generate(tmp_path, **SMALL, scenes=True)
    assert len(list((tmp_path / "scenes").glob("*/scene.yaml"))) == SMALL["events"]


def test_protocols_need_no_numpy_and_chips_no_torch():
    code = (
        "import sys, floodrepro.data.protocols; assert 'numpy' not in sys.modules;"
        "import floodrepro.data.synth, floodrepro.data.audit, floodrepro.data.splits, floodrepro.data.fetch;"
        "assert not {'torch', 'terratorch', 'impactmesh'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
