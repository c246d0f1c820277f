"""Put an export on the hub: first a plan that contacts nobody, then one commit of exactly what the plan lists."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from floodrepro import __version__
from floodrepro.errors import CheckpointError, FloodreproError, UsageError
from floodrepro.publishing.card import CARD, RESULTS
from floodrepro.publishing.export import read_exported
from floodrepro.run_folder import sha256_of
from floodrepro.verification.report import PICTURE, required_sentence
from floodrepro.verification.results import load

_LOGIN = "hf auth login, or set HF_TOKEN, with a token that may write to it"


@dataclass(frozen=True)
class UploadPlan:
    """What would be uploaded where."""

    folder: Path  # the export
    repo: str  # OWNER/NAME
    endpoint: str  # address of the hub
    branch: str  # gets the commit
    private: bool  # whether the repository has to be private
    files: Mapping[str, str]  # sha256 by name
    left_out: list[str]  # other files of the folder, which stay here
    verdict: str  # empty where nothing was verified
    licence: str  # the card's; empty where none was chosen
    objection: str  # why this should not be published; empty where there is no reason

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return vars(self) | {"folder": str(self.folder)}


def make_plan(folder: Path, repo: str, *, branch: str, private: bool) -> UploadPlan:
    """Look through an export folder; nobody is contacted.

    Raises:
        UsageError: The repository's name is not valid, or the folder has no card or not one pair.
        CheckpointError: The pair or the card is damaged, or the results are of other weights.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--repo is no OWNER/NAME: {error}", where=repo) from error
    if repo.count("/") != 1:
        raise UsageError("--repo is no OWNER/NAME", where=repo)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1 or not (folder / CARD).is_file():
        what = f"the folder has {len(found)} safetensors files" if len(found) != 1 else f"there is no {CARD}"
        raise UsageError(what, where=folder, fix="floodrepro export --run DIR writes a pair and its card")
    weights = read_exported(found[0])
    names = [weights.path.name, weights.config.name, CARD]
    names += [name for name in (RESULTS, PICTURE) if (folder / name).is_file()]
    objection, verdict = "not verified: no required check was run", ""
    if (folder / RESULTS).is_file():
        results = load(folder / RESULTS)
        if (results["run"].get("checkpoint") or {}).get("sha256") != weights.metadata.get("source_sha256"):
            what = "results.json is of another checkpoint than the weights were exported from"
            raise CheckpointError(what, where=folder, fix="verify the run, then floodrepro export --card-only")
        verdict = "{word}. {sentence}".format(**results["verdict"])
        unmet = results["summary"] | {"required": []}  # without what is met
        objection = required_sentence(results | {"summary": unmet})
    try:
        licence = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get("license") or ""
    except (ValueError, yaml.YAMLError) as error:  # the first where it is not UTF-8
        raise CheckpointError(f"the card's metadata cannot be read: {error}", where=folder / CARD) from error
    files = {name: sha256_of(folder / name) for name in names}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in names)
    return UploadPlan(
        folder, repo, constants.ENDPOINT, branch, private, files, left_out, verdict, str(licence), objection
    )


def upload(plan: UploadPlan) -> str:
    """Make the repository if it is not there, commit the plan's files at once, and return the commit's address.

    ``upload_folder`` may spread a folder over several commits (huggingface_hub 2.4 with hf_xet), hence
    ``create_commit``.

    Raises:
        CheckpointError: A file was changed since the plan was made.
        FloodreproError: There is no token, or the hub refuses or cannot be reached.
    """
    where = f"{plan.endpoint}/{plan.repo}"
    if constants.HF_HUB_OFFLINE:
        raise FloodreproError("HF_HUB_OFFLINE forbids every request", where=where, fix="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise FloodreproError("there is no token for the hub", where=where, fix=_LOGIN)
    files = [CommitOperationAdd(name, plan.folder / name) for name in plan.files]
    for file, (name, digest) in zip(files, plan.files.items(), strict=True):
        if file.upload_info.sha256.hex() != digest:
            raise CheckpointError(f"{name} was changed since the plan was made", where=plan.folder, fix="publish again")
    api = HfApi(endpoint=plan.endpoint, library_name="floodrepro", library_version=__version__)
    try:
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if plan.private and not api.repo_info(plan.repo).private:  # exist_ok leaves a public one as it is
            what = "--private, and the repository is public already: nothing was uploaded"
            raise FloodreproError(what, where=where, fix="another --repo, or make it private on its page")
        if plan.branch != constants.DEFAULT_REVISION:
            api.create_branch(plan.repo, branch=plan.branch, exist_ok=True)
        name = next(name for name in plan.files if name.endswith(".safetensors"))
        done = api.create_commit(plan.repo, files, commit_message=f"Add {name}", revision=plan.branch)
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        what = f"the hub refuses (HTTP {error.response.status_code}): {said}"
        raise FloodreproError(what, where=where, fix=f"check --repo; {_LOGIN}") from error
    except HTTPError as error:  # of the HTTP library, which is httpx or httpx2
        what = f"the hub cannot be reached: {type(error).__name__}: {error}"
        raise FloodreproError(what, where=where, fix="check the network and HF_ENDPOINT, and try again") from error
    return str(done.commit_url)
