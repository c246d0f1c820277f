"""Energy: the best method that there is for all devices of the run, and its name; no source can end a run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from floodrepro.callbacks.energy import EnergyMeter, PowerSource, find_sources


def measured(*sources: PowerSource, seconds: float = 100, step: float = 2) -> dict:
    """A meter's reading after so many seconds of a clock that is turned by hand."""
    clock = SimpleNamespace(now=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("floodrepro.callbacks.energy.time", SimpleNamespace(monotonic=lambda: clock.now))
        meter = EnergyMeter(sources)
        meter.start()
        while clock.now < seconds:
            clock.now += step
            meter._sample()
        return meter.stop()


def counting(*values: float):
    """Gives these values one after the other, then the last again; None fails."""
    left = list(values)

    def read() -> float:
        value = left.pop(0) if len(left) > 1 else left[0]
        if value is None:
            raise OSError("driver")
        return value

    return read


def test_the_counters_of_all_devices_are_added_up_and_without_a_gpu_or_close_readings_there_is_no_figure():
    counters = {"A": counting(100, 700), "B": counting(50, 250)}
    reading = measured(*(PowerSource(name, counter, lambda: 9.0) for name, counter in counters.items()))
    assert (reading["joules"], reading["method"]) == (800, "counter")
    assert reading["note"] == "energy counter of A + B"
    assert reading["kWh"] == pytest.approx(800 / 3.6e6, abs=1e-9)
    assert measured()["note"] == "no counter, power or rated power: no GPU"
    assert measured(PowerSource("A", None, lambda: 300.0), step=61)["method"] == "none"


@pytest.mark.parametrize("counter", [None, counting(100), counting(100, 50), counting(None, 700), counting(100, None)])
def test_power_is_integrated_where_a_counter_is_missing_stuck_or_failing(counter):
    reading = measured(PowerSource("A", counter, lambda: 300.0), PowerSource("B", None, lambda: 100.0))
    assert (reading["joules"], reading["method"]) == (pytest.approx(40_000), "power")


@pytest.mark.parametrize("power", [None, lambda: float("nan"), counting(300, None), lambda: -1.0])
def test_rated_power_is_an_upper_estimate_and_without_it_there_is_no_figure(power):
    source = PowerSource("MI300X", None, power, 750.0)
    assert "upper estimate: 750 W" in measured(source)["note"]
    both = [measured(source), measured(source, PowerSource("other", None, power))]
    assert [(one["joules"], one["method"]) for one in both] == [(75_000, "tdp"), (None, "none")]


@pytest.fixture
def devices(monkeypatch):
    """Devices as torch would show them: name and PCI bus of each."""

    def show(*found: tuple[str, int], hip: str | None = None) -> list[int]:
        listed = [SimpleNamespace(name=name, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for name, bus in found]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: listed[index])
        monkeypatch.setattr(torch.version, "hip", hip)
        return list(range(len(found)))

    return show


def test_the_counter_of_nvml_is_found_by_the_address_of_the_device_else_torch_gives_its_power(devices, monkeypatch):
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda address: {"0000:3b:00.0": 1, "0000:5e:00.0": 2}[address],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: handle * 1000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    sources = find_sources(devices(("NVIDIA H200", 0x3B), ("NVIDIA H200", 0x5E)))
    assert [source.counter() for source in sources] == [1, 2]  # joules of millijoules
    assert sources[0].tdp_w == 700
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda index: 250_000 + index)
    (source,) = find_sources(devices(("NVIDIA A10", 1)))
    assert (source.counter, source.power()) == (None, 250)


def test_a_slice_or_partition_is_charged_the_whole_device_once_and_the_note_says_so(devices, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (mig,) = find_sources(devices(("NVIDIA H100 MIG 1g.10gb", 1)))
    assert "the whole device of which the run had a MIG slice" in mig.name
    card = hwmon(tmp_path, "0000:05:00.0", power1_input="640000000")
    (card / "current_compute_partition").write_text("CPX\n")
    indices = devices(("AMD Instinct MI300X", 5), ("AMD Instinct MI300X", 5), hip="7.2")
    (socket,) = find_sources(indices, tmp_path)
    assert socket.name == "AMD Instinct MI300X, the whole device of which the run had a partition (CPX)"
    assert (socket.power(), socket.tdp_w) == (640, 750)


def test_amd_power_comes_from_the_driver_s_file_else_from_torch(devices, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "power_draw", lambda index: 0)  # what torch says where amdsmi says N/A
    hwmon(tmp_path, "0000:05:00.0", power1_average="0", power1_input="500000000")
    indices = devices(("AMD Instinct MI300X VF", 5), hip="7.2")
    assert find_sources(indices, tmp_path)[0].power() == 500
    (source,) = find_sources(indices, tmp_path / "hidden")
    assert measured(source)["method"] == "tdp"
    monkeypatch.setattr(torch.cuda, "power_draw", lambda index: 430)
    assert measured(source)["method"] == "power"


def hwmon(root: Path, pci: str, **files: str) -> Path:
    """The amdgpu driver's files of one card below *root*."""
    device = root / "sys" / "devices" / pci
    (device / "hwmon" / "hwmon3").mkdir(parents=True)
    for name, text in files.items():
        (device / "hwmon" / "hwmon3" / name).write_text(text + "\n")
    card = root / "sys" / "class" / "drm" / "card1"
    card.mkdir(parents=True)
    (card / "device").symlink_to(device)
    return device
