"""From a check's values to its status."""

from collections.abc import Sequence
from typing import Literal

from floodrepro.verification.check import Value


def judge(values: Sequence[Value], skip: str = "") -> tuple[Literal["pass", "fail", "skip"], str]:
    """Status and reason: fail if any value is not what is asked, else skip if there is a reason to, else pass.

    Args:
        values: All values of a check.
        skip: Why the check cannot pass although nothing failed; empty if it can.
    """
    if failed := [value for value in values if value.ok is False]:
        return "fail", "; ".join(f"{value.name}: {_shown(value)}, asked is {value.threshold}" for value in failed)
    return ("skip", skip) if skip else ("pass", "")


def _shown(value: Value) -> str:
    figure = f"{value.value:.5g}" if isinstance(value.value, float) else str(value.value)
    return f"{figure} {value.unit}".strip()
