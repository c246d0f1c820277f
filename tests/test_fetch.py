"""Fetching: what is promised of a download, each with the fault that would break the promise."""

import datetime
import email.utils
import errno
import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub._local_folder import get_local_download_paths

from floodrepro.cli.data_fetch import _progress, add_arguments
from floodrepro.cli.main import Parser, main
from floodrepro.data import hub as hubs
from floodrepro.data import names
from floodrepro.data.fetch import fetch
from floodrepro.data.hub import Hub
from floodrepro.data.ledger import LOCK, NAME
from floodrepro.data.synth import generate
from floodrepro.errors import DataError, UsageError
from hub_server import HubServer

REPO = "ibm-esa-geospatial/ImpactMesh-Flood"
DEM, S1 = "test/DEM.tar", "test/S1RTC.tar"
SMALL = {"splits": ["test"], "modalities": ["DEM"]}  # one archive and the split files


def noise(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


def split_files(*counts: int, extra: tuple[str, ...] = ()) -> dict[str, bytes]:
    lists = dict(zip(names.SPLITS, counts, strict=True)) | dict.fromkeys(extra, 2)
    return {
        f"split/{names.split_file(name)}": "".join(f"{name}{i}\n" for i in range(count)).encode()
        for name, count in lists.items()
    }


def data_set(seed: object = 0, size: int = 60_000, counts: tuple[int, int, int] = (5, 3, 2), **kwargs) -> dict:
    """A small data set in the hub's layout, with a card and a modality that nobody asks for."""
    archives = [f"{split}/{part}.tar" for split in names.SPLITS for part in (*names.SUFFIXES, "S2RGB")]
    files = {path: noise(f"{path} {seed}", size) for path in archives}
    return files | split_files(*counts, **kwargs) | {"README.md": b"card\n", ".gitattributes": b"*.tar filter=lfs\n"}


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The tests' process is offline; here it speaks to its own server, and to nothing else."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()  # one that an earlier test opened may know a proxy


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


class Client:
    """Fetches into one folder from one server, and notes the waits instead of waiting."""

    def __init__(self, root: Path, server: HubServer) -> None:
        self.root, self.server = root, server
        self.waits: list[float] = []

    def __call__(self, root: Path | None = None, repo: str = REPO, **kwargs):
        return fetch(root or self.root, Hub(repo, endpoint=self.server.url, sleep=self.waits.append), **kwargs)

    def refused(self, **kwargs) -> DataError:
        with pytest.raises(DataError) as error:
            self(**kwargs)
        assert error.value.fix
        assert len(error.value.report().splitlines()) == 3
        return error.value

    def ledger(self) -> dict:
        return json.loads((self.root / NAME).read_text())

    def files(self) -> dict[str, bytes]:
        """The data set's files in the folder: no ledger, no lock, nothing of huggingface_hub's."""
        return {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and path.name not in (NAME, LOCK) and ".cache" not in path.parts
        }


@pytest.fixture
def client(tmp_path, server):
    return Client(tmp_path / "data", server)


def environment(server: HubServer, tmp_path: Path, **more: str) -> dict[str, str]:
    """What a user's shell would hold: no offline switch, no token, no cache but an empty one."""
    return {
        **{"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"},
        **{"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
        **{name: value for name, value in os.environ.items() if name == "PYTHONPATH"},
        **more,
    }


def command(root: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "floodrepro", "data", "fetch", "--root", str(root), *flags]


def run(server: HubServer, root: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    env = environment(server, root.parent, **more)
    return subprocess.run(command(root, *flags), capture_output=True, text=True, env=env, check=False, timeout=60)


# The layout, and a folder that a plain download left


def test_generated_data_set_comes_over_whole_and_nothing_heavy_is_imported(tmp_path, server):
    source, root = tmp_path / "source", tmp_path / "data"
    generate(source, events=3, chips=3, size=32, protocol="v0", seed=1, layout="hub")
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    sha = server.commit({path.relative_to(source).as_posix(): path.read_bytes() for path in paths})
    probe = (
        "import sys; from floodrepro.cli.main import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'terratorch', 'lightning', 'numpy', 'zarr'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    argv = [sys.executable, "-c", probe, "data", "fetch", "--root", str(root), "--format", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(server, tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["commit"], answer["revision"], answer["version"]) == (sha, "main", "v0-like")
    assert answer["published"] is False
    assert answer["chips"] == {"train": 1, "val": 1, "test": 1}
    for path in paths:
        assert (root / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert len(answer["files"]) == len(paths) == 15
    assert "floodrepro: fetching train/S2L2A.tar: " in done.stderr
    assert " MiB of " in done.stderr
    assert "counts of neither published version" in done.stderr


def test_folder_of_a_plain_hf_download_holds_the_same_files_and_is_adopted_without_a_byte(tmp_path, server, client):
    files = data_set()
    sha = server.commit(files)
    hf = [str(Path(sys.executable).with_name("hf")), "download", REPO, "--repo-type", "dataset", "--local-dir"]
    env = environment(server, tmp_path)
    subprocess.run([*hf, str(client.root)], env=env, check=True, capture_output=True, timeout=60)
    plain = client.files()
    server.forget()
    report = client()
    assert set(report.came.values()) == {"adopted"}
    assert server.sent == []
    assert client.files() == plain
    fetched = client(tmp_path / "other")
    for path in fetched.came:
        assert (tmp_path / "other" / path).read_bytes() == plain[path] == files[path]
    assert (
        set(fetched.came)
        == set(report.came)
        == {path for path in files if path.startswith(("t", "v", "sp"))}
        - {f"{split}/S2RGB.tar" for split in names.SPLITS}
    )
    assert client.ledger()["commit"] == sha
    server.forget()
    assert set(client().came.values()) == {"kept"}
    # A copy that a disk damaged is known for one of this commit by huggingface_hub's own note, and fetched again.
    (client.root / DEM).write_bytes(noise("damage", 60_000))
    (client.root / NAME).unlink()
    os.utime(client.root / DEM, (1, 1))
    assert client().came[DEM] == "fetched"
    assert client.files() == plain


def test_files_of_another_revision_or_of_unknown_origin_are_refused_and_left_alone(tmp_path, server, client):
    old, new = data_set("old"), data_set("new")
    old_sha, new_sha = server.commit(old, "old"), server.commit(new)
    subprocess.run(
        [sys.executable, "-c", "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], repo_type='dataset',"
         "revision='old', local_dir=sys.argv[2])", REPO, str(client.root)],
        env=environment(server, tmp_path), check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    before = client.files()
    error = client.refused()
    assert new_sha in error.what
    assert f"--revision {old_sha}" in error.fix
    assert client.files() == before
    shutil.rmtree(client.root / ".cache")
    assert "delete the file" in client.refused().fix
    assert client.files() == before
    assert set(client(revision="old").came.values()) == {"adopted"}


# Revision, version and protocol


@pytest.mark.parametrize(
    ("counts", "extra", "version"),
    [
        ((57_067, 9_028, 14_556), (), "v0"),
        ((19_448, 2_171, 2_959), ("test_seen_events", "test_holdout"), "v1"),
        ((5, 3, 2), ("test_holdout",), "v1-like"),
        ((5, 3, 2), ("test_seen_events",), "v1-like"),
        ((57_067, 9_028, 14_555), (), "v0-like"),
    ],
)
def test_split_files_tell_the_version_and_the_commit_is_named(server, client, capsys, counts, extra, version):
    files = data_set(size=10, counts=counts, extra=extra)
    files["split/impactmesh_flood_val.txt"] += b"\n \n"  # impactmesh takes a blank line for a chip; nobody else does
    sha = server.commit(files, "tagged")
    report = client(revision="tagged", **SMALL)
    assert any(f"/tree/{sha}?" in address for _, address, _ in server.requests), "a branch may move in between"
    assert (report.version.name, report.version.published) == (version, not version.endswith("-like"))
    assert tuple(report.version.chips.values()) == counts
    said = capsys.readouterr().err
    assert f"@{sha} is {version} (train {counts[0]:,}, val {counts[1]:,}, test {counts[2]:,} chips" in said
    assert ("of neither published version" in said) == version.endswith("-like")
    ledger = client.ledger()
    assert (ledger["commit"], ledger["asked"]) == (sha, "tagged")


@pytest.mark.parametrize(
    ("held", "asked", "ways"),
    [
        ("v1", "v0", ["--revision", "--protocol v1-binary"]),
        ("v0", "v1", ["--revision", "v1 and v1-binary both need v1 data", "--protocol v0"]),
        ("v0", "v1-binary", ["--revision", "v1 and v1-binary both need v1 data"]),
    ],
)
def test_protocol_that_the_commit_lacks_is_refused_before_any_archive(server, client, held, asked, ways):
    server.commit(data_set(size=10, counts=names.PROTOCOLS[held].chip_counts))
    other = "v1" if held == "v0" else "v0"
    right = server.commit(data_set(size=11, counts=names.PROTOCOLS[other].chip_counts), "right")
    error = client.refused(protocol=asked)
    assert f"--protocol {asked} needs" in error.what
    assert f"this is {held} (" in error.what
    for way in ways:
        assert way in error.fix
    assert not [sent for sent in server.sent if sent.path.endswith(".tar")]
    assert client.files() == {}, "a refused commit leaves nothing that keeps the right one out"
    assert client(revision=right, protocol=asked, **SMALL).ledger.commit == right


@pytest.mark.parametrize("protocol", ["v1", "v1-binary"])
def test_both_protocols_of_v1_take_v1_data(server, client, protocol):
    server.commit(data_set(size=10, counts=names.PROTOCOLS["v1"].chip_counts))
    assert client(protocol=protocol, **SMALL).version.name == "v1"


def test_revision_that_moved_is_refused_with_both_commits_and_the_ways_out(tmp_path, server, client):
    old = server.commit(data_set("old"))
    client(**SMALL)
    before = client.files()
    new = server.commit(data_set("new"))
    server.forget()
    error = client.refused()
    assert old in error.what
    assert new in error.what
    assert f"--revision {old}" in error.fix
    assert "new --root" in error.fix
    assert (client.files(), server.sent) == (before, [])
    assert client(revision=old, splits=["test"]).ledger.commit == old
    assert client(tmp_path / "new", **SMALL).ledger.commit == new
    assert client.files() == {path: server.commits[old][path] for path in client.files()}


def test_folder_of_another_repository_is_refused(server, client, tmp_path):
    server.commit(data_set())
    client(**SMALL)
    server.repo = "someone/else"
    assert REPO in client.refused(repo="someone/else").what


# The ledger


def test_ledger_holds_size_hash_commit_and_state_of_every_file(server, client):
    files = data_set()
    sha = server.commit(files)
    client(**SMALL)
    ledger = client.ledger()
    assert (ledger["schema"], ledger["repo"]) == (1, REPO)
    parts = {path for path in files if path.endswith((".tar", ".txt"))}
    assert set(ledger["files"]) == parts
    for path, entry in ledger["files"].items():
        here = path == DEM or path.endswith(".txt")
        assert (entry["size"], entry["revision"]) == (len(files[path]), sha)
        assert entry["state"] == ("verified" if here else "pending")
        assert entry["sha256"] == hashlib.sha256(files[path]).hexdigest()
        assert (entry["git_sha1"] is None) == path.endswith(".tar")
        assert entry["mtime_ns"] == ((client.root / path).stat().st_mtime_ns if here else None)


def test_verified_file_is_never_fetched_twice_and_one_that_changed_is(server, client):
    files = data_set()
    server.commit(files)
    client()
    server.forget()
    assert set(client().came.values()) == {"kept"}
    assert server.sent == []
    os.utime(client.root / DEM, (1, 1))  # another time, the same bytes: read again, not fetched
    assert client().came[DEM] == "kept"
    assert server.sent == []
    (client.root / DEM).write_bytes(noise("other", 60_000))
    (client.root / S1).write_bytes(b"short")
    (client.root / "val/MASK.tar").unlink()
    came = client().came
    assert [path for path in came if came[path] == "fetched"] == sorted([DEM, S1, "val/MASK.tar"])
    assert {sent.path for sent in server.sent} == {DEM, S1, "val/MASK.tar"}
    assert {path: files[path] for path in client.files()} == client.files()


def test_verify_finds_the_damage_that_size_and_time_do_not_show(server, client):
    files = data_set()
    server.commit(files)
    client(**SMALL)
    times = (client.root / DEM).stat()
    (client.root / DEM).write_bytes(noise("other", 60_000))
    os.utime(client.root / DEM, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert client(**SMALL).came[DEM] == "kept"
    assert client(**SMALL, verify=True).came[DEM] == "fetched"
    assert (client.root / DEM).read_bytes() == files[DEM]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "files": {"x": {}}}'])
def test_damaged_ledger_is_named_and_can_be_deleted(server, client, content):
    server.commit(data_set())
    client(**SMALL)
    (client.root / NAME).write_text(content)
    assert str(client.root / NAME) in client.refused(**SMALL).where
    (client.root / NAME).unlink()
    server.forget()
    assert set(client(**SMALL).came.values()) == {"adopted"}
    assert server.sent == []


def test_orphans_of_stopped_downloads_are_deleted_and_useful_halves_kept(server, client):
    files = data_set()
    server.commit(files)
    client(**SMALL)
    downloads = client.root / ".cache" / "huggingface" / "download" / "test"
    downloads.mkdir(parents=True)
    orphans = [f"{DEM}.partial", "test/GONE.tar.partial", "split/gone.txt.partial", f".{NAME}.k1ll3d"]
    orphans += [".cache/huggingface/download/test/abc=.0123.45cdef67.incomplete"]
    resumable = downloads / "abc=.0123.incomplete"  # huggingface_hub before 1.18 goes on with it
    resumable.write_bytes(b"half")
    half = client.root / f"{S1}.partial"
    for path in orphans:
        (client.root / path).write_bytes(b"half")
    half.write_bytes(files[S1][:1000])
    lock = downloads / "S1RTC.tar.lock"
    with lock.open("w") as held:  # as a running `hf download` does
        fcntl.flock(held, fcntl.LOCK_EX)
        client(**SMALL)
        assert [path for path in orphans if (client.root / path).exists()] == orphans[-1:]
    client(**SMALL)
    assert not (client.root / orphans[-1]).exists()
    assert resumable.exists()
    assert half.exists(), "a pending file of this commit: some later call goes on with it"
    server.forget()
    client(splits=["test"], modalities=["S1RTC"])
    assert server.starts_of(S1) == [1000]
    assert not list(client.root.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_said_once_and_nothing_of_others_is_deleted(
    server, client, monkeypatch, capsys, number
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files = data_set()
    server.commit(files)
    downloads = client.root / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (downloads / "DEM.tar.lock").touch()
    (downloads / "abc=.0123.45cdef67.incomplete").write_bytes(b"of a download at work")
    client(**SMALL)
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert len(list(downloads.iterdir())) == 2
    assert capsys.readouterr().err.count("has no locks") == 1


def test_lock_that_fails_for_another_reason_is_not_called_another_fetch(server, client, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    server.commit(data_set())
    monkeypatch.setattr(fcntl, "flock", fail)
    assert "Input/output error" in client.refused(**SMALL).what


# Interrupted downloads


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_killed_fetch_goes_on_where_it_was_and_its_lock_dies_with_it(tmp_path, server):
    files, root = data_set(size=400_000), tmp_path / "data"
    server.commit(files)
    server.fault(DEM, rate=100_000)
    half = root / f"{DEM}.partial"
    flags = ("--split", "test", "--modality", "DEM")
    first = subprocess.Popen(command(root, *flags), env=environment(server, tmp_path), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: half.exists() and half.stat().st_size > 50_000)
        second = run(server, root, *flags)
        assert second.returncode == 1
        assert f"another fetch (process {first.pid})" in second.stderr
        assert len([line for line in second.stderr.splitlines() if line]) == 3
        assert first.poll() is None, "the refused one does the other no harm"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stderr.close()
    wait_for(lambda: DEM in [sent.path for sent in server.sent])  # until the server noticed
    held = half.stat().st_size
    assert 50_000 < held < 400_000
    assert not (root / DEM).exists(), "no half file under a final name"
    ledger = json.loads((root / NAME).read_text())
    assert ledger["files"][DEM]["state"] == "pending"
    server.forget()
    done = run(server, root, *flags)
    assert done.returncode == 0, done.stderr
    assert [(sent.path, sent.start, sent.size) for sent in server.sent] == [(DEM, held, 400_000 - held)]
    assert (root / DEM).read_bytes() == files[DEM]
    assert not half.exists()


def test_fetch_killed_again_and_again_goes_on_each_time_and_ends_with_the_right_bytes(tmp_path, server):
    files, root = data_set(size=150_000), tmp_path / "data"
    server.commit(files)
    archives = [f"test/{part}.tar" for part in names.SUFFIXES]
    for path in archives:
        server.fault(path, rate=400_000, times=100)
    held: dict[str, int] = {}  # bytes of each half file after the last kill
    kills = resumed = 0
    while True:
        before = len(server.sent)
        argv = command(root, "--split", "test")
        process = subprocess.Popen(argv, env=environment(server, tmp_path), stderr=subprocess.DEVNULL)
        wait_for(lambda: process.poll() is not None or len(server.sent) > before)  # noqa: B023
        time.sleep(random.uniform(0.1, 0.5))
        process.kill()
        for sent in server.sent[before:]:
            assert sent.start == held.get(sent.path, 0)
            resumed += sent.start > 0
        if process.wait() == 0:
            break
        kills += 1
        held = {path: half.stat().st_size for path in files if (half := root / f"{path}.partial").exists()}
        for path in (path for path in archives if (root / path).exists()):
            assert (root / path).read_bytes() == files[path], "no half file under a final name"
        assert json.loads((root / NAME).read_text())["schema"] == 1
        assert kills < 40
    assert {path: (root / path).read_bytes() for path in archives} == {path: files[path] for path in archives}
    assert resumed > 1


def test_kill_between_the_name_and_the_ledger_costs_no_byte(server, client):
    server.commit(data_set())
    client(**SMALL)
    ledger = client.ledger()
    ledger["files"][DEM] |= {"state": "pending", "mtime_ns": None}
    (client.root / NAME).write_text(json.dumps(ledger))
    server.forget()
    assert client(**SMALL).came[DEM] == "adopted"
    assert server.sent == []


def test_full_disk_is_an_error_and_the_fetch_goes_on_from_there(tmp_path, server):
    files, root = data_set(), tmp_path / "data"
    server.commit(files)
    limited = (
        "import resource, sys; from floodrepro.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", limited, *command(root, "--split", "test", "--modality", "DEM")[3:]]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(server, tmp_path), check=False)
    assert done.returncode == 1
    assert "cannot be read or written: File too large" in done.stderr
    assert not (root / DEM).exists()
    server.forget()
    assert run(server, root, "--split", "test", "--modality", "DEM").returncode == 0
    assert server.starts_of(DEM) == [30_000]
    assert (root / DEM).read_bytes() == files[DEM]


def test_dropped_connections_are_taken_up_again_at_the_byte_where_they_broke(server, client):
    files = data_set()
    server.commit(files)
    server.fault(DEM, cut_after=7_000, times=10)  # more often than TRIES: each time something arrives
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert server.bytes_of(DEM) == 60_000
    assert server.starts_of(DEM) == list(range(0, 60_000, 7_000))
    assert set(client.waits) == {1.0}


def test_stalled_connection_is_given_up_and_taken_up_again(server, client, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    files = data_set()
    server.commit(files)
    server.fault(DEM, stall_after=7_000)
    start = time.monotonic()
    client(**SMALL)
    assert time.monotonic() - start < 3, "the server would have been silent for 5 s"
    assert server.starts_of(DEM) == [0, 7_000]
    assert (client.root / DEM).read_bytes() == files[DEM]


def test_server_that_ignores_the_range_restarts_the_file_cleanly(server, client):
    files = data_set()
    server.commit(files)
    server.fault(DEM, cut_after=20_000)
    server.fault(DEM, cut_after=7_000, ignores_range=True)
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert server.starts_of(DEM) == [0, 0, 7_000]


def test_answer_with_another_range_is_not_used(server, client):
    files = data_set()
    server.commit(files)
    server.fault(DEM, cut_after=7_000)
    server.fault(DEM, wrong_range=True)
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert server.starts_of(DEM) == [0, 7_001, 7_000]


def test_answer_without_a_length_may_end_early_or_late(server, client):
    files = data_set()
    server.commit(files)
    server.fault(DEM, untold_length=True, cut_after=7_000)
    server.fault(DEM, untold_length=True)
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert server.starts_of(DEM) == [0, 7_000]
    shutil.rmtree(client.root)
    server.fault(DEM, untold_length=True, content=files[DEM] + noise("more", 2**20), times=100)
    assert "found more than 60000" in client.refused(**SMALL).what


def test_server_that_ignores_ranges_and_breaks_off_each_time_is_given_up(server, client):
    server.commit(data_set())
    server.fault(DEM, cut_after=7_000, ignores_range=True, times=100)
    assert f"{hubs.TRIES} times in a row" in client.refused(**SMALL).what
    assert not (client.root / DEM).exists()


def test_files_beyond_what_one_answer_may_hold_are_asked_for_in_ranges(server, client, monkeypatch):
    monkeypatch.setattr(hubs, "LONGEST_RANGE", 25_000)
    files = data_set()
    server.commit(files)
    client(**SMALL)
    assert server.starts_of(DEM) == [0, 25_000, 50_000]
    assert (client.root / DEM).read_bytes() == files[DEM]


def test_half_file_of_other_bytes_costs_one_more_fetch_and_never_a_wrong_file(server, client, capsys):
    files = data_set()
    server.commit(files)
    for size, kind in ((10_000, "sha256"), (60_000, "sha256"), (70_000, "size in bytes expected 60000, found 70000")):
        (client.root / "test").mkdir(parents=True)
        (client.root / f"{DEM}.partial").write_bytes(noise("wrong", size))
        client(**SMALL)
        assert (client.root / DEM).read_bytes() == files[DEM]
        assert f"{DEM}: {kind}" in capsys.readouterr().err
        shutil.rmtree(client.root)
    (client.root / "test").mkdir(parents=True)
    (client.root / f"{DEM}.partial").write_bytes(files[DEM][:50_000])
    server.fault(DEM, content=files[DEM][:40_000])  # it ends before the byte that is asked for: HTTP 416
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    assert "found at most 50000" in capsys.readouterr().err


# Content that is not what the hub says


@pytest.mark.parametrize("path", [DEM, "split/impactmesh_flood_val.txt"])
@pytest.mark.parametrize(
    ("damage", "kind"),
    [(lambda b: b[:-1] + b"?", "sha"), (lambda b: b[:-1], "size"), (lambda b: b + b"more", "size")],
)
def test_wrong_content_is_fetched_once_more_and_then_named(server, client, path, damage, kind):
    files = data_set()
    server.commit(files)
    wrong = damage(files[path])
    server.fault(path, content=wrong)
    client(**SMALL)
    assert (client.root / path).read_bytes() == files[path]
    shutil.rmtree(client.root)
    server.forget()
    server.fault(path, content=wrong, times=100)
    error = client.refused(**SMALL)
    assert path in error.what
    assert kind in error.what
    if kind == "size":
        found = (str(len(files[path])), str(len(wrong)))
    elif path == DEM:
        found = (hashlib.sha256(files[path]).hexdigest(), hashlib.sha256(wrong).hexdigest())
    else:
        found = tuple(hashlib.sha1(f"blob {len(b)}\0".encode() + b).hexdigest() for b in (files[path], wrong))
    assert f"expected {found[0]}, found {found[1]}" in error.what
    assert len([1 for method, address, _ in server.requests if method == "GET" and path in address]) == 2
    assert path not in client.files()
    assert not list(client.root.rglob("*.partial"))


# The disk


def test_disk_that_is_too_small_is_told_before_the_first_byte(server, client, monkeypatch):
    files = data_set(size=3 * 2**20)
    server.commit(files)
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    error = client.refused(**SMALL)
    assert error.what == "the disk is too small: 3.00 MiB needed, 2.00 MiB free"
    assert error.where == str(client.root)
    assert server.sent == []
    (client.root / "test").mkdir()
    (client.root / f"{DEM}.partial").write_bytes(files[DEM][: 2**20 + 100])  # what is here already needs no room
    client(**SMALL)
    assert (client.root / DEM).read_bytes() == files[DEM]
    client(**SMALL, verify=True)


# What the hub may answer


def http_date(seconds: float) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(moment, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "17"}, 17, 17),
        ({"Retry-After": http_date(3600 * 24)}, None, None),  # longer than anyone waits
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55, 57),
        ({"Retry-After": "soon"}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_too_many_requests_waits_as_long_as_the_hub_asks(server, client, headers, low, high):
    files = data_set()
    server.commit(files)
    for limited in (
        lambda: server.refuse(429, headers),
        lambda: server.fault(DEM, status=429, headers=headers),
    ):
        limited()
        client.waits.clear()
        if low is None:
            assert "it asks for a wait of" in client.refused(**SMALL).what
            assert client.waits == []
            server.faults.clear()
            continue
        client(**SMALL)
        assert len(client.waits) == 1
        assert low <= client.waits[0] <= high
        assert (client.root / DEM).read_bytes() == files[DEM]
        shutil.rmtree(client.root)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520])
def test_server_errors_are_retried_with_growing_waits_and_an_end(server, client, status):
    server.commit(data_set())
    server.fault(DEM, status=status, times=3)
    client(**SMALL)
    assert client.waits == [1, 2, 4]
    shutil.rmtree(client.root)
    client.waits.clear()
    server.fault(DEM, status=status, times=100)
    error = client.refused(**SMALL)
    assert f"HTTP {status}" in error.what
    assert "it goes on where it stopped" in error.fix
    assert client.waits == [min(2**n, 60) for n in range(hubs.TRIES - 1)]


def test_hub_that_cannot_be_reached_is_an_error_with_an_end(tmp_path, server):
    client = Client(tmp_path / "data", server)
    server.url = "http://127.0.0.1:9"  # discard: nobody listens
    assert "ConnectError" in client.refused().what
    assert len(client.waits) == hubs.TRIES - 1
    assert not client.root.exists()


@pytest.mark.parametrize(
    ("refusal", "what", "fix"),
    [
        ((401, {"X-Error-Code": "RepoNotFound"}), "does not exist or is private", "--repo"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "does not exist or is private", "hf auth login"),
        ((403, {"X-Error-Code": "GatedRepo"}), "is gated", "accept its terms"),
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "refuses access", "HF_TOKEN"),
        ((403, {}), "refuses access (HTTP 403)", "HF_TOKEN"),
        ((404, {}), "HTTP 404", ""),
    ],
)
def test_refusal_is_told_at_once_with_what_to_do(server, client, refusal, what, fix):
    server.commit(data_set())
    server.refuse(*refusal)
    error = client.refused()
    assert what in error.what
    assert fix in error.fix
    assert (len(server.requests), client.waits) == (1, [])
    assert not client.root.exists()


def test_gated_archive_and_one_that_is_gone_are_told_at_once(server, client):
    server.commit(data_set())
    server.fault(DEM, status=403, headers={"X-Error-Code": "GatedRepo"})
    assert "is gated" in client.refused(**SMALL).what
    server.fault(DEM, status=404, headers={"X-Error-Code": "EntryNotFound"})
    error = client.refused(**SMALL)
    assert "not there" in error.what
    assert DEM in error.where
    assert client.waits == []


def test_unknown_repository_and_revision_are_told_at_once(server, client):
    server.commit(data_set())
    error = client.refused(revision="no-such-tag")
    assert error.what == "the revision does not exist"
    assert "no-such-tag" in error.where
    assert "sha" in error.fix
    assert "does not exist or is private" in client.refused(repo="nobody/nothing").what
    with pytest.raises(UsageError, match="--repo"):
        client(repo="not a repository")
    assert client.waits == []


@pytest.mark.parametrize("body", [b"", b"<html>please log in</html>", b"{}", b"[]"])
@pytest.mark.parametrize("on", ["revision", "tree"])
def test_answer_of_something_else_than_a_hub_is_told(server, client, body, on):
    server.commit(data_set())
    server.refuse(200, {"Content-Type": "text/html"}, body, on=on)
    error = client.refused()
    if on == "tree" and body in (b"{}", b"[]"):
        assert "the commit lacks split/" in error.what
    else:
        assert "not a hub's" in error.what


def test_list_of_files_is_asked_for_again_too(server, client):
    server.commit(data_set())
    server.refuse(503, on="tree")
    client(**SMALL)
    assert client.waits == [1]


def test_server_that_falls_silent_on_the_list_of_files_is_asked_again_and_told(server, client, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.commit(data_set())
    server.silent_trees = 1
    start = time.monotonic()
    client(**SMALL)
    assert client.waits == [1]
    shutil.rmtree(client.root)
    server.silent_trees = 100
    assert "ReadTimeout" in client.refused(**SMALL).what
    assert time.monotonic() - start < 5, "the server would have been silent for 5 s each time"


def test_list_of_files_on_many_pages_is_read_to_its_end(server, client):
    files = data_set()
    server.commit(files)
    server.page_of_tree = 3
    client()
    assert client.files() == {path: files[path] for path in files if "S2RGB" not in path and path[0] not in "R."}
    assert sum("/tree/" in address for _, address, _ in server.requests) > 5


def test_token_goes_to_the_hub_and_not_to_the_host_that_it_redirects_to(tmp_path, server):
    server.commit(data_set())
    assert run(server, tmp_path / "data", "--split", "val", HF_TOKEN="hf_planted").returncode == 0
    assert server.authorized == {"hub": {"Bearer hf_planted"}, "cdn": set()}


# Offline


def test_offline_everything_verified_is_enough_and_what_is_missing_is_named(tmp_path, server):
    sha = server.commit(data_set())
    root = tmp_path / "data"
    nothing = run(server, root, HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1
    assert "nothing was fetched into this folder yet" in nothing.stderr
    assert run(server, root, "--split", "test").returncode == 0
    server.forget()
    again = run(server, root, "--split", "test", "--format", "json", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["commit"] == sha
    assert {file["came"] for file in json.loads(again.stdout)["files"].values()} == {"kept"}
    (root / S1).unlink()
    missing = run(server, root, "--split", "test,val", "--modality", "S1RTC", HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert f"2 files are missing: {S1}, val/S1RTC.tar" in missing.stderr
    assert "HF_HUB_OFFLINE" in missing.stderr
    assert server.requests == []


def test_offline_knows_its_revision_and_hashes_but_deletes_nothing(server, client, monkeypatch):
    sha = server.commit(data_set())
    client(**SMALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", sha):
        assert client(revision=revision, **SMALL, verify=True).ledger.commit == sha
    assert "not other" in client.refused(revision="other", **SMALL).what
    assert REPO in client.refused(repo="someone/else", **SMALL).what
    (client.root / DEM).write_bytes(b"damage")
    assert DEM in client.refused(**SMALL).what
    assert (client.root / DEM).read_bytes() == b"damage"


# The choice of archives, and the command


def fetched_archives(client: Client) -> set[str]:
    return {path for path in client.files() if path.endswith(".tar")}


def test_comma_lists_and_repeated_flags_choose_archives(tmp_path, server):
    server.commit(data_set())
    for root, flags in {
        "commas": ("--split", "train,val", "--modality", "DEM,MASK"),
        "repeats": ("--split", "train", "--split", "val", "--modality", "DEM", "--modality", "MASK,DEM"),
    }.items():
        done = run(server, tmp_path / root, *flags)
        assert done.returncode == 0, done.stderr
        found = {path.relative_to(tmp_path / root).as_posix() for path in (tmp_path / root).glob("*/*.t*")}
        assert found == {"train/DEM.tar", "train/MASK.tar", "val/DEM.tar", "val/MASK.tar", *split_files(1, 1, 1)}
        assert done.stdout.splitlines()[-1] == str(tmp_path / root)
        assert "7 files: 7 fetched (0.23 MiB)" in done.stdout


def test_numbered_archives_belong_to_their_modality_and_other_modalities_only_come_by_name(server, client):
    files = data_set()
    del files["train/S2L2A.tar"]
    numbered = {f"train/S2L2A_{number}.tar" for number in (1, 2, 3)}
    server.commit(files | {path: noise(path, 100) for path in numbered})
    client(splits=["train"], modalities=["S2L2A"])
    assert fetched_archives(client) == numbered
    client(splits=["train"])
    assert fetched_archives(client) == numbered | {f"train/{part}.tar" for part in ("S1RTC", "DEM", "MASK")}
    client(splits=["val"], modalities=["S2RGB"])
    assert "val/S2RGB.tar" in fetched_archives(client)


def test_archive_that_the_commit_lacks_is_told_before_anything_is_fetched(server, client):
    files = data_set()
    del files["val/MASK.tar"]
    server.commit(files)
    assert "val/MASK*.tar" in client.refused().what
    assert "test/S1*.tar" in client.refused(splits=["test"], modalities=["S1"]).what, "S1 is no modality"
    assert "S1RTC" in client.refused(splits=["test"], modalities=["S1"]).fix
    assert server.sent == []
    del files["split/impactmesh_flood_test.txt"]
    server.commit(files)
    assert "split/impactmesh_flood_test.txt" in client.refused(**SMALL).what


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--split", "train,tset"], "--split is 'tset'"),
        (["--split", "train,"], "--split holds an empty name"),
        (["--revision", ""], "--revision is empty"),
        (["--protocol", "v2"], "--protocol is 'v2', expected v0, v1, v1-binary"),
        (["--revison", "main"], "did you mean '--revision'?"),
    ],
)
def test_wrong_flag_is_a_usage_error_before_the_network(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["data", "fetch", "--root", str(tmp_path / "data"), *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_root_that_cannot_be_written_is_an_error_with_a_name(server, client):
    server.commit(data_set())
    client.root.write_text("a file")
    assert str(client.root) in client.refused().where


def test_flags_are_a_promise(capsys):
    assert main(["data", "--help"]) == 0
    assert "fetch" in capsys.readouterr().out
    parser = Parser("fetch")
    add_arguments(parser)
    flags = ["--root", "--revision", "--split", "--modality", "--protocol", "--repo", "--verify", "--format"]
    assert set(flags) <= {flag for action in parser._actions for flag in action.option_strings}


def test_progress_on_a_terminal_is_one_line_that_is_ended_even_by_an_error(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError), _progress() as progress:
        progress("fetching", "train/DEM.tar", 2**30, 4 * 2**30)
        progress("fetching", "train/DEM.tar", 2**30 + 1, 4 * 2**30)  # too soon to be drawn
        raise RuntimeError
    assert sys.stderr.getvalue() == "\r\x1b[Kfloodrepro: fetching train/DEM.tar: 1.00 GiB of 4.00 GiB\n"


def test_installed_client_still_throws_half_files_away(tmp_path, server):
    """Why `floodrepro.data.hub` exists. Where this fails, huggingface_hub resumes again and it could go."""
    files = data_set()
    server.commit(files)
    half = get_local_download_paths(tmp_path, DEM).incomplete_path(hashlib.sha256(files[DEM]).hexdigest())
    half.write_bytes(files[DEM][:30_000])
    huggingface_hub.hf_hub_download(REPO, DEM, repo_type="dataset", local_dir=tmp_path, endpoint=server.url)
    assert server.starts_of(DEM) == [0]
    assert half.exists()
