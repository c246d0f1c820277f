"""This machine: what a run records about it, what this process may use of it, and what torch makes of it.

Nothing that is recorded names a person or a machine: no host name, no user name, no token.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import floodrepro

_PACKAGES = (
    *("torch", "lightning", "terratorch", "impactmesh", "torchvision", "torchgeo", "zarr", "numcodecs", "numpy"),
    *("jsonargparse", "torchmetrics", "segmentation-models-pytorch"),
)
# Variables that change numerics or speed. NVIDIA_TF32_OVERRIDE overrules torch's own switches without a word.
_VARIABLES = re.compile(
    r"(OMP|MKL)_NUM_THREADS|PYTHONHASHSEED|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|(MIOPEN|PYTORCH|HSA|NCCL|TORCH)_.*"
)
_SECONDS = 120  # that torch may take to answer
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY|AUTH", re.IGNORECASE)


def environment(precision: str | None = None, *, root: Path = Path("/")) -> dict[str, Any]:
    """Where a run runs, in JSON types, for ``run.json``.

    It asks torch for its devices, which opens a context on them: call it where the run would do so anyway. The
    trainer's precision is recorded as given; `root` is where ``/proc``, ``/sys``, ``/etc`` and ``/opt`` are looked for.
    """
    import torch  # a command that only asks for code_version() need not wait for it

    try:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # another process holds one for itself: no reason to stop a run on the CPU
        devices = []
    cpu = re.search(r"^model name\s*:\s*(.+)$", small_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    system = re.search(r'^PRETTY_NAME="?([^"\n]+)', small_text(root / "etc/os-release") or "", re.MULTILINE)
    own = {"python": platform.python_version(), "floodrepro": floodrepro.__version__}
    return {
        "packages": own | {name: version_of(name) or "not installed" for name in _PACKAGES},
        "code": code_version(),
        "torch": {
            "version": str(torch.__version__),  # with "+rocm7.2" or "+cpu", which the package's metadata may lack
            "build": "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu",
            "build_version": torch.version.hip or torch.version.cuda,
            "rocm": small_text(root / "opt/rocm/.info/version"),  # rocm-smi would print its own library's version
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # MIOpen's where it is ROCm
        },
        "accelerator": {
            "count": len(devices),
            "name": devices[0].name if devices else None,
            "memory_gib": round(devices[0].total_memory / 2**30, 1) if devices else None,
            "drivers": gpu_drivers(root),
        },
        "numerics": {
            "precision": precision,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,  # convolutions take TF32 unless told otherwise
        },
        "cpu": {
            "model": cpu[1].strip() if cpu else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "logical_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "host": {"os": system[1] if system else platform.system(), "platform": platform.platform()},
        "variables": relevant_variables(os.environ),
    }


def code_version(package: Path = Path(floodrepro.__file__).parent) -> dict[str, Any]:
    """The code that computes: version, commit, whether a tracked file differs from it, and a hash of the source.

    The commit is that of the repository which tracks the package, or the one that a container image was built from.
    """
    commit, dirty = os.environ.get("FLOODREPRO_COMMIT") or None, None  # of an image, which has no repository inside
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # git is missing, hangs, or tracks no such file
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        found = _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
        commit, dirty = found.removesuffix("-dirty"), found.endswith("-dirty")
    digest = hashlib.sha256()  # tells dirty checkouts apart
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    source = digest.hexdigest()
    return {"floodrepro": floodrepro.__version__, "source_sha256": source, "commit": commit, "dirty": dirty}


def _git(folder: Path, *arguments: str) -> str:
    # GIT_DIR and its like, which a hook sets, would answer for another repository. No optional lock: a run that only
    # looks must not make a commit in another window fail.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, env=variables, text=True, timeout=20, check=True).stdout.strip()


def relevant_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that change numerics or speed; a path, or the name of the user or the host, is hidden."""
    private = {"/", platform.node(), variables.get("USER", ""), variables.get("LOGNAME", "")} - {""}
    kept = {key: value for key, value in variables.items() if _VARIABLES.fullmatch(key) and not _SECRET.search(key)}
    return {key: "***" if any(name in value for name in private) else value for key, value in sorted(kept.items())}


def missing_requirements() -> list[str]:
    """Names of floodrepro's dependencies that are not installed; empty where floodrepro itself is not."""
    try:
        lines = [line for line in requires("floodrepro") or () if "extra ==" not in line]
    except PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]  # PEP 508's form
    return [name for name in names if version_of(name) is None]


def installing(*words: str) -> str:
    """The command that installs *words*, pip's arguments, in this environment; one that uv made has no pip."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip"):
        return f"{python} -m pip install {shlex.join(words)}"
    return f"uv pip install --python {python} {shlex.join(words)}".replace(" --force-reinstall ", " --reinstall ")


@functools.cache  # a run asks 200 times, and each reads a file
def version_of(package: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu_drivers(root: Path) -> dict[str, str]:
    """Versions of the GPU drivers that are loaded, by name."""
    amd, found = root / "sys/module/amdgpu", {}
    if amd.is_dir():
        found["amdgpu"] = small_text(amd / "version") or "the kernel's own"  # only AMD's packages have a version file
    banner = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", small_text(root / "proc/driver/nvidia/version") or "")
    nvidia = banner[1] if banner else small_text(root / "sys/module/nvidia/version")
    return found | ({"nvidia": nvidia} if nvidia else {})


def small_text(path: Path) -> str | None:
    """A small file's text; None where it is missing or closed to us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by this process's affinity and by the quotas of its cgroup and the ones above it."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroups(root, "cpu"):
        limit = small_text(folder / "cpu.max") or ""  # v2: quota and period in one file, "max" where there is no limit
        limit = limit or " ".join(small_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if found := re.fullmatch(r"(\d+) (\d+)", limit):
            cores = min(cores, math.ceil(int(found[1]) / int(found[2])))
    return cores


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be had, of the machine and of this process's cgroup and the ones above it.

    Page cache does not count as used: the kernel gives it back when memory is needed.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", small_text(root / "proc/meminfo") or "", re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    for folder in _cgroups(root, "memory"):
        files = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1
        pairs = [[small_text(folder / name) or "" for name in names] for names in files]
        stat = dict(re.findall(r"^(\w+) (\d+)$", small_text(folder / "memory.stat") or "", re.MULTILINE))
        # The total_ figures of v1 include the cgroups below, as the limit does; those of v2 always do.
        cache = [int(stat.get(f"total_{kind}") or stat.get(kind) or 0) for kind in ("inactive_file", "active_file")]
        for limit, used in pairs:
            if limit.isdigit() and used.isdigit():
                free = min(free, max(0, int(limit) - int(used) + sum(cache)))
    return free


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    place = folder.absolute()
    return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's cgroup (v2, and v1's of a controller) and of the ones above it.

    The limit of a batch job may lie above. In a container the path may be the host's, and the top is the container's.
    """
    folders = []
    for line in (small_text(root / "proc/self/cgroup") or "0::/").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            place = top / path.lstrip("/")
            folders += [place, *(parent for parent in place.parents if parent.is_relative_to(top))]
    return folders


def ask_torch() -> dict[str, Any]:
    """What torch makes of this machine: asked in a process of its own, which a broken build may end.

    Returns:
        ``torch``, ``cuda``, ``hip``, ``nms`` as far as they were reached, ``error`` where torch cannot be imported;
        ``devices``, each with ``name``, ``memory`` and ``free`` in bytes, ``float16`` and ``bfloat16``, or ``error``.
    """
    try:
        done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"devices": [], "error": f"torch gave no answer within {_SECONDS} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return {"devices": [], "error": f"the process that imports torch ended with exit code {done.returncode}: {said}"}


def _probe() -> dict[str, Any]:
    """The answer of `ask_torch`, given in that process: import torch and torchvision, multiply on each device."""
    devices: list[dict[str, Any]] = []
    found: dict[str, Any] = {"devices": devices}
    try:
        import torch

        found |= {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            devices.append({"name": about.name, "memory": about.total_memory})
            try:
                devices[i]["free"] = torch.cuda.mem_get_info(i)[0]
                for kind in ("float16", "bfloat16"):
                    ones = torch.ones(64, 64, dtype=getattr(torch, kind), device=f"cuda:{i}")
                    devices[i][kind] = bool((ones @ ones == 64).all())
                devices[i]["bfloat16"] &= torch.cuda.is_bf16_supported(including_emulation=False)
            except RuntimeError as error:  # another process holds it, or the build has no kernels for it
                devices[i]["error"] = str(error).strip().splitlines()[0]
        import torchvision  # noqa: F401  # defines its operators

        found["nms"] = hasattr(torch.ops.torchvision, "nms")
    except Exception as error:  # whatever a broken build raises is the answer
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


if __name__ == "__main__":
    print(json.dumps(_probe()))
