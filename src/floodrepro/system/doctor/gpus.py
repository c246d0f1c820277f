"""GPUs: what their drivers show without torch, what torch makes of them in a process of its own, and peak rates."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floodrepro.errors import UsageError
from floodrepro.recipe import check_precision
from floodrepro.system.doctor.finding import Finding, judged
from floodrepro.system.environment import gpu_drivers, small_text

AMD_NAMES = {"0x74a1": "AMD Instinct MI300X", "0x74b5": "AMD Instinct MI300X VF"}  # the PCI ID Repository
SMALLEST = 8 * 2**30  # bytes: a display device with less is a processor's own graphics, and nothing to train on
# Dense fp16 and bf16 with float32 accumulation, in TFLOP/s. Data sheets often print twice as much, for 2:4 sparsity.
PEAKS = (
    (r"MI300X", 1307.4, "AMD Instinct MI300X data sheet"),
    (r"H100 80GB HBM3|H200(?! NVL)", 989.4, "NVIDIA H100 white paper, SXM5; H200 has the same cores"),
    (r"A100", 312.0, "NVIDIA A100 data sheet"),
)
OPEN = {  # by vendor: what a process opens to compute, and how a container gets it
    "AMD": ("dev/kfd", "docker run --device=/dev/kfd --device=/dev/dri --group-add $(stat -c %g /dev/kfd)"),
    "NVIDIA": ("dev/nvidiactl", "docker run --gpus all"),
}
PROBE = """
import json, torch, torchvision
found = {"nms": hasattr(torch.ops.torchvision, "nms"), "devices": []}
for i in range(torch.cuda.device_count()):
    about, works = torch.cuda.get_device_properties(i), {}
    for name in ("float16", "bfloat16"):
        ones = torch.ones(64, 64, dtype=getattr(torch, name), device=f"cuda:{i}")
        works[name] = bool((ones @ ones == 64).all())
    works["bfloat16"] &= torch.cuda.is_bf16_supported(including_emulation=False)
    found["devices"].append({"name": about.name, "memory": about.total_memory, **works})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Gpu:
    """A GPU that its kernel driver has taken; one that does not train is too small, or not given to this container."""

    vendor: str
    name: str
    trains: bool = True


def find_gpus(root: Path = Path("/"), variables: Mapping[str, str] = os.environ) -> list[Gpu]:
    """GPUs by their drivers' word, those left out that the environment hides from torch."""
    amd, nvidia = [], []
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        kind = small_text(device / "class") or ""  # 03: display, 12: processing accelerator, as an Instinct is
        driver = (device / "driver").resolve().name
        if small_text(device / "vendor") == "0x1002" and kind.startswith(("0x03", "0x12")) and driver == "amdgpu":
            code, memory = (
                small_text(device / "device") or "",
                int(small_text(device / "mem_info_vram_total") or SMALLEST),
            )
            name = small_text(device / "product_name") or AMD_NAMES.get(code, f"AMD {code}")
            amd.append(Gpu("AMD", name, trains=not kind.startswith("0x03") or memory >= SMALLEST))
    if not amd:  # a sandbox may show no PCI device
        for node in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
            if target := re.search(r"^gfx_target_version ([1-9]\d*)", small_text(node) or "", re.MULTILINE):
                amd.append(Gpu("AMD", f"AMD gfx target {target[1]}"))
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", small_text(file) or "", re.MULTILINE)
        # The file is the host's. A CPU torch is right where a container was not given the device.
        nvidia.append(Gpu("NVIDIA", model[1] if model else "NVIDIA", trains=(root / OPEN["NVIDIA"][0]).exists()))

    def hidden(*names: str) -> bool:
        return any(variables.get(f"{name}_VISIBLE_DEVICES") in ("", "-1") for name in names)

    return ([] if hidden("CUDA", "HIP", "ROCR") else amd) + ([] if hidden("CUDA") else nvidia)


def check_devices(gpus: Sequence[Gpu], root: Path = Path("/"), *, rocm: bool = False) -> list[Finding]:
    """Name what is there, with its driver, and see that this user may open it; a *rocm* torch expects something."""
    drivers = ", ".join(f"{name} {version}" for name, version in gpu_drivers(root).items()) or "of unknown version"
    found = []
    for vendor in dict.fromkeys(gpu.vendor for gpu in gpus):
        ours = [gpu for gpu in gpus if gpu.vendor == vendor]
        detail = f"{len(ours)} x {' / '.join(dict.fromkeys(gpu.name for gpu in ours))}, driver {drivers}"
        place, container = OPEN[vendor]
        if not (root / place).exists() and (vendor == "NVIDIA" or any(gpu.trains for gpu in ours)):
            absent, fix = f"{detail}; /{place} is not here", f"in a container: {container}"
            found.append(judged("gpu", False, absent, fix, "fail" if vendor == "AMD" else "warn"))
        elif not any(gpu.trains for gpu in ours):
            found.append(Finding("gpu", "ok", f"{detail}; too small to train on"))
        else:
            may = os.access(root / place, os.R_OK | os.W_OK)
            fix = "sudo usermod -aG render,video $USER, then log in again; in a container --group-add the number that "
            fix += f"'stat -c %g /{place}' prints"
            found.append(judged("gpu", may, detail if may else f"{detail}; /{place} is closed to this user", fix))
    none = "none is seen: torch computes on the CPU"
    return found or [judged("gpu", not rocm, none, f"in a container: {OPEN['AMD'][1]}", "warn")]


def check_use(gpus: Sequence[Gpu], precision: str, versions: Mapping[str, str]) -> list[Finding]:
    """What a recipe's precision (empty without a recipe) and the energy's measurement ask of GPUs and packages."""
    found = []
    try:
        check_precision({"trainer": {"precision": precision}}, gpu=bool(gpus))
    except UsageError as error:
        found.append(Finding("precision", "fail", f"{error.what} ({error.where})", str(error.fix)))
    if any(gpu.vendor == "NVIDIA" for gpu in gpus):
        fix, measured = f'{sys.executable} -m pip install "floodrepro[energy]"', "nvidia-ml-py" in versions
        detail = "NVML's counter and power" if measured else "nvidia-ml-py is not installed: it will not be measured"
        found.append(judged("energy", measured, detail, fix, "warn"))
    return found


def probe(timeout: float = 120) -> dict[str, Any] | str:
    """Import torch and torchvision and multiply on each device, in a process of its own; a string says what failed."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def judge_probe(answer: dict[str, Any] | str, precision: str, *, gpu_expected: bool) -> list[Finding]:
    """What `probe` said, for a recipe's precision in Lightning's words (empty if there is no recipe)."""
    again = "mend the lines above first, or reinstall torch and torchvision together"
    if isinstance(answer, str) or not answer["nms"]:
        return [Finding("torch runs", "fail", answer if isinstance(answer, str) else "no torchvision::nms", again)]
    if gpu_expected and not answer["devices"]:
        fix = "a newer driver (CUDA 13 needs 580, CUDA 12 needs 525), or a torch built for this driver"
        return [Finding("torch runs", "fail", "torch imports, and sees no GPU", fix)]
    found = [Finding("torch runs", "ok", "torch and torchvision import, torchvision::nms is there")]
    for device in answer["devices"]:
        able = {"16": device["float16"], "bf16": device["bfloat16"]}
        said = f"fp16 {_works(able['16'])}, bf16 {_works(able['bf16'])}"
        detail = f"{device['name']}, {device['memory'] / 2**30:.1f} GiB, {said}"
        fix = f"the recipe asks for {precision}: --precision {'fp16' if able['16'] else 'fp32'}"
        found.append(judged("gpu numerics", able.get(precision.split("-")[0], True), detail, fix))
        peak = peak_of(device["name"])
        rate = f"{peak[0]} TFLOP/s dense fp16 and bf16 ({peak[1]})" if peak else "not known: no estimate of time"
        found.append(judged("peak rate", peak is not None, rate, "floodrepro bench train measures the speed", "warn"))
    return found


def _works(value: bool) -> str:
    return "works" if value else "does not work"


def peak_of(name: str) -> tuple[float, str] | None:
    """Peak rate in TFLOP/s of a device by its name, and the source; None where it is not known."""
    return next(((rate, source) for pattern, rate, source in PEAKS if re.search(pattern, name)), None)
