"""What names and sizes tell about a data set: counts, missing parts, duplicates, overlaps, and a digest.

No pixel is read: some 80,000 chips take seconds, so that fit and test can look before they start.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from floodrepro.data.chips import PARTS, ChipSource, open_source_loudly
from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.moments import Finding
from floodrepro.data.names import PROTOCOLS, SPLITS, ChipId, split_file
from floodrepro.errors import DataError, UsageError

OVERLAP = "event-overlap"
SHOWN = 5  # events that a warning lists
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
BOM_MEANS = "it starts with a byte order mark, which impactmesh takes for part of the first chip's id"
SEEN = "test_seen_events"  # v1's list of those test chips whose events are in train too: overlap, but declared


@dataclass(frozen=True)
class QuickAudit:
    """What names and sizes tell about a data set.

    Args:
        protocol: The one that it was held against.
        layout: `extracted` or `tars`.
        chips: Number of chips by split.
        events: Number of events by split.
        findings: What is wrong or worth knowing.
        digest: See the module's docstring.
    """

    protocol: str
    layout: str
    chips: dict[str, int]
    events: dict[str, int]
    findings: tuple[Finding, ...]
    digest: str

    @property
    def errors(self) -> list[Finding]:
        """The findings that stand against training on this data."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def raise_for_errors(self, where: Path) -> None:
        """Raise `DataError` if there is an error, naming the first."""
        if self.errors:
            first = self.errors[0].line().removeprefix("error: ")
            what = f"the data does not fit protocol {self.protocol}: {first}"
            more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            raise DataError(f"{what}{more}", where=where, fix="floodrepro data audit lists all of it")


@dataclass(frozen=True)
class Survey:
    """Names and sizes: chips by split, and bytes by chip and part."""

    source: ChipSource
    protocol: str
    splits: dict[str, list[str]]
    sizes: dict[str, dict[str, int]]
    findings: list[Finding]

    @property
    def listed(self) -> list[str]:
        """Ids of the chips that a split names, sorted."""
        return sorted({chip for chips in self.splits.values() for chip in chips})

    def head(self) -> Iterator[str]:
        """The digest's lines of the first kind."""
        yield from sorted(f"{split} {chip}\n" for split, chips in self.splits.items() for chip in chips)

    def digest(self) -> str:
        """The sha256 that `floodrepro.data.audit` documents."""
        sha256 = hashlib.sha256("".join(self.head()).encode())
        for chip in self.listed:
            for part, size in sorted(self.sizes.get(chip, {}).items()):
                sha256.update(f"{chip} {part} {size}\n".encode())
        return sha256.hexdigest()

    def quick(self) -> QuickAudit:
        """The survey as a result."""
        counts = {split: len(chips) for split, chips in self.splits.items()}
        events = {split: len(events_of(chips)) for split, chips in self.splits.items()}
        findings = tuple(self.findings)
        return QuickAudit(self.protocol, self.source.layout, counts, events, findings, self.digest())


def quick_audit(
    root: Path, protocol: str, *, split_files: Mapping[str, Path] | None = None, source: ChipSource | None = None
) -> QuickAudit:
    """Check names and sizes; no pixel is read.

    Args:
        root: A folder in ImpactMesh-Flood's layout, or the ``data`` folder in it.
        protocol: `v0`, `v1` or `v1-binary`.
        split_files: By split, if they do not lie in ``split/``, or if only some of them matter.
        source: The chips, if they are open already.

    Raises:
        UsageError: There is no such protocol.
        DataError: There are no chips at all, or an archive is damaged.
    """
    return make_survey(root, protocol, split_files, source).quick()


def expected_chips(protocol: str) -> dict[str, int]:
    """Number of chips that the published data has, by split."""
    return dict(zip(SPLITS, PROTOCOLS[DATA_OF[protocol]].chip_counts, strict=True))


def make_survey(root: Path, protocol: str, split_files: Mapping[str, Path] | None, source: ChipSource | None) -> Survey:
    """Read the split files and list the chips' files; raises as `quick_audit`."""
    if protocol not in DATA_OF:
        raise UsageError(f"--protocol is {protocol!r}, expected {', '.join(DATA_OF)}", fix="--protocol v0")
    source = source or open_source_loudly(root)
    findings: list[Finding] = []
    files = split_files if split_files is not None else _find_split_files(root)
    splits = {split: _read_split(split, file, findings) for split, file in files.items()}
    sizes = _sizes(source)
    survey = Survey(source, protocol, splits, sizes, findings)
    for chip in survey.listed:
        missing = [part for part in PARTS if part not in sizes.get(chip, {})]
        if missing:
            findings.append(Finding("error", "missing-part", f"it has no {', '.join(missing)}", chip))
    findings += [Finding("error", "duplicate-part", line) for line in source.duplicates()]
    expected = {split: count for split, count in expected_chips(protocol).items() if split in splits}
    # The counts have to tell the published lists: no digest of them is published.
    published = all(len(splits[split]) == count for split, count in expected.items())
    findings += _overlaps(splits, published=published)
    if unlisted := sorted(sizes.keys() - set(survey.listed)):
        message = f"no split names {len(unlisted)} of the chips on disk, such as {unlisted[0]}"
        findings.append(Finding("warning", "unlisted", message))
    if not published:
        counted = ", ".join(f"{split} {len(splits[split]):,} of {count:,}" for split, count in expected.items())
        message = f"the counts are not the published ones: a subset or generated data ({counted})"
        findings.append(Finding("warning", "counts", message))
    return survey


def _find_split_files(root: Path) -> dict[str, Path]:
    """train, val and test, there or not, and whatever other lists lie beside them."""
    folder = next((f for f in (root / "split", root.parent / "split") if f.is_dir()), root / "split")
    prefix = split_file("").removesuffix(".txt")
    others = {file.stem.removeprefix(prefix): file for file in sorted(folder.glob(f"{prefix}*.txt"))}
    return {split: folder / split_file(split) for split in SPLITS} | others


def _read_split(split: str, file: Path, findings: list[Finding]) -> list[str]:
    """The chips of a split, each once; a line that names no chip is a finding."""

    def add(check: str, message: str, chip: str | None = None) -> None:
        findings.append(Finding("error", check, message, chip, file.name))

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        add("split-file", f"the split cannot be read: {reason}")
        return []
    if text.startswith(BOM):
        add("split-file", BOM_MEANS)
    lines = [line.strip() for line in text.removeprefix(BOM).splitlines()]
    if not lines:
        add("split-file", "the split is empty")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            add("blank-line", f"line {number} is blank: impactmesh takes it for a chip")
        elif line in first:
            add("listed-twice", f"{line} is in lines {first[line]} and {number}", line)
        else:
            try:
                ChipId.parse(line)
                first[line] = number
            except ValueError as error:
                add("chip-id", f"line {number}: {error}")
    return list(first)


def _sizes(source: ChipSource) -> dict[str, dict[str, int]]:
    """Bytes of each chip's files by part."""
    sizes: dict[str, dict[str, int]] = {}
    for part in PARTS:
        for chip in source.parts(part):
            size = source.file_size(chip, part)
            if size is None:
                continue  # a link that leads nowhere: the part is missing
            sizes.setdefault(chip, {})[part] = size
    return sizes


def events_of(chips: Iterable[str]) -> dict[str, set[str]]:
    """Chips by Copernicus EMS event."""
    events: dict[str, set[str]] = {}
    for chip in chips:
        events.setdefault(chip.split("_", 1)[0], set()).add(chip)
    return events


def _overlaps(splits: Mapping[str, Sequence[str]], *, published: bool) -> list[Finding]:
    """Chips and events that lie in two splits; a further test split is held against train and val only.

    An event in two splits is an error, but for the published splits: nobody but their authors can mend them.
    """
    extra = [split for split in splits if split not in SPLITS and split.startswith("test_")]
    pairs = [*combinations([split for split in SPLITS if split in splits], 2)]
    pairs += [(split, other) for split in ("train", "val") if split in splits for other in extra]
    declared = set(splits.get(SEEN, ()))
    findings, seen = [], set()
    for one, other in pairs:
        both = sorted(set(splits[one]) & set(splits[other]))
        findings += [Finding("error", "split-overlap", f"it is in {one} and in {other}", chip) for chip in both]
        events, others = events_of(splits[one]), events_of(splits[other])
        shared = []
        for event in sorted(events.keys() & others.keys()):
            if other in ("test", SEEN) and others[event] <= declared:
                seen.add(event)
                continue
            shared.append(event)
        if shared and published:
            listed = ", ".join(shared[:SHOWN]) + (", …" if len(shared) > SHOWN else "")
            events_lie = "1 event lies" if len(shared) == 1 else f"{len(shared)} events lie"
            which = f"{one} and in {other} of the published splits, which are used as they are"
            findings.append(Finding("warning", OVERLAP, f"{events_lie} in {which}: {listed}"))
        for event in () if published else shared:
            counts = f"{one} ({len(events[event])} chips) and in {other} ({len(others[event])})"
            message = f"event {event} is in {counts}: all its chips have to be in one split"
            findings.append(Finding("error", OVERLAP, message))
    if seen:
        message = f"events of test that training sees as well, as {split_file(SEEN)} declares ({len(seen)}): "
        findings.append(Finding("info", "seen-events", message + ", ".join(sorted(seen))))
    return findings
