"""The training augmentation: one of the eight symmetries of a square for each chip of an epoch."""

import hashlib

import torch

_AXES = (-2, -1)


def hashed_number(seed: int, epoch: int, what: str) -> int:
    """A number from 0 to 2^64 - 1 that looks random and depends on the three arguments only.

    So neither the order of chips, nor the number of workers or processes, nor an interruption changes it.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=8).digest(), "little")


def draw_symmetry(seed: int, epoch: int, chip: str) -> int:
    """The symmetry of a chip in an epoch, 0 to 7, equally likely. 0 leaves the chip as it is."""
    return hashed_number(seed, epoch, chip) % 8


def apply_symmetry(symmetry: int, image: torch.Tensor) -> torch.Tensor:
    """Apply a symmetry (0 to 3: quarter turns; 4 to 7: of the transposed image) to the last two axes (..., H, W).

    Raises:
        ValueError: The image is not square.
    """
    if image.shape[-1] != image.shape[-2]:
        raise ValueError(f"augment needs square chips, these have {image.shape[-2]} x {image.shape[-1]} pixels")
    turns, image = (symmetry, image) if symmetry < 4 else (symmetry - 3, image.transpose(*_AXES))
    return torch.rot90(image, turns, _AXES)
