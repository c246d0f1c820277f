"""Keeps the torch that a container's base image brings: constraints before an install, assertions after it.

Standard library only, so that it runs as a file before anything of floodrepro is installed::

    python container.py constraints --tested constraints.txt > rocm-constraints.txt
    python container.py check --constraints rocm-constraints.txt
"""

import argparse
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

# Built together and for one ROCm, so none of them may move alone. ROCm's triton has had each of these three names.
TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm")
FAMILY = ("torch", "torchvision", "torchaudio", *TRITONS)

# Each in a process of its own: a torch that is broken ends only that one.
PROBES = {
    "torch is no ROCm build": ("-c", "import torch; assert torch.version.hip, 'torch.version.hip is not set'"),
    "torchvision does not fit torch": ("-c", "import torch, torchvision; torch.ops.torchvision.nms"),
    "terratorch cannot be imported": ("-c", "import terratorch"),
    "pip check": ("-m", "pip", "check"),
}


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> list[tuple[str, str]]:
    """Name and version of every distribution on ``sys.path``; a leftover beside its successor counts as well."""
    # The metadata of an uninstall that was cut short has no name.
    return [(normalized(d.name), d.version) for d in distributions() if d.metadata["Name"]]


def pins(text: str) -> dict[str, str]:
    """The versions that a constraints file fixes, by normalized name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE)
    return {normalized(name): version for name, version in found}


def constraints(have: list[tuple[str, str]], tested: str) -> str:
    """The constraints under which an install leaves the torch family as it is.

    The versions come from the metadata: ``pip freeze`` prints ``torch @ file:///…`` for a wheel that was installed
    from a file, and ``torch.__version__`` of AMD's wheels lacks a part that their metadata has.

    Args:
        have: Name and version of what is installed.
        tested: Text of ``constraints.txt``; its torch family, and what only a CUDA build of it needs, is left out.

    Raises:
        SystemExit: torch or torchvision is not there, so there is nothing to keep.
    """
    family = {name: version for name, version in have if name in FAMILY}
    missing = {"torch", "torchvision"} - set(family)
    if missing:
        raise SystemExit(f"container: error: not installed in {sys.executable}: {', '.join(sorted(missing))}")
    rest = {n: v for n, v in pins(tested).items() if n not in FAMILY and not n.startswith(("nvidia-", "cuda-"))}
    return "".join(f"{name}=={version}\n" for name, version in (family | rest).items())


def problems(have: list[tuple[str, str]], wanted: dict[str, str]) -> list[str]:
    """What an install did to the packages of the base image, a line each.

    Args:
        have: Name and version of what is installed now.
        wanted: Versions of the constraints that were written before the install.
    """
    found = [] if "torch" in wanted else ["the constraints do not name torch: they kept nothing"]
    for name in FAMILY:
        before = [wanted[name]] if name in wanted else []
        now = [version for other, version in have if other == name]
        if before != now:
            found.append(f"{name} moved: {' '.join(before) or 'none'} before, {' '.join(now) or 'none'} now")
    tritons = [f"{name} {version}" for name, version in have if name in TRITONS]
    if len(tritons) != 1:
        found.append(f"not exactly one triton: {', '.join(tritons) or 'none'}")
    nvidia = sorted(name for name, _ in have if name.startswith("nvidia-"))
    if nvidia:
        found.append(f"CUDA's packages came along: {', '.join(nvidia)}")
    return found


def probe(title: str) -> list[str]:
    """What a probe found; empty if all is well."""
    done = subprocess.run([sys.executable, *PROBES[title]], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 0:
        return []
    # pip names one problem a line; of a traceback the last line counts.
    return [f"{title}: {line}" for line in (said if title == "pip check" else said[-1:])]


def main(argv: list[str] | None = None) -> int:
    """Write constraints to stdout, or check an environment against them.

    Args:
        argv: Arguments; of the command line if None.

    Returns:
        0, or 1 if the check found a problem.
    """
    parser = argparse.ArgumentParser(description="Keep the torch that a base image brings.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("constraints", help="print constraints that keep what is installed")
    write.add_argument("--tested", type=Path, required=True, metavar="FILE", help="versions of all other packages")
    check = commands.add_parser("check", help="check what an install under them left")
    check.add_argument("--constraints", type=Path, required=True, metavar="FILE", help="what 'constraints' printed")
    arguments = parser.parse_args(argv)
    have = installed()
    if arguments.command == "constraints":
        sys.stdout.write(constraints(have, arguments.tested.read_text(encoding="utf-8")))
        return 0
    found = problems(have, pins(arguments.constraints.read_text(encoding="utf-8")))
    for title in PROBES:
        found += probe(title)
    for line in found:
        print(f"container: {line}", file=sys.stderr)
    print(f"container: {len(found)} problems; " + ", ".join(f"{n} {v}" for n, v in have if n in FAMILY))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
