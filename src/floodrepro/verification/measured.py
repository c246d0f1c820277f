"""What the checks of measured evidence share: an answer where there is none to judge."""

from collections.abc import Mapping
from typing import Any

from floodrepro.verification.check import Evidence, Status


def evidence_file(name: str, suffix: str = ".json") -> str:
    """Where a run folder keeps a measurement."""
    return f"verification/evidence/{name}{suffix}"


def unmeasured(evidence: Evidence, name: str) -> tuple[Status, str] | None:
    """Status and reason where a measurement is missing (a skip) or could not be made (a fail); None if it is there."""
    measured: Mapping[str, Any] | None = evidence.measured.get(name)
    if measured is None:
        return "skip", evidence.missing.get(name) or evidence.missing.get("measured", "it was not measured")
    return ("fail", str(measured["problem"])) if "problem" in measured else None


def which_pair(measured: Mapping[str, Any]) -> list[str]:
    """A note on the exported pair that was measured, where the measurement says which it was."""
    return [f"The pair that was measured: {measured['pair']}."] if "pair" in measured else []


def listed(names: list[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
