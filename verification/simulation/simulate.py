"""How often the verdicts of a report are wrong: events are drawn from populations whose true gap is known.

`python verification/simulation/simulate.py > verification/simulation/output.md` (about two minutes) makes the tables
that docs/statistics.md speaks of. Each population has 100,000 flood events and two models; the gap in flood IoU, pooled
over the whole population, is exactly the margin. A test set is a draw of events with replacement.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.optimize import brentq
from scipy.special import expit

from floodrepro.evaluation.intervals import jackknife, mean_over_events, over_seeds
from floodrepro.evaluation.metrics import iou

MARGIN = 0.02  # of flood IoU
EVENTS = 100_000
REPLICATIONS = 3_000  # simulation error of a share near 0.9: 0.5 pp, near 0.05: 0.4 pp
FALSE_ALARMS = 0.22  # of the pixels of flood, median over events: with the recall below, a flood IoU of about 0.4
DRY_ALARMS = 3_000  # pixels of a dry event that are called flood, median


@dataclass(frozen=True)
class World:
    """A population of flood events, and how two models do on it; model 1 is the worse one.

    Args:
        size: `lognormal` or `pareto`: the distribution of an event's pixels of flood.
        spread: SD of their logarithm, or the exponent of the Pareto distribution.
        dry: Share of events without flood; in half of these no model raises an alarm.
        alike: Correlation between the models of what is hard for them (1 logit of recall), over events.
        heavy: Whether what is hard for one model alone has heavy tails (t, 2 degrees of freedom).
        tilt: Correlation between an event's log size and what model 1 alone loses on it: above 0 it does worse in
            large floods than in small ones.
        where: In which events model 1 is made worse until the gap is the margin: `everywhere`, `slope` (in proportion
            to log size), a share of events such as `0.1`, `above 1` SD of log size (all of them alike), or `beyond 1`
            (in proportion to what log size is above 1 SD).
    """

    size: str = "lognormal"
    spread: float = 1.2
    dry: float = 0.2
    alike: float = 0.98
    heavy: bool = False
    tilt: float = 0.0
    where: str = "everywhere"


def population(world: World, gap: float = MARGIN, events: int = EVENTS, seed: int = 1) -> np.ndarray:
    """Counts (events, 2 models, 2, 2), rows = truth, with this pooled gap in flood IoU."""
    rng = np.random.default_rng(seed)
    log_size = world.spread * rng.standard_normal(events)
    if world.size == "pareto":
        log_size = rng.standard_exponential(events) / world.spread  # of a Pareto variable with this exponent
    standard = (log_size - log_size.mean()) / log_size.std()
    dry = rng.random(events) < world.dry
    truth = np.where(dry, 0, np.rint(20_000 * np.exp(log_size)))
    hard, alarming, own = rng.standard_normal(events), rng.standard_normal(events), rng.standard_normal((2, events))
    if world.heavy:
        own = rng.standard_t(2, (2, events))
    own[1] = (1 - world.tilt**2) ** 0.5 * own[1] - world.tilt * standard
    able = world.alike**0.5 * hard + (1 - world.alike) ** 0.5 * own
    null = dry & (rng.random(events) < 0.5)
    noise = world.alike**0.5 * alarming + (1 - world.alike) ** 0.5 * rng.standard_normal((2, events))
    alarms = np.rint(np.where(null, 0, np.where(dry, DRY_ALARMS, FALSE_ALARMS * truth)) * np.exp(0.6 * noise))
    worse = _where(world.where, standard, rng)

    def counts(shift: float) -> np.ndarray:
        hits = np.rint(truth * expit(able - shift * np.stack([np.zeros(events), worse])))
        missed, rest = truth - hits, np.full((2, events), 10**7)
        return np.moveaxis(np.array([[rest, alarms], [missed, hits]], np.int64), (0, 1, 2, 3), (2, 3, 1, 0))

    def excess(shift: float) -> float:
        pooled = iou(counts(shift).sum(axis=0))
        return float(pooled[0] - pooled[1]) - gap

    return counts(brentq(excess, -20, 20, xtol=1e-6))


def _where(where: str, standard: np.ndarray, rng: Generator) -> np.ndarray:
    if where == "everywhere":
        return np.ones(len(standard))
    if where == "slope":
        return standard - standard.min()
    if where.startswith("above "):
        return (standard > float(where.removeprefix("above "))).astype(float)
    if where.startswith("beyond "):
        return np.maximum(standard - float(where.removeprefix("beyond ")), 0)
    return (rng.random(len(standard)) < float(where)).astype(float)


def draws(counts: np.ndarray, events: int, replications: int, seed: int = 2) -> Iterator[np.ndarray]:
    """Test sets: counts (events, 2, 2, 2)."""
    rng = np.random.default_rng(seed)
    for _ in range(replications):
        yield counts[rng.integers(0, len(counts), events)]


def coverage(counts: np.ndarray, events: int, replications: int = REPLICATIONS) -> dict[str, float]:
    """Shares of test sets: the 90 % interval holds the true gap, and the verdict is `equivalent` (pooled, and by mean).

    A test set of which the figure is undefined without one event has no verdict, and counts as not covered.
    """
    pooled = iou(counts.sum(axis=0))
    known = counts[:, 0, 1].sum(axis=-1) >= 100
    each = iou(counts[known])
    truth = {"pooled": float(pooled[0] - pooled[1]), "mean": float((each[:, 0] - each[:, 1]).mean())}
    found = dict.fromkeys(("pooled covers", "pooled equivalent", "mean covers", "mean equivalent", "no spread"), 0)
    for drawn in draws(counts, events, replications):
        one, other = drawn[:, 0], drawn[:, 1]
        try:
            results = {"pooled": jackknife(one, iou, other=other), "mean": mean_over_events(one, other=other)}
        except ValueError:
            continue
        found["no spread"] += results["pooled"].error == 0
        for name, result in results.items():
            low, high = result.interval()
            found[f"{name} covers"] += low <= truth[name] <= high
            found[f"{name} equivalent"] += low > -MARGIN and high < MARGIN
    return {name: number / replications for name, number in found.items()}


EVEN = {
    "lognormal sizes, models alike (0.95)": World(alike=0.95),
    "lognormal sizes, alike (0.98)": World(),
    "Pareto 1.5, models differ a little (0.95)": World("pareto", 1.5, alike=0.95),
    "Pareto 1.5, nearly the same (0.995)": World("pareto", 1.5, alike=0.995),
    "Pareto 1.1, giants": World("pareto", 1.1, alike=0.995),
    "lognormal, sigma 2.0": World(spread=2.0, alike=0.995),
    "half the events dry": World(dry=0.5, alike=0.995),
    "differences t with 2 df": World(alike=0.995, heavy=True),
}
UNEVEN = {
    "worse in 1 event of 10": World(alike=0.9999, where="0.1"),
    "worse in 6 % of events": World(alike=0.9999, where="0.06"),
    "the same, identical elsewhere": World(alike=1.0, where="0.06"),
    "worse with size, mildly": World(alike=0.9999, where="slope"),
    "worse in floods 1 SD above, sigma 1.5": World(spread=1.5, alike=0.9999, where="above 1"),
    "worse in floods 2 SD above, sigma 1.5": World(spread=1.5, alike=0.9999, where="above 2"),
    "the worse the larger beyond 1 SD, sigma 1.5": World(spread=1.5, alike=0.9999, where="beyond 1"),
    "the worse the larger beyond 2 SD, sigma 1.5": World(spread=1.5, alike=0.9999, where="beyond 2"),
    "models alike (0.98), the worse one loses in large floods (tilt 0.8)": World(spread=1.4, tilt=0.8),
    "the same, tilted the other way (-0.8)": World(spread=1.4, tilt=-0.8),
}
SIZES = (30, 60, 200)


def seeds(kind: str, number: int, gap: float, replications: int = 2_000, seed: int = 3) -> float:
    """Share of `equivalent` over training runs that spread by 1 pp of flood IoU around a true gap."""
    rng = np.random.default_rng(seed)
    shape = replications, number
    deviation = rng.standard_normal(shape)
    if kind == "one run in ten 3 pp below the others":
        deviation = 0.5 * deviation + 0.3 - 3 * (rng.random(shape) < 0.1)
    return float(np.mean([over_seeds(row, 0.0).verdict(MARGIN) == "equivalent" for row in 0.01 * deviation - gap]))


def main() -> None:
    """Print the tables."""
    print("# What the simulation printed\n\nShares in %. The true gap is the margin, 2 pp, where not said otherwise.")
    for title, worlds in (("The gap lies in all events", EVEN), ("The gap lies in some events", UNEVEN)):
        print(
            f"\n## {title}\n\nCoverage of the 90 % interval (wrongly `equivalent`), {REPLICATIONS:,} test sets each.\n"
        )
        print("| population | " + " | ".join(f"pooled, {n} events" for n in SIZES) + " | mean over events, 60 |")
        print("|---|" + "---:|" * (len(SIZES) + 1), flush=True)
        for name, world in worlds.items():
            counts = population(world)
            found = [coverage(counts, n) for n in SIZES]
            cells = [f"{100 * f['pooled covers']:.1f} ({100 * f['pooled equivalent']:.1f})" for f in found]
            print(f"| {name} | {' | '.join(cells)} | {100 * found[1]['mean covers']:.1f} |", flush=True)
    print("\n## Power: `equivalent` at a true gap of 0, in %\n\n| population | events | pooled | mean over events |")
    print("|---|---:|---:|---:|")
    for name in ("lognormal sizes, models alike (0.95)", "Pareto 1.5, nearly the same (0.995)"):
        counts = population(EVEN[name], gap=0.0)
        for n in (30, 60, 120, 200):
            found = coverage(counts, n, 1_000)
            shares = f"{100 * found['pooled equivalent']:.1f} | {100 * found['mean equivalent']:.1f}"
            print(f"| {name} | {n} | {shares} |", flush=True)
    print("\n## Seeds: `equivalent`, runs that spread by 1 pp, in %\n\n| runs | true gap, pp | 3 | 5 | 10 seeds |")
    print("|---|---:|---:|---:|---:|")
    for kind in ("normal", "one run in ten 3 pp below the others"):
        for gap in (0, 1, 2):
            cells = [f"{100 * seeds(kind, number, gap / 100):.1f}" for number in (3, 5, 10)]
            print(f"| {kind} | {gap} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
