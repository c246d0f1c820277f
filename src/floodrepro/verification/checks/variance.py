"""Several trainings that were declared together: all of them, their spread, and their mean against the reference."""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from floodrepro import recipe as recipes
from floodrepro.evaluation.chip_table import refuse_to_compare
from floodrepro.evaluation.statistics import Equivalence, equivalence_over_seeds
from floodrepro.verification.check import Check, Evidence, SeedRun, Table, Value
from floodrepro.verification.comparison import ENDPOINTS, finite, in_words, same_model

ID = "variance"
_CLAIM = (
    "Every declared run is reported and is one of its own, and the runs' mean is equivalent to the reference's figure "
    "where there is one."
)
_answer = partial(Check, ID, "Variance over seeds", _CLAIM)


def check(evidence: Evidence) -> Check:
    """Mean, SD and two one-sided tests over seeds, once no declared run is missing."""
    runs, asked = evidence.seeds, evidence.thresholds[ID]
    if len(runs) < 2:
        return _answer("skip", evidence.missing.get("seeds", "one run: variance unknown"))
    figures = {name: [_figure(run, name) for run in runs] for name in ENDPOINTS}
    answer = partial(_answer, tables=[_listed(runs, figures)], notes=_notes(runs))
    if dropped := [f"{run.run} (seed {run.seed}, {run.status})" for run in runs if run.table is None]:
        reason = f"dropped: {', '.join(dropped)}: declared, but without a chip table"
        return answer("fail", f"{reason}; a mean over the others would be a choice")
    if other := _other_chips(evidence):
        return answer("fail", other)
    if not all(math.isfinite(figure) for name in figures for figure in figures[name]):
        return answer("skip", "flood IoU or mIoU is undefined in a run")
    if problems := [*_copies(evidence), *_undeclared(evidence)]:
        return answer("fail", "; ".join(problems))
    spread = [value for name in figures for value in _spread(name, figures[name])]
    if len(runs) < asked["min_seeds"]:
        return answer("skip", f"{len(runs)} runs: at least {asked['min_seeds']} are needed", values=spread)
    if evidence.reference is None:
        why = evidence.missing.get("reference", "no reference was given")
        notes = [*_notes(runs), f"{why}: only the spread is known, nothing is said about equivalence."]
        return answer("pass", values=spread, notes=notes)
    pooled = evidence.reference.counts.sum(axis=0)
    tests = {
        name: equivalence_over_seeds(figures[name], float(statistic(pooled)), margin=asked["margin_pp"] / 100)
        for name, statistic in ENDPOINTS.items()
    }
    return answer(
        "pass" if all(test.equivalent for test in tests.values()) else "fail",
        "; ".join(f"{name} is {in_words(test, f'{len(runs)} seeds')}" for name, test in tests.items()),
        values=[*spread, *(value for name, test in tests.items() for value in _tested(name, test, len(runs)))],
    )


def _figure(run: SeedRun, name: str) -> float:
    return math.nan if run.table is None else float(ENDPOINTS[name](run.table.counts.sum(axis=0)))


def _other_chips(evidence: Evidence) -> str | None:
    """Why the runs, and the reference, are not all figures of the same chips."""
    first, *others = (run for run in evidence.seeds if run.table is not None)
    assert first.table is not None  # dropped runs were answered for
    for run in others:
        if run.table is not None and (reason := refuse_to_compare(first.table, run.table)):
            return f"{run.run} cannot be held against {first.run}: {reason}"
    if evidence.reference is not None and (reason := refuse_to_compare(first.table, evidence.reference)):
        return f"wrong reference: {reason}"
    return None


def _copies(evidence: Evidence) -> list[str]:
    """Which of the runs and the reference are one model under two names: copies have no spread."""
    tables = [(run.run, run.table) for run in evidence.seeds if run.table is not None]
    if evidence.reference is not None:
        tables.append(("the reference", evidence.reference))
    return [
        f"{other} is a copy of {one}: it {same}"
        for (one, table), (other, another) in itertools.combinations(tables, 2)
        if (same := same_model(table, another))
    ]


def _undeclared(evidence: Evidence) -> list[str]:
    """Runs of another seed or recipe than was declared, as far as the records tell.

    All declared runs have this run's recipe, but for the seed. A table that was made with other overrides does not
    name the recipe of its run.
    """
    found = []
    for run in evidence.seeds:
        seed = evidence.record.get("seed", run.seed) if run.run == evidence.run.path.name else run.seed
        if seed != run.seed:
            found.append(f"{run.run} was trained with seed {seed}, declared was {run.seed}")
        metadata = run.table.metadata if run.table is not None else {}
        expected = recipes.fingerprint({**evidence.recipe, "seed_everything": run.seed})
        if not metadata.get("recipe_changes") and metadata.get("recipe_sha256", expected) != expected:
            found.append(f"{run.run} has not this run's recipe with the declared seed, {run.seed}")
    return found


def _listed(runs: Sequence[SeedRun], figures: dict[str, list[float]]) -> Table:
    rows = [
        (run.run, run.seed, run.status, *(finite(figures[name][n]) for name in figures)) for n, run in enumerate(runs)
    ]
    return Table("All declared runs", ("run", "seed", "status", *figures), rows)


def _spread(name: str, figures: Sequence[float]) -> list[Value]:
    runs = f"over {len(figures)} runs"
    return [
        Value(f"{name}, mean {runs}", float(np.mean(figures))),
        Value(f"{name}, SD {runs}", 100 * float(np.std(figures, ddof=1)), "pp", method="sample SD, n - 1"),
    ]


def _tested(name: str, test: Equivalence, runs: int) -> list[Value]:
    margin = f"{100 * test.margin:g} pp"
    return [
        Value(
            f"{name}, mean over {runs} seeds, difference to the reference",
            100 * test.difference,
            "pp",
            100 * test.interval.low,
            100 * test.interval.high,
            test.interval.level,
            test.interval.method,
            threshold=f"interval within ±{margin}",
            ok=test.equivalent,
        ),
        Value(f"{name}, p of a difference of {margin} or more over seeds", test.p_value),
    ]


def _notes(runs: Sequence[SeedRun]) -> list[str]:
    notes = ["Over seeds the chips and the reference's figure are taken as they stand: see parity for events."]
    if unfinished := [f"{run.run} ({run.status})" for run in runs if run.status != "finished" and run.table]:
        notes.append(f"Tested, and counted, though not finished: {', '.join(unfinished)}.")
    return notes
