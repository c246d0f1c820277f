"""Fetch a data set from the Hugging Face hub: one commit a folder. huggingface_hub transfers the files."""

import fnmatch
import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.data.protocols import LABEL_DIR, PARTS, PROTOCOLS, SPLITS, chip_of, event_of
from floodrepro.data.splits import FETCH_NOTE, data_in, read_commit, read_events, split_files
from floodrepro.errors import DataError
from floodrepro.run_folder import write_atomically

_BLOCK = 2**12  # bytes that are read ahead of a remote tar
_SEEN_A_CHIP = 20  # members of a remote tar whose headers are read for each chip of a sample, at most


def fetch(
    root: Path,
    repo: str,
    *,
    revision: str = "main",
    splits: Sequence[str] = SPLITS,
    parts: Sequence[str] = PARTS,
    protocol: str | None = None,
    sample: int | None = None,
) -> dict[str, Any]:
    """Fetch the archives of some splits and parts, or a sample of chips, after the split files.

    Run it again after an interruption: whole files are not fetched again.

    Args:
        root: Folder to fill; it holds one commit.
        repo: Id of the data set.
        revision: Branch, tag or commit.
        splits: Any of `SPLITS`.
        parts: Any of `PARTS`.
        protocol: Name of the protocol that the data has to fit.
        sample: Number of chips to extract in place of fetching archives, shared by the splits; a few of each event
            where the order in the archives allows it.

    Returns:
        `commit`; `version`, v0 or v1; `chips`, by split; `files`, the bytes of each by its path.

    Raises:
        DataError: The hub cannot be read, lacks a part, holds another version than the protocol's; the folder holds
            another commit, or data of none; the disk is too small; a file is not what the hub says it is.
    """
    from huggingface_hub import HfApi, RepoFile, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    held = read_commit(root / "data")  # of this folder, not of the one that it lies in
    if held is None and (others := data_in(root)):
        what = f"the folder holds a data set ({', '.join(others)}) and no note of its commit; nothing is overwritten"
        raise DataError(what, where=root, fix="--root of a new folder")
    if sample and held and json.loads((root / FETCH_NOTE).read_text(encoding="utf-8")).get("sample") is None:
        raise DataError("the folder is for the whole data set, and no sample", where=root, fix="--root of a new folder")
    hub, kind = HfApi(), "dataset"
    try:
        commit = hub.list_repo_commits(repo, repo_type=kind, revision=revision)[0].commit_id
        if held not in (None, commit):
            what = f"the folder holds commit {held}, and {revision} is {commit}"
            raise DataError(what, where=root, fix=f"--revision {held}, or another --root")
        tree = hub.list_repo_tree(repo, repo_type=kind, revision=commit, recursive=True)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        tars = {(split, part): fnmatch.filter(sizes, f"{split}/{part}*.tar") for split in splits for part in parts}
        if lacking := [f"{split}/{part}*.tar" for (split, part), found in tars.items() if not found]:
            what = f"the commit has no {', '.join(lacking)}"
            raise DataError(what, where=f"{repo}@{commit}", fix="--split, --modality, --repo")
        wanted, lists = list(chain(*tars.values())), fnmatch.filter(sizes, "split/*.txt")
        root.mkdir(parents=True, exist_ok=True)
        needed, free = sum(sizes[path] for path in wanted if not (root / path).is_file()), shutil.disk_usage(root).free
        if sample is None and needed > free:
            what = f"the disk is too small: {needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free"
            raise DataError(what, where=root, fix="--split, --modality, --sample, or another --root")
        whole = root / ".fetch"  # `split/` is not written before the note; a sample's lists its own chips only
        get = partial(snapshot_download, repo, repo_type=kind, revision=commit)
        get(local_dir=whole, allow_patterns=lists)
        files_of = split_files(whole / "split")
        chips = {name: list(read_events(file)) for name, file in files_of.items()}
        version = "v1" if "test_holdout" in chips else "v0"  # only version 1 has further test splits
        if protocol and PROTOCOLS[protocol].data_version not in (None, version):
            counts = ", ".join(f"{len(ids):,} {name}" for name, ids in chips.items())
            what = f"protocol {protocol} needs {PROTOCOLS[protocol].data_version} data, this is {version}: {counts}"
            fix = "--revision of a commit that holds it, or another --protocol; v1-binary is version 1 in two classes"
            raise DataError(what, where=f"{repo}@{commit}", fix=fix)
        # Before the archives: a folder with any of them says of which commit.
        note = {"repo": repo, "commit": commit, "asked": revision, "sample": sample}
        write_atomically(root / FETCH_NOTE, json.dumps(note, indent=2) + "\n")
        if sample is None:
            get(local_dir=root, allow_patterns=[*lists, *wanted])
            console.say("comparing checksums")
            compared = hub.verify_repo_checksums(repo, repo_type=kind, revision=commit, local_dir=root)
            if bad := [mismatch["path"] for mismatch in compared.mismatches]:
                what = f"not what the hub says it is: {', '.join(bad)}"
                raise DataError(what, where=root, fix="delete what is named, then fetch again")
            files = {path: sizes[path] for path in [*lists, *wanted]}
        else:
            files = _extract_sample(root, f"datasets/{repo}@{commit}", tars, sample)
            if not (here := set(map(chip_of, files))):
                what = "no chip was found in the first members of the archives"
                raise DataError(what, where=f"{repo}@{commit}", fix="check --repo and --revision")
            chips = {name: [chip for chip in ids if chip in here] for name, ids in chips.items()}
            (root / "split").mkdir(exist_ok=True)
            for name in filter(chips.get, chips):
                write_atomically(root / "split" / files_of[name].name, "".join(f"{chip}\n" for chip in chips[name]))
    except (OSError, tarfile.TarError) as error:  # an answer of the hub is an OSError as well
        fix = "run the same command again; check --repo, the network, HF_ENDPOINT, HF_TOKEN and the disk"
        raise DataError(f"the fetch stopped: {error}", where=f"{repo}@{revision}", fix=fix) from error
    except (HTTPError, ValueError, LookupError, TypeError) as error:  # no network; a login page, or no hub at all
        what = f"the hub cannot be reached, or this is no hub: {error!r}"
        raise DataError(what, where=f"{repo}@{revision}", fix="check the network, HF_ENDPOINT and --repo") from error
    counted = {name: len(ids) for name, ids in chips.items()}
    return {"root": str(root), "commit": commit, "version": version, "chips": counted, "files": files}


def _extract_sample(
    root: Path, where: str, tars: Mapping[tuple[str, str], Sequence[str]], sample: int
) -> dict[str, int]:
    """Copy chips out of remote tars, by split and part, into `data/<PART>/` by range reads; the bytes of each file."""
    from huggingface_hub import HfFileSystem

    splits, parts = (list(dict.fromkeys(names)) for names in zip(*tars, strict=True))
    files: dict[str, int] = {}
    for number, split in enumerate(splits):
        count, chosen = (sample + len(splits) - 1 - number) // len(splits), list[str]()
        contents: dict[str, dict[str, bytes]] = defaultdict(dict)  # by chip, the content of each path
        for part in sorted(parts, key=lambda part: part != LABEL_DIR):  # small masks tell what chips there are
            left = count
            for path in sorted(tars[split, part]):
                # A header has 512 bytes, and what is read beyond it is lost where a large member follows.
                remote = HfFileSystem().open(f"{where}/{path}", "rb", block_size=_BLOCK, cache_type="readahead")
                with remote, tarfile.open(fileobj=remote, mode="r:") as archive:
                    chosen = chosen or _spread([chip_of(m.name) for m in islice(archive, count * _SEEN_A_CHIP)], count)
                    members = ((chip_of(member.name), member) for member in archive)
                    for chip, member in islice((pair for pair in members if pair[0] in chosen), left):
                        file = archive.extractfile(member)
                        contents[chip][f"data/{part}/{Path(member.name).name}"] = file.read() if file else b""
                        console.say(f"{split} {part}: {chip}")
                        left -= 1
        whole = [held for held in contents.values() if len(held) == len(parts)]  # without a part it is of no use
        for name, content in [item for held in whole for item in held.items()]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
            files[name] = len(content)
    return files


def _spread(chips: Sequence[str], count: int) -> list[str]:
    """So many of the chips, in turn from each event."""
    events: dict[str, list[str]] = defaultdict(list)
    for chip in filter(None, chips):
        events[event_of(chip)].append(chip)
    return [chip for turn in zip_longest(*events.values()) for chip in turn if chip][:count]
