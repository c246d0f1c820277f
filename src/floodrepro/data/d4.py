"""D4 augmentation: one of a square's eight symmetries for each chip, drawn from seed, epoch and chip id alone."""

import hashlib
from collections.abc import Callable

import torch

# The group's elements under the names, and in the order, that albumentations.D4 gives them.
ELEMENTS = ("e", "r90", "r180", "r270", "v", "hvt", "h", "t")
_AXES = (-2, -1)
_OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "e": lambda x: x,
    "r90": lambda x: torch.rot90(x, 1, _AXES),
    "r180": lambda x: torch.rot90(x, 2, _AXES),
    "r270": lambda x: torch.rot90(x, 3, _AXES),
    "v": lambda x: x.flip(-2),
    "hvt": lambda x: torch.rot90(x, 2, _AXES).transpose(*_AXES),
    "h": lambda x: x.flip(-1),
    "t": lambda x: x.transpose(*_AXES),
}


def draw(seed: int, epoch: int, chip: str) -> str:
    """The symmetry of a chip in an epoch.

    It depends on nothing else: not on the order of chips, the number of workers or processes, or where a run was
    interrupted. A hash serves as the generator, since a seeded one would have to be made anew for each chip; eight
    divides 2^64, so that the eight are exactly equally likely.
    """
    return ELEMENTS[number(seed, epoch, chip) % len(ELEMENTS)]


def number(seed: int, epoch: int, what: str) -> int:
    """A number from 0 to 2^64 - 1 that looks random and depends on the three arguments only."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def apply(element: str, image: torch.Tensor) -> torch.Tensor:
    """Apply a symmetry to the last two axes.

    Args:
        element: One of `ELEMENTS`.
        image: Tensor (..., H, W), H = W.

    Returns:
        Tensor of the same shape; a view where torch can give one.

    Raises:
        ValueError: The image is not square.
    """
    if image.shape[-1] != image.shape[-2]:
        raise ValueError(f"D4 needs square chips, these are {image.shape[-2]} x {image.shape[-1]} pixels")
    return _OPERATIONS[element](image)
