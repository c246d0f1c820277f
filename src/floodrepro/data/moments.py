"""Streaming statistics: what is kept of a chip is small, and merges to what all chips together would have given.

`Moments` give each band's mean and standard deviation. `BandProducts` give the correlation between Sentinel-2's bands,
and with it `exchanges` finds bands that lie in each other's place. `ChipRecord` is all that an audit keeps of a chip.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from floodrepro.data.names import S1_BANDS, S2_BANDS, SUFFIXES

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BANDS = {"S2L2A": S2_BANDS, "S1RTC": S1_BANDS, "DEM": ("elevation",)}


@dataclass(frozen=True)
class Moments:
    """Number of values, mean, and sum of squared deviations from the mean, each (C,): one for each band.

    A merge is exact up to float64's rounding: merged in one and the same order, results are equal to the bit.
    Source: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    count: Integers
    mean: Floats
    m2: Floats

    @classmethod
    def of(cls, bands: Sequence[npt.NDArray[Any]]) -> Self:
        """Moments of the values of each band; the bands may differ in their number of values, and have none."""
        count, mean, m2 = [], [], []
        for band in bands:
            values = band.astype(np.float64).ravel()
            middle = float(values.mean()) if values.size else 0.0
            values -= middle
            count.append(values.size)
            mean.append(middle)
            m2.append(float(np.square(values).sum()))
        return cls(np.array(count, np.int64), np.array(mean), np.array(m2))

    @classmethod
    def none(cls, bands: int) -> Self:
        """Moments of no values at all: merging them changes nothing."""
        return cls(np.zeros(bands, np.int64), np.zeros(bands), np.zeros(bands))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of values together."""
        count = self.count + other.count
        weight = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * weight, self.m2 + other.m2 + delta * delta * self.count * weight)

    @property
    def std(self) -> Floats:
        """Standard deviation of the values (divided by n, not by n - 1), (C,); 0 where there are none."""
        deviation: Floats = np.sqrt(self.m2 / np.maximum(self.count, 1))
        return deviation

    def to_json(self) -> list[list[Any]]:
        """Count, mean and m2 as lists; floats survive the way to JSON and back to the bit."""
        return [self.count.tolist(), self.mean.tolist(), self.m2.tolist()]

    @classmethod
    def from_json(cls, document: list[list[Any]]) -> Self:
        """The inverse of `to_json`."""
        count, mean, m2 = document
        return cls(np.array(count, np.int64), np.array(mean, np.float64), np.array(m2, np.float64))


@dataclass(frozen=True)
class BandProducts:
    """Number of pixels, sums (C,), and sums of products of each two bands (C, C), of whole numbers: exact.

    int16 squared is below 2^30, and `of` is given at most 2^14 pixels of a chip: 2^19 chips fit into int64.
    """

    count: int
    sums: Integers
    products: Integers

    @classmethod
    def of(cls, pixels: npt.NDArray[np.int16]) -> Self:
        """Of the pixels (C, N) of one chip."""
        values = pixels.astype(np.int64)
        return cls(values.shape[1], values.sum(axis=1), values @ values.T)

    @classmethod
    def none(cls, bands: int) -> Self:
        """Of no pixels: merging it changes nothing."""
        return cls(0, np.zeros(bands, np.int64), np.zeros((bands, bands), np.int64))

    def merge(self, other: "BandProducts") -> "BandProducts":
        """Of both sets of pixels together."""
        return BandProducts(self.count + other.count, self.sums + other.sums, self.products + other.products)

    @property
    def means(self) -> Floats:
        """Mean of each band, (C,)."""
        means: Floats = self.sums / max(self.count, 1)
        return means

    def correlation(self) -> Floats | None:
        """Pearson's correlation between bands, (C, C); None where a band does not vary."""
        covariance = self.products / max(self.count, 1) - np.outer(self.means, self.means)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
        if self.count < 2 or not (deviation > 0).all():
            return None
        correlation: Floats = np.clip(covariance / np.outer(deviation, deviation), -1, 1)
        return correlation

    def to_json(self) -> list[Any]:
        """Count, sums, and the products' upper triangle."""
        return [self.count, self.sums.tolist(), self.products[np.triu_indices(len(self.sums))].tolist()]

    @classmethod
    def from_json(cls, document: list[Any]) -> Self:
        """The inverse of `to_json`."""
        count, sums, triangle = document
        products = np.zeros((len(sums), len(sums)), np.int64)
        products[np.triu_indices(len(sums))] = triangle
        return cls(count, np.array(sums, np.int64), products + np.triu(products, 1).T)


@dataclass(frozen=True)
class Finding:
    """One thing that an audit has to say.

    Args:
        severity: `error`, `warning` or `info`.
        check: Short name of the check, the same for all of its findings.
        message: One sentence.
        chip: The chip that it is about, if it is about one.
        file: The name of the file that it is about, if it is about one.
    """

    severity: str
    check: str
    message: str
    chip: str | None = None
    file: str | None = None

    def line(self) -> str:
        """The finding as one line of text."""
        subject = self.file or self.chip
        return f"{self.severity}: {self.check}: {f'{subject}: ' if subject else ''}{self.message}"


@dataclass
class ChipRecord:
    """What is kept of a chip.

    Args:
        chip: Its id.
        sizes: Bytes of each part's file.
        sha256: Of each part's file.
        findings: What is wrong with it.
        edge: Height and width in pixels; 0 if no part could be read.
        moments: Per-band statistics by modality, missing values left out.
        missing: By part, the pixels without data (in any band; IGNORE_INDEX in a mask) and all pixels.
        classes: Number of pixels by mask value, IGNORE_INDEX left out.
        flood: Of VV(event) - VV(before) in dB, where the mask says flood.
        order: Band products of the Sentinel-2 pixels sampled for the check of the band order.
    """

    chip: str
    sizes: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    edge: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    missing: dict[str, tuple[int, int]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    flood: Moments = field(default_factory=lambda: Moments.none(1))
    order: BandProducts = field(default_factory=lambda: BandProducts.none(len(S2_BANDS)))

    def add(self, severity: str, check: str, message: str, part: str | None = None) -> None:
        """Add a finding about the chip, or about its file of one part."""
        file = f"{self.chip}{SUFFIXES[part]}" if part else None
        self.findings.append(Finding(severity, check, message, self.chip, file))

    def to_line(self) -> str:
        """The record as one line of JSON."""
        document = vars(self) | {
            "findings": [asdict(finding) for finding in self.findings],
            "moments": {modality: moments.to_json() for modality, moments in self.moments.items()},
            "flood": self.flood.to_json(),
            "order": self.order.to_json(),
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str | bytes) -> Self:
        """The inverse of `to_line`; raises ValueError, KeyError or TypeError for anything else."""
        document = json.loads(line)
        document["findings"] = [Finding(**finding) for finding in document["findings"]]
        document["moments"] = {name: Moments.from_json(value) for name, value in document["moments"].items()}
        document["flood"] = Moments.from_json(document["flood"])
        document["order"] = BandProducts.from_json(document["order"])
        return cls(**document)


# Sentinel-2's bands by their index in names.S2_BANDS: visible light with the foot of the red edge (B01 to B05), near
# infrared with water vapour (B06 to B09), shortwave infrared (B11, B12). Within a group bands look so much alike that
# no statistic tells them apart on every scene: B03 and B04 do not differ over some fields, nor B08 and B8A anywhere.
GROUPS = (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2)


class Exchange(NamedTuple):
    """Two bands by index, and how long the path through all bands is with them exchanged, relative to now."""

    first: int
    second: int
    path: float


def exchanges(products: BandProducts) -> list[Exchange]:
    """All exchanges of two of Sentinel-2's bands from different groups, the one that shortens the path most first.

    The bands are in order of wavelength, and what is close in wavelength looks alike. So the path that visits all
    bands in order, a step being sqrt(1 - correlation), is nearly the shortest one there is, whatever the land, the
    season and the clouds: the idea of seriation. Two bands in each other's place make detours at both places.

    Measured: on three real Sentinel-2 scenes, together and alone, no exchange across groups shortens the path, and on
    crops of them none leads to less than 0.89 of it (147 crops of 32 px) or 0.94 (48 of 56 px). With B02 and B08 in
    each other's place, putting them back leads to 0.64 to 0.77 on each scene, to 0.61 on all, and on generated ones to
    0.52. Below 0.85 lie 39 of the 45 pairs on the three scenes together, and all 45 on generated ones; a shift of all
    bands by one place hardly lengthens the path and is not found.

    Returns:
        An empty list where a band does not vary.
    """
    correlation = products.correlation()
    if correlation is None:
        return []
    step = np.sqrt(1 - correlation)

    def length(order: list[int]) -> float:
        return float(step[order[:-1], order[1:]].sum())

    straight = list(range(len(GROUPS)))
    now = length(straight)
    found = []
    for first in straight:
        for second in straight[first + 1 :]:
            if GROUPS[first] != GROUPS[second]:
                order = straight.copy()
                order[first], order[second] = second, first
                found.append(Exchange(first, second, length(order) / max(now, 1e-12)))
    return sorted(found, key=lambda exchange: exchange.path)


def contrary(means: Floats, expected: Sequence[float], first: int, second: int) -> bool:
    """Whether two bands' means stand the other way round than expected, by a clear margin on both sides.

    Clear is a ratio of 1.3 in what is expected, and of 1.1 in what was measured: shortwave infrared, the least steady
    part of a land's mean spectrum, stands the other way round in deserts, and only by less than that.
    """
    measured, known = means[first] / max(means[second], 1), expected[first] / expected[second]
    if known < 1:
        measured, known = 1 / max(measured, 1e-6), 1 / known
    return bool(known > 1.3 and measured < 1 / 1.1)
