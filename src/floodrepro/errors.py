"""Every exception that floodrepro raises on purpose, and the exit code that each one means."""

from pathlib import Path

SIGNALLED = 128  # exit codes from here on: ended by a signal, the shell's convention


class FloodreproError(Exception):
    """The work could not be done: exit code 1.

    Args:
        what: What is wrong, in one sentence. Line breaks are folded, so that the report keeps to three lines.
        where: The file, key or command that it is about.
        fix: What the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None) -> None:
        self.what = _fold(what)
        self.where = _fold(str(where)) if where is not None else None
        self.fix = _fold(fix) if fix is not None else None
        super().__init__(self.what)

    def report(self) -> str:
        """The error as one to three lines of text, without a final line break."""
        lines = [f"floodrepro: error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)


class UsageError(FloodreproError):
    """A command, flag or recipe that cannot be carried out as given: exit code 2."""

    exit_code = 2


class DataError(FloodreproError):
    """Chips, splits or archives that are missing, damaged or not what they are said to be."""


class CheckpointError(FloodreproError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


class TableError(FloodreproError):
    """A chip table that is missing, damaged, or does not belong to what it is held against."""


class RunFolderError(FloodreproError):
    """A run folder that cannot be written, or holds a run that must not be overwritten."""


class Incident(FloodreproError):
    """The guard stopped a run before a bad state could overwrite a good one: exit code 3.

    Args:
        kind: loss, gradient, state (a weight or buffer), collapse, or elsewhere (another process found it).
        detail: What was found.
        module: Path of the first bad module in forward order; None where there is none to name.
        epoch: Counted from 0.
        step: Optimizer steps taken before it.
        chips: Ids of the batch's chips.
    """

    exit_code = 3

    def __init__(
        self, kind: str, detail: str, *, module: str | None, epoch: int, step: int, chips: tuple[str, ...]
    ) -> None:
        self.kind, self.detail, self.module = kind, detail, module
        self.epoch, self.step, self.chips = epoch, step, chips
        first = f", first bad module {module}" if module else ""
        named = f"; chips {', '.join(chips[:3])}{' …' if len(chips) > 3 else ''}" if chips else ""
        super().__init__(
            f"the guard stopped the run at step {step}, epoch {epoch + 1}: {detail}{first}{named}",
            fix="see incident.json"
            + ("; fit --on-overflow rollback goes on from the last good state in bf16" * (kind != "collapse")),
        )

    def as_dict(self) -> dict[str, object]:
        """The incident as JSON types."""
        return {
            "kind": self.kind,
            "detail": self.detail,
            "module": self.module,
            "epoch": self.epoch,
            "step": self.step,
            "chips": list(self.chips),
        }


def _fold(text: str) -> str:
    return " ".join(text.split())
