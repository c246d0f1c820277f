"""Put an export on the hub: first a plan that contacts nobody, then one commit of the files that it lists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from floodrepro import __version__
from floodrepro.console import public
from floodrepro.errors import CheckpointError, FloodreproError, UsageError
from floodrepro.publishing.card import CARD, RESULTS
from floodrepro.publishing.export import read_exported
from floodrepro.run_folder import sha256_of
from floodrepro.verification import results
from floodrepro.verification.report import PICTURE


def make_plan(folder: Path, repo: str, *, branch: str, private: bool) -> dict[str, Any]:
    """Look through an export folder; nobody is contacted.

    Returns:
        JSON types: what was given, `endpoint` (the hub's address), `files` (sha256 by name), `left_out` (other files),
        and, empty where there is none, `verdict`, `licence` and `objection`: why this should not be published.

    Raises:
        UsageError: The repository's name is not valid, or the folder has no card, not one pair, or a link.
        CheckpointError, TableError: The pair, the card or results.json is damaged, or of other weights.
    """
    try:
        validate_repo_id(repo)
        _, _ = repo.split("/")
    except ValueError as error:  # huggingface_hub's own is one
        raise UsageError(f"--repo is no OWNER/NAME: {error}", where=repo) from error
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1 or not (folder / CARD).is_file():
        what = f"the folder needs one .safetensors and a {CARD}: it has {len(found)} .safetensors"
        raise UsageError(what, where=folder, fix="floodrepro export --run DIR writes a pair and its card")
    weights = read_exported(found[0])
    names = [weights.path.name, weights.config.name, CARD]
    names += [name for name in (RESULTS, PICTURE) if (folder / name).is_file()]
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise UsageError("this is a link, and is not followed", where=folder / links[0], fix="put the file there")
    objection, verdict = "not verified: no required check was run", ""
    if RESULTS in names:
        said = results.load(folder / RESULTS, weights.metadata.get("source_sha256", "unknown"))
        verdict, objection = "{word}. {sentence}".format(**said["verdict"]), said["summary"]["objection"]
    try:
        licence = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get("license") or ""
    except (ValueError, yaml.YAMLError) as error:  # the first where it is not UTF-8
        raise CheckpointError(f"the card's metadata cannot be read: {error}", where=folder / CARD) from error
    return {
        "folder": str(folder),
        "repo": repo,
        "endpoint": public(constants.ENDPOINT),
        "branch": branch,
        "private": private,
        "files": {name: sha256_of(folder / name) for name in names},
        "left_out": sorted(path.name for path in folder.iterdir() if path.name not in names),
        "verdict": verdict,
        "licence": str(licence),
        "objection": objection,
    }


def upload(plan: Mapping[str, Any]) -> str:
    """Make the repository if it is not there, commit the plan's files at once, and return the commit's address.

    ``upload_folder`` may spread a folder over several commits (huggingface_hub 2.4 with hf_xet), hence
    ``create_commit``.

    Raises:
        FloodreproError: There is no token, or the hub refuses or cannot be reached.
    """
    repo, branch, private, where = plan["repo"], plan["branch"], plan["private"], f"{plan['endpoint']}/{plan['repo']}"
    files = [CommitOperationAdd(name, Path(plan["folder"], name)) for name in plan["files"]]
    found = {file.path_in_repo: file.upload_info.sha256.hex() for file in files}
    if changed := [name for name, digest in plan["files"].items() if found[name] != digest]:
        what = f"{changed[0]} has changed since it was listed: nothing was uploaded"
        raise CheckpointError(what, where=plan["folder"], fix="the same command again")
    api = HfApi(library_name="floodrepro", library_version=__version__)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:  # exist_ok leaves a public one as it is
            what = "--private, and the repository is public already: nothing was uploaded"
            raise FloodreproError(what, where=where, fix="another --repo, or make it private on its page")
        if branch != constants.DEFAULT_REVISION:
            api.create_branch(repo, branch=branch, exist_ok=True)
        done = api.create_commit(repo, files, commit_message=f"Add {files[0].path_in_repo}", revision=branch)
    except (HTTPError, OSError) as error:  # of the HTTP library, which is httpx or httpx2; HF_HUB_OFFLINE; no file
        what = f"the hub refuses or cannot be reached: {type(error).__name__}: {public(str(error))}"
        fix = "check --repo, the network and HF_ENDPOINT; hf auth login, or HF_TOKEN with a token that may write to it"
        raise FloodreproError(what, where=where, fix=fix) from error
    return str(done.commit_url)
