"""Figures of a whole data set, gathered chip by chip, and what they say: statistics, band order, flood signature."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from floodrepro import recipe as recipes
from floodrepro.data.moments import BANDS, BandProducts, ChipRecord, Finding, Moments, contrary, exchanges
from floodrepro.data.names import S2_BANDS, Protocol, protocol_of
from floodrepro.errors import UsageError

# Mean and std may differ from the recipe's by this much of the recipe's std. The two published sets of statistics lie
# 0.08 to 0.16 apart in the means of all optical bands, so that 0.05 tells them apart; which pixels and which splits
# were counted for them is not documented, so that less would mean nothing.
TOLERANCE = 0.05
# On v1, flood changes by about -5 dB (-10 to -15), and land that stays dry by about 0. Nobody has measured v0, whose
# masks are other ones: there only a change that is as good as none is an error, and what lies between is a warning.
FLOOD_CHANGE_DB = -2.0
NO_CHANGE_DB = {"v0": -0.5, "v1": FLOOD_CHANGE_DB}
FEWEST_FLOOD_PIXELS = 100  # speckle of about 4 dB a pixel leaves 0.4 dB on the mean of so many
EVENT_PATH, ALL_PATH = 0.85, 0.95  # `exchanges`: for one event; for all, where the means say the same


@dataclass(frozen=True)
class Statistics:
    """A recipe's normalisation: its name, means and stds by modality and band, and its protocol if it is known."""

    name: str
    means: dict[str, list[float]]
    stds: dict[str, list[float]]
    protocol: str | None = None

    @classmethod
    def of(cls, config: str) -> "Statistics":
        """Those of a recipe's data section.

        Raises:
            UsageError: The recipe is not found, or gives no statistics for all bands of a modality.
        """
        path = recipes.find(config)
        arguments = (recipes.read(path).get("data") or {}).get("init_args") or {}
        means, stds = arguments.get("means") or {}, arguments.get("stds") or {}
        fits = [m for m in BANDS if len(means.get(m, ())) == len(stds.get(m, ())) == len(BANDS[m])]
        if not fits:
            raise UsageError("the config gives no means and stds to compare with", where=path, fix="--config YAML")
        protocol = protocol_of(arguments.get("label_map"))
        return cls(path.stem, {m: means[m] for m in fits}, {m: stds[m] for m in fits}, protocol)


@dataclass
class Totals:
    """What the chips' records add up to; by split where figures may differ between splits.

    Args:
        protocol: Of the masks on disk; the last of its classes is flood.
    """

    protocol: Protocol
    chips: Counter[str] = field(default_factory=Counter)
    edges: Counter[int] = field(default_factory=Counter)
    moments: dict[str, dict[str, Moments]] = field(default_factory=dict)
    missing: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    classes: dict[str, Counter[str]] = field(default_factory=dict)
    flood: Moments = field(default_factory=lambda: Moments.none(1))
    order: dict[str, BandProducts] = field(default_factory=dict)  # by event

    def add(self, split: str, record: ChipRecord) -> None:
        """Add one chip."""
        self.chips[split] += 1
        self.edges[record.edge] += 1
        moments, missing = self.moments.setdefault(split, {}), self.missing.setdefault(split, {})
        for modality, values in record.moments.items():
            moments[modality] = moments[modality].merge(values) if modality in moments else values
        for part, (absent, pixels) in record.missing.items():
            before = missing.get(part, (0, 0))
            missing[part] = (before[0] + absent, before[1] + pixels)
        self.classes.setdefault(split, Counter()).update(record.classes)
        self.flood = self.flood.merge(record.flood)
        event = record.chip.split("_", 1)[0]
        self.order[event] = self.order[event].merge(record.order) if event in self.order else record.order

    def document(self, statistics: Statistics | None) -> dict[str, Any]:
        """The figures as plain JSON values, as the data manifest holds them (`audit`)."""
        shares = {
            split: {
                name: counts[str(value)] / max(counts.total(), 1)
                for value, name in enumerate(self.protocol.class_names)
            }
            for split, counts in self.classes.items()
        }
        return {
            "chips": dict(self.chips),
            "class_shares": shares,
            "missing_shares": {
                split: {part: absent / max(pixels, 1) for part, (absent, pixels) in parts.items()}
                for split, parts in self.missing.items()
            },
            "bands": {
                split: {
                    modality: {"count": m.count.tolist(), "mean": m.mean.tolist(), "std": m.std.tolist()}
                    for modality, m in modalities.items()
                }
                for split, modalities in self.moments.items()
            },
            "compared": None if statistics is None else {"recipe": statistics.name, "bands": self.compare(statistics)},
            "flood_change": {"pixels": int(self.flood.count[0]), "mean_db": float(self.flood.mean[0])},
        }

    def compare(self, statistics: Statistics) -> dict[str, dict[str, list[float]]]:
        """How far the train split's bands lie from a recipe's statistics.

        Returns:
            By modality and band: ``z``, (mean - the recipe's mean) / the recipe's std, and ``std_ratio``.
        """
        found = {}
        for modality, moments in self.moments.get("train", {}).items():
            if modality in statistics.means and moments.count.all():
                mean, std = np.array(statistics.means[modality]), np.array(statistics.stds[modality])
                z, ratio = (moments.mean - mean) / std, moments.std / std
                found[modality] = {"z": z.tolist(), "std_ratio": ratio.tolist()}
        return found

    def judge(self, statistics: Statistics | None) -> list[Finding]:
        """What is wrong with the data set as a whole."""
        findings = [*self._judge_classes(), *self._judge_order(statistics)]
        edges = sorted(edge for edge in self.edges if edge)
        if len(edges) > 1:
            counts = ", ".join(f"{self.edges[edge]} of {edge} px" for edge in edges)
            findings.append(Finding("error", "shape", f"chips differ in size, and cannot lie in one batch: {counts}"))
        for modality, band in (self.compare(statistics) if statistics else {}).items():
            off = np.maximum(np.abs(band["z"]), np.abs(np.array(band["std_ratio"]) - 1))
            if (worst := int(off.argmax())) >= 0 and off[worst] > TOLERANCE:
                message = (
                    f"{modality}: {int((off > TOLERANCE).sum())} of {len(off)} bands differ from the statistics of "
                    f"{statistics.name if statistics else ''}, most of all {BANDS[modality][worst]}: "
                    f"z of the mean {band['z'][worst]:+.2f}, std x {band['std_ratio'][worst]:.2f}"
                )
                if statistics and statistics.protocol == "v1-binary":
                    message += "; expected: v1-binary keeps v0's statistics on purpose"
                findings.append(Finding("warning", "statistics", message))
        return findings

    def _judge_classes(self) -> list[Finding]:
        findings = []
        counts: Counter[str] = sum(self.classes.values(), Counter())
        for value, name in enumerate(self.protocol.class_names):
            if not counts[str(value)] and self.classes:
                flood = value == len(self.protocol.class_names) - 1
                message = f"no mask holds a pixel of class {value} ({name}): are these masks of another protocol?"
                findings.append(Finding("error" if flood else "warning", "classes", message))
        pixels, change = int(self.flood.count[0]), float(self.flood.mean[0])
        if pixels < FEWEST_FLOOD_PIXELS:
            message = f"not checked: the radar saw {pixels} flood pixels, and speckle needs {FEWEST_FLOOD_PIXELS}"
            findings.append(Finding("info", "flood-signature", message))
        elif change > FLOOD_CHANGE_DB:
            wrong = change > NO_CHANGE_DB[self.protocol.name]
            message = (
                f"VV changes by {change:+.1f} dB from before to event where masks say flood ({pixels:,} pixels), "
                f"expected {FLOOD_CHANGE_DB:g} or less: masks or timesteps "
                + ("do not belong to these images" if wrong else "may belong to other images (known of v1 only)")
            )
            severity = "error" if wrong else "warning"
            findings.append(Finding(severity, "flood-signature", message))
        return findings

    def _judge_order(self, statistics: Statistics | None) -> list[Finding]:
        findings = []
        by_pair: dict[str, list[str]] = {}
        everything = BandProducts.none(len(S2_BANDS))
        for event, products in sorted(self.order.items()):
            everything = everything.merge(products)
            best = next(iter(exchanges(products)), None)
            if best is not None and best.path < EVENT_PATH:
                by_pair.setdefault(f"{S2_BANDS[best.first]} and {S2_BANDS[best.second]}", []).append(event)
        for pair, events in by_pair.items():
            listed = ", ".join(events[:5]) + (", …" if len(events) > 5 else "")
            message = f"S2L2A bands {pair} look exchanged in {len(events)} of {len(self.order)} events ({listed})"
            findings.append(Finding("error", "band-order", message))
        means = everything.means
        if everything.count and means[5:10].mean() < means[:4].mean():
            message = (
                "S2L2A is darker in near infrared (B06 to B09) than in visible light (B01 to B04): reversed bands?"
            )
            findings.append(Finding("error", "band-order", message))
        expected = statistics.means.get("S2L2A") if statistics else None
        if expected and not findings:
            for one, other, path in exchanges(everything):
                if path < ALL_PATH and contrary(means, expected, one, other):
                    message = f"S2L2A bands {S2_BANDS[one]} and {S2_BANDS[other]} look exchanged, also by their means"
                    findings.append(Finding("error", "band-order", message))
                    break
        return findings
