"""Energy of a run by method, and what it means for a data centre and the air: arithmetic with named sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from floodrepro.errors import UsageError
from floodrepro.publishing.markdown import figure

METHODS = {
    "counter": "read from the device's own energy counter",
    "power": "integrated from sampled power",
    "tdp": "an upper estimate, rated power times time",
}
"""What `system/energy.py` calls its methods, in words."""


@dataclass(frozen=True)
class Factor:
    """A figure that was not measured here.

    Args:
        value: Power usage effectiveness (a ratio), or kg CO2e per kWh.
        source: Where it comes from, in the words of who gave it.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Factors:
    """What turns a device's energy into a data centre's emissions.

    Args:
        pue: Power usage effectiveness: energy of the data centre over energy of its computers (ISO/IEC 30134-2).
        intensity: Of the grid, kg CO2e per kWh.
    """

    pue: Factor
    intensity: Factor


@dataclass(frozen=True)
class Energy:
    """Energy of the parts of a run.

    Args:
        kwh: By method, kWh; figures of different methods are kept apart.
        parts: Number of parts (a resumed run has several).
        unmeasured: Number of those of which nothing can be said.
        notes: How each figure came about, without repeats.
    """

    kwh: Mapping[str, float]
    parts: int
    unmeasured: int
    notes: Sequence[str]

    @property
    def total(self) -> float | None:
        """Energy of the whole run, kWh; None where a part is missing or parts were measured by different methods."""
        return next(iter(self.kwh.values())) if len(self.kwh) == 1 and not self.unmeasured else None


@dataclass(frozen=True)
class Carbon:
    """What the data centre drew, kWh, and what that emitted, kg CO2e."""

    kwh: float
    kg: float


def kwh(hours: float, watts: float) -> float:
    """Energy in kWh of a device that draws *watts* for *hours*."""
    return hours * watts / 1000


def carbon(energy: float, pue: float, intensity: float) -> Carbon:
    """Energy and emissions of a data centre.

    Args:
        energy: Of the device, kWh.
        pue: Power usage effectiveness.
        intensity: kg CO2e per kWh.
    """
    return Carbon(energy * pue, energy * pue * intensity)


def add_up(entries: Sequence[Mapping[str, Any]]) -> Energy:
    """Add the energy of a run's parts, method by method.

    Args:
        entries: ``energy`` of run.json.
    """
    sums: dict[str, float] = {}
    measured = [entry for entry in entries if entry.get("kWh") is not None]
    for entry in measured:
        sums[entry["method"]] = sums.get(entry["method"], 0.0) + entry["kWh"]
    notes = list(dict.fromkeys(str(entry["note"]) for entry in entries if entry.get("note")))
    return Energy(sums, len(entries), len(entries) - len(measured), notes)


def factors(
    pue: float | None, pue_source: str | None, intensity: float | None, intensity_source: str | None
) -> Factors | None:
    """Both factors with their sources; None where none was given.

    Raises:
        UsageError: A value lacks its source or a source its value, one of the two is missing, or one cannot be.
    """
    given = {
        **{"--pue": pue, "--pue-source": _text(pue_source)},
        **{"--grid-intensity": intensity, "--grid-source": _text(intensity_source)},
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing or pue is None or intensity is None:
        raise UsageError(
            f"{' and '.join(missing)} is missing: a carbon figure needs PUE and grid intensity, each with its source",
            fix="--pue X --pue-source TEXT --grid-intensity X --grid-source TEXT, or none of them",
        )
    if not 1 <= pue < 10:
        raise UsageError(f"--pue is {pue:g}, expected 1 or more: the data centre's energy over the computers'")
    if not 0 <= intensity < 10:
        raise UsageError(f"--grid-intensity is {intensity:g}, expected kg CO2e per kWh, 0 to about 1")
    return Factors(Factor(pue, str(given["--pue-source"])), Factor(intensity, str(given["--grid-source"])))


def sentences(record: Mapping[str, Any] | None, given: Factors | None) -> list[str]:
    """Energy of the device by method, and emissions where a PUE and a grid intensity were given."""
    if record is None or not record.get("energy"):
        return ["The energy was not recorded, and no carbon figure is made up."]
    found = add_up(record["energy"])
    lines = [f"Device: {figure(kwh)} kWh, {METHODS.get(method, method)}." for method, kwh in found.kwh.items()]
    if len(lines) > 1:
        lines.append("The parts of the run were measured by different methods, and their figures are not added.")
    if found.unmeasured:
        lines.append(f"Of {found.unmeasured} of {found.parts} parts of the run the energy is not known.")
    lines.append(
        "It is the energy of one device, without host, cooling and other devices; validation is in it, the test is not."
        f" How it was measured: {'; '.join(found.notes)}."
    )
    if found.total is None:
        lines.append("There is no one figure for the whole run, and no carbon figure is made up.")
    elif given is None:
        lines.append("No PUE and grid intensity were given with a source, and no carbon figure is made up.")
    else:
        footprint = carbon(found.total, given.pue.value, given.intensity.value)
        lines.append(
            f"Data centre and grid: {figure(found.total)} kWh x PUE {given.pue.value:g} ({given.pue.source}) = "
            f"{figure(footprint.kwh)} kWh; x {given.intensity.value:g} kg CO2e/kWh ({given.intensity.source}) = "
            f"{figure(footprint.kg)} kg CO2e."
        )
    return lines


def _text(text: str | None) -> str | None:
    """One line; None where nothing is left of it."""
    return " ".join(text.split()) or None if text else None
