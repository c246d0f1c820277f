"""The ledger of a download: which file of which commit lies in the folder, and whether it was checked.

``floodrepro-ledger.json`` in the data set's folder, written atomically after every change::

    schema     1; a reader refuses a number that it does not know
    repo       the data set's repository, such as ibm-esa-geospatial/ImpactMesh-Flood
    commit     the one commit, 40 hex digits, that every file of the folder comes from
    asked      the revision (branch, tag or sha) that led to the commit
    files      one entry a file, by its path in the repository: every archive and split file of the commit
      size       bytes
      sha256     of the content; null until it is known: the hub gives it for LFS files only
      git_sha1   of the content as a git blob; null for LFS files
      revision   the commit that the file comes from
      state      "pending": not here, not whole or not checked. "verified": size and hash were found to be right
      mtime_ns   of the verified file, nanoseconds since 1970: a file that changed since is hashed again

While a file is on its way its bytes lie beside it, under its name and `.partial`.
"""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from floodrepro.errors import DataError
from floodrepro.lock import hold
from floodrepro.run_folder import write_atomically

SCHEMA = 1
NAME = "floodrepro-ledger.json"
LOCK = ".floodrepro-fetch.lock"
PARTIAL = ".partial"
_ONE_DOWNLOAD = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # huggingface_hub 2.4.0, _download_to_tmp_and_move
_BLOCK = 2**22  # bytes read at a time; larger ones hash no faster


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit, as the hub describes it.

    Args:
        path: Path in the repository, which is also the path below the data set's folder.
        size: Bytes.
        sha256: Of the content, for LFS files.
        git_sha1: Of the content as a git blob, for all others.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Entry(RemoteFile):
    """A file of the ledger: what is expected, and what was found."""

    revision: str
    state: Literal["pending", "verified"] = "pending"
    mtime_ns: int | None = None


class Mismatch(Exception):
    """Content that is not what the hub says it is."""

    def __init__(self, kind: str, expected: object, found: object) -> None:
        super().__init__(f"{kind} expected {expected}, found {found}")


def check_content(path: Path, file: RemoteFile, seen: Callable[[int], None] = lambda _: None) -> str:
    """Read a file and compare it with what it should be.

    Args:
        path: The file.
        file: What is expected.
        seen: Called with the number of bytes read so far.

    Returns:
        The content's sha256.

    Raises:
        Mismatch: The size, the sha256 or the git blob sha1 is another one.
    """
    size = path.stat().st_size
    if size != file.size:
        raise Mismatch("size in bytes", file.size, size)
    sha256 = hashlib.sha256()
    # Git hashes a header before the content; sha1 is what git uses and guards against accidents only.
    git_sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    done = 0
    with path.open("rb") as source:
        while block := source.read(_BLOCK):
            sha256.update(block)
            if file.sha256 is None:
                git_sha1.update(block)
            done += len(block)
            seen(done)
    if file.sha256 is not None and sha256.hexdigest() != file.sha256:
        raise Mismatch("sha256", file.sha256, sha256.hexdigest())
    if file.sha256 is None and git_sha1.hexdigest() != file.git_sha1:
        raise Mismatch("git blob sha1", file.git_sha1, git_sha1.hexdigest())
    return sha256.hexdigest()


@dataclass
class Ledger:
    """The ledger of one folder. What it says on disk is what it says here, after `save` and every `set`."""

    root: Path
    repo: str
    commit: str
    asked: str
    files: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, repo: str, commit: str, asked: str, files: Mapping[str, RemoteFile]) -> Self:
        """A new ledger in which every file is pending; nothing is written yet."""
        entries = {path: Entry(**asdict(file), revision=commit) for path, file in sorted(files.items())}
        return cls(root, repo, commit, asked, entries)

    @classmethod
    def read(cls, root: Path) -> Self | None:
        """The ledger that lies in a folder; None where there is none.

        Raises:
            DataError: It is damaged or of another schema.
        """
        path = root / NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {content['schema']}, expected {SCHEMA}")
            entries = {name: Entry(name, **entry) for name, entry in content["files"].items()}
            return cls(root, content["repo"], content["commit"], content["asked"], entries)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"the ledger cannot be read: {type(error).__name__}: {error}",
                where=path,
                fix="delete it and fetch again: the files that are here are hashed, not downloaded again",
            ) from error

    def save(self) -> None:
        """Write the ledger into its folder."""
        files = {path: {k: v for k, v in asdict(entry).items() if k != "path"} for path, entry in self.files.items()}
        head = {"schema": SCHEMA, "repo": self.repo, "commit": self.commit, "asked": self.asked}
        write_atomically(self.root / NAME, json.dumps(head | {"files": files}, indent=2) + "\n")

    def set_verified(self, path: str, sha256: str) -> None:
        """Enter that the file is here and right."""
        mtime = (self.root / path).stat().st_mtime_ns
        self.files[path] = replace(self.files[path], state="verified", sha256=sha256, mtime_ns=mtime)
        self.save()

    def set_pending(self, path: str) -> None:
        """Enter that the file is not here, or not right."""
        self.files[path] = replace(self.files[path], state="pending", mtime_ns=None)
        self.save()

    def unchanged(self, path: str) -> bool:
        """Whether the file was verified and has kept its size and modification time since."""
        entry = self.files[path]
        try:
            status = (self.root / path).stat()
        except OSError:
            return False
        return entry.state == "verified" and (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime_ns)

    def holds_anything(self) -> bool:
        """Whether a byte of the commit lies in the folder."""
        return any(
            (self.root / (path if entry.state == "verified" else f"{path}{PARTIAL}")).exists()
            for path, entry in self.files.items()
        )

    @property
    def where(self) -> str:
        """Repository and commit, for messages."""
        return f"{self.repo}@{self.commit}"

    def pinned(self) -> "Ledger":
        """The ledger that the folder has already, if it holds anything, else this one.

        Raises:
            DataError: The folder's ledger is of another commit or repository, or damaged.
        """
        old = Ledger.read(self.root)
        if old is None or not old.holds_anything():
            return self
        old.refuse_other_repo(self.repo)
        if old.commit != self.commit:
            raise DataError(
                f"the folder holds commit {old.commit}, and {self.asked} is now {self.commit}: they are never mixed",
                where=self.root,
                fix=f"--revision {old.commit} to go on with the old one, or a new --root for the new one",
            )
        return old

    def refuse_other_repo(self, repo: str) -> None:
        """Raise `DataError` if the folder belongs to another repository."""
        if self.repo != repo:
            problem = f"the folder holds files of {self.repo}, and {repo} is asked for"
            raise DataError(problem, where=self.root, fix=f"--repo {self.repo}, or a new --root for {repo}")


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep every other fetch out of a folder, which is made where it is missing.

    Raises:
        DataError: Another process holds the lock.
    """

    def taken(process: str) -> DataError:
        what = f"another fetch (process {process}) is at work in this folder"
        return DataError(what, where=root, fix="wait until it is done, or give another --root")

    root.mkdir(parents=True, exist_ok=True)
    with hold(root / LOCK, taken):
        yield


def remove_orphans(ledger: Ledger) -> list[str]:
    """Delete what interrupted downloads left and no download will go on with.

    That is a ``.partial`` whose file is not pending at the ledger's commit, what a kill left of a half written ledger,
    and ``.incomplete`` files of huggingface_hub from 1.18 on, which gives each download a name of its own and never
    opens one again (huggingface_hub#4306, #4196); an older client goes on with its own. Where a running ``hf download``
    holds a lock, or nobody can tell, they are left alone.

    Returns:
        The paths deleted, relative to the folder.
    """
    root = ledger.root
    pending = {f"{path}{PARTIAL}" for path, entry in ledger.files.items() if entry.state == "pending"}
    folders = {Path(path).parent for path in ledger.files}
    found = [path for folder in folders for path in (root / folder).glob(f"*{PARTIAL}")]
    orphans = [path for path in found if path.relative_to(root).as_posix() not in pending]
    orphans += root.glob(f".{NAME}.*")
    downloads = root / ".cache" / "huggingface" / "download"
    if not any(_is_locked(path) for path in downloads.rglob("*.lock")):
        orphans += [path for path in downloads.rglob("*.incomplete") if _ONE_DOWNLOAD.search(path.name)]
    for path in orphans:
        path.unlink(missing_ok=True)
    return sorted(path.relative_to(root).as_posix() for path in orphans)


def _is_locked(path: Path) -> bool:
    """Whether it may be: also where the file system has no locks, or the file is not ours to open."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def plain_download(root: Path, path: str) -> tuple[str | None, str | None]:
    """Commit and ETag that `hf download --local-dir` noted for a file; the ETag is its sha256 or git blob sha1."""
    note = root / ".cache" / "huggingface" / "download" / f"{path}.metadata"
    try:
        commit, etag = note.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return None, None
    return commit, etag
