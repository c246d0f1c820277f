"""Which torch is installed, and whether it is one for the GPU that is there. torch is not imported."""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from floodrepro.system.doctor.finding import Finding, judged
from floodrepro.system.doctor.gpus import Gpu
from floodrepro.system.environment import small_text

PIP = f"{sys.executable} -m pip install"
BUILD_FOR = {"AMD": "rocm", "NVIDIA": "cuda"}
REPAIR = {
    "AMD": "docker build -f Dockerfile.rocm -t floodrepro .; or, inside a ROCm image and without a .venv: "
    "FLOODREPRO_TORCH=keep scripts/reproduce.sh --demo",
    "NVIDIA": f"{PIP} --force-reinstall -c constraints.txt torch torchvision",
}
_CONSTANT = re.compile(r"^(__version__|cuda|hip)\b[^=\n]*= *(?:'([^'\n]*)'|None)", re.MULTILINE)


@dataclass(frozen=True)
class Build:
    """What a ``version.py`` says: the version with its local part, and what ROCm or CUDA it was built for."""

    version: str
    kind: str
    of: str | None

    @classmethod
    def read(cls, folder: Path | None) -> "Build | None":
        """Of a package's folder; None where it says nothing."""
        text = (small_text(folder / "version.py") if folder else None) or ""
        said = {match[1]: match[2] for match in _CONSTANT.finditer(text)}
        if not said.get("__version__"):
            return None
        kind = "rocm" if said.get("hip") else "cuda" if said.get("cuda") else "cpu"
        return cls(said["__version__"], kind, said.get("hip") or said.get("cuda"))


def folder_of(package: str) -> Path | None:
    """Where a package would be imported from; None where there is none."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def check_torch(
    folder: Path | None, versions: Mapping[str, str], gpus: Sequence[Gpu], root: Path, *, building: bool = False
) -> list[Finding]:
    """Judge the installed torch.

    Args:
        folder: Of the package; None where there is none.
        versions: Of all distributions, by normalised name.
        gpus: What there is to train on; none where the recipe keeps to the CPU.
        root: Where ``/opt`` is looked for.
        building: A container is being built: its GPU is elsewhere.
    """
    rocm = small_text(root / "opt/rocm/.info/version")  # rocm-smi would print its own library's version
    repair = REPAIR[gpus[0].vendor if gpus else "AMD" if rocm else "NVIDIA"]
    build, listed = Build.read(folder), versions.get("torch", "")
    if folder is None:
        return [Finding("torch", "fail", "not installed", repair)]
    if build is None or not any(folder.glob("_C.*")):
        return [Finding("torch", "fail", f"{folder} holds no whole torch", repair)]
    if listed and listed.partition("+")[0] != build.version.partition("+")[0]:
        detail = f"{folder} is {build.version}, pip's record says {listed}: two installations got mixed"
        return [Finding("torch", "fail", detail, repair)]
    what = f"{build.version}, {build.kind} build{f' for {build.of}' if build.of else ''}"
    if gpus and build.kind not in [BUILD_FOR[gpu.vendor] for gpu in gpus]:
        what += f": cannot use the {gpus[0].vendor} GPU that is here ({gpus[0].name})"
        return [Finding("torch", "fail", what, f"{repair}; on the CPU by choice: --trainer.accelerator cpu")]
    if rocm and build.kind != "rocm":
        return [Finding("torch", "fail" if building else "warn", f"{what}, but ROCm {rocm} is installed here", repair)]
    found = [Finding("torch", "ok", what)]
    if rocm:
        same = _minor(rocm) == _minor(build.of or "")
        fix = "an image whose torch was built for its ROCm: Dockerfile.rocm names one"
        found.append(judged("rocm", same, f"{rocm}, torch's is {build.of}", fix, "warn"))
    return found


def check_torchvision(torch: Path | None, torchvision: Path | None) -> Finding:
    """Whether torchvision was built for this torch, by their versions; `gpus.probe` sees whether it loads."""
    base, ours = Build.read(torch), Build.read(torchvision)
    fix = f"{PIP} --force-reinstall torch and the torchvision that belongs to it, from one place"
    if base is None or ours is None:
        return Finding("torchvision", "fail", "missing, or without a torch beside it", fix)
    # torch 2.N goes with torchvision 0.(N + 15): 2.0 with 0.15, 2.9 with 0.24, 2.14 with 0.29 (torchvision's README).
    wanted = _minor(base.version)[1] + 15
    kinds = {match[1] for b in (base, ours) if (match := re.search(r"\+(cpu|cu|rocm)", b.version))}
    fits = _minor(ours.version) == (0, wanted) and len(kinds) <= 1
    detail = f"{ours.version} beside torch {base.version}"
    lost = "" if fits else f", which goes with 0.{wanted} of the same build: torchvision::nms will be missing"
    return judged("torchvision", fits, detail + lost, fix)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
