"""What a check is given, what it answers, and how its figures are written.

An answer has one shape from the check to the page: that of results.json, whose keys docs/verification.md explains.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from floodrepro import recipe as recipes
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.run_folder import RunFolder

Status = Literal["pass", "fail", "undecided", "skip"]
NOTHING = "\N{EN DASH}"  # where there is no figure
CRITERIA: dict[str, dict[str, Any]] = recipes.read_yaml(Path(__file__).parents[1] / "checks.yaml")
"""Title, claim, files and criteria of each check, in the order of the report."""


Check = dict[str, Any]
"""An answer: `status`, `finding` and, where it has them, `values` (made by `figure`), `tables` (`title`, `columns` and
`rows`), `plots` (as `figures.png` draws them), `notes`, and the `outcome` of a comparison: equivalent, undecided,
different (better) or different (worse). Only a pass is a pass. `battery.ask` fills in the rest."""


class Unanswered(Exception):
    """Ends a check with a status and a finding: what is damaged or wrong fails it, what is missing skips it."""


@dataclass(frozen=True)
class SeedRun:
    """One run of several that were declared together; `table` is None where it was not tested."""

    seed: int
    status: str  # finished, failed, interrupted, running or "not started"
    table: ChipTable | None
    run: str  # name of its folder


@dataclass(frozen=True)
class Evidence:
    """All that the checks are given. They open no checkpoint."""

    run: RunFolder
    record: Mapping[str, Any]  # run.json; empty where there is none
    recipe: recipes.Recipe
    class_name: str = "class 1"  # of the positive class
    positive: int = 1  # its number
    metrics: Sequence[Mapping[str, str]] = ()  # rows of metrics.csv
    table: ChipTable | None = None  # of the run's best checkpoint
    subsets: Mapping[str, ChipTable] = field(default_factory=dict)  # further test splits of the same pass
    reference: ChipTable | None = None
    reference_name: str = ""
    baselines: Mapping[str, ChipTable] = field(default_factory=dict)
    measured: Mapping[str, Check] = field(default_factory=dict)  # answers of `measure`, by check
    seeds: Sequence[SeedRun] = ()  # all runs declared together with this one
    audit: Mapping[str, Any] = field(default_factory=dict)  # data-manifest.json; empty where there is none
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # reference/*.yaml by stem
    absent: Mapping[str, tuple[Status, str]] = field(default_factory=dict)  # skip or fail, and why, of what is not here

    @property
    def iou_name(self) -> str:
        """What the primary score is called, such as `flood IoU`."""
        return f"{self.class_name} IoU"

    def without(self, name: str, otherwise: str) -> Unanswered:
        """What a check raises that lacks something."""
        return Unanswered(*self.absent.get(name, ("skip", otherwise)))

    def usable_table(self) -> ChipTable:
        """The run's chip table.

        Raises:
            Unanswered: There is none, or nothing can be computed from it.
        """
        if self.table is None:
            raise self.without("table", "the run has no chip table")
        if not self.table.counts.any():
            raise Unanswered("skip", "all pixels of the chip table are ignored")
        return self.table


CHECKS: dict[str, Callable[[Evidence], Check]] = {}
"""The functions of `checks/` that are checks, by their names."""


def check(function: Callable[[Evidence], Check]) -> Callable[[Evidence], Check]:
    """Make a function a check: its name is the id, under which checks.yaml says what it claims."""
    CHECKS[function.__name__] = function
    return function


def figure(
    name: str,
    value: str | float | None,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    level: float | None = None,
    *,
    n_chips: int | None = None,
    n_events: int | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    expected: str | float | None = None,
) -> dict[str, Any]:
    """One figure of a check; its text has as many digits as it takes to be on its side of the limits.

    `low` and `high` end its interval: a confidence interval where there is a level (0 to 1), else percentiles. Its
    criterion is one limit, two, or the expected value; a figure that is undefined, None, meets none.
    """
    limits = {word: limit for word, limit in (("at least", at_least), ("at most", at_most)) if limit is not None}
    criterion, ok = ", ".join(f"{word} {limit:g}" for word, limit in limits.items()), None
    if expected is not None:
        criterion, ok = number(expected), value == expected
    elif limits:
        least, most = limits.get("at least", -math.inf), limits.get("at most", math.inf)
        ok = isinstance(value, int | float) and least <= value <= most
    digits = number(value, *limits.values())
    text = f"{digits} {unit}" if unit and digits != NOTHING else digits
    found = {"name": name, "value": value, "text": text, "unit": unit, "low": low, "high": high, "level": level}
    return found | {"n_chips": n_chips, "n_events": n_events, "criterion": criterion, "ok": ok}


def judge(values: Sequence[Mapping[str, Any]], found: str, skip: str = "", **parts: Any) -> Check:
    """An answer: fail if a criterion is not met, else skip if there is a reason to, else pass."""
    failed = [f"{one['name']}: {one['text']}, expected {one['criterion']}" for one in values if one["ok"] is False]
    status, finding = ("fail", "; ".join(failed)) if failed else ("skip", skip) if skip else ("pass", found)
    return {"status": status, "finding": finding, "values": values, **parts}


def number(value: Any, *beside: float, digits: int = 4) -> str:
    """A figure as text: whole numbers in full, others to so many digits, or more if they round onto one beside."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    while digits < 11 and any(float(f"{value:.{digits}g}") == other != value for other in beside):
        digits += 1
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def points(value: float, margin: float) -> str:
    """A difference in percentage points with its sign, which does not round onto zero or the margin."""
    return ("+" if value > 0 else "") + number(value, 0.0, margin, -margin, digits=2)


from floodrepro.verification.checks import run, scores  # noqa: E402, F401  # they fill CHECKS
