"""What a check is given, what it answers, and how its figures are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder

Status = Literal["pass", "fail", "undecided", "skip"]
Outcome = Literal["equivalent", "different (better)", "different (worse)", "undecided"]
Cell = str | float | int | None
NOTHING = "\N{EN DASH}"  # where there is no figure


@dataclass(frozen=True)
class Value:
    """One figure of a check, its interval, what it rests on, and its criterion, if it has one."""

    name: str
    value: Cell  # None where it is undefined
    unit: str = ""  # pp, GiB, chips/s, …; empty for a pure number
    low: float | None = None  # of its interval
    high: float | None = None
    level: float | None = None  # of the interval, 0 to 1
    n_chips: int | None = None
    n_events: int | None = None
    at_least: float | None = None
    at_most: float | None = None
    expected: Cell = None

    @property
    def ok(self) -> bool | None:
        """Whether the criterion is met; None without one. An undefined value meets none."""
        if self.expected is not None:
            return self.value == self.expected
        if self.at_least is None and self.at_most is None:
            return None
        if not isinstance(self.value, int | float):
            return False
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def criterion(self) -> str:
        """The criterion in words; empty without one."""
        if self.expected is not None:
            return number(self.expected)
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return f"at most {self.at_most:g}" if self.at_most is not None else ""

    @property
    def text(self) -> str:
        """The value with its unit, to as many digits as it takes to be on its side of the criterion."""
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        shown = number(self.value, *limits)
        return f"{shown} {self.unit}".strip() if self.value is not None else NOTHING


@dataclass(frozen=True)
class Table:
    """A table of a check: every row has as many cells as there are columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Plot:
    """A picture of a check, as data: the report draws it.

    A series is a mapping with `label`, `x`, `y`, and optionally `low`, `high` and `guide` (true: dashed, grey). The
    kinds are `lines`; `dots`, where y are labels; `forest`, where x are differences in pp and y labels;
    and `panels` without series, drawn from `evidence/panels.npz`.
    """

    name: str  # of the file, without its ending
    kind: Literal["lines", "dots", "forest", "panels"]
    title: str
    x_label: str = ""
    y_label: str = ""
    series: Sequence[Mapping[str, Any]] = ()
    caption: str = ""  # what it shows, also for a reader who cannot see it
    margin: float | None = None  # of a forest, shaded on either side of 0


@dataclass(frozen=True)
class Check:
    """A check's answer. Only a pass is a pass: undecided is a comparison whose data do not decide."""

    id: str
    title: str
    claim: str  # what passing means, one sentence
    status: Status
    finding: str  # what was found, in words
    values: Sequence[Value] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()  # to be read with the figures
    evidence: Sequence[str] = ()  # files that it rests on, relative to the run folder
    outcome: Outcome | None = None  # of a comparison
    code: str = ""  # the function that made it


@dataclass(frozen=True)
class SeedRun:
    """One run of several that were declared together; `table` is None where it was not tested."""

    seed: int
    status: str  # finished, failed, interrupted, running or "not started"
    table: ChipTable | None
    run: str  # name of its folder


@dataclass(frozen=True)
class Evidence:
    """All that the checks are given. They compute nothing of it and open no checkpoint."""

    run: RunFolder
    record: Mapping[str, Any]  # run.json; empty where there is none
    recipe: Recipe
    class_name: str = "class 1"  # of the positive class
    positive: int = 1  # its number
    metrics: Sequence[Mapping[str, str]] = ()  # rows of metrics.csv
    table: ChipTable | None = None  # of the run's best checkpoint
    subsets: Mapping[str, ChipTable] = field(default_factory=dict)  # further test splits of the same pass
    reference: ChipTable | None = None
    reference_name: str = ""
    reference_record: Mapping[str, Any] = field(default_factory=dict)
    reference_metrics: Sequence[Mapping[str, str]] = ()
    baselines: Mapping[str, ChipTable] = field(default_factory=dict)
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # verification/evidence/*.json by name
    seeds: Sequence[SeedRun] = ()  # all runs declared together with this one
    audit: Mapping[str, Any] | None = None  # data-manifest.json
    thresholds: Mapping[str, Any] = field(default_factory=dict)  # thresholds.yaml
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # reference/*.yaml by stem
    missing: Mapping[str, str] = field(default_factory=dict)  # why something above is absent, by its name
    damaged: Mapping[str, str] = field(default_factory=dict)  # the same, where it is there and cannot be read

    @property
    def iou_name(self) -> str:
        """What the primary score is called, such as `flood IoU`."""
        return f"{self.class_name} IoU"

    def absent(self, name: str, otherwise: str) -> tuple[Status, str]:
        """Status and finding of a check that lacks something: what is damaged fails it, what is missing skips it."""
        if name in self.damaged:
            return "fail", self.damaged[name]
        return "skip", self.missing.get(name, otherwise)


def judge(values: Sequence[Value], found: str, skip: str = "") -> tuple[Status, str]:
    """Status and finding: fail if a criterion is not met, else skip if there is a reason to, else pass."""
    if failed := [value for value in values if value.ok is False]:
        return "fail", "; ".join(f"{value.name}: {value.text}, expected {value.criterion}" for value in failed)
    return ("skip", skip) if skip else ("pass", found)


def finite(value: float) -> float | None:
    """The figure as JSON knows it: None where it is undefined."""
    return float(value) if math.isfinite(value) else None


def number(value: Any, *beside: float) -> str:
    """A figure as text: whole numbers in full, others to four digits, or more if they round onto one beside."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return NOTHING
    for digits in range(4, 12):
        if not any(float(f"{value:.{digits}g}") == other != value for other in beside):
            break
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def points(value: float, *beside: float) -> str:
    """A difference in percentage points with its sign: one digit, more where it would round onto 0 or a figure beside.

    Args:
        value: The difference.
        beside: Such as the margin; taken with either sign.
    """
    for digits in range(1, 5):
        shown = float(f"{value:.{digits}f}")
        if not any(abs(shown) == other != abs(value) for other in (0.0, *beside)):
            break
    return f"{value:+z.{digits}f}"
