"""What a run records about where it ran, and what it keeps to itself."""

import getpass
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

import floodrepro
from floodrepro.system.environment import code_version, environment, gpu_drivers, relevant_variables
from processes import CONTEXT
from test_doctor import plant


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that is committed to a repository."""
    plant(tmp_path, {"repository/src/package/__init__.py": "a = 1\n"})
    for words in ("init -q", "add .", "commit -qm one"):
        git(tmp_path / "repository", *words.split())
    return tmp_path / "repository/src/package"


def test_this_machine_is_recorded_in_json_types_and_names_neither_host_nor_user():
    found = environment("bf16-mixed")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["packages"]["floodrepro"] == floodrepro.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["numerics"]["precision"] == "bf16-mixed"
    assert found["accelerator"]["count"] == torch.cuda.device_count()
    text = json.dumps(found)
    assert not set(re.split(r"[/\s\"]", text)) & {platform.node(), getpass.getuser()}
    assert str(Path.home()) not in text


def test_planted_machine_gives_its_drivers_and_names_and_a_bare_one_nothing(tmp_path):
    files = {
        "opt/rocm/.info/version": "7.2.4-93\n",
        "sys/module/amdgpu/version": "6.14.14\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 9575F 64-Core Processor\nmodel name\t: another\n",
    }
    found, bare = environment(root=plant(tmp_path, files)), environment(root=tmp_path / "nothing")
    assert (found["torch"]["rocm"], found["accelerator"]["drivers"]) == ("7.2.4-93", {"amdgpu": "6.14.14"})
    assert (found["cpu"]["model"], found["host"]["os"]) == ("AMD EPYC 9575F 64-Core Processor", "Ubuntu 24.04.3 LTS")
    assert (bare["torch"]["rocm"], bare["accelerator"]["drivers"]) == (None, {})
    for words in ("Kernel Module  570.86.15  Tue", "Open Kernel Module for x86_64  570.86.15  Build"):  # both banners
        banner = {"proc/driver/nvidia/version": f"NVRM version: NVIDIA UNIX {words}\nGCC version: 12.3\n"}
        assert gpu_drivers(plant(tmp_path / "nvidia", banner)) == {"nvidia": "570.86.15"}


def test_variables_that_change_numerics_or_speed_are_recorded_and_nothing_private(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "gpu-box-7")
    kept = {"HSA_XNACK": "1", "MIOPEN_FIND_MODE": "FAST", "OMP_NUM_THREADS": "8", "PYTORCH_TUNABLEOP_ENABLED": "1"}
    secrets = {"HF_TOKEN": "hf_x", "TORCH_HUB_TOKEN": "x", "PYTORCH_API_KEY": "x", "NCCL_Password": "x"}
    private = {"MIOPEN_USER_DB_PATH": "/home/al/m", "NCCL_HOSTID": "gpu-box-7", "TORCH_OWNER": "alice"}
    others = {"USER": "alice", "LANG": "C", "OMP_STACKSIZE": "1"}
    assert relevant_variables(kept | secrets | private | others) == kept | dict.fromkeys(private, "***")


def commit_of(package: Path) -> tuple[str | None, bool | None]:
    found = code_version(package)
    return found["commit"], found["dirty"]


def test_checkout_gives_its_commit_and_whether_it_was_changed(package):
    commit, digests = git(package, "rev-parse", "HEAD"), [code_version(package)["source_sha256"]]
    (package / "untracked.txt").write_text("a note\n")
    assert commit_of(package) == (commit, False)
    for name in ("__init__.py", "new.py"):
        (package / name).write_text("a = 2\n")
        assert commit_of(package) == (commit, True)
        digests.append(code_version(package)["source_sha256"])
    assert len(set(digests)) == 3


def test_package_inside_another_repository_or_without_git_has_no_commit_but_its_images(package, monkeypatch):
    wheel = plant(package.parents[1] / ".venv/lib/site-packages/floodrepro", {"__init__.py": ""})
    assert commit_of(wheel) == (None, None)
    monkeypatch.setenv("FLOODREPRO_COMMIT", "c0ffee")
    assert commit_of(wheel) == ("c0ffee", None)
    assert commit_of(package) == (git(package, "rev-parse", "HEAD"), False)
    monkeypatch.setenv("PATH", str(package))
    assert commit_of(package) == ("c0ffee", None)


def _tell(path: Path) -> None:
    import fork_server  # there it is imported already

    path.write_text(json.dumps(fork_server.FOUND))


def test_importing_terratorch_leaves_the_process_alone_and_asks_no_network(tmp_path):
    """In the fork server, which every run of processes.py begins in."""
    process = CONTEXT.Process(target=_tell, args=(tmp_path / "told.json",))
    process.start()
    process.join(180)
    assert json.loads((tmp_path / "told.json").read_text()) == {"unchanged": True, "asked": []}
