"""What a run records about where it ran: versions, commit, torch's build, devices, CPU, and what changes numerics.

Nothing here names a person or a machine: no host name, no user name, no token.
"""

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import floodrepro

_PACKAGES = (
    *("torch", "lightning", "terratorch", "impactmesh", "torchvision", "torchgeo", "zarr", "numcodecs", "numpy"),
    *("jsonargparse", "torchmetrics", "segmentation-models-pytorch"),
)
COMMIT_VARIABLE = "FLOODREPRO_COMMIT"  # set in a container image, which has no repository inside
# Variables that change numerics or speed. NVIDIA_TF32_OVERRIDE overrules torch's own switches without a word.
_VARIABLES = re.compile(
    r"(OMP|MKL)_NUM_THREADS|PYTHONHASHSEED|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|(MIOPEN|PYTORCH|HSA|NCCL|TORCH)_.*"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY|AUTH", re.IGNORECASE)


def environment(
    precision: str | None = None, *, root: Path = Path("/"), variables: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Where a run runs, in JSON types, for ``run.json``.

    It asks torch for its devices, which opens a context on them: call it where the run would do so anyway.

    Args:
        precision: The trainer's precision, recorded as given.
        root: Where ``/proc``, ``/sys``, ``/etc`` and ``/opt`` are looked for.
        variables: The environment variables.
    """
    import torch  # a command that only asks for code_version() need not wait for it

    try:
        matmul = torch.get_float32_matmul_precision()
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch >= 2.9 refuses to say once the new switch of a single backend was set
        matmul = f"cuda: {torch.backends.cuda.matmul.fp32_precision}"
        convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # missing in its stub
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
            "names": [device.name for device in devices],
            "drivers": gpu_drivers(root),
        },
        "numerics": {
            "precision": precision,
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "float32_matmul_precision": matmul,
            "cudnn_allow_tf32": convolutions,  # on NVIDIA convolutions of float32 take TF32 unless told otherwise
        },
        "cpu": {
            "model": cpu[1].strip() if cpu else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "logical_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "host": {
            "os": system[1] if system else platform.system(),
            "kernel": platform.release(),
            "libc": " ".join(platform.libc_ver()),
        },
        "variables": relevant_variables(variables),
    }


def code_version(package: Path = Path(floodrepro.__file__).parent) -> dict[str, Any]:
    """The code that computes: version, commit, whether a tracked file differs from it, and a hash of the source.

    The commit is that of the repository which tracks the package, or the one that a container image was built from.
    Where there is neither, as in a wheel, ``note`` says why.
    """
    found = {"floodrepro": floodrepro.__version__, "source_sha256": _source_digest(package)}
    note, commit, changes = "git does not track the package, or refuses a repository of another user", None, None
    try:
        if _git(package, "ls-files", "--error-unmatch", "__init__.py"):
            note, commit = "the repository has no commit, or is damaged", _git(package, "rev-parse", "--verify", "HEAD")
            changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:  # git is missing, or hangs on a slow file system
        note = f"git cannot be asked: {type(error).__name__}"
    if commit and changes is not None:
        return found | {"commit": commit, "dirty": bool(changes), "note": None}
    if built_from := os.environ.get(COMMIT_VARIABLE):
        note = "the commit that the container image was built from"
    return found | {"commit": built_from or None, "dirty": None, "note": note}


def _source_digest(package: Path) -> str:
    """Sha256 over the paths and contents of a package's Python files; it tells dirty checkouts apart."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails."""
    # GIT_DIR and its like, which a hook sets, would answer for another repository. No optional lock: a run that only
    # looks must not make a commit in another window fail.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, env=variables, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


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
