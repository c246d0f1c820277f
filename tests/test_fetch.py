"""Fetching with the real client from a local hub: one commit a folder, protocol first, damage named, nothing lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from conftest import files_of
from floodrepro.data import fetch as fetching
from floodrepro.data.chips import Chips
from floodrepro.data.splits import FETCH_NOTE, read_commit
from floodrepro.data.synth import generate
from floodrepro.data.weights import REFERENCE
from hub_server import HubServer
from test_splits import ids_of


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, bytes]:
    """Files of a version 0 data set as they lie on the hub, the train optical in two archives."""
    root = tmp_path_factory.mktemp("published")
    generate(root, events=6, chips=18, size=32, protocol="v0", seed=1, layout="hub")
    files = files_of(root)
    files["train/S2L2A_1.tar"] = files.pop("train/S2L2A.tar")
    return files | {"README.md": b"card"}


@pytest.fixture
def hub(published, monkeypatch, tmp_path):
    """A hub that this process's client speaks to; it is offline but for that."""
    with HubServer() as server:
        server.commit(published)
        server.speak_to(monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def run(cli, hub):
    """`floodrepro data fetch`, which ends with this code."""

    def fetch(root: Path, *flags: object, code: int = 0):
        outcome = cli("data", "fetch", "--root", root, *flags, "--format", "json")
        assert outcome.code == code, outcome.err
        return outcome

    return fetch


def archives(root: Path) -> dict[str, bytes]:
    return {path: content for path, content in files_of(root).items() if path.endswith(".tar")}


def test_all_archives_of_one_commit_arrive_and_a_second_call_fetches_nothing(hub, run, published, tmp_path):
    root = tmp_path / "data-set"
    report = json.loads(run(root, "--protocol", "v0").out)
    assert archives(root) == {path: content for path, content in published.items() if path.endswith(".tar")}
    assert not (root / "README.md").exists()
    assert report["commit"] == read_commit(root / "data") == hub.refs["main"]
    assert report["chips"] == {"train": 12, "val": 3, "test": 3}
    assert len(Chips(root).having("S2L2A")) == 18
    hub.sent.clear()
    run(root, "--protocol", "v0")
    assert hub.sent.total() == 0


def test_wrong_protocol_part_repository_and_full_disk_are_named_before_any_archive(hub, run, tmp_path, monkeypatch):
    root = tmp_path / "a"
    assert "protocol v1 needs v1 data, this is v0: 3 test" in run(root, "--protocol", "v1", code=1).err
    hub.commit({path: content for path, content in hub.commits[hub.refs["main"]].items() if "DEM" not in path})
    assert "train/DEM*.tar" in run(root, code=1).err
    assert "to do:" in run(root, "--repo", "some/other", code=1).err
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert "the disk is too small: 0.0 GB to fetch" in run(root, "--modality", "MASK", code=1).err
    assert not archives(root)


def test_moved_branch_is_refused_and_the_commit_that_is_here_named(hub, run, published, tmp_path):
    root, first, flags = tmp_path / "a", hub.refs["main"], ("--split", "val,test", "--modality", "DEM,MASK")
    run(root, *flags)
    assert set(archives(root)) == {f"{s}/{p}.tar" for s in ("val", "test") for p in ("DEM", "MASK")}
    assert len(list((root / "split").glob("*.txt"))) == 3
    hub.commit(published | {"val/MASK.tar": b"other"})
    assert f"--revision {first}" in run(root, *flags, code=1).err
    run(root, *flags, "--revision", first)


def test_damaged_archive_is_named_and_the_others_are_kept(hub, run, published, tmp_path):
    damaged = bytes([published["val/DEM.tar"][0] ^ 1]) + published["val/DEM.tar"][1:]
    hub.fault("val/DEM.tar", content=damaged)
    root, flags = tmp_path / "a", ("--split", "val", "--modality", "DEM,MASK")
    assert "not what the hub says it is: val/DEM.tar" in run(root, *flags, code=1).err
    (root / "val" / "DEM.tar").unlink()
    hub.sent.clear()
    run(root, *flags)
    assert hub.sent["val/MASK.tar"] == 0
    assert archives(root)["val/DEM.tar"] == published["val/DEM.tar"]


def test_dropped_connection_and_a_busy_hub_are_survived(hub, run, tmp_path):
    hub.fault("val/S2L2A.tar", cut_after=2**14)
    hub.refusals.append((429, {"Retry-After": "1"}))
    begin = time.monotonic()
    run(tmp_path / "a", "--split", "val", "--modality", "S2L2A")
    assert time.monotonic() - begin > 1


def test_killed_fetch_is_finished_by_the_same_command_and_files_of_others_stay(hub, run, published, tmp_path):
    hub.fault("train/S2L2A_1.tar", rate=50_000)
    root = tmp_path / "a"
    other = root / ".cache" / "huggingface" / "download" / "theirs.incomplete"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    command = [sys.executable, "-m", "floodrepro", "data", "fetch", "--root", root, "--split", "train"]
    given = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    with subprocess.Popen(command, env=os.environ | given | {"PYTHONPATH": ":".join(sys.path)}) as process:
        deadline = time.monotonic() + 60
        while not hub.sent["train/S2L2A_1.tar"] and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    run(root, "--split", "train")
    assert archives(root)["train/S2L2A_1.tar"] == published["train/S2L2A_1.tar"]
    assert other.read_bytes() == b"x"


@pytest.mark.parametrize("flags", [(), ("--sample", "2")])
def test_other_data_set_and_one_with_a_damaged_note_are_not_written_over(tmp_path, cli, flags):
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "impactmesh_flood_val.txt").write_text("mine_1\n")
    for note in ("", "[]"):  # refused before the hub is asked
        (tmp_path / FETCH_NOTE).write_text(note)
        outcome = cli("data", "fetch", "--root", tmp_path, *flags)
        assert outcome.code == 1
        assert "holds a data set (split) and no note of its commit" in outcome.err
    assert (tmp_path / "split" / "impactmesh_flood_val.txt").read_text() == "mine_1\n"
    nothing = cli("data", "fetch", "--root", tmp_path, "--sample", "-3")
    assert (nothing.code, "--sample: '-3'" in nothing.err) == (2, True)


@pytest.mark.parametrize("fault", ["nobody listens", "a login page", "no chips"])
def test_no_network_a_login_page_and_no_chips_are_told_in_three_lines(hub, run, tmp_path, monkeypatch, fault):
    if fault == "nobody listens":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's, before each of five more tries
    elif fault == "a login page":
        hub.refusals.append((200, {"Content-Type": "text/html"}))
    else:
        commit = hub.commits[hub.refs["main"]]
        hub.commit({path: bytes(10240) if path.endswith(".tar") else content for path, content in commit.items()})
    told = run(tmp_path / "a", "--sample", 3, code=1)
    assert len(told.report) == 3 and "Traceback" not in told.err
    assert ("no chip" in told.err) == (fault == "no chips")


def test_sample_reads_only_the_chips_that_it_extracts(hub, run, tmp_path):
    """Version 1 with larger chips, so that what is read ahead of a header counts little."""
    made, root = tmp_path / "made", tmp_path / "sample"
    generate(made, events=6, chips=30, size=96, protocol="v1", seed=1, layout="hub")
    files = files_of(made)
    hub.commit(files)
    report = json.loads(run(root, "--protocol", "v1", "--sample", "6").out)
    source, read = Chips(root), hub.sent.total()
    listed = {s: ids_of(root, s) for s in ("train", "val", "test")}
    assert {split: len(chips) for split, chips in listed.items()} == {"train": 2, "val": 2, "test": 2}
    assert len({chip.split("_")[0] for chip in listed["train"]}) == 2
    whole, useful = sum(map(len, files.values())), sum(report["files"].values())
    assert read < 0.35 * whole
    assert read < 1.6 * useful + 500_000
    for chip in [chip for chips in listed.values() for chip in chips]:
        for part in ("S2L2A", "S1RTC"):
            assert source.bands(chip, part).tobytes() == Chips(made).bands(chip, part).tobytes()
    note = json.loads((root / FETCH_NOTE).read_text())
    run(root, "--protocol", "v1", "--sample", "2", "--split", "val")
    assert (note["sample"], ids_of(root, "train")) == (6, listed["train"])
    (root / FETCH_NOTE).write_text(json.dumps(note | {"sample": None}))
    assert "the folder is for the whole data set" in run(root, "--sample", "2", code=1).err


def test_weights_are_fetched_and_another_content_than_the_published_one_is_refused(hub, cli, tmp_path, monkeypatch):
    hub.serve("ibm-esa-geospatial/TerraMind-1.0-tiny", {"TerraMind_v1_tiny.pt": b"weights"})
    hub.serve(REFERENCE.repo, {REFERENCE.name: b"other"}, REFERENCE.revision)
    command = ("data", "weights", "--config", "terramind_v1_tiny_impactmesh_flood_v1", "--format", "json")
    assert Path(json.loads(cli(*command).out)["backbone"]).read_bytes() == b"weights"
    refused = cli(*command, "--reference", tmp_path / "ibm.pt")
    assert (refused.code, "not the published one" in refused.err) == (1, True)
    assert not (tmp_path / "ibm.pt").exists()
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "no-hub/{repo_id}/resolve/{revision}/{filename}")
    assert "cannot be fetched" in cli(*command).report[0]  # the HTTP library's error, and no OSError
