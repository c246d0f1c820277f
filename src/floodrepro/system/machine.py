"""What this process may use of the machine: cores, memory, disk. Limits of cgroups (containers, Slurm) count."""

import math
import os
import re
import shutil
from pathlib import Path

from floodrepro.system.environment import small_text


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by this process's affinity and by the quotas of its cgroup and the ones above it."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroups(root, "cpu"):
        quota, period = [*(small_text(folder / "cpu.max") or "max").split(), "100000"][:2]
        if v1 := _number(folder / "cpu.cfs_quota_us"):  # -1 where there is none
            quota, period = str(v1), small_text(folder / "cpu.cfs_period_us") or "100000"
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be had, of the machine and of this process's cgroup and the ones above it.

    Page cache does not count as used: the kernel gives it back when memory is needed.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", small_text(root / "proc/meminfo") or "", re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    for folder in _cgroups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        stat = dict(re.findall(r"^(\w+) (\d+)$", small_text(folder / "memory.stat") or "", re.MULTILINE))
        # The total_ figures of v1 include the cgroups below, as the limit does; those of v2 always do.
        cache = [stat.get(f"total_{kind}") or stat.get(kind) or "0" for kind in ("inactive_file", "active_file")]
        if limit:
            free = min(free, max(0, limit - used + sum(map(int, cache))))
    return free


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


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


def _number(file: Path) -> int | None:
    text = small_text(file) or ""
    return int(text) if text.isdigit() else None
