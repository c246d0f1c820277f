"""What the whole path fetches beside the chips, and how large all of it is, each with where that was read."""

import re
from dataclasses import dataclass
from pathlib import Path

from floodrepro.errors import CheckpointError, DataError
from floodrepro.run_folder import sha256_of

DATA_BYTES = {"v0": 210e9, "v1": 72e9}  # inferred from the chips' sizes: nobody has written them down


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository on the hub.

    Args:
        repo: The repository's id.
        name: The file's.
        revision: Branch or commit; None for what TerraTorch asks for, `main`.
        sha256: What the content has to be; None where no one has said.
    """

    repo: str
    name: str
    revision: str | None = None
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


def backbone_weights(backbone: str) -> HubFile | None:
    """What TerraTorch 1.2.7 (terramind_register.py) fetches for a pretrained backbone; None for one that is not known.

    Args:
        backbone: As the recipe names it, such as `terramind_v1_base`.
    """
    size = re.fullmatch(r"terramind_v1_(tiny|small|base|large)(?:_tim)?", backbone)
    return HubFile(f"ibm-esa-geospatial/TerraMind-1.0-{size[1]}", f"TerraMind_v1_{size[1]}.pt") if size else None


def fetch_file(file: HubFile) -> Path:
    """Fetch a file into huggingface_hub's cache, or find it there, and check its hash.

    Raises:
        DataError: It cannot be had.
        CheckpointError: Its content is not what it should be.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(hf_hub_download(file.repo, file.name, revision=file.revision))
    except (HfHubHTTPError, OSError) as error:  # no network and not in the cache is an OSError as well
        fix = f"{' '.join(file.command)}; where there is no network, copy the cache (HF_HOME) of a machine that did"
        raise DataError(f"{file.name} cannot be fetched: {error}", where=file.repo, fix=fix) from error
    check_hash(path, file.sha256)
    return path


def in_cache(file: HubFile) -> Path | None:
    """A file that was fetched before; None where it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.name, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def cached_file(file: HubFile) -> Path:
    """A file that was fetched before.

    Raises:
        DataError: It is not in the cache.
    """
    if path := in_cache(file):
        return path
    raise DataError(f"{file.name} is not in huggingface_hub's cache", where=file.repo, fix=" ".join(file.command))


def check_hash(path: Path, sha256: str | None) -> None:
    """Raise `CheckpointError` if a file is not the one that it should be."""
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise CheckpointError(
            f"the file is not the one that was expected: sha256 {found}, expected {sha256}",
            where=path.resolve(),  # in the cache a link: without its target it is fetched again
            fix="delete it and start again, and mind what HF_ENDPOINT names; --reference none goes on without one",
        )
