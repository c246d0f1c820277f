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


def test_driver_of_the_kernel_has_no_version_of_its_own(amd_box):
    (amd_box / "sys/module/amdgpu/version").unlink()
    assert environment(root=amd_box)["accelerator"]["drivers"] == {"amdgpu": "the kernel's own"}


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


def test_package_that_is_missing_is_said_to_be(monkeypatch):
    real = importlib.metadata.version

    def without_zarr(package: str) -> str:
        if package == "zarr":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr("floodrepro.system.environment.version", without_zarr)
    packages = environment()["packages"]
    assert packages["zarr"] == "not installed"
    assert packages["numpy"] == real("numpy")


@pytest.mark.parametrize("strict", [True, False])
def test_switches_of_torch_are_read_when_asked(strict):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    try:
        torch.use_deterministic_algorithms(strict)
        torch.backends.cudnn.deterministic = strict
        numerics = environment(variables={"PYTHONHASHSEED": "7"})["numerics"]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]
    assert numerics["deterministic_algorithms"] is numerics["cudnn_deterministic"] is strict
    assert numerics["python_hash_seed"] == "7"


def test_new_precision_switch_of_torch_does_not_break_the_record():
    # In a process of its own: torch offers no way back from the mix of both switches.
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from floodrepro.system.environment import environment\n"
        "print(environment()['numerics']['float32_matmul_precision'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cuda: tf32"


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


@pytest.mark.parametrize("ignored", [True, False])
def test_installed_package_inside_a_foreign_repository_has_no_commit(repository, ignored):
    installed = repository / ".venv/lib/python3.12/site-packages/floodrepro"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    if ignored:
        (repository / ".gitignore").write_text(".venv\n")
    found = checkout(installed)
    assert found["commit"] is None
    assert found["dirty"] is None
    assert "does not track" in found["note"]


def test_package_outside_any_repository_has_no_commit(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    assert checkout(tmp_path)["commit"] is None


def test_repository_without_a_commit_gives_none(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "__init__.py")
    assert checkout(tmp_path)["commit"] is None
    assert "no commit" in checkout(tmp_path)["note"]


def test_machine_without_git_gives_no_commit_but_a_reason(repository, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    found = checkout(repository / "src/package")
    assert found == {"commit": None, "dirty": None, "note": "git cannot be asked: FileNotFoundError"}


def test_git_variables_of_a_hook_do_not_answer_for_another_repository(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere/.git"))
    assert checkout(repository / "src/package")["commit"] is not None


def test_resume_compares_what_computes():
    found = code_version()
    assert {"floodrepro", "commit", "dirty", "source_sha256", "torch", "lightning", "terratorch", "impactmesh"} == set(
        found
    )
    assert json.loads(json.dumps(found)) == found == code_version()


@pytest.mark.parametrize(("name", "content"), [("__init__.py", "a = 2\n"), ("new.py", ""), ("deep/new.py", "a = 1\n")])
def test_source_digest_sees_a_changed_and_a_new_file(repository, name, content):
    package = repository / "src/package"
    before = source_digest(package)
    (package / "deep").mkdir()
    (package / "notes.txt").write_text("no code\n")
    assert source_digest(package) == before
    (package / name).write_text(content)
    assert source_digest(package) != before


def test_code_version_does_not_wait_for_torch():
    code = (
        "import sys; from floodrepro.system.environment import code_version\n"
        "code_version(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
