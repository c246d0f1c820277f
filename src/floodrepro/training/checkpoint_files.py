"""Checkpoint files that are whole or not there: written beside, hashed, flushed to the disk, then renamed.

Lightning 2.6.1 writes to a temporary file below TMPDIR first and moves it: where that is another filesystem, the move
is a copy, and a kill in the middle of it leaves half a file under the final name.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from floodrepro import console
from floodrepro.errors import CheckpointError
from floodrepro.run_folder import PARTIAL, free_name, sha256_of, write_atomically

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_BLOCK = 1 << 20


class BestWeights(ModelCheckpoint):
    """Lightning's own under another name: it may stand beside another one that watches the same value."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way to write and read checkpoints, without its temporary file.

    ``last.ckpt`` has its sha256 beside it, in the format of sha256sum, and leaves the one before as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; raises `CheckpointError` where the disk does not take it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, digest = _write_beside(checkpoint, target)
        try:
            if target.name == LAST:
                # In this order a kill between any two lines leaves a file whose hash is the one beside it.
                if target.exists():
                    previous = target.with_name(PREVIOUS)
                    _write_digest(previous, _read_digest(target) or sha256_of(target))
                    target.replace(previous)
                _write_digest(target, digest)
            temporary.replace(target)
            _flush_folder(target.parent)
        except OSError as error:
            raise _unwritable(target, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the CPU, tensors and plain values only: nothing in it is ever run."""
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded


def newest_whole(folder: Path) -> Path | None:
    """The newest full state of which every byte is as it was written.

    A ``last.ckpt`` that is truncated, empty or altered is set aside under another name, with a warning that names both
    files. What a killed process left half written is removed.

    Args:
        folder: The run's checkpoints.

    Returns:
        ``last.ckpt`` or ``previous.ckpt``; None where neither was written yet.

    Raises:
        CheckpointError: There was one, and none is whole.
    """
    for orphan in folder.glob(f".*{PARTIAL}"):
        orphan.unlink()
    last, previous = folder / LAST, folder / PREVIOUS
    if is_whole(last):
        return last
    fallback = previous if is_whole(previous) else None
    if last.exists():
        aside = folder / f"{LAST}.damaged"
        aside = last.replace(aside.with_name(free_name(aside)) if aside.exists() else aside)
        if fallback is None:
            raise CheckpointError(
                f"{LAST} is damaged (its sha256 is another), and there is no whole {PREVIOUS}",
                where=aside,
                fix="start again under another --name; the damaged file was kept",
            )
        console.warn(f"{LAST} is damaged (its sha256 is another): set aside as {aside.name}, going on from {PREVIOUS}")
    elif previous.exists() and fallback is None:
        raise CheckpointError(f"{PREVIOUS} is damaged and there is no {LAST}", where=previous, fix="another --name")
    return fallback


def is_whole(path: Path) -> bool:
    """Whether a full state is there and its bytes have the sha256 that stands beside it."""
    wanted = _read_digest(path)
    return path.is_file() and wanted is not None and sha256_of(path) == wanted


def has_digest(path: Path) -> bool:
    """Whether a sha256 stands beside a full state."""
    return _read_digest(path) is not None


class _Hashing:
    """A file that torch writes to: hashes what goes by, and keeps the system's own error, which torch replaces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        try:
            self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(block)
        return len(block)

    def flush(self) -> None:
        self._file.flush()


def _write_beside(checkpoint: dict[str, Any], target: Path) -> tuple[Path, str]:
    """Write to a temporary file in the target's folder, down to the disk; returns it and its sha256."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=PARTIAL)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb", buffering=_BLOCK) as file:
            hashing = _Hashing(file)
            try:
                torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # torch asks for write() and flush() only
            except RuntimeError as error:
                raise hashing.error or error from error
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600, which would hide results from the user's group
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(target, error) from error
        raise
    return temporary, hashing.sha256.hexdigest()


def _unwritable(target: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint cannot be written: {error.strerror}",
        where=target,
        fix="free some disk and run the same command: it goes on from the checkpoint before, which is whole",
    )


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write_digest(path: Path, digest: str) -> None:
    write_atomically(_digest_file(path), f"{digest}  {path.name}\n")


def _read_digest(path: Path) -> str | None:
    try:
        words = _digest_file(path).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return None
    return words[0] if words else None


def _flush_folder(folder: Path) -> None:
    """Make renames durable; fsync(2) asks for the folder as well as the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
