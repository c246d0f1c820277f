"""What a run records about where it ran, and what it keeps to itself."""

import getpass
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import floodrepro
from floodrepro.system.environment import checkout, code_version, environment, relevant_variables, source_digest


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed package in it."""
    package = tmp_path / "repository/src/package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    git(tmp_path, "init", "-q", "repository")
    git(package, "add", ".")
    git(package, "commit", "-qm", "one")
    return tmp_path / "repository"


@pytest.fixture
def amd_box(tmp_path: Path) -> Path:
    files = {
        "opt/rocm/.info/version": "7.2.4-93\n",
        "sys/module/amdgpu/version": "6.14.14\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 9575F 64-Core Processor\nmodel name\t: another\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_this_machine_is_recorded_in_json_types():
    found = environment("bf16-mixed")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["packages"]["floodrepro"] == floodrepro.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["numerics"]["precision"] == "bf16-mixed"
    assert found["accelerator"]["count"] == torch.cuda.device_count()
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()


def test_record_names_neither_host_nor_user():
    texts: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for part in value.values():
                walk(part)
        elif isinstance(value, str):
            texts.append(value)

    walk(environment())
    words = {word for text in texts for word in text.replace("/", " ").split()}
    assert not words & {platform.node(), getpass.getuser()}
    assert str(Path.home()) not in " ".join(texts)


def test_amd_box_gives_the_installed_rocm_and_the_driver(amd_box):
    found = environment(root=amd_box)
    assert found["torch"]["rocm"] == "7.2.4-93"
    assert found["accelerator"]["drivers"] == {"amdgpu": "6.14.14"}
    assert found["cpu"]["model"] == "AMD EPYC 9575F 64-Core Processor"
    assert found["host"]["os"] == "Ubuntu 24.04.3 LTS"


@pytest.mark.parametrize(
    "banner",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 14 01:00:00 2025\nGCC version: 12.3\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs@U22-4)  Tue Jan 14\n",
    ],
)
def test_nvidia_driver_is_found_in_either_banner(tmp_path, banner):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(banner)
    assert environment(root=tmp_path)["accelerator"]["drivers"] == {"nvidia": "570.86.15"}


def test_bare_machine_gives_nothing_instead_of_failing(tmp_path):
    found = environment(root=tmp_path)
    assert found["torch"]["rocm"] is None
    assert found["accelerator"]["drivers"] == {}


def test_variables_that_change_numerics_or_speed_are_recorded_and_no_others():
    kept = {"MIOPEN_FIND_MODE": "3", "PYTORCH_TUNABLEOP_ENABLED": "1", "HSA_XNACK": "1", "OMP_NUM_THREADS": "8"}
    assert relevant_variables({**kept, "HF_TOKEN": "hf_x", "LANG": "C", "OMP_STACKSIZE": "1"}) == kept


def test_secret_behind_a_recorded_prefix_stays_out():
    assert relevant_variables({"TORCH_HUB_TOKEN": "x", "PYTORCH_API_KEY": "x", "NCCL_Password": "x"}) == {}


def test_user_and_host_are_masked_in_what_is_recorded(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "gpu-box-7")
    found = relevant_variables(
        {
            "HOME": "/home/alice",
            "USER": "alice",
            "MIOPEN_USER_DB_PATH": "/home/alice/miopen",
            "TORCH_HOME": "/scratch/alice/torch",
            "PYTORCH_KERNEL_CACHE_PATH": "/home/alicent",
            "NCCL_HOSTID": "gpu-box-7",
        }
    )
    assert found == {
        "MIOPEN_USER_DB_PATH": "~/miopen",
        "TORCH_HOME": "/scratch/***/torch",
        "PYTORCH_KERNEL_CACHE_PATH": "/home/alicent",
        "NCCL_HOSTID": "***",
    }


def test_checkout_gives_its_commit_and_whether_it_was_changed(repository):
    package = repository / "src/package"
    commit = git(package, "rev-parse", "HEAD")
    assert checkout(package) == {"commit": commit, "dirty": False, "note": None}
    (package / "untracked.txt").write_text("a note\n")
    assert checkout(package)["dirty"] is False
    (package / "__init__.py").write_text("a = 2\n")
    assert checkout(package) == {"commit": commit, "dirty": True, "note": None}


def test_package_inside_another_repository_or_outside_any_has_no_commit(repository, tmp_path):
    wheel, bare = repository / ".venv/lib/site-packages/floodrepro", tmp_path / "bare"
    for package in (wheel, bare):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        found = checkout(package)
        assert (found["commit"], found["dirty"], "does not track" in found["note"]) == (None, None, True)


def test_container_image_records_the_commit_that_it_was_built_from(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOODREPRO_COMMIT", "c0ffee")
    package = tmp_path / "site-packages/floodrepro"
    package.mkdir(parents=True)
    assert checkout(package)["commit"] == "c0ffee"
    assert checkout(repository / "src/package")["commit"] == git(repository, "rev-parse", "HEAD")


def test_machine_without_git_gives_no_commit_but_a_reason(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    found = checkout(repository / "src/package")
    assert found == {"commit": None, "dirty": None, "note": "git cannot be asked: FileNotFoundError"}


def test_resume_compares_what_computes():
    found = code_version()
    assert {"floodrepro", "commit", "dirty", "source_sha256", "torch", "lightning", "terratorch", "impactmesh"} == set(
        found
    )
    assert json.loads(json.dumps(found)) == found == code_version()


def test_source_digest_sees_a_changed_and_a_new_file(repository):
    package = repository / "src/package"
    digests = [source_digest(package)]
    (package / "notes.txt").write_text("no code")
    assert source_digest(package) == digests[0]
    for name, content in (("__init__.py", "a = 2\n"), ("new.py", "")):
        (package / name).write_text(content)
        digests.append(source_digest(package))
    assert len(set(digests)) == 3


def test_code_version_does_not_wait_for_torch():
    code = (
        "import sys; from floodrepro.system.environment import code_version\n"
        "code_version(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
