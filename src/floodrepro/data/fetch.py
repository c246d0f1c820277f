"""Fetch ImpactMesh-Flood's archives from the hub: one commit a folder, each file checked, nothing fetched twice."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.data import ledger as ledgers
from floodrepro.data import names
from floodrepro.data.hub import Hub
from floodrepro.data.hub_layout import DATA_OF, PARTS, Version, check_protocol, identify, is_part, select
from floodrepro.data.ledger import Ledger, Mismatch, check_content
from floodrepro.errors import DataError, FloodreproError, UsageError

Progress = Callable[[str, str, int, int], None]  # "checking" or "fetching", a file, bytes done, bytes in all


@dataclass(frozen=True)
class FetchReport:
    """What lies in the folder now.

    Args:
        ledger: The folder's ledger; it may know files that were not asked for.
        version: What the split files say.
        came: How each file that was asked for came: `fetched`, `adopted` or `kept`.
    """

    ledger: Ledger
    version: Version
    came: dict[str, str]

    def size(self, *ways: str) -> int:
        """Bytes of the files that came in the ways named."""
        return sum(self.ledger.files[path].size for path, way in self.came.items() if way in ways)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; sizes in bytes."""
        ledger, version = self.ledger, self.version
        return {
            **{"root": str(ledger.root), "repo": ledger.repo, "revision": ledger.asked, "commit": ledger.commit},
            **{"version": version.name, "published": version.published, "chips": version.chips},
            "files": {path: {**asdict(ledger.files[path]), "came": way} for path, way in sorted(self.came.items())},
        }


def fetch(
    root: Path,
    hub: Hub,
    *,
    revision: str | None = None,
    splits: Sequence[str] = names.SPLITS,
    modalities: Sequence[str] = PARTS,
    protocol: str | None = None,
    verify: bool = False,
    progress: Progress = lambda *_: None,
) -> FetchReport:
    """Make a folder hold the split files and the chosen archives of one commit, in the hub's layout.

    What is there already is used: files that the ledger knows are not read again as long as their size and time stay,
    files of a plain `hf download` are hashed and entered, and a half file is completed.

    Args:
        root: The data set's folder; made if it is missing.
        hub: The repository.
        revision: Branch, tag or sha; `main` where None. Offline, the ledger's commit where None.
        splits: Splits whose archives are wanted.
        modalities: Modalities whose archives are wanted, MASK among them.
        protocol: `v0`, `v1` or `v1-binary`, if the data has to fit one.
        verify: Hash every file, the unchanged ones too.
        progress: Called as bytes are hashed or arrive.

    Raises:
        UsageError: An argument is unknown.
        DataError: The hub, the commit, the folder or the disk do not allow it; what is verified by then is kept.
    """
    _check_arguments(revision, splits, protocol)
    try:
        if hub.offline:
            ledger = _offline_ledger(root, hub.repo, revision)
        else:
            asked = revision or "main"
            snapshot = hub.snapshot(asked)
            known = {path: file for path, file in snapshot.files.items() if is_part(path)}
            ledger = Ledger.of(root, hub.repo, snapshot.commit, asked, known)
        split_files, archives = select(ledger.files, splits, modalities, ledger.where)
        with ledgers.locked(root):
            return _Fetch(root, hub, ledger.pinned(), verify, progress).run(split_files, archives, protocol)
    except OSError as error:
        problem = f"the folder cannot be read or written: {error.strerror or error}"
        fix = "mend that or name another --root; the same command then goes on where it stopped"
        raise DataError(problem, where=error.filename or root, fix=fix) from error


def _check_arguments(revision: str | None, splits: Sequence[str], protocol: str | None) -> None:
    if revision is not None and not revision.strip():  # as an unset variable of a script would make it
        raise UsageError("--revision is empty", fix="--revision SHA, or leave it out for main")
    if wrong := [split for split in splits if split not in names.SPLITS]:
        raise UsageError(f"--split is {wrong[0]!r}, expected {', '.join(names.SPLITS)}", fix="--split train,val,test")
    if protocol is not None and protocol not in DATA_OF:
        raise UsageError(f"--protocol is {protocol!r}, expected {', '.join(DATA_OF)}", fix="--protocol v0")


def _offline_ledger(root: Path, repo: str, revision: str | None) -> Ledger:
    ledger = Ledger.read(root)
    fix = "unset HF_HUB_OFFLINE and run again"
    if ledger is None:
        raise DataError("offline (HF_HUB_OFFLINE), and nothing was fetched into this folder yet", where=root, fix=fix)
    if revision not in (None, ledger.commit, ledger.asked):
        problem = f"offline (HF_HUB_OFFLINE), and the folder holds {ledger.asked} ({ledger.commit}), not {revision}"
        raise DataError(problem, where=root, fix=fix)
    ledger.refuse_other_repo(repo)
    return ledger


def size_text(size: int) -> str:
    """Bytes as a reader takes them in: GiB, or MiB below a tenth of a GiB, or bytes below a tenth of a MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit / 10:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


@dataclass
class _Fetch:
    """One call's work on one locked folder."""

    root: Path
    hub: Hub
    ledger: Ledger
    verify: bool
    progress: Progress
    came: dict[str, str] = field(default_factory=dict)

    def run(self, split_files: Sequence[str], archives: Sequence[str], protocol: str | None) -> FetchReport:
        wanted = [*split_files, *archives]
        for path in ledgers.remove_orphans(self.ledger):
            console.say(f"deleted {path}, which an interrupted download left")
        if not self.hub.offline:
            self.check_disk(wanted)
        fresh = not self.ledger.holds_anything()
        self.ledger.save()
        try:
            missing = self.settle(split_files if not self.hub.offline else wanted)
            self.download(missing)
            version = identify(self.root, split_files)
            tell = console.say if version.published else console.warn
            tell(f"{self.ledger.where} is {version}")
            check_protocol(version, protocol, self.ledger.where)
            missing = self.settle(archives)
        except FloodreproError:
            if fresh:
                self.withdraw(split_files)
            raise
        self.download(missing)
        return FetchReport(self.ledger, version, self.came)

    def check_disk(self, wanted: Sequence[str]) -> None:
        """Raise `DataError` if what is not here yet does not fit on the disk."""
        needed = 0
        for path in wanted:
            here = sum(file.stat().st_size for file in (self.root / path, self.half(path)) if file.exists())
            needed += max(0, self.ledger.files[path].size - here)
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise DataError(
                f"the disk is too small: {size_text(needed)} needed, {size_text(free)} free",
                where=self.root,
                fix="free some space, give a --root on another disk, or fetch less: --split, --modality",
            )

    def settle(self, paths: Sequence[str]) -> list[str]:
        """Enter into the ledger what lies in the folder already; the rest is returned."""
        paths = [path for path in paths if path not in self.came]
        known = {path for path in paths if self.ledger.unchanged(path) and not self.verify}
        present = [path for path in paths if path not in known and (self.root / path).exists()]
        self.came |= dict.fromkeys(known, "kept")
        total, before = sum((self.root / path).stat().st_size for path in present), 0
        for path in present:
            entry, offset = self.ledger.files[path], before
            before += (self.root / path).stat().st_size
            try:
                sha256 = check_content(self.root / path, entry, self.seen("checking", path, offset, total))
            except Mismatch as mismatch:
                self.reject(path, mismatch)
            else:
                self.came[path] = "kept" if entry.state == "verified" else "adopted"
                self.ledger.set_verified(path, sha256)
        missing = [path for path in paths if path not in self.came]
        for path in missing:
            if self.ledger.files[path].state == "verified":
                self.ledger.set_pending(path)
        return missing

    def reject(self, path: str, mismatch: Mismatch) -> None:
        """Discard a damaged file that came from this commit; a file of unknown or other origin is the user's."""
        entry, target = self.ledger.files[path], self.root / path
        commit, etag = ledgers.plain_download(self.root, path)
        ours = entry.state == "verified" or (etag is not None and etag in (entry.sha256, entry.git_sha1))
        if not ours:
            other = f"--revision {commit} to go on with what lies here, or " if commit else "delete the file, or "
            raise DataError(
                f"{path} is not the file of commit {entry.revision}: {mismatch}",
                where=target,
                fix=f"{other}a new --root: two revisions are never mixed",
            )
        console.say(f"{path} is damaged: {mismatch}")
        if not self.hub.offline:
            target.unlink()

    def download(self, missing: Sequence[str]) -> None:
        """Fetch files, check them and give them their names.

        Raises:
            DataError: Offline; or a file is twice not what the hub says it is.
        """
        if missing and self.hub.offline:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise DataError(
                f"offline (HF_HUB_OFFLINE), and {len(missing)} files are missing: {', '.join(missing[:4])}{more}",
                where=self.root,
                fix="unset HF_HUB_OFFLINE and run again",
            )
        total, before = sum(self.ledger.files[path].size for path in missing), 0
        for path in missing:
            self.download_one(path, self.seen("fetching", path, before, total))
            before += self.ledger.files[path].size

    def download_one(self, path: str, seen: Callable[[int], None]) -> None:
        entry, target, half = self.ledger.files[path], self.root / path, self.half(path)
        half.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            try:
                self.hub.download(entry, self.ledger.commit, half, seen)
                sha256 = check_content(half, entry, self.seen("checking", path, 0, entry.size))
                break
            except Mismatch as mismatch:
                half.unlink()
                if last:
                    raise DataError(
                        f"{path}: {mismatch}; it was fetched twice and discarded",
                        where=self.ledger.where,
                        fix="a proxy or mirror may change it: try another network or HF_ENDPOINT, or later",
                    ) from mismatch
                console.say(f"{path}: {mismatch}; discarded, and fetched once more")
        with half.open("rb") as file:
            os.fsync(file.fileno())  # the ledger must not know of bytes that a power cut can still take
        half.replace(target)
        self.came[path] = "fetched"
        self.ledger.set_verified(path, sha256)

    def withdraw(self, split_files: Sequence[str]) -> None:
        """Undo a first call that was refused, so that the folder is free for another commit."""
        for path in split_files:
            self.half(path).unlink(missing_ok=True)
            if self.came.get(path) == "fetched":
                (self.root / path).unlink()
        (self.root / ledgers.NAME).unlink()

    def seen(self, work: str, path: str, before: int, total: int) -> Callable[[int], None]:
        """A callback for one file's bytes that reports them among those of all files."""
        return lambda done: self.progress(work, path, before + done, total)

    def half(self, path: str) -> Path:
        return self.root / f"{path}{ledgers.PARTIAL}"
