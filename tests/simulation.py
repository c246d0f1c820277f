"""Draws flood events, chips and seeds with a known true gap, to see how often the verdicts of a report are wrong.

`python tests/simulation.py` prints the tables of docs/statistics.md.

R = replications, E = events, M = models. Counts are (R, E, M, 2, 2), rows = truth, 1 = flood.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri, roots_hermitenorm, stdtr, stdtrit

from floodrepro.evaluation.metrics import iou
from floodrepro.evaluation.statistics import jackknife

PIXELS = 256 * 256
FLOOD_SHARE = 0.06  # of a chip in an event with flood: with RECALL and FALSE_ALARMS, a flood IoU of 0.41 beside 0.96
FALSE_ALARMS = 0.22  # logs of the pixels wrongly called flood over those of flood are normal around log(this)
MARGIN = 0.02  # of flood IoU
REPLICATIONS = 4_000  # simulation error of a share near 0.9: 0.5 pp, near 0.05: 0.3 pp
BLOCK = 500  # replications at a time, for memory
GAUSS = roots_hermitenorm(64)


@dataclass(frozen=True)
class World:
    """A population of flood events, and how two models do on it.

    Args:
        events: E, in a test set.
        gap: Flood IoU of model 0 less that of the others, pooled over the population.
        size: SD of the log of an event's number of chips.
        chips: Median of that number.
        dry: Share of events without flood.
        share: SD of the log of an event's share of flood.
        difficulty: SD over events of a model's recall, as logits.
        within: The same over chips of an event.
        alike: Correlation between two models of what is hard for them.
        harder: Correlation of an event's share of flood with the recall that all models have on it.
        tilt: The same with the part of the recall that models other than 0 have alone: the gap lies in large floods.
        alarms: SD over events of the log of false alarms.
        dry_alarms: Share of a dry chip that is called flood, mean.
    """

    events: int = 60
    gap: float = MARGIN
    size: float = 1.2
    chips: float = 8
    dry: float = 0.2
    share: float = 0.7
    difficulty: float = 1.0
    within: float = 0.7
    alike: float = 0.95
    harder: float = 0.3
    tilt: float = 0.0
    alarms: float = 0.6
    dry_alarms: float = 0.006

    def _own_tilt(self, model: int) -> float:
        return self.tilt if model else 0.0

    def parts(self, logit: float, model: int) -> tuple[float, float, float]:
        """Recall, false alarms and pixels without flood, as shares of the pixels of flood, over the whole population.

        Weighting events by a lognormal share of flood moves the mean of what is correlated with it (Girsanov), so that
        one integral over a normal variable is left.
        """
        common, own = self.alike**0.5 * self.harder, (1 - self.alike) ** 0.5 * self._own_tilt(model)
        mean = logit + self.difficulty * self.share * (common + own)
        nodes, weights = GAUSS
        recall = float(weights @ expit(mean + np.hypot(self.difficulty, self.within) * nodes) / weights.sum())
        dry = self.dry / (1 - self.dry) / FLOOD_SHARE
        alarms = FALSE_ALARMS * np.exp(self.alarms**2 / 2) + dry * self.dry_alarms
        return recall, alarms, 1 / FLOOD_SHARE - 1 + dry

    def iou(self, logit: float, model: int = 0) -> tuple[float, float]:
        """True IoU of flood and of the rest, of a model whose recall is `logit` in a middling event."""
        recall, alarms, rest = self.parts(logit, model)
        return recall / (1 + alarms), (rest - alarms) / (rest + 1 - recall)

    def logit(self, flood_iou: float, model: int = 0) -> float:
        """The recall, as logits, that makes this flood IoU."""
        return float(brentq(lambda logit: self.iou(logit, model)[0] - flood_iou, -12, 12))

    def draw(self, generator: Generator, replications: int, logits: np.ndarray | None = None) -> np.ndarray:
        """Counts (R, E, M, 2, 2) of test sets; two models with the true gap, or models of these logits (R, M)."""
        if logits is None:
            pair = [0.0, self.logit(self.iou(0.0)[0] - self.gap, 1)]
            logits = np.tile(pair, (replications, 1))
        shape = replications, self.events
        chips = np.ceil(generator.lognormal(np.log(self.chips), self.size, shape)).astype(np.int64)
        dry = generator.random(shape) < self.dry
        hard, alarming, chance = generator.standard_normal((3, *shape))
        own = generator.standard_normal((logits.shape[1], *shape))
        # What the share of flood depends on: the difficulty that all share, the part of each model > 0, and chance.
        pull = self.tilt * own[1:].sum(axis=0) / max(len(own) - 1, 1) ** 0.5
        chance *= (1 - self.harder**2 - self.tilt**2) ** 0.5
        share = FLOOD_SHARE * np.exp(self.share * (self.harder * hard + pull + chance) - self.share**2 / 2) * ~dry
        first = np.concatenate([[0], chips.ravel().cumsum()[:-1]])
        event = np.repeat(np.arange(chips.size), chips.ravel())  # of each chip
        flood = PIXELS * share.ravel()[event] * generator.standard_exponential(len(event))
        same = generator.standard_normal(len(event))
        truth = np.rint(np.add.reduceat(flood, first)).reshape(shape)
        counts = np.empty((*shape, logits.shape[1], 2, 2), np.int64)
        mix = np.array([self.alike**0.5, (1 - self.alike) ** 0.5])
        for model in range(logits.shape[1]):
            ability = logits[:, model, None] + self.difficulty * (mix[0] * hard + mix[1] * own[model])
            noise = self.within * (mix[0] * same + mix[1] * generator.standard_normal(len(event)))
            hits = np.rint(np.add.reduceat(flood * expit(ability.ravel()[event] + noise), first)).reshape(shape)
            log_alarms = self.alarms * (mix[0] * alarming + mix[1] * generator.standard_normal(shape))
            dry_pixels = chips * PIXELS * self.dry_alarms * np.exp(-(self.alarms**2) / 2)
            alarms = np.rint(np.where(dry, dry_pixels, FALSE_ALARMS * truth) * np.exp(log_alarms))
            rest = np.maximum(chips * PIXELS - truth - alarms, 0)
            counts[:, :, model] = np.moveaxis(np.array([[rest, alarms], [truth - hits, hits]]), (0, 1), (2, 3))
        return counts


def flood(counts: np.ndarray) -> np.ndarray:
    """Flood IoU."""
    return iou(counts, 1)


WORLDS = {
    "as published, roughly": World(),
    "8 events": World(events=8),
    "15 events": World(events=15),
    "30 events": World(events=30),
    "120 events": World(events=120),
    "events of like size (sigma 0.5)": World(size=0.5),
    "events of very unlike size (sigma 1.5)": World(size=1.5),
    "three times the chips": World(chips=24),
    "no dry event": World(dry=0.0),
    "every other event dry": World(dry=0.5),
    "many false alarms in dry events": World(dry_alarms=0.03, alarms=1.2),
    "floods of very unlike share (sigma 1.2)": World(share=1.2),
    "events alike (difficulty 0.4)": World(difficulty=0.4, within=0.3, alarms=0.3),
    "events most unlike (difficulty 1.6)": World(difficulty=1.6),
    "models less alike (0.5)": World(alike=0.5),
    "models nearly the same (0.995)": World(alike=0.995),
    "nearly the same, 30 events": World(alike=0.995, events=30),
    "true gap 0": World(gap=0.0),
    "gap larger in large floods (0.5)": World(tilt=0.5),
    "gap mostly in large floods (0.8), models less alike": World(alike=0.5, tilt=0.8),
    "the same, floods of very unlike share": World(alike=0.5, tilt=0.8, share=1.2),
}
"""What is tried; 60 events, models alike (0.95) and a true gap of 2 pp where not said otherwise."""

TOO_HARD = list(WORLDS)[-2:]
"""Where the default interval is known to fall short, and docs/statistics.md says so."""


@dataclass(frozen=True)
class Coverage:
    """Shares over replications, 0 to 1.

    Args:
        effective: Median effective number of events.
        error: Median standard error of the gap, in IoU.
        default: Coverage of the default interval at 90 %.
        plain: Coverage with E - 1 degrees of freedom.
        single: Coverage of the default interval of the first model's flood IoU.
        equivalent: Share that is called equivalent over events.
    """

    effective: float
    error: float
    default: float
    plain: float
    single: float
    equivalent: float


def coverage(world: World, replications: int = REPLICATIONS, seed: int = 1) -> Coverage:
    """How the intervals and the verdict over events do in a world."""
    generator = np.random.default_rng(seed)
    paired, alone = [], []
    for _ in range(0, replications, BLOCK):
        counts = world.draw(generator, BLOCK)
        paired.append(jackknife(counts[:, :, 0], flood, other=counts[:, :, 1]))
        alone.append(jackknife(counts[:, :, 0], flood))
    estimate, error, freedom = np.concatenate(paired, axis=1)
    own, own_error, own_freedom = np.concatenate(alone, axis=1)
    off = np.abs(estimate - world.gap)
    p_value = stdtr(freedom, -(MARGIN - np.abs(estimate)) / error)
    return Coverage(
        float(np.median(freedom)) + 1,
        float(np.median(error)),
        float((off <= stdtrit(freedom, 0.95) * error).mean()),
        float((off <= stdtrit(world.events - 1, 0.95) * error).mean()),
        float((np.abs(own - world.iou(0.0)[0]) <= stdtrit(own_freedom, 0.95) * own_error).mean()),
        float((p_value < 0.05).mean()),
    )


def methods(world: World, replications: int = 1_500, resamples: int = 400, seed: int = 2) -> dict[str, float]:
    """Coverage at 90 % of several intervals on the same draws.

    The three of the bootstrap are those of Efron and Tibshirani 1993, chapters 12 to 14.
    """
    generator = np.random.default_rng(seed)
    drawn_counts = world.draw(generator, replications)
    estimate, error, freedom = jackknife(drawn_counts[:, :, 0], flood, other=drawn_counts[:, :, 1])
    counts = drawn_counts.astype(np.float64)
    hits = counts[..., 1, 1]
    union = hits + counts[..., 0, 1] + counts[..., 1, 0]
    ends: dict[str, list[np.ndarray]] = {"percentile": [], "BCa": [], "bootstrap-t": []}
    tails = np.array([0.05, 0.95])
    for hit, whole, found in zip(hits, union, estimate, strict=True):
        events = len(hit)
        places = generator.integers(0, events, (resamples, events)) + events * np.arange(resamples)[:, None]
        weights = (
            np.bincount(places.ravel(), minlength=events * resamples).reshape(resamples, events).astype(np.float64)
        )
        drawn, spread = _linear(hit, whole, weights)
        _, own_spread = _linear(hit, whole, np.ones((1, events)))
        influence = (hit / whole.sum(0) - whole * hit.sum(0) / whole.sum(0) ** 2) @ [1, -1]
        skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        bias = ndtri(np.clip((drawn < found).mean(), 1 / resamples, 1 - 1 / resamples))
        moved = bias + ndtri(tails)
        ends["percentile"].append(np.quantile(drawn, tails))
        ends["BCa"].append(np.quantile(drawn, ndtr(bias + moved / (1 - skew * moved))))
        ends["bootstrap-t"].append(found - np.quantile((drawn - found) / spread, tails[::-1]) * own_spread)
    halves = {
        "jackknife, t with E - 1 degrees of freedom": stdtrit(world.events - 1, 0.95) * error,
        "jackknife, t with effective events - 1 (the default)": stdtrit(freedom, 0.95) * error,
    }
    covered = {name: float(np.mean([low <= world.gap <= high for low, high in pairs])) for name, pairs in ends.items()}
    return {f"bootstrap, {name.removeprefix('bootstrap-')}": share for name, share in covered.items()} | {
        name: float((np.abs(estimate - world.gap) <= half).mean()) for name, half in halves.items()
    }


def _linear(hits: np.ndarray, union: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gap (B,) in resamples with these weights (B, E), and its linearised standard error (B,)."""
    total = weights @ union
    ratio = weights @ hits / total  # (B, M)
    influence = (hits[:, 0] - ratio[:, :1] * union[:, 0]) / total[:, :1]
    influence -= (hits[:, 1] - ratio[:, 1:] * union[:, 1]) / total[:, 1:]
    return ratio[:, 0] - ratio[:, 1], np.sqrt((weights * influence**2).sum(axis=1))


GAPS_PP = (0, 0.5, 1, 2, 2.5, 3)
SEEDS = (1, 3, 5, 10)
SPREADS_PP = (0.5, 1)
DRAWS = 20_000  # simulation error of a share near 0.05: 0.15 pp


def seed_verdicts(gap: float, spread: float, draws: int = DRAWS, seed: int = 3) -> dict[str, float]:
    """Shares of draws in which each rule calls a model equivalent to a reference.

    A run's recall differs from another's so that its flood IoU has this SD; its IoU of the rest follows from the same
    counts. True gap and spread are in IoU; the reference's figures are fixed.
    """
    world = World()
    generator = np.random.default_rng(seed)
    reference = np.array(world.iou(0.0))
    flood_iou = reference[0] - gap + spread * generator.standard_normal((draws, max(SEEDS)))
    # IoU of the rest as a function of flood IoU: both move with the recall, and only with it.
    recall = flood_iou * (1 + world.parts(0.0, 0)[1])
    _, alarms, rest = world.parts(0.0, 0)
    mean_iou = (flood_iou + (rest - alarms) / (rest + 1 - recall)) / 2
    shares = {
        "card": float((np.abs(mean_iou[:, 0] - reference.mean()) < MARGIN).mean()),
        "one run": float((np.abs(flood_iou[:, 0] - reference[0]) < MARGIN).mean()),
    }
    for seeds in SEEDS[1:]:
        shares[f"{seeds} seeds"] = float((seed_p_values(flood_iou[:, :seeds], reference[0]) < 0.05).mean())
    return shares


def seed_p_values(values: np.ndarray, reference: float) -> np.ndarray:
    """`equivalence_over_seeds` for many rows (R, n) at once; a test holds the two together."""
    seeds = values.shape[1]
    error = values.std(axis=1, ddof=1) / seeds**0.5
    return stdtr(seeds - 1, -(MARGIN - np.abs(values.mean(axis=1) - reference)) / error)


ODD_SEEDS = {
    "normal": lambda generator, shape: generator.standard_normal(shape),
    "heavy tails (t, 3 degrees of freedom)": lambda generator, shape: generator.standard_t(3, shape) / 3**0.5,
    "a long tail of bad runs (exponential)": lambda generator, shape: 1 - generator.standard_exponential(shape),
    "one run in ten 3 pp below the others": lambda generator, shape: (
        0.5 * generator.standard_normal(shape) + 0.3 - 3 * (generator.random(shape) < 0.1)
    ),
}
"""Deviations of runs from their mean in pp, SD about 1."""


def odd_seeds(kind: str, seeds: int, draws: int = DRAWS, seed: int = 4) -> float:
    """Share of wrong verdicts over seeds, at a true gap of the margin, for runs that spread in this way."""
    deviations = ODD_SEEDS[kind](np.random.default_rng(seed), (draws, seeds))
    return float((seed_p_values(-MARGIN + 0.01 * deviations, 0.0) < 0.05).mean())


def seeds_and_events(seeds: int = 5, spread: float = 0.005, seed: int = 5) -> tuple[float, float]:
    """Wrong verdicts about all runs on all events, at a true gap of the margin, where both are drawn.

    Returns:
        Over seeds (the runs against the reference on one test set), and over events (the first run alone).
    """
    world = World(alike=0.995)
    generator = np.random.default_rng(seed)
    target = world.iou(0.0)[0] - MARGIN
    grid = np.linspace(target - 6 * spread, target + 6 * spread, 41)
    logit = np.array([world.logit(value, 1) for value in grid])
    runs = np.interp(target + spread * generator.standard_normal((1_000, seeds)), grid, logit)
    counts = world.draw(generator, 1_000, np.concatenate([np.zeros((1_000, 1)), runs], axis=1))
    scores = flood(counts.sum(axis=1))
    over_seeds = seed_p_values(scores[:, 1:] - scores[:, :1], 0.0)
    estimate, error, freedom = jackknife(counts[:, :, 0], flood, other=counts[:, :, 1])
    over_events = stdtr(freedom, -(MARGIN - np.abs(estimate)) / error)
    return float((over_seeds < 0.05).mean()), float((over_events < 0.05).mean())


POWER_WORLDS = {
    "60 events, models alike (0.95)": World(),
    "120 events, models alike (0.95)": World(events=120),
    "60 events, events alike too (difficulty 0.4)": World(difficulty=0.4, within=0.3, alarms=0.3),
    "60 events, models nearly the same (0.995)": World(alike=0.995),
}


@dataclass(frozen=True)
class Results:
    """All that is simulated; shares 0 to 1."""

    methods: dict[str, dict[str, float]]
    worlds: dict[str, Coverage]
    power: dict[str, list[float]]
    seeds: dict[tuple[float, float], dict[str, float]]
    odd: dict[str, list[float]]
    both: tuple[float, float]


def simulate() -> Results:
    """Run it all, seeded."""
    return Results(
        {f"{events} events": methods(World(events=events)) for events in (30, 60)},
        {name: coverage(world) for name, world in WORLDS.items()},
        {
            name: [coverage(replace(world, gap=gap / 100), 1_000).equivalent for gap in (0, 0.5, 1)]
            for name, world in POWER_WORLDS.items()
        },
        {(spread, gap): seed_verdicts(gap / 100, spread / 100) for spread in SPREADS_PP for gap in GAPS_PP},
        {kind: [odd_seeds(kind, seeds) for seeds in SEEDS[1:]] for kind in ODD_SEEDS},
        seeds_and_events(),
    )


def tables(results: Results) -> str:
    """The tables of docs/statistics.md, shares in percent."""
    parts = [
        "Coverage of 90 % intervals of the gap in flood IoU, in %, 1,500 replications (simulation error 0.8):",
        _table(
            ["interval", *results.methods],
            [
                [name, *(_percent(found[name]) for found in results.methods.values())]
                for name in results.methods["30 events"]
            ],
        ),
        "Coverage of the default interval of the gap, the same with E - 1 degrees of freedom, that of the default "
        'interval of one model\'s flood IoU, and the share of wrong verdicts "equivalent within 2 pp" over events, in '
        "%, 4,000 replications (simulation error 0.5, for the last 0.3); 60 events where not said otherwise:",
        _table(
            [
                "setting",
                "effective events",
                "standard error, pp",
                "default",
                "with E - 1",
                "one model",
                "wrongly equivalent",
            ],
            [
                [
                    name,
                    f"{found.effective:.1f}",
                    f"{100 * found.error:.2f}",
                    _percent(found.default),
                    _percent(found.plain),
                    _percent(found.single),
                    _percent(found.equivalent) if WORLDS[name].gap >= MARGIN else "-",
                ]
                for name, found in results.worlds.items()
            ],
        ),
        'Power over events: share of "equivalent within 2 pp", in %, 1,000 replications:',
        _table(
            ["setting", "true gap 0 pp", "0.5 pp", "1 pp"],
            [[name, *map(_percent, shares)] for name, shares in results.power.items()],
        ),
        'Share of "equivalent within 2 pp" by rule, in %, 20,000 draws (simulation error at most 0.35):',
        _table(
            [
                *("seed SD, pp", "true gap, pp", "card: one run, mIoU within 2 pp", "one run, flood IoU within 2 pp"),
                *("TOST, 1 seed", *(f"TOST, {seeds} seeds" for seeds in SEEDS[1:])),
            ],
            [
                [
                    *(f"{spread:g}", f"{gap:g}", _percent(shares["card"]), _percent(shares["one run"])),
                    *("0 (not possible)", *(_percent(shares[f"{seeds} seeds"]) for seeds in SEEDS[1:])),
                ]
                for (spread, gap), shares in results.seeds.items()
            ],
        ),
        "Wrong verdicts over seeds at a true gap of 2 pp, SD about 1 pp, where the runs are not normal, in %:",
        _table(
            ["runs", *(f"{seeds} seeds" for seeds in SEEDS[1:])],
            [[kind, *map(_percent, shares)] for kind, shares in results.odd.items()],
        ),
        "Wrong verdicts about the recipe on all events, at a true gap of 2 pp, 60 events, models nearly the same, seed "
        f"SD 0.5 pp: over 5 seeds on one test set {_percent(results.both[0])} %, over events with one run "
        f"{_percent(results.both[1])} %.",
    ]
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(tables(simulate()))
