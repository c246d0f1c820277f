"""Energy of a run, and by which of four methods the figure came about.

In order of preference: ``counter`` (the device's own energy counter, once it has proved itself against its power),
``power`` (sampled power, integrated), ``tdp`` (rated power times time, an upper estimate) and ``none``. One figure
comes from one method over the whole run. It is the energy of the device alone: no host, no cooling, no other device.
"""

import contextlib
import math
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from floodrepro.system.energy_sources import Gpu, Read, Sources, find_sources

__all__ = ["EnergyMeter", "Gpu", "Sources", "Totals", "find_sources", "judge"]

PROOF_S = 120.0  # over less than this, two sensors that average differently disagree for no fault of theirs
TOLERANCE = 0.2  # sampling misses less than this over minutes; a wrong unit or a stuck counter is off by far more
MAX_GAP_S = 60.0  # between power readings further apart than this, anything may have happened
COVERAGE = 0.95  # share of the run that readings must cover before they stand for all of it


@dataclass(frozen=True)
class Totals:
    """What the readings since *start* add up to; times are the clock's seconds."""

    start: float
    watts: float = 0.0
    watts_at: float = -math.inf
    power_joules: float = 0.0
    covered_s: float = 0.0
    first_count: float | None = None
    count: float = 0.0
    counted_at: float = -math.inf
    count_fell: bool = False

    def add(self, now: float, watts: float | None, count: float | None) -> "Totals":
        """These totals and one more reading of power and counter, where None is a reading that failed."""
        new = self
        if watts is not None:
            gap = now - self.watts_at
            if gap <= MAX_GAP_S:
                joules = (self.watts + watts) / 2 * gap  # the trapezoid rule
                new = replace(new, power_joules=self.power_joules + joules, covered_s=self.covered_s + gap)
            new = replace(new, watts=watts, watts_at=now)
        if count is not None:
            first = count if now == self.start else self.first_count  # one that answers later missed the beginning
            fell = self.count_fell or (self.first_count is not None and count < self.count)
            new = replace(new, first_count=first, count=count, counted_at=now, count_fell=fell)
        return new


def judge(sources: Sources, totals: Totals, now: float) -> dict[str, Any]:
    """The energy from *totals.start* to *now* by the best method that can be believed.

    Returns:
        ``joules`` and ``kWh`` (None where nothing can be said), ``method`` and ``note``.
    """
    seconds, power = now - totals.start, totals.power_joules
    rise = totals.count - totals.first_count if totals.first_count is not None else 0.0
    no_power = None
    if sources.power is None:
        no_power = sources.missing
    elif totals.covered_s < COVERAGE * seconds:
        no_power = f"power was read over {totals.covered_s:.0f} s of {seconds:.0f} s only"
    elif power <= 0:
        no_power = "power adds up to nothing"
    no_counter = None
    if sources.counter is None:
        no_counter = sources.missing
    elif totals.first_count is None or totals.counted_at - totals.start < COVERAGE * seconds:
        no_counter = "the energy counter could not be read over the whole run"
    elif totals.count_fell:
        no_counter = "the energy counter went backwards"
    elif rise <= 0:
        no_counter = "the energy counter does not move"
    elif sources.counter_needs_proof and no_power:
        no_counter = "the energy counter has no power reading to prove itself against"
    elif sources.counter_needs_proof and seconds < PROOF_S:
        no_counter = f"the energy counter takes {PROOF_S:.0f} s to prove itself"
    elif sources.counter_needs_proof and abs(rise - power) > TOLERANCE * power:
        no_counter = f"the energy counter rose by {rise:.0f} J where power gives {power:.0f} J"
    if no_counter is None:
        proof = f"; {rise / power - 1:+.1%} beside integrated power" if sources.counter_needs_proof else ""
        return _result(rise, "counter", f"energy counter of {sources.name}{proof}")
    if no_power is None:
        over = f"integrated over {totals.covered_s / seconds:.0%} of the time"
        return _result(power, "power", f"sampled power of {sources.name}, {over}; {no_counter}")
    why = "; ".join(dict.fromkeys((no_counter, no_power)))
    if sources.tdp_w is not None:
        note = f"upper estimate: {sources.tdp_w:.0f} W rated power of {sources.name} x {seconds:.0f} s; {why}"
        return _result(sources.tdp_w * seconds, "tdp", note)
    return _result(None, "none", why)


class EnergyMeter:
    """Measures once, from `start` to `stop`; no failure of a source reaches the run.

    Args:
        sources: What to measure with.
        interval_s: Seconds between two readings.
        clock: Seconds that never go back.
    """

    def __init__(self, sources: Sources, *, interval_s: float = 2.0, clock: Read = time.monotonic) -> None:
        self._sources, self._interval_s, self._clock = sources, interval_s, clock
        self._totals: Totals | None = None
        self._final: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="energy", daemon=True)

    def start(self) -> None:
        """Take the first reading and go on in a thread."""
        if self._totals is None:
            watts, count, now = _try(self._sources.power), _try(self._sources.counter), self._clock()
            self._totals = Totals(now).add(now, watts, count)
            with contextlib.suppress(RuntimeError):  # no thread to be had: `reading` then finds too little was covered
                self._thread.start()

    def reading(self) -> dict[str, Any]:
        """Energy since `start` as `judge` gives it; after `stop`, that of the whole run."""
        if self._final is not None:
            return self._final
        if self._totals is None:
            return _result(None, "none", "the measurement was never started")
        self._sample()
        return judge(self._sources, self._totals, self._clock())

    def stop(self) -> dict[str, Any]:
        """End the measurement and give its `reading`; a second call gives the same one."""
        self._final = self.reading()
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)  # one that is stuck in a driver is left to die with the process
        return self._final

    def _sample_until_stopped(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        if self._lock.acquire(timeout=1):  # else the other side is stuck in a driver: this reading has failed
            try:
                watts, count = _try(self._sources.power), _try(self._sources.counter)
                if self._totals is not None:
                    self._totals = self._totals.add(self._clock(), watts, count)
            finally:
                self._lock.release()


def _try(read: Read | None) -> float | None:
    """A reading, or None where it fails or cannot be one."""
    try:
        value = float(read()) if read else math.nan
    except Exception:  # whatever a driver's library raises must not end a run
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _result(joules: float | None, method: str, note: str) -> dict[str, Any]:
    if joules is None:
        return {"joules": None, "kWh": None, "method": method, "note": note}
    return {"joules": round(joules, 3), "kWh": round(joules / 3.6e6, 9), "method": method, "note": note}
