"""Energy of a run by method, and what it means for a data centre and the air: arithmetic with named sources."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from floodrepro.errors import UsageError
from floodrepro.verification.checks import number

METHODS = {
    "counter": "read from the device's own energy counter",
    "power": "integrated from sampled power",
    "tdp": "an upper estimate, rated power times time",
}


class Factors(NamedTuple):
    """What turns the devices' energy into a data centre's emissions, and where both figures come from.

    `pue` is power usage effectiveness: energy of the data centre over energy of its computers (ISO/IEC 30134-2).
    `intensity` is that of the grid, kg CO2e per kWh.
    """

    pue: float
    pue_source: str
    intensity: float
    intensity_source: str


def factors_of(pue: Sequence[str] | None, grid: Sequence[str] | None) -> Factors | None:
    """`Factors` from the two flags, each a figure and its source; None where neither was given.

    Raises:
        UsageError: One is missing, without its source, or out of range.
    """
    if pue is None and grid is None:
        return None
    found: list[Any] = []
    units = {"--pue": (pue, 1, "1 or more"), "--grid": (grid, 0, "0 to about 1 kg CO2e per kWh")}
    for flag, (given, low, unit) in units.items():
        if given is None:
            raise UsageError(f"{flag} is missing: a carbon figure needs both", fix="--pue X SOURCE --grid X SOURCE")
        try:
            value, source = float(given[0]), " ".join(given[1].split())
        except ValueError as error:
            raise UsageError(f"{flag}: {error}", fix=f"{flag} X SOURCE") from error
        if not low <= value < 10 or not source:
            raise UsageError(f"{flag} {value:g} {source!r}: expected {unit}, and where it comes from")
        found += [value, source]
    return Factors(*found)


def total_kwh(record: Mapping[str, Any]) -> float | None:
    """Energy of all devices over the whole run, kWh; None where a part or a device is unknown or methods are mixed."""
    parts: Sequence[Mapping[str, Any]] = record.get("energy") or []
    metered, devices = _devices(record)
    one_method = len({part.get("method") for part in parts}) == 1
    if not one_method or metered < devices or any(part.get("kWh") is None for part in parts):
        return None
    return float(sum(part["kWh"] for part in parts))


def emissions_kg(record: Mapping[str, Any], factors: Factors | None) -> float | None:
    """Emissions of the run, kg CO2e; None where the energy of all devices, or a factor, is not known."""
    energy = total_kwh(record)
    return None if energy is None or factors is None else energy * factors.pue * factors.intensity


def energy_lines(record: Mapping[str, Any], factors: Factors | None) -> list[str]:
    """Energy by method, which devices it is of, and emissions where a PUE and a grid intensity were given."""
    parts: Sequence[Mapping[str, Any]] = record.get("energy") or []
    known = [part for part in parts if part.get("kWh") is not None]
    if not known:
        return ["The energy was not measured, so there is no carbon figure."]
    lines = []
    for method in dict.fromkeys(str(part["method"]) for part in known):
        kwh = sum(part["kWh"] for part in known if part["method"] == method)
        lines.append(f"{number(kwh)} kWh, {METHODS.get(method, method)}.")
    if len(lines) > 1:
        lines.append("Figures of different methods are not added.")
    if len(known) < len(parts):
        lines.append(f"The energy of {len(parts) - len(known)} of {len(parts)} parts of the run is not known.")
    metered, devices = _devices(record)
    whose = "the device" if devices == 1 else f"all {devices} devices"
    if metered < devices:
        whose = f"{metered} of {devices} devices; nothing was scaled up"
    lines.append(f"This is the energy of {whose}, without host and cooling. Validation is included, the test is not.")
    energy, emitted = total_kwh(record), emissions_kg(record, factors)
    if energy is None:
        lines.append("There is no one figure for the whole run on all devices, so there is no carbon figure.")
    elif factors is None:
        lines.append("No PUE and grid intensity were given with a source, so there is no carbon figure.")
    else:
        lines.append(
            f"Data centre and grid: {number(energy)} kWh x PUE {factors.pue:g} ({factors.pue_source}) x "
            f"{factors.intensity:g} kg CO2e/kWh ({factors.intensity_source}) = {number(emitted)} kg CO2e."
        )
    notes = dict.fromkeys(str(part["note"]) for part in known if part.get("note"))
    return [*lines, *([f"How it was measured: {'; '.join(notes)}."] if notes else [])]


def _devices(record: Mapping[str, Any]) -> tuple[int, int]:
    """How many devices were metered, and how many trained: one a process."""
    metered = min((int(part.get("devices") or 1) for part in record.get("energy") or []), default=0)
    return metered, int(record.get("processes") or 1)
