"""Cores, memory, shared memory, open files and disk, against what a recipe asks for. All needs are estimates."""

import math
import os
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from floodrepro.system.doctor.finding import Finding, gb, judged
from floodrepro.system.doctor.needs import FLOAT_CHIP_BYTES, Needs
from floodrepro.system.environment import small_text

PROCESS = 1_200_000_000  # bytes of a process that has imported TerraTorch 1.2.7
# A state holds the weights and AdamW's two moments. Last, previous, one being written; best weights, export.
ONE_STATE, ALL_FILES = 3 + 1, 3 * 3 + 2  # in sizes of the weights; the first beside the best weights
OPEN_FILES = 256  # of a fit beside its loaders', rounded up


@dataclass(frozen=True)
class Host:
    """What this process may use, its container's limits included: cores, bytes free, most open files."""

    cores: int
    memory: int
    shm: int
    files: int

    @classmethod
    def read(cls, root: Path = Path("/")) -> "Host":
        """This machine's; *root* holds ``/proc``, ``/sys`` and ``/dev``."""
        cores = len(os.sched_getaffinity(0))
        quota = (small_text(root / "sys/fs/cgroup/cpu.max") or "max").split()
        if quota[0] != "max":
            cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
        available = re.search(r"^MemAvailable:\s+(\d+) kB", small_text(root / "proc/meminfo") or "", re.MULTILINE)
        memory = int(available[1]) * 1024 if available else 0
        limit, used = (small_text(root / f"sys/fs/cgroup/memory.{name}") or "" for name in ("max", "current"))
        if limit.isdigit() and used.isdigit():
            memory = min(memory, int(limit) - int(used))
        shm, files = root / "dev/shm", resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        many = 10**9 if files == resource.RLIM_INFINITY else files
        return cls(cores, memory, shutil.disk_usage(shm).free if shm.is_dir() else 0, many)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place)
    return disk.free if disk.total else sys.maxsize  # /proc and its like: that nothing can be made there is said later


def check_host(host: Host, needs: Needs, gpus: int, free: int) -> list[Finding]:
    """Judge a machine with so many GPUs, and so many bytes free for run folders, for one recipe."""
    workers = needs.workers * max(1, gpus if not isinstance(needs.devices, int) or needs.devices < 0 else needs.devices)
    held = workers * needs.prefetch * needs.batch_bytes
    memory = PROCESS + 2 * needs.batch * FLOAT_CHIP_BYTES + 2 * held
    if needs.model and not gpus:
        memory += 4 * needs.model.weights + needs.batch * needs.model.chip_memory  # with gradients and moments
    files = OPEN_FILES + needs.workers * (needs.prefetch + 2) * 5  # a batch's tensors may have a file each
    share = "docker run --ipc=host or --shm-size=16g; elsewhere: mount -o remount,size=16G /dev/shm"
    # floodrepro's loader has memory of its own and falls back on /dev/shm; torch's workers die of a bus error there.
    found = [
        judged(
            "cores",
            not workers or workers < host.cores,
            f"{host.cores}, for {workers} loader processes and the fit itself",
            f"--data.init_args.num_workers {host.cores - 1}; it changes no result",
            "warn",
        ),
        judged(
            "memory",
            memory <= host.memory,
            f"{gb(host.memory)} free, about {gb(memory)} needed with chips of 256 px (estimate)",
            "--data.init_args.num_workers or prefetch_factor lower; on a CPU batch_size, which changes the result",
            "warn",
        ),
        judged(
            "/dev/shm",
            held <= host.shm,
            f"{gb(host.shm)} free, {gb(held)} for what {workers} loader processes hold ready",
            share,
            "warn" if needs.own_loader else "fail",
        ),
        judged(
            "open files",
            files <= host.files,
            f"at most {host.files}, about {files} needed",
            f"ulimit -n {max(4096, files)}",
        ),
    ]
    if needs.model is None:
        return [*found, Finding("disk", "ok", f"{gb(free)} free; the size of {needs.backbone}'s states is not known")]
    whole, least = (needs.model.weights * sizes for sizes in (ALL_FILES, ONE_STATE))
    detail = f"{gb(free)} free for run folders, {gb(whole)} for states, best weights and export (estimate)"
    fix = "free some space, or fit --runs-root on another disk"
    return [*found, judged("disk", free >= whole, detail, fix, "warn" if free >= least else "fail")]
