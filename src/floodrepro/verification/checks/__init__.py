"""What a check is given, what it answers, in the shape of results.json, whose keys docs/verification.md explains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from floodrepro import recipe as recipes
from floodrepro.errors import name_three
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

    def need(self, name: str, otherwise: str, least: int = 1) -> Any:
        """What is held under a name; raises `Unanswered` where it is absent, with the reason for it or `otherwise`."""
        found = getattr(self, name)
        if found is None or len(found) < least:
            raise Unanswered(*self.absent.get(name, ("skip", otherwise)))
        return found

    def usable_table(self) -> ChipTable:
        """The run's chip table; raises `Unanswered` where there is none, or nothing can be computed from it."""
        table: ChipTable = self.need("table", "the run has no chip table")
        if not table.counts.any():
            raise Unanswered("skip", "all pixels of the chip table are ignored")
        return table


def figure(
    name: str,
    value: str | float | None,
    unit: str = "",
    interval: tuple[float | None, float | None, float | None] = (None, None, None),
    *,
    n_chips: int | None = None,
    n_events: int | None = None,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    expected: str | float | None = None,
) -> dict[str, Any]:
    """One figure of a check; its text has as many digits as it takes to be on its side of the limits.

    `interval` is a confidence interval: its two ends and its level (0 to 1). The criterion is one limit, two, or the
    expected value; a figure that is undefined, None, meets none.
    """
    limits = {word: x for word, x in (("at least", at_least), ("at most", at_most)) if math.isfinite(x)}
    criterion, ok = ", ".join(f"{word} {limit:g}" for word, limit in limits.items()), None
    if expected is not None:
        criterion, ok = number(expected), value == expected
    elif limits:
        ok = isinstance(value, int | float) and at_least <= value <= at_most
    text = f"{number(value, *limits.values())} {unit}".strip() if value is not None else NOTHING
    found = {"name": name, "value": value, "text": text, "unit": unit, "n_chips": n_chips, "n_events": n_events}
    return found | dict(zip(("low", "high", "level"), interval, strict=True)) | {"criterion": criterion, "ok": ok}


def tally(what: str, names: Sequence[str]) -> dict[str, Any]:
    """As a figure, how many there are; it names the first of them."""
    return figure(f"{what} ({name_three('', names)})" if names else what, len(names), at_most=0)


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
