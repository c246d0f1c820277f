"""What a machine can measure energy with: NVML, amdsmi, the amdgpu driver's power files, RAPL, or rated power."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TDP_W = {"MI300X": 750.0}  # AMD Instinct MI300X data sheet

_NO_GPU_TAKES_W = 10_000

Read = Callable[[], float]


@dataclass(frozen=True)
class Sources:
    """What a machine offers to measure with. Reading may raise; it then counts as a reading that failed.

    Args:
        counter: Gives the joules since any fixed moment.
        power: Gives watts.
        tdp_w: Rated power of the device in watts.
        name: What is read, for the note.
        counter_needs_proof: Whether the counter is believed only beside power that agrees with it.
        missing: Which of the two is not there, and why, for the note.
    """

    counter: Read | None = None
    power: Read | None = None
    tdp_w: float | None = None
    name: str = "device"
    counter_needs_proof: bool = True
    missing: str = "not offered here"


@dataclass(frozen=True)
class Gpu:
    """The device that a run computes on.

    Args:
        name: As torch calls it.
        pci: PCI address up to its function (``0000:3b:00``); None if torch does not tell.
        rocm: Whether torch reaches it through ROCm, not CUDA.
    """

    name: str
    pci: str | None
    rocm: bool

    @classmethod
    def of_torch(cls, index: int = 0) -> "Gpu":
        """Torch's device *index*, which must exist."""
        import torch

        found: Any = torch.cuda.get_device_properties(index)
        try:
            pci = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}"
        except AttributeError:  # torch 2.14.1 has them, unlisted in its stubs; older ones need not
            pci = None
        return cls(found.name, pci, rocm=torch.version.hip is not None)


def find_sources(gpu: Gpu | None, root: Path = Path("/")) -> Sources:
    """What there is to measure a run with: on *gpu*, or on the CPU where it is None. *root* holds ``/sys``."""
    if gpu is None:
        packages = [zone for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")) if _is_package(zone)]
        if not packages:
            return Sources(missing="no GPU, and no CPU package with a RAPL counter that may be read")
        name = f"{len(packages)} CPU package(s) (RAPL: all that ran on them, without memory)"
        return Sources(_rapl(packages), name=name, counter_needs_proof=False, missing="RAPL gives no power")
    counter, power = _amd(gpu, root) if gpu.rocm else _nvml(gpu)
    nvml = "pynvml (nvidia-ml-py)"
    counter_from, power_from = ("amdsmi", "amdgpu's hwmon or amdsmi") if gpu.rocm else (nvml, nvml)
    missing = [] if counter else [f"no energy counter from {counter_from}"]
    missing += [] if power else [f"no power from {power_from}"]
    tdp_w = next((watts for name, watts in TDP_W.items() if name in gpu.name), None)
    return Sources(counter, power, tdp_w, name=gpu.name, missing="; ".join(missing))


def _nvml(gpu: Gpu) -> tuple[Read | None, Read | None]:
    """Counter and power of an NVIDIA GPU, which NVML gives in millijoules and milliwatts."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        if gpu.pci is None and nvml.nvmlDeviceGetCount() != 1:
            return None, None
        handle = nvml.nvmlDeviceGetHandleByPciBusId(f"{gpu.pci}.0") if gpu.pci else nvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # not installed, no driver, hidden from this container: all the same to the run
        return None, None
    return (
        lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
        lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    )


def _amd(gpu: Gpu, root: Path) -> tuple[Read | None, Read | None]:
    """Counter by amdsmi; power by the driver's file, or by amdsmi where a container or a virtual function hides it."""
    in_file = _hwmon_power(gpu, root)
    try:
        smi: Any = importlib.import_module("amdsmi")
        smi.amdsmi_init()
        handle = _the_one(gpu, [(smi.amdsmi_get_gpu_device_bdf(h), h) for h in smi.amdsmi_get_processor_handles()])
    except Exception:  # its import alone raises several kinds where library and driver do not match
        return None, in_file
    if handle is None:
        return None, in_file

    def joules() -> float:
        # A virtual function has no counter; elsewhere it was seen to stand still (ROCm/amdsmi#22), or off (#38).
        found = smi.amdsmi_get_energy_count(handle)
        ticks = found["energy_accumulator"] if "energy_accumulator" in found else found["power"]  # its name in ROCm 5
        return float(ticks * found["counter_resolution"]) / 1e6  # a tick is given in microjoules

    def watts() -> float:
        # One figure since ROCm 7; before, the momentary one (MI300) or the average (older). What a device lacks is
        # "N/A" or the largest number of 16 or 32 bits.
        found = smi.amdsmi_get_power_info(handle)
        values = [found.get(f"{kind}socket_power") for kind in ("", "current_", "average_")]
        return float(next(v for v in values if isinstance(v, int | float) and 0 < v < _NO_GPU_TAKES_W))

    try:
        watts()
    except Exception:  # it raises its own kinds; without a figure, StopIteration
        return joules, in_file
    return joules, in_file or watts


def _hwmon_power(gpu: Gpu, root: Path) -> Read | None:
    """Power from the amdgpu driver's files: a GPU has the average or the momentary one, few have both."""
    monitors = [m for m in sorted(root.glob("sys/class/drm/card*/device/hwmon/*")) if _word(m / "name") == "amdgpu"]
    monitor = _the_one(gpu, [(m.parents[1].resolve().name, m) for m in monitors])
    files = [monitor / "power1_average", monitor / "power1_input"] if monitor else []
    file = next((f for f in files if _word(f).isdigit() and int(_word(f)) > 0), None)  # 0: it is not measured
    return None if file is None else lambda: _micro(file)


def _rapl(packages: list[Path]) -> Read:
    """Energy of CPU packages. Their counters start again at 0 every quarter of an hour or so under load."""
    last, total = [_micro(package / "energy_uj") for package in packages], 0.0

    def joules() -> float:
        nonlocal total
        for i, package in enumerate(packages):
            now = _micro(package / "energy_uj")
            total += now - last[i] if now >= last[i] else now - last[i] + _micro(package / "max_energy_range_uj")
            last[i] = now
        return total

    return joules


def _is_package(zone: Path) -> bool:
    # Since CVE-2020-8694 only root may read the counter. Other zones (core, dram, psys) are parts or the whole.
    return _word(zone / "name").startswith("package") and _word(zone / "energy_uj").isdigit()


def _the_one(gpu: Gpu, found: list[tuple[str, Any]]) -> Any:
    """What stands at the GPU's PCI address; where torch does not tell it, the only thing there is, or None."""
    here = [thing for address, thing in found if gpu.pci is None or address.lower().startswith(gpu.pci)]
    return here[0] if len(here) == 1 else None


def _micro(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) / 1e6


def _word(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
