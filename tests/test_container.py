"""The constraints that keep an image's torch and the check after an install, in made-up and in real environments."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from floodrepro.system import container

TORCH = "2.9.1+rocm7.2.4.lw.git39497456"  # these versions: as AMD's wheels for ROCm 7.2.4 name themselves
HIP_TORCH = """
from types import SimpleNamespace
version = SimpleNamespace(hip="7.2.53211")
ops = SimpleNamespace(torchvision=SimpleNamespace(nms=1))
"""
PACKAGES = {
    "torch": (TORCH, HIP_TORCH),
    "torchvision": ("0.24.0+rocm7.2.4.gitb919bd0c", ""),
    "torchaudio": ("2.9.0+rocm7.2.4.gite3c6ee2b", ""),
    "triton": ("3.5.1+rocm7.2.4.gita272dfa8", ""),
    "terratorch": ("1.2.7", ""),
}
TESTED = "# comment\nterratorch==1.2.7\ntorch==2.14.1\ntorchvision==0.29.2\nnvidia-cublas==13.1\ncuda-toolkit==13.0\n"


def distribution(site: Path, name: str, version: str, code: str | None = None, requires: str = "") -> Path:
    """An installed distribution, and its module if there is code."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    need = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{need}")
    if code is not None:
        (site / f"{name}.py").write_text(code)
    return info


def wheel(folder: Path, name: str, version: str, code: str = "", requires: str = "") -> None:
    """The same as a wheel."""
    site = folder / f"{name}-unpacked"
    info = distribution(site, name, version, code, requires)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").touch()
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        for path in (p for p in site.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(site))
    shutil.rmtree(site)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A virtual environment with nothing but pip."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The packages of a healthy image, as a folder for sys.path."""
    for name, (version, code) in PACKAGES.items():
        distribution(tmp_path / "site", name, version, code)
    return tmp_path / "site"


def python(venv: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [venv / "bin" / "python", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | variables,
        check=False,
    )


def write_constraints(venv: Path, folder: Path, **variables: str) -> Path:
    (folder / "constraints.txt").write_text(TESTED)
    done = python(venv, container.__file__, "constraints", "--tested", folder / "constraints.txt", **variables)
    assert done.returncode == 0, done.stderr
    (folder / "rocm-constraints.txt").write_text(done.stdout)
    return folder / "rocm-constraints.txt"


def test_constraints_are_the_images_torch_and_the_tested_rest(empty, site, tmp_path):
    lines = write_constraints(empty, tmp_path, PYTHONPATH=str(site)).read_text().splitlines()
    assert sorted(lines) == sorted(f"{name}=={version}" for name, (version, _) in PACKAGES.items())


def test_no_constraints_without_a_torch_to_keep(empty, tmp_path):
    (tmp_path / "constraints.txt").write_text(TESTED)
    done = python(empty, container.__file__, "constraints", "--tested", tmp_path / "constraints.txt")
    assert done.returncode == 1
    assert "torch, torchvision" in done.stderr
    assert done.stdout == ""


def test_healthy_image_passes(empty, site, tmp_path):
    constraints = write_constraints(empty, tmp_path, PYTHONPATH=str(site))
    done = python(empty, container.__file__, "check", "--constraints", constraints, PYTHONPATH=str(site))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"torch {TORCH}" in done.stdout


def change(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def moved(site: Path, name: str, version: str) -> None:
    shutil.rmtree(next(site.glob(f"{name}-*.dist-info")))
    distribution(site, name, version)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda site: moved(site, "torch", "2.9.1"), f"torch moved: {TORCH} before, 2.9.1 now"),
        (lambda site: moved(site, "torchvision", "0.29.2"), "torchvision moved"),
        (lambda site: shutil.rmtree(next(site.glob("torchaudio-*"))), "torchaudio moved"),
        (lambda site: distribution(site, "nvidia-cublas-cu12", "12.8"), "came along: nvidia-cublas-cu12"),
        (lambda site: distribution(site, "pytorch_triton_rocm", "3.5.1"), "not exactly one triton"),
        (lambda site: distribution(site, "triton", "3.8.0"), "not exactly one triton"),
        (lambda site: shutil.rmtree(next(site.glob("triton-*"))), "not exactly one triton: none"),
        (lambda site: change(site / "torch.py", '"7.2.53211"', "None"), "torch is no ROCm build: AssertionError"),
        (lambda site: change(site / "torch.py", "nms=1", ""), "torchvision does not fit torch: AttributeError"),
        (lambda site: (site / "terratorch.py").write_text("raise ImportError('lost')"), "imported: ImportError: lost"),
        (lambda site: distribution(site, "timm", "1.0", requires="numpy<2"), "pip check: timm 1.0 requires numpy"),
    ],
)
def test_what_an_install_broke_is_named_and_fails_the_build(empty, site, tmp_path, plant, said):
    constraints = write_constraints(empty, tmp_path, PYTHONPATH=str(site))
    plant(site)
    done = python(empty, container.__file__, "check", "--constraints", constraints, PYTHONPATH=str(site))
    assert done.returncode == 1
    assert said in done.stderr


def test_constraints_that_name_no_torch_are_no_constraints():
    have = [(name, version) for name, (version, _) in PACKAGES.items()]
    assert "the constraints do not name torch: they kept nothing" in container.problems(have, {"terratorch": "1.2.7"})


def test_floodrepros_own_bounds_admit_the_images_torch():
    """Or pip refuses to install it there: the constraints leave it no choice."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    family = [name for name in PACKAGES if name in bounds]
    assert family == ["torch", "torchvision", "terratorch"]
    assert [name for name in family if not bounds[name].contains(PACKAGES[name][0])] == []


def test_this_environment_keeps_its_torch_under_its_own_constraints():
    """A real one, of a CUDA or CPU torch: what only ROCm has is not asked."""
    have = container.installed()
    wanted = container.pins(container.constraints(have, (ROOT / "constraints.txt").read_text()))
    assert wanted["torch"] == dict(have)["torch"]
    assert wanted["terratorch"] == "1.2.7"
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in wanted)
    assert [line for line in container.problems(have, wanted) if "moved" in line] == []
    assert container.probe("torchvision does not fit torch") == []
    assert container.probe("pip check") == []


# The install steps, with pip


@pytest.fixture
def image(empty: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An environment in which a ROCm torch is installed, and a folder of wheels with a newer one on offer."""
    wheels = tmp_path / "wheels"
    for name, (version, code) in PACKAGES.items():
        wheel(wheels, name, version, code)
    venv = Path(shutil.copytree(empty, tmp_path / "venv", symlinks=True))
    family = [f"{name}=={version}" for name, (version, _) in PACKAGES.items() if name != "terratorch"]
    done = python(venv, "-m", "pip", "install", "--find-links", wheels, *family)
    assert done.returncode == 0, done.stderr
    wheel(wheels, "torch", "2.14.1", "version = None")
    return venv, wheels


def install(venv: Path, wheels: Path, folder: Path, requirement: str, *options: str) -> subprocess.CompletedProcess:
    """The Dockerfile's two steps: constraints, then an install with them in the environment."""
    constraints = write_constraints(venv, folder)
    (folder / "requirements.txt").write_text(f"{requirement}\n")
    arguments = ("-m", "pip", "install", "--find-links", wheels, *options, "-r", folder / "requirements.txt")
    return python(venv, *arguments, PIP_CONSTRAINT=str(constraints))


def test_package_that_is_content_with_the_images_torch_leaves_it_alone(image, tmp_path):
    venv, wheels = image
    wheel(wheels, "modest", "1.0", requires="torch>=2")
    done = install(venv, wheels, tmp_path, "modest\nterratorch", "--upgrade", "--upgrade-strategy", "eager")
    assert done.returncode == 0, done.stderr
    check = python(venv, container.__file__, "check", "--constraints", tmp_path / "rocm-constraints.txt")
    assert (check.returncode, check.stderr) == (0, "")


def test_package_that_asks_for_another_torch_is_refused_and_torch_stays(image, tmp_path):
    venv, wheels = image
    wheel(wheels, "greedy", "1.0", requires="torch>=2.10")
    done = install(venv, wheels, tmp_path, "greedy")
    assert done.returncode != 0
    assert "conflicting dependencies" in done.stderr
    assert f"The user requested (constraint) torch=={TORCH}" in done.stdout
    shown = python(venv, "-m", "pip", "list", "--format", "json")
    assert {"name": "torch", "version": TORCH} in json.loads(shown.stdout)


def test_without_the_constraints_the_same_install_replaces_torch_and_the_check_finds_it(image, tmp_path):
    venv, wheels = image
    wheel(wheels, "greedy", "1.0", requires="torch>=2.10")
    constraints = write_constraints(venv, tmp_path)
    assert python(venv, "-m", "pip", "install", "--find-links", wheels, "greedy", "terratorch").returncode == 0
    check = python(venv, container.__file__, "check", "--constraints", constraints)
    assert check.returncode == 1
    assert f"torch moved: {TORCH} before, 2.14.1 now" in check.stderr
