"""The scripts that a newcomer runs first, the steps of the ROCm image, and the constraints that both install."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile.rocm").read_text()
AMD = "numpy==2.1.0\ntorch==2.9.1+rocm7.2.4.lw.git9f3b\ntorchvision==0.24.0+rocm7.2.4\ntriton==3.5.1+rocm7.2.4\n"
OTHER = AMD.replace("2.9.1+rocm7.2.4.lw.git9f3b", "2.15.0")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The parts of a checkout that the scripts read, with no .venv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(["/bin/bash", str(script), *arguments], capture_output=True, text=True, env=variables)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python_of(path: Path, version: str) -> Path:
    """An interpreter that knows its version and makes empty environments."""
    known = f"import sys; sys.version_info = ({version.replace('.', ', ')}, 0); "
    make = '[ "$1" != -m ] || { mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 0; }'
    return program(path, f'{make}\n[ "$1" = -c ] || exit 0\nexec /usr/bin/python3 -c "{known}$2"')


def test_interpreter_of_another_version_is_refused_and_a_foreign_venv_left_alone(clone):
    for version in ("3.9", "3.14"):
        python = python_of(clone / "python", version)
        done = run(clone / "scripts/reproduce.sh", "--demo", FLOODREPRO_PYTHON=str(python))
        assert (done.returncode, "no Python 3.11 to 3.13 was found" in done.stderr) == (2, True)
    assert not (clone / ".venv").exists()
    foreign = python_of(clone / ".venv/bin/python", "3.9")
    done = run(clone / "scripts/test.sh")
    assert (done.returncode, "move .venv away" in done.stderr, foreign.exists()) == (2, True, True)


def test_uv_installs_where_it_is_and_an_unchanged_environment_is_used_as_it_is(clone):
    """An environment that uv made has no pip."""
    tools, python = clone / "tools", python_of(clone / "python", "3.12")
    program(tools / "uv", f'echo "$@" >> {clone}/calls')
    variables = {"PATH": f"{tools}:/usr/bin:/bin", "FLOODREPRO_PYTHON": str(python)}
    for _ in range(2):
        run(clone / "scripts/reproduce.sh", "--demo", **variables)
    [call] = (clone / "calls").read_text().splitlines()
    assert call.startswith("pip install --python .venv/bin/python --torch-backend ")
    assert call.endswith("--constraint constraints.txt --editable .")


def test_constraints_hold_exact_versions_of_every_dependency_and_no_address():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {Requirement(line) for line in lines}
    assert {(len(pin.specifier), next(iter(pin.specifier)).operator, pin.url) for pin in pins} == {(1, "==", None)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {canonicalize_name(Requirement(dependency).name) for dependency in named}
    assert names - {"floodrepro"} <= {canonicalize_name(pin.name) for pin in pins}


def build(folder: Path, before: str, after: str) -> list[bool]:
    """Whether the step that pins and the one that installs succeed, with the packages that `pip list` prints."""
    for name in ("pip", "python"):  # all else of pip and python does nothing
        program(folder / "tools" / name, f'[ "$1" != list ] || cat {folder}/packages')
    (folder / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    arguments = dict(re.findall(r"^ARG (\w+)='?(.*?)'?$", DOCKERFILE, re.MULTILINE))
    variables = os.environ | arguments | {"PATH": f"{folder}/tools:/usr/bin:/bin"}
    passed = []
    steps = re.findall(r"^RUN ((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    for script, packages in zip(steps, (before, after), strict=False):
        (folder / "packages").write_text(packages)
        command = ["bash", "-o", "pipefail", "-c", script.replace("\\\n", "")]
        passed.append(subprocess.run(command, cwd=folder, env=variables, capture_output=True).returncode == 0)
    return passed


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [
        (AMD, f"{AMD}floodrepro==0.2.0\n", [True, True]),
        (AMD, OTHER, [True, False]),
        (AMD, f"{AMD}pytorch-triton-rocm==3.5.1\n", [True, False]),
        ("torchvision==0.24.0\n", "", [False, False]),
    ],
)
def test_build_stops_where_torch_is_missing_or_moved(tmp_path, before, after, passed):
    assert build(tmp_path, before, after) == passed


def test_torch_of_the_base_image_is_pinned_and_all_else_is_as_tested(tmp_path):
    build(tmp_path, AMD, AMD)
    pins = (tmp_path / "pins.txt").read_text().splitlines()
    assert pins[:3] == AMD.splitlines()[1:]
    names = [line.split("==")[0] for line in pins if "==" in line]
    assert len(names) == len(set(names))
    assert {"torchgeo", "torchmetrics", "terratorch", "lightning", "numpy"} <= set(names)
    assert [name for name in names if name.startswith(("nvidia", "cuda"))] == []
