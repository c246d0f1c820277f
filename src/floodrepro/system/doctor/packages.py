"""Installed packages: floodrepro's own bounds, with the reasons of those that hurt, and the tested versions."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import floodrepro
from floodrepro.system.container import FAMILY, normalized, pins
from floodrepro.system.doctor.finding import Finding, judged
from floodrepro.system.doctor.torch_build import PIP

POISONED = ("2.6.2", "2.6.3")  # of lightning on PyPI: GHSA-w37p-236h-pfx3
WHY = {  # named in every report; other packages only where they do not fit
    "lightning": "the recipes and the resume were tried with 2.6",
    "terratorch": "the recipes' arguments are 1.2's",
    "torchgeo": "terratorch 1.2.7 does not import with torchgeo 0.10",
    "zarr": "chips are zarr v2, and impactmesh reads them with zarr 2's API",
    "numcodecs": "0.16 dropped what zarr 2.18 imports",
}


def own_requirements() -> list[str]:
    """What floodrepro's metadata asks for, extras left out; empty where it is not installed."""
    try:
        return [line for line in requires("floodrepro") or () if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def tested_versions() -> str | None:
    """Text of a checkout's constraints.txt, or of what pip is told to keep to, as in the ROCm image; else None."""
    files = Path(floodrepro.__file__).parents[2] / "constraints.txt", Path(os.environ.get("PIP_CONSTRAINT", ""))
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


def check_bounds(versions: Mapping[str, str], requirements: Sequence[str]) -> list[Finding]:
    """Judge versions, by normalised name, against requirements in PEP 508's words."""
    from packaging.requirements import Requirement

    if not requirements:
        return [Finding("packages", "warn", "floodrepro is not installed: its bounds are not known", f"{PIP} -e .")]
    found = []
    for requirement in map(Requirement, requirements):
        name = normalized(requirement.name)
        version = versions.get(name, "not installed")
        if name == "lightning" and version in POISONED:
            detail = f"{version} steals credentials when imported (GHSA-w37p-236h-pfx3)"
            fix = f"{PIP} --force-reinstall lightning==2.6.1; then change every token and key of this machine"
            found.append(Finding(name, "fail", detail, fix))
        elif name not in versions or not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version}, needed is {requirement.specifier}{f': {WHY[name]}' if name in WHY else ''}"
            found.append(Finding(name, "fail", detail, f'{PIP} "{requirement}"'))
        elif name in WHY:
            found.append(Finding(name, "ok", version))
    return found


def check_tested(versions: Mapping[str, str], constraints: str | None, *, keeps_torch: bool) -> Finding:
    """Compare with constraints.txt; without torch's family where that comes from elsewhere, as in a ROCm image."""
    if constraints is None:
        return Finding("tested versions", "ok", "not compared: a wheel comes without constraints.txt")
    wanted = {n: v for n, v in pins(constraints).items() if n in versions and not (keeps_torch and n in FAMILY)}
    # A build's local part, such as +cpu, is another file of the same version.
    other = [f"{n} {versions[n]} (not {v})" for n, v in wanted.items() if versions[n].partition("+")[0] != v]
    same = f"{len(wanted) - len(other)} of {len(wanted)} packages as tested"
    detail = f"{same}; others: {', '.join(other[:4])}{', …' if len(other) > 4 else ''}" if other else same
    return judged("tested versions", not other, detail, f"{PIP} -c constraints.txt -e .", "warn")
