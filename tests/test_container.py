"""The ROCm image: its steps keep the base image's torch and fail where it moved. A shell runs them."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import ROOT

TEXT = (ROOT / "Dockerfile.rocm").read_text()
AMD = "numpy==2.1.0\ntorch==2.9.1+rocm7.2.4.lw.git9f3b\ntorchvision==0.24.0+rocm7.2.4\ntriton==3.5.1+rocm7.2.4\n"


def step(holds: str) -> str:
    """The shell of the one RUN instruction that holds a text."""
    [found] = [body for body in re.findall(r"^RUN ((?:.*\\\n)*.*)", TEXT, re.MULTILINE) if holds in body]
    return found.replace("\\\n", "")


def shell(script: str, folder: Path, packages: str) -> subprocess.CompletedProcess:
    """Run a step where `pip list` prints these packages and everything else of pip and python does nothing."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (folder / "packages").write_text(packages)
    (tools / "pip").write_text(f'#!/bin/sh\n[ "$1" = install ] || cat {folder}/packages\n')
    (tools / "python").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    keep = re.search(r"^ARG KEEP='(.*)'$", TEXT, re.MULTILINE)[1]
    variables = os.environ | {"PATH": f"{tools}:/usr/bin:/bin", "KEEP": keep, "TORCH_BUILD": "hip"}
    command = ["bash", "-o", "pipefail", "-c", script]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    return tmp_path


def test_torch_of_the_base_image_is_pinned_and_all_else_is_as_tested(image):
    assert shell(step("pins.txt"), image, AMD).returncode == 0
    pins = (image / "pins.txt").read_text().splitlines()
    assert pins[:3] == AMD.splitlines()[1:]
    names = [line.split("==")[0] for line in pins if "==" in line]
    assert len(names) == len(set(names))
    assert {"torchgeo", "torchmetrics", "terratorch", "lightning", "numpy"} <= set(names)
    assert [name for name in names if name.startswith(("nvidia", "cuda"))] == []


def test_base_image_without_torch_stops_the_build(image):
    assert shell(step("pins.txt"), image, AMD.replace("torch==2.9.1+rocm7.2.4.lw.git9f3b\n", "")).returncode != 0


@pytest.mark.parametrize(
    ("after", "passes"),
    [
        (AMD + "floodrepro==0.2.0\n", True),
        (AMD.replace("2.9.1+rocm7.2.4.lw.git9f3b", "2.15.0"), False),
        (AMD + "pytorch-triton-rocm==3.5.1\n", False),
    ],
)
def test_torch_that_moved_stops_the_build(image, after, passes):
    shell(step("pins.txt"), image, AMD)
    assert (shell(step("pip install"), image, after).returncode == 0) is passes


def test_compose_and_the_documented_run_give_the_same_devices_and_folders():
    service = yaml.safe_load((ROOT / "compose.rocm.yaml").read_text())["services"]["floodrepro"]
    page = (ROOT / "docs/mi300x.md").read_text()
    assert all(f"--device={device}" in page for device in service["devices"])
    assert f"--ipc={service['ipc']}" in page
    mounted = [volume.rsplit(":", 1)[1] for volume in service["volumes"]]
    assert all(f":{folder}" in page and folder in TEXT for folder in mounted)
