"""What a check is given, what it answers, and how its figures are written."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        low, high = (-math.inf if self.at_least is None else self.at_least), self.at_most
        return isinstance(self.value, int | float) and low <= self.value <= (math.inf if high is None else high)

    @property
    def criterion(self) -> str:
        """The criterion in words; empty without one."""
        if self.expected is not None:
            return number(self.expected)
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{low:g} to {high:g}"
        return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""

    @property
    def text(self) -> str:
        """The value with its unit, to as many digits as it takes to be on its side of the criterion."""
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        return f"{number(self.value, *limits)} {self.unit}".strip() if self.value is not None else NOTHING


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
    and `panels` without series, which is `evidence/panels.png`.
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

    status: Status
    finding: str  # what was found, in words
    values: Sequence[Value] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()  # to be read with the figures
    outcome: Outcome | None = None  # of a comparison
    # The rest is filled in by the decorator `check`.
    id: str = ""
    title: str = ""
    claim: str = ""  # what passing means, one sentence
    evidence: Sequence[str] = ()  # files that it rests on, relative to the run folder
    code: str = ""  # the function that made it


class Unanswered(Exception):
    """Ends a check that lacks something: what is damaged or wrong fails it, what is missing skips it."""

    def __init__(self, status: Status, finding: str) -> None:
        super().__init__(status, finding)


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
    recipe: Recipe
    criteria: Mapping[str, Any]  # checks.yaml
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


Answer = Callable[[Evidence], Check]


def check(function: Answer) -> Answer:
    """Make a function a check: its name is the id, and checks.yaml has what it claims."""

    @functools.wraps(function)
    def ask(evidence: Evidence) -> Check:
        try:
            found = function(evidence)
        except Unanswered as unanswered:
            found = Check(*unanswered.args)
        about = evidence.criteria[function.__name__]
        margin = evidence.criteria["parity"]["margin_pp"]
        split = evidence.table.metadata.get("split", "test") if evidence.table else "test"
        return replace(
            found,
            id=function.__name__,
            title=about["title"],
            claim=about["claim"].format(iou=evidence.iou_name, positive=evidence.class_name, margin=margin, **about),
            evidence=[file.format(split=split) for file in about["files"]],
            code=found.code or f"{function.__module__}.{function.__name__}",
        )

    return ask


def from_json(entry: Mapping[str, Any]) -> Check:
    """A check's answer that was kept as JSON.

    Raises:
        TypeError, AttributeError: It is no answer.
    """
    kinds: dict[str, Any] = {"values": Value, "tables": Table, "plots": Plot}
    return Check(**{**entry, **{key: [kind(**one) for one in entry.get(key, ())] for key, kind in kinds.items()}})


def judge(values: Sequence[Value], found: str, skip: str = "", **parts: Any) -> Check:
    """An answer: fail if a criterion is not met, else skip if there is a reason to, else pass."""
    failed = [f"{value.name}: {value.text}, expected {value.criterion}" for value in values if value.ok is False]
    if failed:
        return Check("fail", "; ".join(failed), values, **parts)
    return Check("skip" if skip else "pass", skip or found, values, **parts)


def number(value: Any, *beside: float) -> str:
    """A figure as text: whole numbers in full, others to four digits, or more if they round onto one beside."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    digits = 4
    while digits < 11 and any(float(f"{value:.{digits}g}") == other != value for other in beside):
        digits += 1
    if value == 0 or not 1e-3 <= abs(value) < 1e9:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def points(value: float, *beside: float) -> str:
    """A difference in percentage points with its sign: one digit, more where it would round onto 0 or a figure beside.

    Args:
        value: The difference.
        beside: Such as the margin; taken with either sign.
    """
    digits = 1
    while digits < 4 and any(abs(round(value, digits)) == other != abs(value) for other in (0.0, *beside)):
        digits += 1
    return f"{value:+z.{digits}f}"
