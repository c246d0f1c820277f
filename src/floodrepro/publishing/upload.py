"""Put an export on the hub: first a plan that contacts nobody, then one commit of exactly what the plan lists."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from floodrepro import __version__
from floodrepro.errors import CheckpointError, FloodreproError, UsageError
from floodrepro.publishing.bundle import CARD, Card, check_files, read_card, weights_name
from floodrepro.publishing.shortfall import shortfall
from floodrepro.run_folder import sha256_of

EDITED = f"{CARD} was edited after the export."
_LOGIN = "hf auth login, or set HF_TOKEN, with a token that may write to it"


@dataclass(frozen=True)
class Item:
    """A file to be uploaded: its path, size in bytes and sha256; it keeps its name in the repository."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """What would be uploaded where.

    Args:
        folder: The export folder.
        repo: OWNER/NAME.
        endpoint: Address of the hub.
        branch: Branch that gets the commit.
        private: Whether the repository has to be private.
        items: The files.
        left_out: Other files of the folder, which stay here.
        verdict: The verdict's sentences; empty where nothing was verified.
        objection: Why this should not be published, in one line; empty where nothing speaks against it.
    """

    folder: Path
    repo: str
    endpoint: str
    branch: str
    private: bool
    items: list[Item]
    left_out: list[str]
    verdict: list[str]
    objection: str

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        files = {item.path.name: {"bytes": item.size, "sha256": item.sha256} for item in self.items}
        kept = {key: value for key, value in vars(self).items() if key not in ("items", "folder")}
        return {**kept, "folder": str(self.folder), "files": files}


def make_plan(folder: Path, repo: str, *, branch: str, private: bool) -> Plan:
    """Look through an export folder; nobody is contacted.

    Raises:
        UsageError: The repository's name cannot be one, or the folder has no card of floodrepro's.
        CheckpointError: The files do not belong together, or the card hides what `shortfall` says.
    """
    with _errors(repo):
        validate_repo_id(repo)
    if repo.count("/") != 1:
        raise UsageError("--repo is no OWNER/NAME", where=repo, fix="--repo OWNER/NAME")
    card = read_card(folder)
    results = check_files(folder, card)
    names = [*card.files, CARD]
    items = [Item(folder / n, (folder / n).stat().st_size, sha256_of(folder / n)) for n in names]
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in names)
    missing = shortfall(results)
    if missing and _first_line(card) != f"**{missing}**":
        raise CheckpointError(
            f"the card's first line does not say: {missing}",
            where=folder / CARD,
            fix="floodrepro export --card-only writes the card anew, once this one is moved away",
        )
    objection = " ".join(text for text in (missing, EDITED if card.edited else None) if text)
    verdict = list(results["verdict"]["sentences"]) if results else []
    return Plan(folder, repo, constants.ENDPOINT, branch, private, items, left_out, verdict, objection)


def refuse_objection(plan: Plan, anyway: str | None) -> None:
    """Raise `CheckpointError` if something speaks against publishing and *anyway* does not say it word for word."""
    if anyway is not None and not plan.objection:
        raise UsageError("--publish-anyway, and nothing speaks against publishing", fix="leave it out")
    if plan.objection and anyway != plan.objection:
        raise CheckpointError(
            f"this model is not published: {plan.objection}",
            where=plan.folder,
            fix=f'mend that, or say it: --publish-anyway "{plan.objection}"',
        )


def refuse_without_access(plan: Plan) -> None:
    """Raise if no upload can succeed: no token, or HF_HUB_OFFLINE."""
    if constants.HF_HUB_OFFLINE:
        raise FloodreproError("HF_HUB_OFFLINE forbids every request", where=plan.endpoint, fix="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise FloodreproError("there is no token for the hub", where=plan.endpoint, fix=_LOGIN)


def upload(plan: Plan) -> str:
    """Make the repository if it is not there, and commit the plan's files at once.

    huggingface_hub's ``upload_folder`` may spread a folder over several commits (2.4 with hf_xet installed), hence
    ``create_commit``.

    Returns:
        Address of the commit.

    Raises:
        FloodreproError: The hub refuses, or cannot be reached.
    """
    api = HfApi(endpoint=plan.endpoint, library_name="floodrepro", library_version=__version__)
    name = weights_name(read_card(plan.folder))
    with _errors(f"{plan.endpoint} {plan.repo}"):
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if plan.private and not api.repo_info(plan.repo).private:  # exist_ok leaves a public one as it is
            raise FloodreproError(
                "--private, and the repository exists already and is public: nothing was uploaded",
                where=f"{plan.endpoint} {plan.repo}",
                fix="another --repo, or make it private on its page",
            )
        if plan.branch != constants.DEFAULT_REVISION:
            api.create_branch(plan.repo, branch=plan.branch, exist_ok=True)
        files = [CommitOperationAdd(item.path.name, item.path) for item in plan.items]
        for item, file in zip(plan.items, files, strict=True):
            if file.upload_info.sha256.hex() != item.sha256:
                raise CheckpointError(
                    f"{item.path.name} was changed since the plan was made: nothing was uploaded",
                    where=plan.folder,
                    fix="give the same command again",
                )
        done = api.create_commit(plan.repo, files, commit_message=f"Add {name}", revision=plan.branch)
    return str(done.commit_url)


def _first_line(card: Card) -> str:
    block = REGEX_YAML_BLOCK.search(card.text)
    return (card.text[block.end() :] if block else card.text).strip().partition("\n")[0]


@contextlib.contextmanager
def _errors(where: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into floodrepro's errors."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"--repo is no repository id: {error}", where=where, fix="--repo OWNER/NAME") from error
    except OfflineModeIsEnabled as error:
        raise FloodreproError("HF_HUB_OFFLINE forbids every request", where=where, fix="unset it") from error
    except RevisionNotFoundError as error:
        raise FloodreproError("the branch does not exist (HTTP 404)", where=where, fix="another --branch") from error
    except RepositoryNotFoundError as error:
        what = f"the repository is not there, or not open to this token (HTTP {error.response.status_code})"
        raise FloodreproError(what, where=where, fix=f"check --repo; {_LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        fix = _LOGIN if status in (401, 403) else "try again later; nothing is there until its one commit is"
        what = f"the hub refuses {'the token' if status == 401 else 'the upload'} (HTTP {status}): {_said(error)}"
        raise FloodreproError(what, where=where, fix=fix) from error
    except (ValueError, RuntimeError) as error:  # metadata that the hub does not take; an upload to its storage
        raise FloodreproError(f"the upload failed: {error}", where=where, fix="see above; try again") from error
    except _request_error() as error:
        what = f"the hub cannot be reached: {type(error).__name__}: {error}"
        raise FloodreproError(what, where=where, fix="check the network and HF_ENDPOINT, and try again") from error


def _said(error: HfHubHTTPError) -> str:
    return error.server_message or str(error).strip().splitlines()[0]


def _request_error() -> type[Exception]:
    """What a broken connection raises: the HTTP library is httpx in huggingface_hub 1, httpx2 in 2."""
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    error: type[Exception] = library.RequestError
    return error
