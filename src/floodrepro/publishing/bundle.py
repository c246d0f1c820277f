"""The export folder: a pair, its card and its results, tied to each other by hashes. Nothing here imports torch.

The card ends in a seal, a comment with the sha256 of its own text and of the files that it speaks of. By it an edited
card is told from one that may be written anew, and weights are told from others of the same name.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.run_folder import sha256_of, write_atomically

CARD, RESULTS = "README.md", "results.json"

_SEAL = re.compile(r"\n<!-- floodrepro wrote this card; (?P<seal>\{.*\}) -->\n\Z")
_ANEW = "floodrepro export --card-only writes the card anew"


@dataclass(frozen=True)
class Weights:
    """A safetensors file, as its header describes it.

    Args:
        path: The file.
        sha256: Of the file.
        tensors: Number of tensors.
        values: Number of values in them, buffers included.
        metadata: What the export wrote into the header: recipe_sha256, data_digest, source_sha256, …
    """

    path: Path
    sha256: str
    tensors: int
    values: int
    metadata: dict[str, str]


@dataclass(frozen=True)
class Card:
    """A README.md that floodrepro wrote.

    Args:
        text: Its text, the seal left out.
        edited: Whether the text is another than the one that was sealed.
        files: The sha256 of each file that it speaks of, by name.
    """

    text: str
    edited: bool
    files: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Read the header of an exported safetensors file, and hash all of it.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError("there are no exported weights", where=path, fix="floodrepro export --run DIR")
    try:
        with safe_open(str(path), framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the exported weights are damaged: {error}", where=path) from error
    values = sum(math.prod(shape) for shape in shapes)
    return Weights(path, sha256_of(path), len(shapes), values, metadata)


def refuse_card(folder: Path) -> None:
    """Raise `UsageError` if a card lies in a folder already, or results do."""
    for name in (CARD, RESULTS):
        if (folder / name).exists():
            raise UsageError(
                "the file exists already and is not overwritten",
                where=folder / name,
                fix="--output DIR, or --card-only for a new card of the pair that is there",
            )


def refuse_edited(folder: Path) -> None:
    """Raise `UsageError` if a folder's card or results are not as floodrepro wrote them."""
    if not (folder / CARD).exists():
        return
    card = read_card(folder)
    results = folder / RESULTS
    changed = CARD if card.edited else None
    if changed is None and results.exists() and sha256_of(results) != card.files.get(RESULTS):
        changed = RESULTS
    if changed:
        raise UsageError(
            f"{changed} was changed since floodrepro wrote it, and is not overwritten",
            where=folder / changed,
            fix="move it away (both it and README.md if it is results.json), and give the same command again",
        )


def write_card(folder: Path, text: str, pair: tuple[Path, Path], results: Path | None) -> Path:
    """Write the card, sealed, and beside it a copy of the results that it was made from.

    Args:
        folder: The export folder.
        text: The card.
        pair: Weights and config.
        results: The run's results.json; None where there is none.

    Returns:
        The card's path.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    copy = folder / RESULTS
    try:
        if results is not None:
            write_atomically(copy, results.read_text(encoding="utf-8"))
        else:
            copy.unlink(missing_ok=True)  # of an earlier card; `refuse_edited` has seen that it was ours
        files = {path.name: sha256_of(path) for path in (*pair, *([copy] if results is not None else []))}
        seal = json.dumps({"card": _digest(text), "files": files})
        write_atomically(folder / CARD, f"{text}\n<!-- floodrepro wrote this card; {seal} -->\n")
    except OSError as error:
        raise RunFolderError(f"the card cannot be written: {error.strerror or error}", where=folder) from error
    return folder / CARD


def read_card(folder: Path) -> Card:
    """Read a folder's card.

    Raises:
        UsageError: There is none, or it was not written by floodrepro.
    """
    path = folder / CARD
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"there is no card to be read: {error.strerror}", where=path, fix=_ANEW) from error
    match = _SEAL.search(content)
    if match is None:
        raise UsageError(
            "the card was not written by floodrepro, or its last line is gone",
            where=path,
            fix=f"move it away; {_ANEW}",
        )
    text, seal = content[: match.start()], json.loads(match["seal"])
    return Card(text, seal["card"] != _digest(text), seal["files"])


def check_files(folder: Path, card: Card) -> dict[str, Any] | None:
    """Check that the files beside a card are those that it speaks of, and give the results among them.

    Raises:
        CheckpointError: A file is missing or another one, or the results are of other weights.
    """
    for name, digest in card.files.items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "none, it is missing"
        if found != digest:
            what = f"{name} is not the file that the card speaks of: sha256 {found}, the card says {digest}"
            raise CheckpointError(what, where=folder, fix=_ANEW)
    if RESULTS not in card.files:
        return None
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    source = read_weights(folder / weights_name(card)).metadata.get("source_sha256")
    tested = (results["run"].get("checkpoint") or {}).get("sha256")
    if tested != source:
        what = f"results.json is of the checkpoint {tested}, the weights were exported from {source}"
        raise CheckpointError(what, where=folder, fix="export and verify the same run")
    return results


def weights_name(card: Card) -> str:
    """Name of the weights that a card speaks of."""
    return next(name for name in card.files if name.endswith(".safetensors"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
