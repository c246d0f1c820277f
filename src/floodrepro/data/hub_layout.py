"""ImpactMesh-Flood's layout on the hub: which files belong to it, and which version of the data they are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from floodrepro.data import names
from floodrepro.data.ledger import RemoteFile
from floodrepro.errors import DataError

PARTS = (*names.MODALITIES, names.LABEL_DIR)
# The version of the data that a protocol reads. v1-binary maps v1's masks to two classes while they are read.
DATA_OF = {"v0": "v0", "v1": "v1", "v1-binary": "v1"}
_V1_ONLY = {f"split/{names.split_file(name)}" for name in ("test_seen_events", "test_holdout")}
# v0's optical archives of train are S2L2A_1.tar to S2L2A_3.tar; all others are plainly <split>/<MODALITY>.tar.
_ARCHIVE = re.compile(rf"({'|'.join(names.SPLITS)})/([A-Za-z0-9]+)(?:[_-][\w-]+)?\.tar")
_SPLIT_FILE = re.compile(r"split/\w[\w.-]*\.txt")


@dataclass(frozen=True)
class Version:
    """What the split files say a commit holds.

    Args:
        name: `v0` or `v1`; with `-like` where the counts are of neither published version.
        chips: Number of chips by split.
    """

    name: str
    chips: dict[str, int]

    @property
    def published(self) -> bool:
        """Whether the counts are those of a published version."""
        return self.name in names.PROTOCOLS

    def __str__(self) -> str:
        """Name and counts, for a reader."""
        counts = ", ".join(f"{split} {count:,}" for split, count in self.chips.items())
        note = "" if self.published else "; counts of neither published version: a subset, or generated data"
        return f"{self.name} ({counts} chips{note})"


def is_part(path: str) -> bool:
    """Whether a path is a split file or an archive; cards, pictures and anything else are left on the hub."""
    return bool(_ARCHIVE.fullmatch(path) or _SPLIT_FILE.fullmatch(path))


def select(
    files: Mapping[str, RemoteFile], splits: Sequence[str], modalities: Sequence[str], where: str
) -> tuple[list[str], list[str]]:
    """Paths of the split files, and of the archives that are wanted: the small ones, masks and DEM, first.

    Raises:
        DataError: The commit lacks a split file or an archive of a wanted split and modality.
    """
    matches = [match for path in files if (match := _ARCHIVE.fullmatch(path))]
    held = {(match[1], match[2]) for match in matches}
    needed = [f"split/{names.split_file(split)}" for split in names.SPLITS]
    missing = [path for path in needed if path not in files]
    missing += [f"{s}/{m}*.tar" for s in splits for m in modalities if (s, m) not in held]
    if missing:
        raise DataError(
            f"the commit lacks {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}",
            where=where,
            fix=f"it holds archives of {', '.join(sorted({part for _, part in held})) or 'nothing'}"
            f" for {', '.join(sorted({split for split, _ in held})) or 'no split'}: --split, --modality, --repo choose",
        )
    archives = [match[0] for match in matches if match[1] in splits and match[2] in modalities]
    archives.sort(key=lambda path: (files[path].size, path))
    return [path for path in files if _SPLIT_FILE.fullmatch(path)], archives


def identify(root: Path, paths: Sequence[str]) -> Version:
    """Tell the data's version by the number of chips that its split files list.

    Args:
        root: The data set's folder.
        paths: The split files that belong to the data, relative to the folder.
    """
    chips = {}
    for split in names.SPLITS:
        text = (root / "split" / names.split_file(split)).read_text(encoding="utf-8", errors="replace")
        chips[split] = sum(1 for line in text.splitlines() if line.strip())
    for protocol in names.PROTOCOLS.values():
        if tuple(chips.values()) == protocol.chip_counts:
            return Version(protocol.name, chips)
    return Version("v1-like" if _V1_ONLY & set(paths) else "v0-like", chips)


def check_protocol(version: Version, protocol: str | None, commit: str) -> None:
    """Raise `DataError` if a protocol was asked for that the data cannot give."""
    if protocol is None or version.name.removesuffix("-like") == DATA_OF[protocol]:
        return
    if DATA_OF[protocol] == "v0":
        ways = "--revision of a commit that holds v0, or --protocol v1-binary: v1's masks read as v0's two classes"
    else:
        ways = "--revision of a commit that holds v1 (v1 and v1-binary both need v1 data), or --protocol v0"
    raise DataError(f"--protocol {protocol} needs {DATA_OF[protocol]} data, this is {version}", where=commit, fix=ways)
