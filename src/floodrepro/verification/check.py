"""What a check is given and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder

Status = Literal["pass", "fail", "skip"]
Cell = str | float | int | None


@dataclass(frozen=True)
class Value:
    """One figure of a check.

    Args:
        name: Such as `flood IoU, difference to the reference`.
        value: The figure; None where it is undefined.
        unit: `pp`, `GiB`, `chips/s`, … ; empty for a pure number.
        low: Lower end of its interval, if it has one.
        high: Upper end.
        level: Of the interval, 0 to 1.
        method: How the interval was made.
        n_chips: Chips behind it.
        n_events: Events behind it.
        threshold: What is asked of it, in words; empty where it is only reported.
        ok: Whether it is met; None where nothing is asked.
    """

    name: str
    value: Cell
    unit: str = ""
    low: float | None = None
    high: float | None = None
    level: float | None = None
    method: str = ""
    n_chips: int | None = None
    n_events: int | None = None
    threshold: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table of a check: every row has as many cells as there are columns; a float is shown to four digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Plot:
    """A picture of a check, as data: the report draws it.

    Args:
        name: File name without its ending, such as `reliability`.
        kind: `lines` and `scatter` (x, y), `bars` (x = labels, y), `forest` (x = values with low and high, y = labels),
            `panels` (no series: drawn from `evidence/panels.npz`).
        title: Above it.
        x_label: With unit.
        y_label: With unit.
        series: Each a mapping with `label`, `x`, `y`, and optionally `low` and `high`; lists of equal length.
        caption: What it shows, for who cannot see it as well.
    """

    name: str
    kind: Literal["lines", "scatter", "bars", "forest", "panels"]
    title: str
    x_label: str = ""
    y_label: str = ""
    series: Sequence[Mapping[str, Any]] = ()
    caption: str = ""


@dataclass(frozen=True)
class Check:
    """A check's answer.

    Args:
        id: A word: `parity`, `head_to_head`, …
        title: For a heading.
        claim: What passing means, one sentence.
        status: pass, fail or skip. A skip is no pass.
        reason: Why it failed or was skipped; of a pass, the answer in words, or nothing.
        values: The figures.
        tables: Tables.
        plots: Pictures.
        notes: Sentences to be read with the figures.
        evidence: Files that it rests on, relative to the run folder.
    """

    id: str
    title: str
    claim: str
    status: Status
    reason: str = ""
    values: Sequence[Value] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    evidence: Sequence[str] = ()


@dataclass(frozen=True)
class SeedRun:
    """One run of several that were declared together.

    Args:
        seed: Its seed.
        status: finished, failed, interrupted, running or "not started".
        table: Its test table; None where it has none.
        run: Name of its folder.
    """

    seed: int
    status: str
    table: ChipTable | None
    run: str


@dataclass(frozen=True)
class Evidence:
    """All that the checks are given: nothing here is computed by them, and no check opens a checkpoint.

    Args:
        run: The run folder.
        record: Its run.json; empty where there is none.
        recipe: Its recipe.
        metrics: Rows of metrics.csv, values as text; empty where there is none.
        table: Chip table of the run's best checkpoint over the test split.
        subsets: Further test splits of the same checkpoint by name (v1: seen_events, holdout).
        reference: Chip table of the reference over the same split.
        reference_name: What to call it.
        reference_record: run.json of the reference's run folder, if it lies in one.
        reference_metrics: Rows of its metrics.csv, likewise.
        measured: What was measured with torch, by name: `weights`, `load_back`, `round_trip`, `panels`; the content of
            `verification/evidence/<name>.json`. `{"problem": "…"}` where the measurement failed; absent where it was
            not made.
        seeds: All runs declared together with this one; empty for a single run.
        benchmarks: Contents of bench JSON files that belong to this run, by name.
        card: Figures in the metadata of the exported model card, by TerraTorch's names; empty where there is none.
        audit: The data manifest of `data audit`, if there is one.
        thresholds: `verification/thresholds.yaml`, by check id.
        published: `verification/reference/*.yaml`, by stem.
        missing: Why something above is absent, by its name.
    """

    run: RunFolder
    record: Mapping[str, Any]
    recipe: Recipe
    metrics: Sequence[Mapping[str, str]] = ()
    table: ChipTable | None = None
    subsets: Mapping[str, ChipTable] = field(default_factory=dict)
    reference: ChipTable | None = None
    reference_name: str = ""
    reference_record: Mapping[str, Any] = field(default_factory=dict)
    reference_metrics: Sequence[Mapping[str, str]] = ()
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Sequence[SeedRun] = ()
    benchmarks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    card: Mapping[str, float] = field(default_factory=dict)
    audit: Mapping[str, Any] | None = None
    thresholds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
