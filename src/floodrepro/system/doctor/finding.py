"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and the next step; `fail` where a run cannot work or would be another one."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def judged(name: str, passes: bool, detail: str, fix: str, otherwise: Literal["warn", "fail"] = "fail") -> Finding:
    """`ok` without a next step, or what it is otherwise with one."""
    return Finding(name, "ok", detail) if passes else Finding(name, otherwise, detail, fix)


def gb(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:.1f} GB"
