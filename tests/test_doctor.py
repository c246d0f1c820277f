"""What the doctor finds on machines that are planted, and on this one. Every repair is a command or flags to paste."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from floodrepro import recipe as recipes
from floodrepro.data.protocols import PROTOCOLS
from floodrepro.recipe import fold
from floodrepro.system import doctor, environment
from floodrepro.system.doctor import Finding, check_backbone, check_chips, check_gpus, check_machine, check_torch
from floodrepro.system.environment import free_memory, usable_cores

GIB = 2**30
NAMES = {"v0": "terramind_v1_base_impactmesh_flood_amd", "v1-binary": "terramind_v1_base_impactmesh_flood_v1_binary"}
BASE, DEMO = recipes.read_yaml(recipes.find(NAMES["v0"])), recipes.read_yaml(recipes.find("demo"))
MI300X = {"name": "AMD Instinct MI300X", "memory": 192 * GIB, "free": 190 * GIB, "float16": True, "bfloat16": True}
T4 = {"name": "Tesla T4", "memory": 15 * GIB, "free": 14 * GIB, "float16": True, "bfloat16": False}
MIG = T4 | {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "memory": 5 * GIB, "free": 5 * GIB, "bfloat16": True}
ROCM = {"torch": "2.9.1+rocm7.2.4", "cuda": None, "hip": "7.2.26015", "nms": True, "devices": []}
CUDA = {"torch": "2.14.1+cu130", "cuda": "13.0", "hip": None, "nms": True, "devices": []}
CPU = CUDA | {"torch": "2.14.1+cpu", "cuda": None}
HELD = {"name": "NVIDIA H100", "memory": 80 * GIB, "error": "CUDA error: all CUDA-capable devices are busy"}
BF16 = fold([BASE], ["--trainer.precision", "bf16-mixed"])
INSTINCT = {"dev/kfd": "", "dev/dri/renderD128": ""}
NVIDIA = {"dev/nvidiactl": "", "sys/module/nvidia/version": "535.5\n"}
HIDDEN = {  # files, what torch answers, why it sees none, the repair
    "AMD GPU and a torch for CUDA": (INSTINCT, CUDA, "built for NVIDIA", "--torch-backend=auto"),
    "AMD driver too old": (INSTINCT, ROCM, "may not fit ROCm 7.2", "dmesg"),
    "NVIDIA GPU and a torch for CPUs": (NVIDIA, CPU, "built for the CPU", "--force-reinstall"),
    "NVIDIA driver too old": (NVIDIA, CUDA, "535.5): it may be too old for CUDA 13", "--torch-backend=auto"),
    "WSL": ({"dev/dxg": ""}, CUDA, "it may be too old", "--torch-backend=auto"),
    "ROCm image without devices": ({".dockerenv": ""}, ROCM, "was given none", "--device=/dev/kfd"),
    "none": ({}, CUDA, "none is here", ""),
}
SLURM = {"slurm/job_1/memory.max": "64000\n", "slurm/job_1/memory.current": "1000\n"}
CACHED = {"memory.max": "64000\n", "memory.current": "63800\n", "memory.stat": "anon 2800\ninactive_file 61000\n"}
V1 = {"memory/memory.limit_in_bytes": "8000\n", "memory/memory.usage_in_bytes": "3000\n"}
V1 |= {"memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n"}
CGROUPS = {
    "v2, the limit of a Slurm job lies above": ("0::/slurm/job_1/step_0/task_0\n", SLURM, 63_000),
    "v2, page cache counts as free": ("0::/\n", CACHED, 61_200),
    "v1, the container's own folder at the top": ("5:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n", V1, 6_000),
    "no limit": ("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}, 1_536_000_000),
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def assert_can_be_pasted(fix: str) -> None:
    assert fix
    assert subprocess.run(["bash", "-n", "-c", fix], capture_output=True).returncode == 0, fix


def test_healthy_machine_passes_and_both_formats_say_the_same(cli, chips, asked_once):
    command = ("doctor", "--config", "demo", "--data-root", chips)
    told = cli(*command, "--format", "json")
    found = json.loads(told.out)
    assert (told.code, found["ok"]) == (0, True), told.out
    assert [f for f in found["findings"] if f["status"] == "ok" and f["fix"]] == []
    assert {"packages", "torch", "gpu", "cores", "memory", "disk", "data"} <= {f["name"] for f in found["findings"]}
    assert found["findings"][-1]["detail"] in cli(*command).out


def test_broken_torch_is_reported_and_the_rest_is_looked_at_all_the_same(tmp_path):
    plant(tmp_path, {"torch/__init__.py": "import os\nos.kill(os.getpid(), 11)\n"})
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "floodrepro", "doctor", "--config", "demo", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    found = by_name([Finding(**f) for f in json.loads(done.stdout)["findings"]])
    assert (done.returncode, found["torch"].status, found["memory"].status) == (1, "fail", "ok"), done.stderr
    assert "exit code -11" in found["torch"].detail
    assert_can_be_pasted(found["torch"].fix)


def test_before_a_fit_torch_is_asked_only_where_a_gpu_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ask_torch", lambda: pytest.fail("torch was asked"))
    assert {f.status for f in doctor.examine(DEMO, tmp_path, quick=True, root=tmp_path)} <= {"ok", "warn"}


def test_package_out_of_bounds_missing_or_stolen_is_named_with_its_repair(monkeypatch):
    versions = {"zarr": "3.1.0", "lightning": "2.6.3", "rasterio": None}
    real = environment.version_of
    monkeypatch.setattr(environment, "version_of", lambda name: versions.get(name, real(name)))
    found = by_name(doctor.check_packages())
    assert set(found) == set(versions)
    assert set(by_name(doctor.check_packages(quick=True))) == {"zarr", "lightning"}  # a fit may not need the other
    assert "3.1.0, needed is <3,>=2.18" in found["zarr"].detail
    assert "not installed" in found["rasterio"].detail
    assert "steals credentials" in found["lightning"].detail
    for finding in found.values():
        assert_can_be_pasted(finding.fix)
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)  # uv's environments have no pip
    fix = check_torch({"devices": [], "error": "ImportError"}, "NVIDIA").fix
    assert fix.startswith(f"uv pip install --python {sys.executable} --reinstall -c ")


@pytest.mark.parametrize(
    ("needs", "nms", "status", "words"),
    [
        ("torch>=2.14.0", True, "ok", f"torchvision {version('torchvision')}"),
        ("torch==2.9.1", True, "fail", "which needs torch==2.9.1"),
        ("torch>=2.14.0", False, "fail", "torchvision::nms is missing"),
    ],
)
def test_pair_of_torch_and_torchvision_is_judged_by_metadata_and_operators(monkeypatch, needs, nms, status, words):
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", needs])
    found = check_torch(CUDA | {"torch": "2.15.0+cu130", "nms": nms}, "")  # newer than its torchvision, and fits
    assert (found.status, words in found.detail) == (status, True), found


def test_partitions_of_one_kind_are_one_line_that_warns_of_shared_power(tmp_path):
    plant(tmp_path, {"sys/class/drm/card0/device/current_compute_partition": "CPX\n"})
    found = check_gpus(ROCM | {"devices": [MI300X | {"memory": 24 * GIB}] * 64}, {}, tmp_path)
    assert [f.name for f in found] == ["gpu"]
    assert "64 x AMD Instinct MI300X, 24.0 GiB" in found[0].detail
    assert "whole GPU" in found[0].detail
    assert "whole GPU" in check_gpus(CUDA | {"devices": [MIG]}, {}, tmp_path / "x")[0].detail
    assert "whole GPU" not in check_gpus(ROCM | {"devices": [MI300X]}, {}, tmp_path / "x")[0].detail


@pytest.mark.parametrize(
    ("answer", "recipe", "name", "status", "words"),
    [
        (CUDA | {"devices": [T4]}, BASE, "gpu memory", "warn", "batch_size 8 --trainer.accumulate_grad_batches 2"),
        (CUDA | {"devices": [MIG]}, DEMO, "gpu memory", "ok", ""),
        (ROCM | {"devices": [MI300X | {"free": 3 * GIB}]}, BASE, "gpu memory", "warn", ""),  # another process's
        (CUDA | {"devices": [T4]}, BF16, "gpu", "fail", "--precision fp32"),
        (CPU, BASE, "precision", "fail", "fp16 does not run on a CPU"),
        (CUDA | {"devices": [HELD]}, BASE, "gpu", "fail", "are busy"),
    ],
)
def test_memory_precision_and_a_gpu_that_is_held_are_judged(tmp_path, answer, recipe, name, status, words):
    found = by_name(check_gpus(answer, recipe, tmp_path))[name]
    assert (found.status, words in f"{found.detail}\n{found.fix}") == (status, True), found


@pytest.mark.parametrize(("files", "answer", "words", "fix"), HIDDEN.values(), ids=HIDDEN)
def test_gpu_that_torch_cannot_see_gets_the_repair_of_its_vendor(tmp_path, monkeypatch, files, answer, words, fix):
    for name in ("CUDA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)
    found = check_gpus(answer, DEMO, plant(tmp_path, files))[0]
    status = "fail" if "dev/nvidiactl" in files else "warn" if fix else "ok"
    assert (found.status, words in found.detail, fix in found.fix) == (status, True, True), found
    if fix:
        assert_can_be_pasted(found.fix)


def test_closed_device_file_gets_the_repair_of_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: "renderD" not in str(path))  # tests may run as root
    for files, fix in (({}, "usermod -aG render,video"), ({".dockerenv": ""}, '--group-add "$(stat -c %g /dev/kfd)"')):
        found = check_gpus(ROCM, DEMO, plant(tmp_path, INSTINCT | files))[0]
        assert "/dev/dri/renderD128 is closed to this user" in found.detail
        assert fix in found.fix


def test_hiding_the_gpu_or_asking_for_the_cpu_is_no_fault_and_devices_count_as_lightning_does(tmp_path, monkeypatch):
    plant(tmp_path, INSTINCT)
    asks_cpu = fold([DEMO], ["--trainer.accelerator=cpu"])
    assert check_gpus(ROCM | {"devices": [MI300X]}, asks_cpu, tmp_path)[0].status == "ok"
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert "HIP_VISIBLE_DEVICES hides it" in check_gpus(ROCM, DEMO, tmp_path)[0].detail
    for given, count in (("auto", 8), (-1, 8), (2, 2), ("1", 1), ([0, 1, 5], 3), ("0,", 1), (None, 8), (0, 1)):
        assert doctor._devices_used({"trainer": {"devices": given}}, 8) == count, given


@pytest.mark.parametrize(("own", "files", "free"), CGROUPS.values(), ids=CGROUPS)
def test_memory_is_the_least_that_a_cgroup_leaves(tmp_path, own, files, free):
    plant(tmp_path, {"proc/self/cgroup": own, "proc/meminfo": "MemAvailable:  1500000 kB\n"})
    plant(tmp_path / "sys/fs/cgroup", files)
    assert free_memory(tmp_path) == free


def test_cores_are_those_of_the_quota(tmp_path):
    v2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}
    v1 = {f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us": "100000\n" for name in ("quota", "period")}
    v1 |= {"proc/self/cgroup": "2:cpu,cpuacct:/\n"}
    assert [usable_cores(plant(tmp_path / str(len(files)), files)) for files in (v2, v1)] == [1, 1]
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_machine_that_is_short_of_something_gets_a_flag_to_paste(monkeypatch):
    def check(recipe: recipes.Recipe, devices: int, cores: int, memory: int, disk: int) -> dict[str, Finding]:
        for name, value in (("usable_cores", cores), ("free_memory", memory * GIB), ("free_disk", disk * 10**9)):
            monkeypatch.setattr(environment, name, lambda _, value=value: value)
        return by_name(check_machine(recipe, devices))

    assert {f.status for f in check(BASE, 1, 64, 400, 1000).values()} == {"ok"}
    short, two = check(BASE, 1, 8, 4, 1), check(fold([BASE], ["--trainer.devices=2"]), 2, 8, 400, 1000)
    assert [f.status for f in short.values()] == ["warn", "warn", "fail", "fail"]
    assert short["cores"].fix == "--data.init_args.num_workers 7"
    assert two["cores"].fix == "--data.init_args.num_workers 3"
    assert short["memory"].fix == "--data.init_args.num_workers 5"
    assert check(BASE, 0, 8, 4, 1)["memory"].fix.startswith("floodrepro reproduce --demo")
    assert check(DEMO, 0, 8, 4, 1)["memory"].status == "ok"


def test_backbone_weights_are_looked_for_in_the_cache(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    missing = check_backbone(BASE)[0]
    assert (missing.status, missing.fix.split()[:2]) == ("warn", ["hf", "download"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert check_backbone(BASE)[0].status == "fail"
    assert check_backbone(DEMO) == []
    assert check_backbone(fold([BASE], ["--model.init_args.model_args.backbone_ckpt_path", "own.pt"])) == []


def test_missing_data_gets_a_command_that_fits_the_recipe_and_a_missing_chip_is_named(tmp_path, own_chips, monkeypatch):
    def check(recipe: recipes.Recipe, root: Path = tmp_path / "my data") -> Finding:
        return check_chips(fold([recipe], recipes.data_overrides(root, recipe)))

    assert "floodrepro data synth --root" in check(DEMO).fix
    assert check(BASE).fix.endswith("--protocol v0 --revision COMMIT")
    binary = check(recipes.read_yaml(recipes.find(NAMES["v1-binary"])))
    assert binary.fix.endswith("--protocol v1-binary")
    assert "about 72 GB" in binary.detail
    assert_can_be_pasted(binary.fix)
    monkeypatch.setitem(PROTOCOLS, "v0", replace(PROTOCOLS["v0"], size_gb=None))
    assert ("None" in check(BASE).detail, "GB free" in check(BASE).detail) == (False, True)
    assert "chips of train" in check(DEMO, own_chips).detail
    gone = next((own_chips / "data/DEM").iterdir())
    gone.unlink()
    found = check(DEMO, own_chips)
    assert (found.status, gone.stem.removesuffix("_DEM") in found.detail) == ("fail", True)
