"""The hub's side of a download: what a revision holds, and one file's bytes, however often the connection drops.

Requests go through huggingface_hub's own client, headers (token included) and addresses. Its ``hf_hub_download`` is
not used: from 1.18 on it writes to a file of a random name and, in a new process, starts at byte 0 again
(huggingface_hub#4306); a kill costs up to a whole archive. Here the bytes lie in a file of a known name, and the next
request asks for the rest of them.
"""

import contextlib
import email.utils
import functools
import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers  # type: ignore[attr-defined]

from floodrepro import __version__, console
from floodrepro.data.ledger import Mismatch, RemoteFile
from floodrepro.errors import DataError, UsageError

T = TypeVar("T")

TRIES = 8  # in a row without a new byte; with the waits between them, about two minutes
LONGEST_WAIT = 600  # seconds; the hub counts requests in windows of 300 s
# Bytes asked for at a time: the hub's CDN serves no more than 50 GB in one answer (huggingface_hub#2991, #3868).
LONGEST_RANGE = 40 * 10**9


@dataclass(frozen=True)
class Snapshot:
    """What one commit holds, by path."""

    commit: str
    files: dict[str, RemoteFile]


class _TryAgain(Exception):
    """A request failed in a way that may pass; `wait` is the server's wish in seconds, if it had one."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Hub:
    """One data set repository on the hub.

    Args:
        repo: Repository id, such as `ibm-esa-geospatial/ImpactMesh-Flood`.
        endpoint: Address of the hub; huggingface_hub's own (HF_ENDPOINT) where None.
        sleep: What waits between two tries, in seconds.
    """

    def __init__(self, repo: str, *, endpoint: str | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        self.repo = repo
        self.endpoint = endpoint or constants.ENDPOINT
        self._sleep = sleep

    @property
    def offline(self) -> bool:
        """Whether HF_HUB_OFFLINE forbids every request."""
        return constants.HF_HUB_OFFLINE

    def snapshot(self, revision: str) -> Snapshot:
        """Resolve a branch, tag or sha to its commit and list the commit's files.

        Raises:
            UsageError: The repository id cannot be one.
            DataError: The repository or the revision does not exist or is not open to this user, or the hub cannot be
                reached.
        """
        api = HfApi(endpoint=self.endpoint, library_name="floodrepro", library_version=__version__)

        def resolve() -> str | None:
            with self._errors_of(revision):
                return api.dataset_info(self.repo, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT).sha

        commit = self._persist(resolve)
        if commit is None:
            raise DataError("the hub names no commit for the revision", where=f"{self.repo}@{revision}")

        # repo_info lists files too, but the hub may cut its list short (huggingface_hub#3241, #3565).
        page: str | None = f"{self.endpoint}/api/datasets/{self.repo}/tree/{commit}?recursive=True&expand=False"
        files: list[RemoteFile] = []
        while page is not None:
            found, page = self._persist(functools.partial(self._page_of_tree, page, revision))
            files += found
        return Snapshot(commit, {file.path: file for file in files})

    def _page_of_tree(self, page: str, revision: str) -> tuple[list[RemoteFile], str | None]:
        """The files that a page of the tree lists, and the next page's address.

        HfApi.list_repo_tree has no timeout (huggingface_hub 2.4.0): where the server falls silent, it waits for ever.
        """
        headers = build_hf_headers(library_name="floodrepro", library_version=__version__)
        with self._errors_of(revision):
            answer = get_session().get(page, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
            files = [_describe(entry) for entry in answer.json() if entry["type"] == "file"]
            return files, answer.links.get("next", {}).get("url")

    def download(self, file: RemoteFile, commit: str, partial: Path, seen: Callable[[int], None]) -> None:
        """Bring *partial* to the file's full length, starting from the bytes that it holds.

        Neither these bytes nor the content are checked here.

        Args:
            file: What to fetch.
            commit: The commit that it belongs to.
            partial: Where the bytes go; it grows with every byte that arrives.
            seen: Called with the number of bytes that *partial* holds.

        Raises:
            Mismatch: The hub gives out another number of bytes than it announced.
            DataError: The file is refused, or no byte came in several tries.
        """
        partial.touch()
        while partial.stat().st_size < file.size:
            self._persist(lambda: self._append(file, commit, partial, seen), lambda: partial.stat().st_size)

    def _append(self, file: RemoteFile, commit: str, partial: Path, seen: Callable[[int], None]) -> None:
        """Ask once for what *partial* lacks, or for as much of it as one answer may hold."""
        held = partial.stat().st_size
        stop = min(file.size, held + LONGEST_RANGE)
        headers = build_hf_headers(library_name="floodrepro", library_version=__version__)
        headers["Accept-Encoding"] = "identity"  # a range of compressed bytes would be of no use
        if (held, stop) != (0, file.size):
            headers["Range"] = f"bytes={held}-{stop - 1}"
        url = hf_hub_url(self.repo, file.path, repo_type="dataset", revision=commit, endpoint=self.endpoint)
        with (
            self._errors_of(commit, file.path),
            get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer,
        ):
            if answer.status_code == 416:  # the hub's file ends before the byte that was asked for
                raise Mismatch("size in bytes", file.size, f"at most {held}")
            hf_raise_for_status(answer)
            first, total = _extent(answer.headers) if answer.status_code == 206 else (0, _length(answer.headers))
            if total not in (None, file.size):
                raise Mismatch("size in bytes", file.size, total)
            if first not in (0, held):
                raise _TryAgain(f"byte {held} was asked for and byte {first} came")
            if answer.status_code != 206:
                stop = file.size
            with partial.open("r+b") as target:
                if first != held:  # the server ignored the range and sends the file from its start
                    target.truncate(0)
                target.seek(first)
                held = first
                for block in answer.iter_bytes():
                    target.write(block)
                    held += len(block)
                    if held > stop:
                        raise Mismatch("size in bytes", file.size, f"more than {stop}")
                    seen(held)
            if held < stop:
                raise _TryAgain(f"the answer ended after {held} of {stop} bytes")

    def _persist(self, request: Callable[[], T], held: Callable[[], int] = lambda: 0) -> T:
        """Repeat a request until it succeeds, fails for good, or brings no new byte (*held*) several times in a row."""
        failures = 0
        while True:
            before = held()
            try:
                return request()
            except _TryAgain as failure:
                failures = 1 if held() > before else failures + 1
                wait = failure.wait if failure.wait is not None else min(2.0 ** (failures - 1), 60.0)
                if failures >= TRIES or wait > LONGEST_WAIT:
                    wish = f"; it asks for a wait of {wait:.0f} s" if failure.wait else ""
                    raise DataError(
                        f"the hub could not be read, {failures} times in a row: {failure}{wish}",
                        where=f"{self.endpoint} {self.repo}",
                        fix="run the same command again later: it goes on where it stopped",
                    ) from failure
                console.say(f"{failure}; trying again in {wait:.0f} s ({failures} of {TRIES - 1})")
                self._sleep(wait)

    @contextlib.contextmanager
    def _errors_of(self, revision: str, path: str = "") -> Iterator[None]:
        """Turn what huggingface_hub and its HTTP library raise into floodrepro's errors, or into `_TryAgain`."""
        where = f"{self.repo}@{revision}" + (f" {path}" if path else "")
        try:
            yield
        except HFValidationError as error:
            raise UsageError(
                f"--repo is no repository id: {error}", where=self.repo, fix="--repo OWNER/NAME"
            ) from error
        except OfflineModeIsEnabled as error:
            raise DataError("HF_HUB_OFFLINE forbids every request", where=where, fix="unset HF_HUB_OFFLINE") from error
        except HfHubHTTPError as error:
            if error.response.status_code in (408, 429) or error.response.status_code >= 500:
                raise _TryAgain(f"HTTP {error.response.status_code}", _wait_of(error.response.headers)) from error
            what, fix = _verdict(error)
            raise DataError(what, where=where, fix=fix) from error
        except _request_error() as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:  # from huggingface_hub's reading of the answer
            raise DataError(
                f"the answer is not a hub's: {type(error).__name__}: {error}",
                where=f"{self.endpoint} {where}",
                fix="check HF_ENDPOINT, and whether a proxy or a login page answers in the hub's place",
            ) from error


def _verdict(error: HfHubHTTPError) -> tuple[str, str]:
    """What is wrong and what to do, for an answer that no further try will better."""
    login = "set HF_TOKEN to a token that may read it, or run: hf auth login"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):  # before its base class, RepositoryNotFoundError
        return f"the repository is gated (HTTP {status})", f"accept its terms on its page on the hub; {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the repository does not exist or is private (HTTP {status})", f"check --repo; if private, {login}"
    if isinstance(error, RevisionNotFoundError):
        return "the revision does not exist", "--revision takes a branch, a tag or the 40 digits of a commit's sha"
    if isinstance(error, RemoteEntryNotFoundError):
        return "the file is listed, but is not there (HTTP 404)", "try again later, or another --revision"
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status})", login
    by_hand = "run: hf download REPO PATH --repo-type dataset --local-dir DIR, then this command again adopts the file"
    return f"the hub answers HTTP {status}", by_hand


def _describe(entry: Mapping[str, Any]) -> RemoteFile:
    """A file from its entry in the tree."""
    if (lfs := entry.get("lfs")) is not None:
        return RemoteFile(entry["path"], lfs["size"], lfs["oid"], None)
    return RemoteFile(entry["path"], entry["size"], None, entry["oid"])


def _extent(headers: Mapping[str, str]) -> tuple[int, int | None]:
    """First byte and whole size in bytes (None if not told) of a partial answer."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if match is None:
        raise _TryAgain("a partial answer does not tell its range")
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _length(headers: Mapping[str, str]) -> int | None:
    """Size in bytes of a whole answer; None if it is not told, or told of compressed bytes."""
    length = headers.get("Content-Length", "")
    plain = headers.get("Content-Encoding", "identity") == "identity"
    return int(length) if plain and length.isdigit() else None


def _wait_of(headers: Mapping[str, str]) -> float | None:
    """The wait in seconds that the server asks for: by the hub's own rate limit header, or by Retry-After."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0  # it is rounded down
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _request_error() -> type[Exception]:
    """What a broken connection raises: the HTTP library is httpx in huggingface_hub 1, httpx2 in 2."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    error: type[Exception] = library.RequestError
    return error
