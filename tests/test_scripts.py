"""The scripts that a newcomer runs first."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The parts of a checkout that the scripts read, with no .venv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/bash", str(script), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
        check=False,
    )


def make_python(path: Path, version: str) -> Path:
    """An interpreter that only knows its version."""
    major, minor = version.split(".")
    test = f"import sys; sys.version_info = ({major}, {minor}, 0); "
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 1\nexec /usr/bin/python3 -c "{test}$2"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["reproduce.sh", "test.sh"])
@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_interpreter_of_another_version_is_refused(clone, script, version):
    python = make_python(clone / "python", version)
    done = run(clone / "scripts" / script, "--demo", FLOODREPRO_PYTHON=str(python))
    assert done.returncode == 2
    assert "is not Python 3.11 or 3.12" in done.stderr
    assert not (clone / ".venv").exists()


def test_no_interpreter_at_all_is_said(clone, tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "cat", "cksum", "grep"):
        (tools / name).symlink_to(shutil.which(name))
    done = run(clone / "scripts" / "reproduce.sh", "--demo", PATH=str(tools))
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 on PATH" in done.stderr


def test_foreign_venv_is_left_alone(clone):
    (clone / ".venv" / "bin").mkdir(parents=True)
    make_python(clone / ".venv" / "bin" / "python", "3.9")
    done = run(clone / "scripts" / "test.sh")
    assert done.returncode == 2
    assert "move .venv away" in done.stderr
    assert (clone / ".venv" / "bin" / "python").exists()


def test_constraints_hold_exact_versions_and_no_address():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.+!]+", line)] == []


def test_every_direct_dependency_is_pinned_and_bounded_with_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for dependency in project["dependencies"]:
        name = re.split(r"[\[><=!]", dependency)[0].lower().replace("_", "-")
        assert name in pins
    assert "torchgeo>=0.8,<0.10" in text
    assert "!=2.6.2,!=2.6.3" in text
    assert "zarr>=2.18,<3" in text


def test_torch_family_can_be_left_out_of_the_constraints():
    """As a ROCm image does: its own torch must not be constrained to another build."""
    setup = (ROOT / "scripts" / "setup-venv.sh").read_text()
    pattern = re.search(r"TORCH_FAMILY='(.*)'", setup).group(1)
    names = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(pattern, line)]
    assert {"torch", "torchvision", "triton"} <= {line.split("==")[0] for line in names}
    assert all(re.match(r"torch(vision)?==|triton==|nvidia-|cuda-", line) for line in names)
    assert not any(line.startswith(("torchgeo", "torchmetrics", "terratorch")) for line in names)


def test_shellcheck_finds_nothing():
    scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_matrix_refuses_an_unknown_environment_before_it_makes_a_known_one(clone, tmp_path: Path):
    done = run(clone / "scripts" / "test-matrix.sh", "torch-2.9.1", "torch-1", TMPDIR=str(tmp_path))
    assert done.returncode == 2
    assert "no environment 'torch-1'" in done.stderr


def test_matrix_removes_its_environment_when_the_installation_fails(clone, tmp_path: Path):
    room = tmp_path / "room"
    room.mkdir()
    variables = {"TMPDIR": str(room), "PIP_NO_INDEX": "1", "FLOODREPRO_PYTHON": sys.executable}
    done = run(clone / "scripts" / "test-matrix.sh", "torch-2.9.1", **variables)
    assert done.returncode == 2
    assert "torch-2.9.1: the installation failed" in done.stderr
    assert list(room.iterdir()) == []


def test_smoke_tests_of_the_matrix_are_there():
    text = (ROOT / "scripts" / "test-matrix.sh").read_text()
    named = re.findall(r"^  (tests/\w+\.py)::(\w+)$", text, re.MULTILINE)
    assert len(named) >= 6
    assert [test for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []
