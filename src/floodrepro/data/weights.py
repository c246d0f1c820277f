"""The weights that a reproduction needs besides chips: the pretrained backbone and IBM's checkpoint, on the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from floodrepro.errors import CheckpointError, DataError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import sha256_of


class HubFile(NamedTuple):
    """A file of a model repository on the Hugging Face hub; its sha256 where one was published."""

    repo: str
    name: str
    revision: str | None = None  # None: `main`, as TerraTorch asks for it
    sha256: str | None = None

    @property
    def command(self) -> list[str]:
        """The command line of huggingface_hub that fetches the same."""
        return ["hf", "download", self.repo, self.name, *(["--revision", self.revision] if self.revision else [])]


# IBM's two-class model of version 0; commit and hash as its repository's page showed them. 673 MB.
REFERENCE = HubFile(
    "ibm-esa-geospatial/TerraMind-base-Flood",
    "TerraMind_v1_base_ImpactMesh_flood.pt",
    "1e4b2429d17234922f8d92beb0d725af4db85c08",
    "22627584c2db618c2f6ddb64b411a95762a893becb25104e3f66bfebecaa71e9",
)


def backbone_weights(model_args: Mapping[str, Any]) -> HubFile | None:
    """What TerraTorch 1.2.7 (terramind_register.py) fetches for a recipe's `model_args`, if it fetches and is known."""
    if not model_args.get("backbone_pretrained") or model_args.get("backbone_ckpt_path"):
        return None
    size = re.fullmatch(r"terramind_v1_(tiny|small|base|large)(?:_tim)?", str(model_args.get("backbone")))
    return HubFile(f"ibm-esa-geospatial/TerraMind-1.0-{size[1]}", f"TerraMind_v1_{size[1]}.pt") if size else None


def describe_weights(model_args: Mapping[str, Any]) -> str | None:
    """What a recipe's backbone starts from, by its id on the hub or in words; None for random weights."""
    if own := model_args.get("backbone_ckpt_path"):
        return f"weights of {Path(own).name}"
    if file := backbone_weights(model_args):
        return file.repo
    return "the backbone's own pretrained weights" if model_args.get("backbone_pretrained") else None


def model_args(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of backbone and decoder; empty where it says nothing."""
    return ((recipe.get("model") or {}).get("init_args") or {}).get("model_args") or {}


def describe_model(recipe: Recipe, record: Mapping[str, Any]) -> list[str]:
    """Backbone and decoder of a recipe, and what the training of a run's record started from, in words."""
    arguments, source = model_args(recipe), record.get("started_from")
    start = f"{source['file']}, sha256 {source['sha256']}" if source else describe_weights(arguments)
    parts = f"{arguments.get('backbone', 'a backbone')} with {arguments.get('decoder', 'a decoder')}"
    return [parts, f"started from {start or 'random weights'}"]


def fetch_file(file: HubFile) -> Path:
    """Fetch a file into huggingface_hub's cache, or find it there, and check its hash.

    Raises:
        DataError: It is neither in the cache nor can it be fetched.
        CheckpointError: Its content is not the published one.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        path = Path(hf_hub_download(file.repo, file.name, revision=file.revision))
    except (OSError, HTTPError) as error:  # no network, and not in the cache; a connection that breaks
        fix = f"{' '.join(file.command)}; without a network, copy the cache (HF_HOME) of a machine that has it"
        raise DataError(f"{file.name} cannot be fetched: {error}", where=file.repo, fix=fix) from error
    if file.sha256 is not None and (found := sha256_of(path)) != file.sha256:
        what = f"the file is not the published one: sha256 {found}, expected {file.sha256}"
        raise CheckpointError(what, where=path.resolve(), fix="delete it, check HF_ENDPOINT, and fetch it again")
    return path
