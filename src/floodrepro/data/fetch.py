"""Fetch a data set from the Hugging Face hub: one commit a folder. huggingface_hub transfers the files."""

import json
import re
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floodrepro import console
from floodrepro.data.protocols import LABEL_DIR, PARTS, PROTOCOLS, SPLITS, event_of
from floodrepro.data.splits import FETCH_NOTE, read_split
from floodrepro.errors import DataError
from floodrepro.run_folder import sha256_of, write_atomically

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_WAITS = (1, 2, 4, 8)  # seconds between tries of a request that the hub refused for the moment
_BLOCK = 2**12  # bytes that are read ahead of a remote tar
_SEEN_A_CHIP = 20  # members of a remote tar whose headers are read for each chip of a sample, at most


@dataclass
class FetchReport:
    """What lies in the folder now.

    Args:
        root: The folder.
        commit: Of the hub's repository.
        version: `v0`, `v1`, or `unknown` where the counts are of neither.
        chips: Number of chips that each split file lists.
        files: Bytes of each file, by its path.
    """

    root: Path
    commit: str
    version: str
    chips: dict[str, int]
    files: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return vars(self) | {"root": str(self.root)}


def fetch(
    root: Path,
    repo: str,
    *,
    revision: str = "main",
    splits: Sequence[str] = SPLITS,
    parts: Sequence[str] = PARTS,
    protocol: str | None = None,
    sample: int | None = None,
) -> FetchReport:
    """Fetch the archives of some splits and parts, or a sample of chips, after the split files.

    Run it again after an interruption: whole files are not fetched again, nor hashed again while they stay unchanged.

    Args:
        root: Folder to fill; it holds one commit.
        repo: Id of the data set.
        revision: Branch, tag or commit.
        splits: Any of train, val, test.
        parts: Any of S2L2A, S1RTC, DEM, MASK.
        protocol: Name of the protocol that the data has to fit.
        sample: Number of chips to extract in place of fetching archives, shared by the splits; a few of each event
            where the order in the archives allows it.

    Raises:
        DataError: The hub cannot be read, lacks a part, holds another version than the protocol's; the folder holds
            another commit; the disk is too small; a file is not what the hub says it is.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit, remote = _list_files(repo, revision)
        note = _read_note(root)
        if note and note["commit"] != commit:
            what = f"the folder holds commit {note['commit']}, and {revision} is {commit}"
            raise DataError(what, where=root, fix=f"--revision {note['commit']}, or another --root")
        wanted = _choose(remote, splits, parts, where=f"{repo}@{commit}")
        lists = [path for path in remote if path.startswith("split/") and path.endswith(".txt")]
        root.mkdir(parents=True, exist_ok=True)
        get = partial(snapshot_download, repo, repo_type="dataset", revision=commit)
        if sample is None:
            _check_disk(root, remote, wanted)
            get(local_dir=root, allow_patterns=lists)
            report = FetchReport(root, commit, *check_version(root / "split", protocol, where=f"{repo}@{commit}"))
            note = {"repo": repo, "commit": commit, "asked": revision, "verified": (note or {}).get("verified", {})}
            _write_note(root, note)  # before the archives: a folder with any of them says of which commit
            get(local_dir=root, allow_patterns=wanted)
            _verify(root, remote, wanted, note)
            report.files = {path: remote[path].size for path in [*lists, *wanted]}
            return report
        hidden = root / ".fetch"  # whole lists: the folder's own name the chips of the sample only
        get(local_dir=hidden, allow_patterns=lists)
        version, _ = check_version(hidden / "split", protocol, where=f"{repo}@{commit}")
        _write_note(root, {"repo": repo, "commit": commit, "asked": revision, "sample": sample})
        chips, files = _extract_sample(root, f"datasets/{repo}@{commit}", wanted, splits, parts, sample)
        counts = _write_lists(hidden / "split", root / "split", chips)
        return FetchReport(root, commit, version, counts, files)
    except (HfHubHTTPError, OSError, tarfile.TarError) as error:
        fix = "run the same command again; check --repo, the network, HF_ENDPOINT, HF_TOKEN and the disk"
        raise DataError(f"the fetch stopped: {error}", where=f"{repo}@{revision}", fix=fix) from error


def check_version(folder: Path, protocol: str | None, *, where: str) -> tuple[str, dict[str, int]]:
    """The version of the data that split files list, by their counts, and the counts by split.

    Raises:
        DataError: A split file is missing, or the data is of another version than the protocol's.
    """
    chips = {}
    for split in SPLITS:
        found = next(iter(sorted(folder.glob(f"*_{split}.txt"))), None)
        if found is None:
            raise DataError(f"there is no split file of {split}", where=where, fix="check --repo and --revision")
        chips[split] = len(read_split(found))
    known = {rules.data_version: dict(rules.counts) for rules in PROTOCOLS.values() if rules.data_version}
    version = next((str(name) for name, counts in known.items() if counts == chips), "unknown")
    needed = PROTOCOLS[protocol].data_version if protocol else None
    like = "v1" if any(folder.glob("*_test_holdout.txt")) else "v0"  # a subset, or generated chips
    if needed and (like if version == "unknown" else version) != needed:
        fix = f"--revision of a commit that holds {needed}, or another --protocol"
        fix += "; v1-binary reads version 1 as version 0's two classes" if needed == "v0" else ""
        what = f"protocol {protocol} needs {needed} data, this is {version if version != 'unknown' else f'like {like}'}"
        raise DataError(f"{what}: {', '.join(f'{n:,} {s}' for s, n in chips.items())}", where=where, fix=fix)
    return version, chips


def _list_files(repo: str, revision: str) -> tuple[str, dict[str, "RepoFile"]]:
    """Commit of a revision, and its files by path. A hub that is busy is asked again, after what it says."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    for wait in (*_WAITS, None):
        try:
            commit = str(api.dataset_info(repo, revision=revision, timeout=30).sha)
            tree = api.list_repo_tree(repo, repo_type="dataset", revision=commit, recursive=True)
            return commit, {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if wait is None or (status != 429 and status < 500):
                raise
            told = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(told), 300) if told.isdigit() else wait)
    raise AssertionError  # the last try returns or raises


def _choose(remote: dict[str, "RepoFile"], splits: Sequence[str], parts: Sequence[str], where: str) -> list[str]:
    """Paths of the archives, `<split>/<PART>*.tar`, the small ones first."""
    chosen: list[str] = []
    for split in splits:
        for part in parts:
            found = [path for path in remote if path.startswith(f"{split}/{part}") and path.endswith(".tar")]
            if not found:
                raise DataError(
                    f"the commit has no {split}/{part}*.tar", where=where, fix="--split, --modality, --repo"
                )
            chosen += found
    return sorted(chosen, key=lambda path: (remote[path].size, path))


def _check_disk(root: Path, remote: dict[str, "RepoFile"], wanted: Sequence[str]) -> None:
    needed = sum(remote[path].size for path in wanted if not (root / path).is_file())
    if needed > (free := shutil.disk_usage(root).free):
        what = f"the disk is too small: {needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free"
        raise DataError(what, where=root, fix="--split, --modality, --sample, or another --root")
    console.say(f"{needed / 1e9:.1f} GB to fetch, {free / 1e9:.0f} GB free")


def _read_note(root: Path) -> dict[str, Any] | None:
    path = root / FETCH_NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_note(root: Path, note: dict[str, Any]) -> None:
    write_atomically(root / FETCH_NOTE, json.dumps(note, indent=2) + "\n")


def _verify(root: Path, remote: dict[str, "RepoFile"], wanted: Sequence[str], note: dict[str, Any]) -> None:
    """Compare archives with the hub's sha256; those that were compared before and are unchanged are left out."""
    states = {path: [(root / path).stat().st_size, (root / path).stat().st_mtime_ns] for path in wanted}
    new = [path for path in wanted if note["verified"].get(path) != states[path]]
    if new:
        console.say(f"comparing {len(new)} checksums")
    with ThreadPoolExecutor(4) as pool:
        digests = dict(zip(new, pool.map(lambda path: sha256_of(root / path), new), strict=True))
    bad = [path for path, digest in digests.items() if (lfs := remote[path].lfs) and digest != lfs.sha256]
    note["verified"] |= {path: states[path] for path in new if path not in bad}
    _write_note(root, note)
    if bad:
        what = f"not what the hub says it is: {', '.join(bad)}"
        raise DataError(what, where=root, fix=f"delete {'it' if len(bad) == 1 else 'them'}, then fetch again")


def _extract_sample(
    root: Path, where: str, wanted: Sequence[str], splits: Sequence[str], parts: Sequence[str], sample: int
) -> tuple[set[str], dict[str, int]]:
    """Copy chips out of remote tars by range reads into `data/<PART>/`: their ids, and the bytes of each file."""
    chips: set[str] = set()
    files: dict[str, int] = {}
    for number, split in enumerate(splits):
        count = (sample + len(splits) - 1 - number) // len(splits)
        chosen: list[str] = []
        contents: dict[str, dict[str, bytes]] = {}  # by chip, the content of each path
        for part in sorted(
            parts, key=lambda part: part != LABEL_DIR
        ):  # masks are small: they tell what chips there are
            for path in sorted(path for path in wanted if path.startswith(f"{split}/{part}")):
                with _remote_tar(f"{where}/{path}") as archive:
                    if not chosen:
                        chosen = _spread([_chip_of(m.name) for m in islice(archive, count * _SEEN_A_CHIP)], count)
                    for member in archive:
                        if (chip := _chip_of(member.name)) in chosen and (file := archive.extractfile(member)):
                            contents.setdefault(chip, {})[f"data/{part}/{Path(member.name).name}"] = file.read()
                            console.say(f"{split} {part}: {chip}")
                        if sum(any(name.startswith(f"data/{part}/") for name in c) for c in contents.values()) == count:
                            break
        for chip, held in contents.items():
            if len(held) < len(parts):
                continue  # a chip that lacks a part is of no use
            chips.add(chip)
            for name, content in held.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
                files[name] = len(content)
    return chips, files


@contextmanager
def _remote_tar(path: str) -> Iterator[tarfile.TarFile]:
    """A tar on the hub, of which only what is asked for is read."""
    from huggingface_hub import HfFileSystem

    # A header has 512 bytes, and what is read beyond it is lost where a large member follows.
    remote = HfFileSystem().open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    with remote, tarfile.open(fileobj=remote, mode="r:") as archive:
        yield archive


def _chip_of(name: str) -> str:
    return re.sub(r"_(S2L2A\.zarr\.zip|S1RTC\.zarr\.zip|DEM\.tif|annotation_\w+\.tif)$", "", Path(name).name)


def _spread(chips: Sequence[str], count: int) -> list[str]:
    """So many of the chips, in turn from each event."""
    place: Counter[str] = Counter()
    order = {}
    for chip in chips:
        place[event_of(chip)] += 1
        order[chip] = place[event_of(chip)]
    return sorted(order, key=lambda chip: order[chip])[:count]


def _write_lists(whole: Path, folder: Path, chips: set[str]) -> dict[str, int]:
    """Write each split file with those of its chips that are in the sample: number of chips by split."""
    folder.mkdir(exist_ok=True)
    counts = {}
    for file in sorted(whole.glob("*.txt")):
        kept = [chip for chip in read_split(file) if chip in chips]
        write_atomically(folder / file.name, "".join(f"{chip}\n" for chip in kept))
        counts[file.stem.split("_", 2)[-1]] = len(kept)
    return counts
