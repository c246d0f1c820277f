"""Looks at a machine before a run does: packages, torch, GPU, memory, disk, data. torch is not imported here."""

from pathlib import Path

from floodrepro.system.container import installed
from floodrepro.system.doctor import data, gpus, machine, packages, torch_build
from floodrepro.system.doctor.finding import Finding
from floodrepro.system.doctor.needs import Needs, estimate_time, read_needs

__all__ = ["Finding", "Needs", "examine", "quick", "read_needs"]


def quick(needs: Needs, runs: Path, root: Path = Path("/")) -> list[Finding]:
    """What `fit` looks at before it begins: nothing that takes a second, starts a process or asks the network."""
    versions, seen = dict(reversed(installed())), _seen(needs, root)
    large = [gpu for gpu in seen if gpu.trains]
    return [
        *_torch(versions, large, root),
        *packages.check_bounds(versions, packages.own_requirements()),
        *gpus.check_devices(seen, root),
        *machine.check_host(machine.Host.read(root), needs, len(large), machine.free_disk(runs)),
        *([data.check_backbone(needs, data.Hub.of_environment())] if "huggingface-hub" in versions else []),
    ]


def examine(
    needs: Needs | None, data_root: Path | None = None, *, build: bool = False, root: Path = Path("/")
) -> list[Finding]:
    """Everything.

    Args:
        needs: The recipe's; None leaves out what only a recipe can ask for.
        data_root: The data set's folder, if not where the recipe has it.
        build: Only what can be seen while a container is built: without GPU, recipe and network.
        root: Where ``/proc``, ``/sys``, ``/dev`` and ``/opt`` are looked for.
    """
    versions = dict(reversed(installed()))  # of two leftovers the first on sys.path is imported
    seen = [] if build else _seen(needs, root)
    large = [gpu for gpu in seen if gpu.trains]
    found = _torch(versions, large, root, building=build)
    found += packages.check_bounds(versions, packages.own_requirements())
    torch = torch_build.Build.read(torch_build.folder_of("torch"))
    keeps_torch = torch is not None and torch.kind == "rocm"
    found.append(packages.check_tested(versions, packages.tested_versions(), keeps_torch=keeps_torch))
    if not build:
        found += gpus.check_devices(seen, root, rocm=keeps_torch)
        found += gpus.check_use(large, needs.precision if needs else "", versions)
    device = large[0].name if large else None
    if torch is not None and (large or build):  # without a GPU it would take longer than all the rest, and tell little
        answer = gpus.probe()
        found += gpus.judge_probe(answer, needs.precision if needs else "", gpu_expected=bool(large))
        device = answer["devices"][0]["name"] if isinstance(answer, dict) and answer["devices"] else device
    return found if build else found + _recipe_and_data(needs, data_root, len(large), device, versions, root)


def _recipe_and_data(
    needs: Needs | None, data_root: Path | None, count: int, device: str | None, versions: dict[str, str], root: Path
) -> list[Finding]:
    found, data_root = [], data_root or (needs.data_root if needs else None)
    if needs is None:
        found.append(Finding("recipe", "ok", "none given: memory, disk, loaders and time not judged", "--config YAML"))
    else:
        found += machine.check_host(machine.Host.read(root), needs, count, machine.free_disk(Path("runs")))
    if "huggingface-hub" not in versions:
        return found  # said already, and what follows stands on it
    hub, reads = data.Hub.of_environment(), []
    if needs is not None:
        reads.append(data.check_backbone(needs, hub))
    if data_root is not None:
        free, protocol = machine.free_disk(data_root), needs.protocol if needs else None
        reads.append(data.check_data(data_root, protocol, free, offline=hub.offline))
    found += [*reads, data.check_reference(hub)]
    if any(finding.status != "ok" for finding in reads) and not hub.offline:
        found.append(data.check_network(hub.endpoint))
    if needs is not None:
        version = data.version_of(data_root) if data_root else None
        found.append(estimate_time(needs, device, published=version is None or version.published))
    return found


def _seen(needs: Needs | None, root: Path) -> list[gpus.Gpu]:
    """GPUs; none for a recipe that keeps to the CPU."""
    return [] if needs is not None and needs.accelerator == "cpu" else gpus.find_gpus(root)


def _torch(versions: dict[str, str], large: list[gpus.Gpu], root: Path, *, building: bool = False) -> list[Finding]:
    torch, torchvision = torch_build.folder_of("torch"), torch_build.folder_of("torchvision")
    found = torch_build.check_torch(torch, versions, large, root, building=building)
    return [*found, torch_build.check_torchvision(torch, torchvision)]
