"""Energy of the devices that a run computes on, without host and cooling, and the method behind the figure.

In order of preference: ``counter`` (NVML's energy counter), ``power`` (sampled power, integrated), ``tdp`` (rated power
times time, an upper estimate) and ``none``. One figure comes from one method, for all devices and the whole time.
"""

import contextlib
import importlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TDP_W = {"MI300X": 750.0, "H100 PCIe": 350.0, "H100": 700.0, "H200": 700.0}
"""Rated power by a part of the device's name, W: data sheets of AMD Instinct and of NVIDIA (SXM where not said)."""
INTERVAL_S = 2.0  # between two readings of power
MAX_GAP_S = 60.0  # between power readings further apart than this, anything may have happened
COVERAGE = 0.95  # share of the time that readings must cover before they stand for all of it


@dataclass(frozen=True)
class PowerSource:
    """What one physical device offers to measure with. A reading may raise; it then counts as failed."""

    name: str  # as torch calls it, and what else runs on it where the run has a part of it only
    counter: Callable[[], float] | None = None  # joules since any fixed moment
    power: Callable[[], float] | None = None  # watts
    tdp_w: float = math.nan  # rated power, watts


def find_sources(indices: Sequence[int], root: Path = Path("/")) -> list[PowerSource]:
    """What there is to measure devices with, of these indices of torch's, one source for each physical device."""
    found = {}
    for index in indices:
        device: Any = torch.cuda.get_device_properties(index)
        name, pci = str(device.name), f"device {index}"
        if hasattr(device, "pci_bus_id"):  # not in older torch
            pci = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}"
        tdp = next((watts for part, watts in TDP_W.items() if part in name), math.nan)
        if pci not in found:  # partitions of one device share its address, and its power
            found[pci] = _amd(name, pci, index, tdp, root) if torch.version.hip else _nvidia(name, pci, index, tdp)
    return list(found.values())


def _nvidia(name: str, pci: str, index: int, tdp: float) -> PowerSource:
    note = ", the whole device of which the run had a MIG slice" if "MIG" in name else ""
    counter: Callable[[], float] | None = None
    with contextlib.suppress(Exception):  # not installed, no driver, hidden from this container: all the same here
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByPciBusId(f"{pci}.0")
        counter = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # noqa: E731  # of millijoules
    return PowerSource(name + note, counter, lambda: torch.cuda.power_draw(index) / 1e3, tdp)  # of milliwatts


def _amd(name: str, pci: str, index: int, tdp: float, root: Path) -> PowerSource:
    def ask(pattern: str) -> list[str]:
        """What the driver says in files of this device, where it answers."""
        answers = []
        for file in root.glob(f"sys/class/drm/card*/device/{pattern}"):
            with contextlib.suppress(OSError):
                if pci in str(file.resolve()):
                    answers.append(file.read_text().strip())
        return answers

    def watts() -> float:  # microwatts in the files; torch gives watts here, and 0 where amdsmi does not know
        readings = [int(text or 0) / 1e6 for text in ask("hwmon/*/power1_[ai][vn]*")]
        return max([0, *readings]) or torch.cuda.power_draw(index) or math.nan

    modes = sorted({*ask("current_compute_partition")} - {"SPX", "", "0"})
    note = f", the whole device of which the run had a partition ({', '.join(modes)})" if modes else ""
    return PowerSource(name + note, None, watts, tdp)


class EnergyMeter:
    """Measures once, from `start` to `stop`, with a source for each device; no failure of one reaches the run."""

    def __init__(self, sources: Sequence[PowerSource]) -> None:
        self._sources = list(sources)
        self._began = self._last = 0.0
        self._watts = self._first = math.nan  # of the reading before; joules on the counters at the start
        self._joules = self._covered = 0.0  # of integrated power, and the seconds that it covers
        self._final: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._sample_until_stopped, name="energy", daemon=True)
        self._stopping = threading.Event()

    def start(self) -> None:
        """Take the first reading and go on in a thread."""
        self._first, self._watts = self._sum("counter"), self._sum("power")
        self._began = self._last = time.monotonic()
        if self._sources:
            self._thread.start()

    def reading(self) -> dict[str, Any]:
        """Energy since `start`: ``joules`` and ``kWh`` (None where unknown), ``method``, ``note`` and ``devices``."""
        if self._final is not None:
            return self._final
        seconds = time.monotonic() - self._began
        names = " + ".join(source.name for source in self._sources) or "no GPU"
        rated = sum(source.tdp_w for source in self._sources)
        power = self._joules if self._covered >= COVERAGE * seconds else 0
        joules = {"counter": self._sum("counter") - self._first, "power": power, "tdp": rated * seconds}
        notes = {
            "counter": f"energy counter of {names}",
            "power": f"power of {names}, read every {INTERVAL_S:g} s and integrated",
            "tdp": f"upper estimate: {rated:g} W rated power of {names}",
            "none": f"no counter, power or rated power: {names}",
        }
        method = next((name for name, value in joules.items() if value > 0), "none")  # a NaN is not
        known = joules.get(method)
        figures = {"joules": known and round(known, 3), "kWh": known and round(known / 3.6e6, 9)}
        return {**figures, "method": method, "note": notes[method], "devices": len(self._sources)}

    def stop(self) -> dict[str, Any]:
        """End the measurement and give its `reading`; a second call gives the same one."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)  # or it is stuck in a driver: this reading has failed
        if self._final is None and not self._thread.is_alive():
            self._sample()
        self._final = self.reading()
        return self._final

    def _sample_until_stopped(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        """Integrate power by the trapezoid rule."""
        watts, now = self._sum("power"), time.monotonic()
        if math.isnan(watts):
            return
        if not math.isnan(self._watts) and now - self._last <= MAX_GAP_S:
            self._joules += (self._watts + watts) / 2 * (now - self._last)
            self._covered += now - self._last
        self._watts, self._last = watts, now

    def _sum(self, kind: str) -> float:
        """All devices' readings of one kind added up; NaN where one of them fails or cannot be one."""
        try:
            values = [float(getattr(source, kind)()) for source in self._sources]
        except Exception:  # whatever a driver's library raises must not end a run
            return math.nan
        return sum(values) if values and all(math.isfinite(v) and v >= 0 for v in values) else math.nan
