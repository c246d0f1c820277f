"""The exceptions that floodrepro raises on purpose, and their exit codes; `mapping.plan` has one more."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIGNALLED = 128  # exit codes from here on: ended by a signal, the shell's convention


class FloodreproError(Exception):
    """The work could not be done: exit code 1.

    Args:
        what: What is wrong, in one sentence.
        where: The file, key or command that it is about.
        fix: What the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None) -> None:
        # Line breaks are folded: the report keeps to three lines.
        self.what, self.where, self.fix = (" ".join(str(text or "").split()) for text in (what, where, fix))
        super().__init__(self.what)

    def __str__(self) -> str:
        """One to three lines."""
        more = [f"\n  {name}: {text}" for name, text in (("where", self.where), ("to do", self.fix)) if text]
        return "".join([self.what, *more])


class UsageError(FloodreproError):
    """A command, flag or recipe that cannot be carried out as given: exit code 2."""

    exit_code = 2


class DataError(FloodreproError):
    """Chips, splits or archives that are missing, damaged or not what they are said to be."""


class CheckpointError(FloodreproError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class TableError(FloodreproError):
    """A chip table that is missing, damaged, or does not belong to what it is compared with."""


class RunFolderError(FloodreproError):
    """A run folder that cannot be written, or holds a run that must not be overwritten."""


class Incident(FloodreproError):
    """The guard stopped a run before a bad state could overwrite a good one: exit code 3.

    Args:
        entry: JSON types, for ``run.json``: `kind` is ``input`` (a batch held a value that is not finite), ``loss``, or
            ``state`` (a weight or a buffer); a `detail`, `epoch` (from 0) and `step`; `tensors` are the parameters and
            buffers that are not finite, `chips` those of the batches around the step, of ``input`` the bad ones only.
    """

    exit_code = 3

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry, self.rolls_back = dict(entry), entry["kind"] != "input"  # there no wider number format helps
        what = f"NaNGuard stopped the run at step {entry['step']}, epoch {entry['epoch'] + 1}: {entry['detail']}"
        what += name_three("; not finite:", entry["tensors"]) + name_three("; chips", entry["chips"])
        fix = "look at these chips, replace or remove them; then run the same command again"
        if self.rolls_back:
            fix = "see incidents in run.json; fit --on-overflow rollback resumes from the last good state in bf16"
        super().__init__(what, fix=fix)


class Interrupted(FloodreproError, SystemExit):
    """The run was told to stop and did so in good order: exit code 128 + the signal's number, as shells have it.

    It is a `SystemExit` too: plain ``terratorch fit`` ends with the same code and without a traceback. `how` says what
    was saved, `where` in which folder.
    """

    def __init__(self, number: int, where: str | Path, how: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; {how}", where=where, fix="run the same command again to resume")
        self.exit_code = self.code = SIGNALLED + number


def name_three(label: str, names: Sequence[str], separator: str = ", ") -> str:
    """The label, the first three names, and how many more there are; empty without names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{label} {separator.join(names[:3])}{more}".strip() if names else ""
