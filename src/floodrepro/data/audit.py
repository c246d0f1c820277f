"""Is this the data that a protocol means, and is it whole? A quick look at names and sizes, or a deep one at pixels.

The result is ``data-manifest.json`` in the data set's folder, schema 1::

    schema          1
    protocol        v0, v1 or v1-binary
    layout          extracted or tars
    splits          by split file: chips, events, and the published number of chips (null for further test splits)
    digest          sha256 of the lines "<split> <chip>", sorted, then "<chip> <part> <bytes>", sorted, of all chips
                    that a split names: the same for either layout, and for a quick audit and a deep one
    findings        severity (error, warning, info), check, message, chip, file; null where it is about no chip or file
    deep            null after a quick audit, else
      content_digest  as digest, with the file's sha256 at the end of each line of the second kind
      chips           number of chips read, by split ("unlisted": no split names them), as in the next three
      class_shares    by class of the mask, ignored pixels left out
      missing_shares  by part, the share of pixels without data in any band; of MASK, the ignored ones
      bands           by modality: count, mean and std of each band's values, missing ones left out
      compared        with a recipe's statistics: recipe, its name, and bands: by modality z and std_ratio, as
                      `moments.Totals.compare` gives them; null if it was not asked for
      flood_change    pixels called flood, and the mean of VV(event) - VV(before) over them in dB
"""

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from multiprocessing.connection import wait as wait_for_process
from pathlib import Path
from typing import IO, Any

from floodrepro import console
from floodrepro.data.chip_checks import DAMAGED, check_chip
from floodrepro.data.chips import ChipSource
from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.moments import ChipRecord, Finding
from floodrepro.data.names import PROTOCOLS, Protocol
from floodrepro.data.survey import Survey, expected_chips, make_survey
from floodrepro.data.totals import Statistics, Totals
from floodrepro.errors import DataError, UsageError
from floodrepro.lock import acquire
from floodrepro.run_folder import write_atomically

SCHEMA = 1
MANIFEST = "data-manifest.json"
PARTIAL = ".floodrepro-audit.partial.jsonl"
UNLISTED = "unlisted"
MOST_JOBS = 32  # each has the index of all chips: 0.2 GB at the size of the published data


def audit(
    root: Path,
    protocol: str,
    *,
    deep: bool = False,
    statistics: Statistics | None = None,
    jobs: int | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Audit a data set and write its manifest.

    Args:
        root: The data set's folder.
        protocol: `v0`, `v1` or `v1-binary`.
        deep: Whether to read every chip.
        statistics: Of the recipe that the bands are compared with after a deep audit; not compared where None.
        jobs: Processes that read; `default_jobs` where None.
        resume: Whether a deep audit that was stopped goes on; else it starts anew.
        progress: Called with the number of chips read and of all.

    Returns:
        The manifest.

    Raises:
        UsageError: There is no such protocol, or jobs is not positive.
        DataError: There are no chips at all, another audit is at work here, or a worker process died.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected 1 or more", fix="--jobs 1")
    survey = make_survey(root, protocol, None, None)
    found = survey.quick()
    expected = expected_chips(protocol)
    document: dict[str, Any] = {
        **{"schema": SCHEMA, "protocol": protocol, "layout": found.layout},
        "splits": {
            split: {"chips": count, "events": found.events[split], "expected": expected.get(split)}
            for split, count in found.chips.items()
        },
        **{"digest": found.digest, "findings": [], "deep": None},
    }
    findings = list(found.findings)
    partial = None
    if deep:
        with _Partial(root, survey, resume=resume) as partial:
            _read_chips(survey, partial, jobs or default_jobs(), progress)
            document["deep"] = _deep_section(survey, partial, statistics, findings)
    document["findings"] = [asdict(finding) for finding in findings]
    try:
        write_atomically(root / MANIFEST, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        console.warn(f"{MANIFEST} cannot be written ({error.strerror}): the result is only printed")
    if partial is not None:
        partial.remove()  # not before the manifest is there
    return document


def default_jobs() -> int:
    """One process for each core that this one may run on (as Slurm or taskset left it), but not more than 32."""
    return min(len(os.sched_getaffinity(0)), MOST_JOBS)


def _deep_section(
    survey: Survey, partial: "_Partial", statistics: Statistics | None, findings: list[Finding]
) -> dict[str, Any]:
    """Merge the chips' records in the order of their ids: the same sums whoever read them, and when."""
    protocol = PROTOCOLS[DATA_OF[survey.protocol]]
    # Backwards, so that a chip in two splits counts for the first: train, val, test, then further test splits.
    split_of = {chip: split for split, chips in reversed(survey.splits.items()) for chip in chips}
    content = hashlib.sha256("".join(survey.head()).encode())
    totals = Totals(protocol)
    of_chips = []
    for chip in sorted(survey.sizes):
        record = partial.record(chip)
        totals.add(split_of.get(chip, UNLISTED), record)
        of_chips += record.findings
        if chip in split_of:
            for part, sha256 in sorted(record.sha256.items()):
                content.update(f"{chip} {part} {record.sizes[part]} {sha256}\n".encode())
    findings += [*totals.judge(statistics), *of_chips]
    return {"content_digest": content.hexdigest(), **totals.document(statistics)}


class _Partial:
    """The records of the chips that were read so far, one line of JSON each, in a file that outlives a killed audit.

    A record counts as long as its chip's files have the sizes they had. That of a chip that could not be read is made
    again: whoever ran into it may have fetched the chip again since.
    """

    def __init__(self, root: Path, survey: Survey, *, resume: bool) -> None:
        self.path: Path | None = root / PARTIAL
        self._offsets: dict[str, int] = {}
        self._file = self._open(root)
        # The sizes are in the records; what a record says depends on the protocol as well.
        head = json.dumps({"schema": SCHEMA, "protocol": DATA_OF[survey.protocol]}).encode() + b"\n"
        self._file.seek(0)
        if resume and self._file.readline() == head:
            self._load(survey.sizes)
        else:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(head)

    def _open(self, root: Path) -> IO[bytes]:
        try:
            file = (root / PARTIAL).open("a+b")
        except OSError as error:
            console.warn(f"{root} cannot be written ({error.strerror}): a stopped audit will not go on from here")
            self.path = None
            return tempfile.TemporaryFile()
        try:
            acquire(file, root)
        except BlockingIOError as error:
            file.close()
            raise DataError("another audit of this data is at work", where=root, fix="wait for it to end") from error
        return file

    def _load(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        while line := self._file.readline():
            start = self._file.tell() - len(line)
            try:
                record = ChipRecord.from_line(line)
            except (ValueError, KeyError, TypeError):
                self._file.truncate(start)  # the line that the kill tore
                break
            damaged = any(finding.check == DAMAGED for finding in record.findings)
            if record.sizes == sizes.get(record.chip) and not damaged:
                self._offsets[record.chip] = start

    def __contains__(self, chip: str) -> bool:
        return chip in self._offsets

    def append(self, line: str) -> None:
        """Keep a chip's record, given as its line."""
        self._file.seek(0, os.SEEK_END)
        start = self._file.tell()
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._offsets[json.loads(line)["chip"]] = start

    def record(self, chip: str) -> ChipRecord:
        """A chip's record."""
        self._file.seek(self._offsets[chip])
        return ChipRecord.from_line(self._file.readline())

    def remove(self) -> None:
        """Delete the file: the audit came to its end."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read_chips(survey: Survey, partial: _Partial, jobs: int, progress: Callable[[int, int], None]) -> None:
    """Read all chips that have no record yet, each by one of *jobs* processes."""
    protocol = PROTOCOLS[DATA_OF[survey.protocol]]
    total = len(survey.sizes)
    todo = [(chip, tuple(survey.sizes[chip])) for chip in sorted(survey.sizes) if chip not in partial]
    if len(todo) < total:
        console.say(f"going on with a stopped audit: {total - len(todo)} of {total} chips are done")
    progress(total - len(todo), total)
    lines = _in_workers(survey.source, protocol, todo, jobs) if jobs > 1 else _here(survey.source, protocol, todo)
    for done, line in enumerate(lines, total - len(todo) + 1):
        partial.append(line)
        progress(done, total)


Task = tuple[str, tuple[str, ...]]  # a chip and its parts


def _check(source: ChipSource, protocol: Protocol, task: Task) -> str:
    """Read and check one chip; its record as a line."""
    chip, parts = task
    files, unreadable = {}, {}
    for part in parts:
        try:
            files[part] = source.read_file(chip, part)
        except (DataError, OSError) as error:  # no permission, a bad sector, or gone since the survey
            unreadable[part] = error.__cause__ or error
    record = check_chip(chip, files, protocol)
    for part, reason in unreadable.items():
        record.add("error", DAMAGED, f"cannot be read: {reason}", part)
    return record.to_line()


def _here(source: ChipSource, protocol: Protocol, todo: Sequence[Task]) -> Iterator[str]:
    for task in todo:
        yield _check(source, protocol, task)


_work: tuple[ChipSource, Protocol] | None = None


def _start_worker(source: ChipSource, protocol: Protocol) -> None:
    global _work
    _work = source, protocol
    from numcodecs import blosc

    blosc.use_threads = False  # the cores are taken by the other workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal: the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait_for_process([parent.sentinel])
        os._exit(1)

    # A worker of concurrent.futures waits for ever if its parent is killed: it holds both ends of its queue's pipe.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _check_in_worker(task: Task) -> str:
    assert _work is not None
    return _check(*_work, task)


def _in_workers(source: ChipSource, protocol: Protocol, todo: Sequence[Task], jobs: int) -> Iterator[str]:
    """Lines in the order in which they are ready; never more than a few chips are under way."""
    tasks = iter(todo)
    # Spawned, not forked: GDAL, BLAS and blosc may hold threads by now. An executor, not a Pool: a Pool waits for ever
    # for the result of a worker that was killed for its memory.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, max(len(todo), 1)), context, _start_worker, (source, protocol)) as workers:
        under_way: set[Future[str]] = set()
        try:
            while True:
                under_way |= {workers.submit(_check_in_worker, t) for t in islice(tasks, 4 * jobs - len(under_way))}
                if not under_way:
                    return
                ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ready:
                    yield future.result()
        except BrokenProcessPool as error:
            fix = "the same command goes on where it ended; --jobs 1 needs the least memory"
            raise DataError("a worker process of the audit died", where=source.root, fix=fix) from error
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
