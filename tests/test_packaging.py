"""What is distributed: the wheel, the sdist, and the layers of the package inside."""

import os
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

from conftest import ROOT
from floodrepro import __version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and an sdist, made without the network."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="comes with floodrepro[dev]")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    """The wheel, unpacked as `pip install --no-deps` would."""
    [file] = built.glob("*.whl")
    shutil.unpack_archive(file, built / "site", "zip")
    return built / "site"


def test_wheel_has_recipes_constraints_types_and_licence_and_the_sdist_all_that_is_tracked(built, wheel):
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*")}
    assert {"floodrepro/py.typed", "floodrepro/constraints.txt"} <= names
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert (wheel / "floodrepro" / "configs" / recipe.name).read_bytes() == recipe.read_bytes()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = message_from_string(next(wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier")
    assert "](docs/" not in metadata.get_payload()  # a link that leads nowhere on an index
    assert "](https://" in metadata.get_payload()
    [file] = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in tracked if (ROOT / name).is_file()} - names <= {".gitignore"}


def test_wheel_without_dependencies_says_which_are_missing(wheel):
    command = [sys.executable, "-S", "-m", "floodrepro", "fit", "--config", "demo"]  # no site-packages, and no pip
    variables = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=wheel)
    what, fix = done.stderr.splitlines()
    assert (done.returncode, "dependencies are not all installed: " in what, "torch, " in what) == (1, True, True)
    assert fix == f"  to do: uv pip install --python {sys.executable} floodrepro"


def test_all_that_names_the_version_names_the_same():
    for file, line in (
        ("CITATION.cff", f"version: {__version__}\n"),
        ("CHANGELOG.md", f"each such change is listed here.\n\n## {__version__}, "),
        ("Dockerfile.rocm", f'image.version="{__version__}"'),
    ):
        assert line in (ROOT / file).read_text(encoding="utf-8").lower(), file
