"""Energy of a run: which method is believed, and which is not."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from floodrepro.system.energy import EnergyMeter, Gpu, Sources, find_sources

MI300X = Gpu("AMD Instinct MI300X VF", "0000:83:00", rocm=True)
NEVER = 1e6  # seconds between two readings of the thread: the test takes them itself


class Machine:
    """A fake device on a fake clock: 500 W, with a counter that agrees unless a test says otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.watts: float | Exception = 500.0
        self.counted = 7e6  # counters do not start at 0
        self.counter_rate = 500.0

    def clock(self) -> float:
        return self.now

    def power(self) -> float:
        if isinstance(self.watts, Exception):
            raise self.watts
        return self.watts

    def counter(self) -> float:
        return self.counted

    def meter(self, **sources: object) -> EnergyMeter:
        chosen = {"counter": self.counter, "power": self.power, "tdp_w": 750.0, "name": "GPU"} | sources
        return EnergyMeter(Sources(**chosen), interval_s=NEVER, clock=self.clock)

    def run(self, meter: EnergyMeter, seconds: int, step: int = 2) -> None:
        for _ in range(0, seconds, step):
            self.now += step
            self.counted += self.counter_rate * step
            meter.reading()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def measured(machine: Machine, seconds: int = 600, **sources: object) -> dict:
    meter = machine.meter(**sources)
    meter.start()
    machine.run(meter, seconds)
    return meter.stop()


def test_counter_that_agrees_with_power_is_used(machine):
    machine.counter_rate = 550.0
    result = measured(machine)
    assert result["method"] == "counter"
    assert result["joules"] == 330_000
    assert "+10.0%" in result["note"]


def test_counter_that_does_not_move_is_not_believed(machine):
    machine.counter_rate = 0.0
    result = measured(machine)
    assert (result["method"], result["joules"]) == ("power", 300_000)
    assert "does not move" in result["note"]


@pytest.mark.parametrize("rate", [500 / 15.3, 390.0, 610.0, 500 * 15.3])
def test_counter_that_disagrees_with_power_is_not_believed(machine, rate):
    machine.counter_rate = rate
    result = measured(machine)
    assert (result["method"], result["joules"]) == ("power", 300_000)
    assert f"rose by {600 * rate:.0f} J where power gives 300000 J" in result["note"]


def test_counter_that_gets_stuck_later_loses_its_trust(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 300)
    assert meter.reading()["method"] == "counter"
    machine.counter_rate = 0.0
    machine.run(meter, 300)
    assert (meter.stop()["method"], meter.stop()["joules"]) == ("power", 300_000)


def test_counter_that_was_reset_is_not_believed(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 300)
    machine.counted = 0.0  # the driver was reloaded
    machine.run(meter, 300)
    machine.counted += 7.3e6 - 150_000  # even where the sum would agree again
    machine.run(meter, 2)
    result = meter.stop()
    assert result["method"] == "power"
    assert "went backwards" in result["note"]


def test_counter_that_missed_the_start_is_not_believed(machine):
    counts = iter([math.nan])
    result = measured(machine, counter=lambda: next(counts, machine.counted))
    assert (result["method"], result["joules"]) == ("power", 300_000)


def test_short_run_does_not_wait_for_the_counter_to_prove_itself(machine):
    result = measured(machine, seconds=60)
    assert (result["method"], result["joules"]) == ("power", 30_000)
    assert "120 s to prove itself" in result["note"]


def test_counter_without_power_beside_it_is_not_believed(machine):
    result = measured(machine, power=None)
    assert (result["method"], result["joules"]) == ("tdp", 450_000)


def test_power_is_integrated_by_the_trapezoid_rule(machine):
    meter = machine.meter(counter=None)
    meter.start()  # 500 W
    for watts in (700.0, 100.0):
        machine.now, machine.watts = machine.now + 4, watts
        meter.reading()
    assert meter.stop()["joules"] == (500 + 700) / 2 * 4 + (700 + 100) / 2 * 4


@pytest.mark.parametrize("fault", [OSError("gone"), math.nan, -1.0, math.inf])
def test_one_failed_reading_of_power_is_bridged(machine, fault):
    meter = machine.meter(counter=None)
    meter.start()
    machine.run(meter, 10)
    machine.watts = fault
    machine.run(meter, 2)
    machine.watts = 500.0
    machine.run(meter, 10)
    assert (meter.stop()["method"], meter.stop()["joules"]) == ("power", 11_000)


def test_power_that_went_away_does_not_pass_for_the_whole_run(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 300)
    machine.watts = OSError("gone")
    machine.run(meter, 300)
    result = meter.stop()
    assert (result["method"], result["joules"]) == ("tdp", 450_000)
    assert "power was read over 300 s of 600 s only" in result["note"]


def test_gap_of_an_hour_is_not_integrated_over(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 60)
    machine.now += 3600  # the process was stopped
    machine.run(meter, 60)
    assert meter.stop()["method"] == "tdp"


def test_power_of_zero_watts_is_not_believed(machine):
    machine.watts = 0.0
    result = measured(machine)
    assert (result["method"], result["joules"]) == ("tdp", 450_000)
    assert result["note"].startswith("upper estimate: 750 W")


def test_machine_without_any_source_gives_no_figure_but_a_reason(machine):
    result = measured(machine, counter=None, power=None, tdp_w=None, missing="no meter in this box")
    assert result == {"joules": None, "kWh": None, "method": "none", "note": "no meter in this box"}


def test_reading_in_the_middle_is_true_and_json(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 240)
    reading = meter.reading()
    assert reading["joules"] == 120_000
    assert reading["kWh"] == pytest.approx(120 / 3600)
    assert json.loads(json.dumps(reading)) == reading
    meter.stop()


def test_stopped_meter_keeps_its_figure(machine):
    meter = machine.meter()
    meter.start()
    machine.run(meter, 240)
    first = meter.stop()
    machine.now += 1000
    assert meter.stop() == meter.reading() == first


def test_meter_that_was_never_started_gives_no_figure(machine):
    assert machine.meter().stop()["method"] == "none"


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "energy"]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_thread_samples_by_itself_and_is_gone_after_stop():
    read: list[float] = []
    meter = EnergyMeter(Sources(power=lambda: read.append(1) or 100.0), interval_s=0.01)
    meter.start()
    assert sampling_threads()[0].daemon
    wait_for(lambda: len(read) > 5)
    result = meter.stop()
    assert not sampling_threads()
    assert result["method"] == "power"


def test_sources_that_always_raise_neither_stop_the_thread_nor_reach_the_run():
    tries: list[int] = []

    def broken() -> float:
        tries.append(1)
        raise RuntimeError("driver")

    meter = EnergyMeter(Sources(counter=broken, power=broken), interval_s=0.01)
    meter.start()
    wait_for(lambda: len(tries) > 10)
    assert meter.stop()["method"] == "none"
    assert not sampling_threads()


def test_driver_that_hangs_in_the_thread_does_not_hang_the_run():
    stuck, release = threading.Event(), threading.Event()

    def power() -> float:
        if threading.current_thread().name == "energy":
            stuck.set()
            release.wait(30)
        return 100.0

    meter = EnergyMeter(Sources(power=power, tdp_w=750.0), interval_s=0.01)
    meter.start()
    assert stuck.wait(10)
    begun = time.monotonic()
    result = meter.reading()
    assert time.monotonic() - begun < 5
    assert result["method"] == "tdp"
    assert result["joules"] > 700  # the second of waiting counts
    release.set()
    meter.stop()
    assert not sampling_threads()


def amd_box(root: Path, **files: str) -> Path:
    """A fake ``/sys``: an MI300X, and beside it another maker's card."""
    for number, (address, driver) in enumerate([("0000:83:00.0", "amdgpu"), ("0000:01:00.0", "nouveau")]):
        device = root / "sys/devices" / address
        hwmon = device / f"hwmon/hwmon{number}"
        hwmon.mkdir(parents=True)
        (hwmon / "name").write_text(f"{driver}\n")
        for name, content in files.items() if driver == "amdgpu" else [("power1_input", "1000000\n")]:
            (hwmon / name).write_text(content)
        card = root / f"sys/class/drm/card{number}"
        card.mkdir(parents=True)
        (card / "device").symlink_to(device)
    return root


@pytest.mark.parametrize("file", ["power1_average", "power1_input"])
@pytest.mark.parametrize("pci", ["0000:83:00", None])
def test_amd_power_file_is_read_in_microwatts(tmp_path, file, pci):
    found = find_sources(Gpu("AMD Instinct MI300X", pci, rocm=True), amd_box(tmp_path, **{file: "612000000\n"}))
    assert found.power is not None
    assert found.power() == 612.0
    assert found.tdp_w == 750.0


def test_power_of_another_card_is_not_taken_for_this_one(tmp_path):
    root = amd_box(tmp_path, power1_average="612000000\n")
    assert find_sources(Gpu("AMD Instinct MI300X", "0000:99:00", rocm=True), root).power is None


def test_virtual_function_without_power_file_falls_back_to_rated_power(tmp_path, machine):
    found = find_sources(MI300X, amd_box(tmp_path))
    meter = EnergyMeter(found, interval_s=NEVER, clock=machine.clock)
    meter.start()
    machine.run(meter, 100)
    result = meter.stop()
    assert (result["method"], result["joules"]) == ("tdp", 75_000)
    assert "no energy counter from amdsmi" in result["note"]
    assert "no power from amdgpu" in result["note"]


def amdsmi(**calls) -> SimpleNamespace:
    handles = {"other": "0000:01:00.0", "ours": "0000:83:00.0"}
    return SimpleNamespace(
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: list(handles),
        amdsmi_get_gpu_device_bdf=handles.__getitem__,
        **calls,
    )


@pytest.mark.parametrize("key", ["energy_accumulator", "power"])
def test_amdsmi_counter_is_read_in_its_own_resolution(tmp_path, monkeypatch, key):
    counts = {"other": 1, "ours": 2_000_000}
    count = lambda handle: {key: counts[handle], "counter_resolution": 15.3, "timestamp": 1}  # noqa: E731
    monkeypatch.setitem(sys.modules, "amdsmi", amdsmi(amdsmi_get_energy_count=count))
    counter = find_sources(MI300X, tmp_path).counter
    assert counter is not None
    assert counter() == pytest.approx(30.6)


@pytest.mark.parametrize(
    "answer",
    [
        {"socket_power": 412, "current_socket_power": 412, "average_socket_power": "N/A"},  # ROCm 7
        {"current_socket_power": 412, "average_socket_power": 0xFFFF},  # ROCm 6, MI300
        {"current_socket_power": 0xFFFFFFFF, "average_socket_power": 412},  # ROCm 6, MI200
    ],
)
def test_amdsmi_power_is_read_where_the_driver_shows_no_file(tmp_path, monkeypatch, answer):
    answers = {"ours": answer, "other": {"socket_power": 99}}
    monkeypatch.setitem(sys.modules, "amdsmi", amdsmi(amdsmi_get_power_info=answers.__getitem__))
    power = find_sources(MI300X, tmp_path).power
    assert power is not None
    assert power() == 412.0


@pytest.mark.parametrize("answer", [{}, {"socket_power": "N/A", "current_socket_power": 0xFFFFFFFF}])
def test_amdsmi_power_that_has_no_figure_is_no_source(tmp_path, monkeypatch, answer):
    monkeypatch.setitem(sys.modules, "amdsmi", amdsmi(amdsmi_get_power_info=lambda handle: answer))
    found = find_sources(MI300X, tmp_path)
    assert found.power is None
    assert "no power from amdgpu's hwmon or amdsmi" in found.missing


def test_nvml_counter_and_power_are_read_in_thousandths(monkeypatch):
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId={"0000:3b:00.0": "ours"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000_000,
        nvmlDeviceGetPowerUsage=lambda handle: 345_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = find_sources(Gpu("NVIDIA H200", "0000:3b:00", rocm=False))
    assert found.counter is not None and found.power is not None
    assert (found.counter(), found.power()) == (5000.0, 345.0)
    assert find_sources(Gpu("NVIDIA H200", "0000:44:00", rocm=False)).counter is None


def test_library_that_breaks_on_import_or_start_is_no_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())  # any use raises AttributeError
    monkeypatch.setitem(sys.modules, "amdsmi", None)  # importing it raises ImportError
    assert find_sources(Gpu("NVIDIA H200", None, rocm=False)).missing.count("pynvml") == 2
    assert find_sources(MI300X, tmp_path).counter is None


def cpu_box(root: Path) -> Path:
    """A fake powercap tree: two packages, a core zone and the whole platform, of which only packages count."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for zone, name in names.items():
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text("1000000\n")
        (folder / "max_energy_range_uj").write_text("5000000\n")
    return root


def test_cpu_packages_are_summed_without_their_parts_and_over_their_wrap(tmp_path, machine):
    zones = cpu_box(tmp_path) / "sys/class/powercap"
    meter = EnergyMeter(find_sources(None, tmp_path), interval_s=NEVER, clock=machine.clock)
    meter.start()
    (zones / "intel-rapl:0/energy_uj").write_text("4000000\n")  # + 3 J
    for zone in ("intel-rapl:0:0", "intel-rapl:2"):
        (zones / zone / "energy_uj").write_text("4900000\n")
    machine.run(meter, 10)
    (zones / "intel-rapl:0/energy_uj").write_text("500000\n")  # + 1.5 J, over the end of its range at 5 J
    (zones / "intel-rapl:1/energy_uj").write_text("1250000\n")  # + 0.25 J
    machine.run(meter, 10)
    result = meter.stop()
    assert (result["method"], result["joules"]) == ("counter", 4.75)
    assert "2 CPU package(s)" in result["note"]


def test_cpu_counter_that_only_root_may_read_gives_no_figure_but_a_reason(tmp_path, machine):
    for file in (cpu_box(tmp_path) / "sys/class/powercap").glob("*/energy_uj"):
        file.unlink()
        file.mkdir()  # unreadable for root too, who runs the tests in a container
    meter = EnergyMeter(find_sources(None, tmp_path), interval_s=NEVER, clock=machine.clock)
    meter.start()
    machine.run(meter, 10)
    result = meter.stop()
    assert (result["method"], result["joules"]) == ("none", None)
    assert "RAPL" in result["note"]
