"""Looks at a machine before a run does: packages, torch, GPU, memory, disk, data. Each fault comes with its repair."""

import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import floodrepro
from floodrepro import console
from floodrepro.errors import FloodreproError
from floodrepro.recipe import Recipe
from floodrepro.system import environment as machine

# With neck and UNetDecoder: bytes of the weights, and bytes that both passes of one chip of 256 px take beside them in
# float32, measured on a CPU. AdamW and the gradients make four times the weights of it. A run leaves its best weights,
# two full states of three times the weights, one more while it is written, and the export.
MODELS = {"terramind_v1_base": (673_100_000, 3_000_000_000), "terramind_v1_tiny": (56_400_000, 600_000_000)}
TRAINED, RUN_FOLDER = 4, 1 + 3 * 3 + 1  # times the weights
CHIP_BYTES = (12 + 2 + 1) * 4 * 256**2 * 4  # 15 bands, 4 timesteps, 256 px, float32
PROCESS_BYTES = 1_200_000_000  # of a process that has imported TerraTorch 1.2.7
STOLE_CREDENTIALS = ("2.6.2", "2.6.3")  # of lightning on PyPI: GHSA-w37p-236h-pfx3
_ARGUMENTS, _BATCH, _WORKERS = "model.init_args.model_args", "data.init_args.batch_size", "data.init_args.num_workers"
_ROOT, _DEMO = "trainer.default_root_dir", "runs/demo"
_GIVE_TO_CONTAINER = {
    "AMD": '--device=/dev/kfd --device=/dev/dri --group-add "$(stat -c %g /dev/kfd)"',
    "NVIDIA": "--gpus all",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, how it is, what was found, and what to do."""

    name: str
    status: str  # ok, warn, or fail: a run cannot work, or would not be the one that the recipe describes
    detail: str
    fix: str = ""  # a command to paste or flags to add; empty where the status is ok


def examine(
    recipe: Recipe | None, runs: Path = Path("runs"), *, quick: bool = False, root: Path = Path("/")
) -> list[Finding]:
    """Look at the machine.

    Args:
        recipe: Resolved, or folded by the command line; None leaves out what only a recipe can ask for.
        runs: Folder of all runs.
        quick: Ask torch only where a GPU's device file is, and leave what is not installed to the import that needs it.
        root: Where ``/proc``, ``/sys``, ``/dev`` and ``/opt`` are looked for.
    """
    found, devices = check_packages(quick=quick), 0
    on_cpu = _of(recipe or {}, "trainer.accelerator", "auto") == "cpu"
    if not quick or (_vendor(root) and not on_cpu):
        answer = machine.ask_torch()
        devices = 0 if on_cpu else len(answer["devices"])
        found += [check_torch(answer, _vendor(root)), *check_gpus(answer, recipe or {}, root)]
    return found if recipe is None else [*found, *check_machine(recipe, devices, runs, root), *check_backbone(recipe)]


def check_before_fit(recipe: Recipe, runs: Path) -> None:
    """Warn of what may hurt a fit; of several processes of one run, the first one does. Arguments as for `examine`.

    Raises:
        FloodreproError: Something will stop the fit, or make it another run than the recipe describes.
    """
    if int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))):
        return
    findings = examine(recipe, runs, quick=True)
    for finding in findings:
        if finding.status == "warn":
            console.warn(f"{finding.name}: {finding.detail}; to do: {finding.fix}")
    if failed := [finding for finding in findings if finding.status == "fail"]:
        what = "; ".join(f"{finding.name}: {finding.detail}" for finding in failed)
        raise FloodreproError(what, fix="; then ".join(finding.fix for finding in failed))


def _of(recipe: Recipe, path: str, default: Any) -> Any:
    """A value of a recipe by its path; the default where it is missing or of another type."""
    value: Any = recipe
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, type(default)) else default


def _sizes(recipe: Recipe) -> tuple[int, int, int]:
    """Bytes, estimates: the weights; what training takes for one chip beside them; a chip. 0 where not measured."""
    weights, training = MODELS.get(_of(recipe, f"{_ARGUMENTS}.backbone", ""), (0, 0))
    half = 2 if "16" in _of(recipe, "trainer.precision", "32-true") else 1
    smaller = (256 // 64) ** 2 if _of(recipe, _ROOT, "") == _DEMO else 1
    return weights, training // half // smaller, CHIP_BYTES // smaller


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _judge(name: str, passes: bool, detail: str, fix: str, otherwise: str = "warn") -> Finding:
    return Finding(name, "ok", detail) if passes else Finding(name, otherwise, detail, fix)


def _torch_for(vendor: str) -> str:
    """The command that installs a torch and a torchvision that belong together and fit a vendor's GPU."""
    if vendor != "AMD":
        packaged = Path(floodrepro.__file__).with_name("constraints.txt")
        tested = packaged if packaged.is_file() else packaged.parents[2] / packaged.name  # in a checkout
        return machine.installing("--force-reinstall", "-c", str(tested), "torch", "torchvision")
    python = shlex.quote(sys.executable)  # PyPI has no ROCm build; uv looks at the GPU and knows where each build is
    return f"pip install uv && uv pip install --python {python} --reinstall --torch-backend=auto torch torchvision"


def check_packages(*, quick: bool = False) -> list[Finding]:
    """Compare what is installed with floodrepro's bounds; if *quick*, what is missing is no fault."""
    try:
        wanted = [Requirement(line) for line in requires("floodrepro") or ()]
    except PackageNotFoundError:
        what = "floodrepro is not installed: its bounds are not known"
        return [Finding("packages", "warn", what, machine.installing("floodrepro"))]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = []
    for requirement in wanted:
        name, have = requirement.name, machine.version_of(requirement.name)
        fits = quick if have is None else requirement.specifier.contains(have, prereleases=True)
        if name == "lightning" and have in STOLE_CREDENTIALS:
            what = f"{have} steals credentials when imported (GHSA-w37p-236h-pfx3): change every token of this machine"
            found.append(Finding(name, "fail", what, machine.installing("--force-reinstall", "lightning==2.6.1")))
        elif not fits:
            what = f"{have or 'not installed'}, needed is {requirement.specifier or 'any version'}"
            found.append(Finding(name, "fail", what, machine.installing(str(requirement))))
    return found or [Finding("packages", "ok", f"{len(wanted)} dependencies, all within their bounds")]


def check_torch(answer: Mapping[str, Any], vendor: str) -> Finding:
    """Whether torch and torchvision import and belong together, by torchvision's metadata and by its operator."""
    if "torch" not in answer:
        return Finding("torch", "fail", str(answer["error"]), _torch_for(vendor))
    build = f"ROCm {answer['hip']}" if answer["hip"] else f"CUDA {answer['cuda']}" if answer["cuda"] else "CPU"
    have = machine.version_of("torchvision")
    needed = [r.specifier for r in map(Requirement, requires("torchvision") or ()) if r.name == "torch"] if have else []
    detail, why = f"{answer['torch']}, built for {build}; torchvision {have or 'is not installed'}", ""
    if not all(specifier.contains(answer["torch"], prereleases=True) for specifier in needed):
        why = f", which needs torch{needed[0]}"
    elif not answer.get("nms"):
        why = f": {answer.get('error', 'operator torchvision::nms is missing')}"
    return _judge("torch", not why, detail + why, _torch_for(vendor), "fail")


def _vendor(root: Path) -> str:
    """Whose GPU has a device file here; empty where there is none. /dev/dxg is the GPU of Windows under WSL."""
    if any((root / "dev" / name).exists() for name in ("nvidiactl", "dxg")):
        return "NVIDIA"
    return "AMD" if (root / "dev/kfd").exists() else ""


def check_gpus(answer: Mapping[str, Any], recipe: Recipe, root: Path = Path("/")) -> list[Finding]:
    """Judge what torch sees (the answer of `ask_torch`), a line for each kind of GPU, or why it sees none."""
    on_cpu, found = _of(recipe, "trainer.accelerator", "auto") == "cpu", []
    devices = [] if on_cpu else answer["devices"]
    kind = {"16": "float16", "bf16": "bfloat16"}.get(_of(recipe, "trainer.precision", "").partition("-")[0])
    if not devices:
        found.append(_why_no_gpu(answer, root, on_cpu=on_cpu))
        if kind == "float16":
            found.append(Finding("precision", "fail", "fp16 does not run on a CPU", "--precision fp32"))
    modes = [machine.small_text(file) for file in root.glob("sys/class/drm/card*/device/current_compute_partition")]
    split = any(mode not in (None, "", "SPX") for mode in modes)  # of AMD: CPX, DPX, …; SPX is a whole GPU
    for text, count in Counter(json.dumps(device | {"free": 0}) for device in devices).items():
        device = json.loads(text)
        detail = f"{count} x {device['name']}, {_gib(device['memory'])}"
        if "error" in device:
            found.append(Finding("gpu", "fail", f"{detail}: {device['error']}", "nvidia-smi || rocm-smi"))
            continue
        detail += "".join(f", {k} {'works' if device[k] else 'does not work'}" for k in ("float16", "bfloat16"))
        if " MIG " in device["name"] or split:
            detail += "; a partition: power and energy are read for the whole GPU, which others may share"
        found.append(_judge("gpu", kind is None or device[kind], detail, "--precision fp32", "fail"))
    free, batch = [device["free"] for device in devices if "free" in device], _of(recipe, _BATCH, 8)
    weights, training, _ = _sizes(recipe)
    if free and weights:
        need, room = TRAINED * weights + batch * training, min(free) - TRAINED * weights
        detail = f"{_gib(min(free))} free, about {_gib(need)} needed for batches of {batch} (estimate)"
        fits = next((n for n in range(batch, 1, -1) if batch % n == 0 and n * training <= room), 1)
        fix = f"--{_BATCH} {fits} --trainer.accumulate_grad_batches {batch // fits}"
        found.append(_judge("gpu memory", need <= min(free), detail, fix))
    return found


def _why_no_gpu(answer: Mapping[str, Any], root: Path, *, on_cpu: bool) -> Finding:
    vendor, build = _vendor(root), "AMD" if answer.get("hip") else "NVIDIA" if answer.get("cuda") else "the CPU"
    variables = [f"{name}_VISIBLE_DEVICES" for name in ("CUDA", "HIP", "ROCR")]
    hidden = next((name for name in variables if os.environ.get(name) in ("", "-1")), None)
    in_container = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    if on_cpu or hidden:
        return Finding("gpu", "ok", "none is used: " + (f"{hidden} hides it" if hidden else "the recipe says cpu"))
    if not vendor and in_container and build == "AMD":
        fix = f"docker run {_GIVE_TO_CONTAINER['AMD']} --ipc=host IMAGE"
        return Finding("gpu", "warn", "this container was given none", fix)
    if not vendor:
        return Finding("gpu", "ok", "none is here: torch computes on the CPU")
    names = ("dev/kfd", "dev/dri/renderD*") if vendor == "AMD" else ("dev/nvidiactl", "dev/nvidia0")
    closed = [node for name in names for node in root.glob(name) if not os.access(node, os.R_OK | os.W_OK)]
    if build != vendor:
        why, fix = f"torch is built for {build}", _torch_for(vendor)
    elif closed:
        why, fix = f"/{closed[0].relative_to(root)} is closed to this user", "sudo usermod -aG render,video $USER"
        fix = f"docker run {_GIVE_TO_CONTAINER[vendor]} IMAGE" if in_container else f"{fix}; newgrp render"
    elif vendor == "AMD":
        why, fix = f"it may not fit ROCm {answer['hip']}", "sudo dmesg | grep -i amdgpu"
    else:  # NVIDIA's release notes of CUDA: 13 needs driver 580, 12 needs 525
        why, fix = f"it may be too old for CUDA {answer['cuda']} (13 needs 580, 12 needs 525)", _torch_for("AMD")
    drivers = ", ".join(map(" ".join, machine.gpu_drivers(root).items())) or "of unknown version"
    # AMD's may be a processor's own graphics, and WSL always has /dev/dxg: no failure. fp16 fails without a GPU anyway.
    status = "fail" if (root / "dev/nvidiactl").exists() else "warn"
    detail = f"torch sees no GPU, but a driver for {vendor} is here ({drivers}): {why}"
    return Finding("gpu", status, detail, f"{fix}  # or: --trainer.accelerator cpu")


def _devices_used(recipe: Recipe, available: int) -> int:
    """How many devices a recipe's ``trainer.devices`` means: a number, a list, or a text such as "0,1" or "auto"."""
    devices = str((recipe.get("trainer") or {}).get("devices", "auto"))
    if devices.startswith("[") or "," in devices:
        return len(re.findall(r"\d+", devices))
    return max(1, int(devices) if devices.isdigit() else available)


def check_machine(recipe: Recipe, devices: int, runs: Path = Path("runs"), root: Path = Path("/")) -> list[Finding]:
    """Compare cores, memory, shared memory and disk with what a recipe needs on so many GPUs: estimates."""
    batch, workers = _of(recipe, _BATCH, 8), _of(recipe, _WORKERS, 0)
    weights, training, chip = _sizes(recipe)
    processes, chips = _devices_used(recipe, devices), batch * chip
    loaders = f"{processes * workers} loader processes"
    cores = machine.usable_cores(root)
    most = max(0, cores // processes - 1)
    found = [_judge("cores", workers <= most or not workers, f"{cores}, for {loaders}", f"--{_WORKERS} {most}")]

    memory, ready = machine.free_memory(root), workers * _of(recipe, "data.init_args.prefetch_factor", 2) * chips
    need = processes * (PROCESS_BYTES + 2 * chips + ready) + (0 if devices else TRAINED * weights + batch * training)
    spare = int((memory - need + processes * ready) * workers // (processes * ready)) if ready else 0
    fix = f"--{_WORKERS} {spare}" if spare > 0 else "floodrepro reproduce --demo  # or use a GPU"
    found.append(_judge("memory", need <= memory, f"{_gib(memory)} free, about {_gib(need)} needed (estimate)", fix))

    shared, ready = machine.free_disk(root / "dev/shm"), processes * ready
    detail = f"{_gib(shared)} free, {_gib(ready)} for what {loaders} hold ready"
    fix = "sudo mount -o remount,size=16G /dev/shm  # of a container: docker run --ipc=host"
    found.append(_judge("/dev/shm", ready <= shared, detail, fix, "fail" if ready > 2 * shared else "warn"))

    if weights:
        disk = machine.free_disk(runs)
        detail = f"{disk / 1e9:.1f} GB free, {RUN_FOLDER * weights / 1e9:.1f} for a run and its export (estimate)"
        fix, otherwise = "--runs-root /another/disk/runs", "fail" if disk < TRAINED * weights else "warn"
        found.append(_judge("disk", disk >= RUN_FOLDER * weights, detail, fix, otherwise))
    return found


def check_backbone(recipe: Recipe) -> list[Finding]:
    """Whether the pretrained weights that TerraTorch will ask for are in the hub's cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    from floodrepro.data.weights import backbone_weights

    file = backbone_weights(_of(recipe, _ARGUMENTS, {}))
    if file is None:
        return []
    offline = constants.HF_HUB_OFFLINE
    held = isinstance(try_to_load_from_cache(file.repo, file.name, revision=file.revision), str)
    detail = f"{file.name} is {'' if held else 'not '}in {constants.HF_HUB_CACHE}"
    fix = shlex.join(file.command) + ("  # where there is a network; then copy the cache" if offline else "")
    return [_judge("backbone", held, detail, fix, "fail" if offline else "warn")]


def check_chips(recipe: Recipe) -> Finding:
    """Whether each chip of the recipe's splits has its files; names are read, no pixels. `data audit` looks inside."""
    from floodrepro.data.protocols import SPLITS, protocol_of
    from floodrepro.data.splits import check_data

    arguments = _of(recipe, "data.init_args", {})
    root = Path(arguments.get("data_root") or ".")
    folder = root.parent if root.name == "data" else root
    if folder.is_dir():
        try:
            chips = check_data(recipe, [split for split in SPLITS if arguments.get(f"{split}_split")]).chips
        except FloodreproError as error:
            return Finding("data", "fail", f"{error.what} ({error.where})", str(error.fix))
        return Finding("data", "ok", ", ".join(f"{count} chips of {split}" for split, count in chips.items()))
    where, protocol, missing = f"--root {shlex.quote(str(folder))}", protocol_of(recipe), f"{folder} is not here"
    if _of(recipe, _ROOT, "") == _DEMO:
        fix = f"floodrepro data synth {where} --events 16 --chips 128 --size 64 --protocol v0 --seed 42"
        return Finding("data", "warn", f"{missing}; the demo's chips are generated", fix)
    if protocol.repo is None:
        return Finding("data", "fail", missing, "--data-root DIR")
    revision = " --revision COMMIT" if protocol.name == "v0" else ""  # main holds version 1
    fix = f"floodrepro data fetch {where} --protocol {protocol.name}{revision}"
    room = f"about {protocol.size_gb} GB to download, " if protocol.size_gb else ""
    room += f"{machine.free_disk(folder) / 1e9:.0f} GB free"
    return Finding("data", "warn", f"{missing}; {room}", fix)
