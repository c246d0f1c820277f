"""What the doctor sees: every fault planted, and a healthy machine."""

import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from floodrepro import recipe as recipes
from floodrepro.data import sources
from floodrepro.data.ledger import Ledger, RemoteFile
from floodrepro.data.presence import protocol_of
from floodrepro.system.container import installed
from floodrepro.system.doctor import data, quick, read_needs
from floodrepro.system.doctor.gpus import Gpu, check_devices, check_use, find_gpus, judge_probe
from floodrepro.system.doctor.machine import Host, check_host
from floodrepro.system.doctor.needs import estimate_test, estimate_time
from floodrepro.system.doctor.packages import check_bounds, check_tested, own_requirements
from floodrepro.system.doctor.torch_build import Build, check_torch, check_torchvision, folder_of

BASE = recipes.read(recipes.find("terramind_v1_base_impactmesh_flood_amd"))
NEEDS = read_needs([BASE])
AMD, NVIDIA = Gpu("AMD", "AMD Instinct MI300X"), Gpu("NVIDIA", "NVIDIA H100 80GB HBM3")
GIB = 2**30
BIG = Host(cores=64, memory=200 * GIB, shm=64 * GIB, files=65536)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def pci(root: Path, code: str, kind: str, **files: str) -> Path:
    """A PCI device of AMD's that the amdgpu driver has taken."""
    device = root / "sys/bus/pci/devices/0000:05:00.0"
    plant(device, {"vendor": "0x1002\n", "device": f"{code}\n", "class": f"{kind}\n", **files})
    driver = root / "sys/bus/pci/drivers/amdgpu"
    driver.mkdir(parents=True)
    (device / "driver").symlink_to(driver)
    return root


def nvidia(root: Path, *, given: bool = True) -> Path:
    plant(root, {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 7\n"})
    return plant(root, {"dev/nvidiactl": ""}) if given else root


def package(root: Path, version: str, *, hip: str | None = None, cuda: str | None = None) -> Path:
    text = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"
    return plant(root / version, {"version.py": text, "_C.so": ""})


@pytest.fixture
def torches(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "torches"
    return {
        "rocm": package(folder, "2.9.1+rocm7.2.4", hip="7.2.26015-fc0010cf6a"),
        "cuda": package(folder, "2.14.1+cu130", cuda="13.0"),
        "cpu": package(folder, "2.14.1+cpu"),
    }


def by_name(findings) -> dict[str, dataclasses.dataclass]:
    return {finding.name: finding for finding in findings}


# The whole


def test_healthy_machine_passes_and_both_formats_say_the_same(cli, chips):
    told = cli("doctor", "--config", "demo", "--data", chips, "--format", "json")
    found = json.loads(told.out)
    assert told.code == 0, told.out
    assert found["ok"] is True
    assert {finding["status"] for finding in found["findings"]} <= {"ok", "warn"}
    assert {"torch", "torchvision", "zarr", "gpu", "disk", "data", "time"} <= {f["name"] for f in found["findings"]}
    text = cli("doctor", "--config", "demo", "--data", chips).out
    for line in ("torch", "torchvision", "data"):
        (finding,) = [f for f in found["findings"] if f["name"] == line]
        assert finding["detail"] in text


@pytest.mark.skipif(any(gpu.trains for gpu in find_gpus()), reason="a process of its own asks torch about the GPU")
def test_torch_is_not_imported_where_there_is_no_gpu():
    code = "import sys; from floodrepro.cli.main import main; main(['doctor', '--config', 'demo']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "terratorch", "lightning"} & set(done.stdout.splitlines()[-1].split())


def run_with(torch: Path | None, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PYTHONPATH": str(torch.parent)} if torch else {}) | variables
    command = [sys.executable, "-m", "floodrepro", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_broken_torch_is_reported_not_run_into(tmp_path):
    broken = plant(tmp_path / "torch", {"__init__.py": "raise ImportError('libtorch.so: no such file')\n"})
    done = run_with(broken, "doctor", "--format", "json")
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert found["torch"]["status"] == "fail"
    assert "holds no whole torch" in found["torch"]["detail"]
    assert found["torch"]["fix"]
    assert found["lightning"]["status"] == "ok"  # the rest is looked at all the same
    fit = run_with(broken, "fit", "--config", "demo", "--name", "x")
    assert fit.returncode == 1
    assert "holds no whole torch" in fit.stderr
    assert len(fit.stderr.splitlines()) <= 3


def test_torch_that_looks_whole_and_does_not_import_is_found_while_a_container_is_built(tmp_path):
    version = dict(installed())["torch"]
    text = {"__init__.py": "raise ImportError('libtorch.so: no such file')\n", "_C.so": ""}
    broken = plant(tmp_path / "torch", {**text, "version.py": f"__version__ = '{version}'\ncuda = None\nhip = None\n"})
    done = run_with(broken, "doctor", "--build", "--format", "json")
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert found["torch runs"]["status"] == "fail"
    assert "libtorch.so: no such file" in found["torch runs"]["detail"]


def test_container_build_runs_torch_and_asks_for_neither_gpu_nor_recipe(cli):
    told = cli("doctor", "--build", "--format", "json")
    found = {f["name"]: f["status"] for f in json.loads(told.out)["findings"]}
    assert told.code == 0, told.out
    assert found["torch runs"] == "ok"
    assert not {"gpu", "recipe", "disk", "data", "network"} & found.keys()
    assert cli("doctor", "--build", "--config", "demo").code == 2


def test_fit_refuses_what_would_stop_it_and_says_what_may_hurt(tmp_path, chips):
    given = ("--config", "terramind_v1_tiny_impactmesh_flood", "--data-root", str(chips))
    done = run_with(
        None, "fit", *given, f"--data.init_args.num_workers={os.cpu_count()}", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 1
    assert "warning: cores" in done.stderr
    assert "TerraMind_v1_tiny.pt is not in the cache" in done.stderr
    assert "loading TerraTorch" not in done.stderr  # answered before anything slow
    assert "to do: hf download" in done.stderr


# torch and the GPU


@pytest.mark.parametrize(
    ("gpus", "kind", "status"),
    [
        ([AMD], "cuda", "fail"),
        ([AMD], "cpu", "fail"),
        ([AMD], "rocm", "ok"),
        ([NVIDIA], "cpu", "fail"),
        ([NVIDIA], "rocm", "fail"),
        ([NVIDIA], "cuda", "ok"),
        ([AMD, NVIDIA], "cuda", "ok"),
        ([], "cuda", "ok"),
        ([], "cpu", "ok"),
    ],
)
def test_torch_has_to_be_built_for_the_gpu_that_is_there(gpus, kind, status, torches, tmp_path):
    found = check_torch(torches[kind], {}, gpus, tmp_path)[0]
    assert found.status == status
    if status == "fail":
        repair = {"AMD": "Dockerfile.rocm", "NVIDIA": "pip install --force-reinstall"}[gpus[0].vendor]
        assert repair in found.fix
        assert "--trainer.accelerator cpu" in found.fix


def test_whole_way_from_sysfs_to_a_refusal_unless_the_recipe_keeps_to_the_cpu(tmp_path):
    root = plant(pci(tmp_path, "0x74b5", "0x120000"), {"dev/kfd": "", "dev/shm/x": ""})
    needs = replace(NEEDS, pretrained=False)
    here = Build.read(folder_of("torch"))
    assert by_name(quick(needs, tmp_path, root))["torch"].status == ("ok" if here.kind == "rocm" else "fail")
    assert by_name(quick(replace(needs, accelerator="cpu"), tmp_path, root))["torch"].status == "ok"


@pytest.mark.parametrize("listed", ["2.9.1", "2.14.0"])
def test_torch_that_pip_knows_as_another_is_two_installations(listed, torches, tmp_path):
    assert check_torch(torches["cuda"], {"torch": listed}, [], tmp_path)[0].status == "fail"


def test_missing_torch_is_a_failure_with_a_repair(tmp_path):
    (found,) = check_torch(None, {}, [], tmp_path)
    assert (found.status, found.detail) == ("fail", "not installed")
    assert "pip install" in found.fix


@pytest.mark.parametrize(("rocm", "status"), [("7.2.4-93\n", "ok"), ("6.4.1\n", "warn")])
def test_rocm_is_read_from_its_own_file_and_held_against_torch(rocm, status, torches, tmp_path):
    root = plant(tmp_path, {"opt/rocm/.info/version": rocm})
    assert by_name(check_torch(torches["rocm"], {}, [AMD], root))["rocm"].status == status


def test_rocm_image_that_lost_its_torch_fails_the_build(torches, tmp_path):
    root = plant(tmp_path, {"opt/rocm/.info/version": "7.2.4\n"})
    assert check_torch(torches["cuda"], {}, [], root, building=True)[0].status == "fail"
    assert check_torch(torches["rocm"], {}, [], root, building=True)[0].status == "ok"


@pytest.mark.parametrize(
    ("torch", "torchvision", "status"),
    [
        ("2.14.1+cu130", "0.29.2+cu132", "ok"),
        ("2.9.1+rocm7.2.4", "0.24.1+rocm7.2.4", "ok"),
        ("2.9.1+rocm7.2.4", "0.24.0a0+b919bd0", "ok"),
        ("2.14.1+cu130", "0.24.1+cu130", "fail"),
        ("2.14.1+rocm7.2", "0.29.0+cu130", "fail"),
        ("2.14.1+cu130", "0.29.0+cpu", "fail"),
    ],
)
def test_torchvision_has_to_match_torch_in_version_and_build(torch, torchvision, status, tmp_path):
    assert check_torchvision(package(tmp_path, torch), package(tmp_path, torchvision)).status == status


def test_missing_torchvision_is_a_failure(tmp_path, torches):
    assert check_torchvision(torches["cpu"], None).status == "fail"


def test_mi300x_is_named_by_its_pci_id_and_by_the_driver(tmp_path):
    root = pci(tmp_path, "0x74b5", "0x120000", mem_info_vram_total=str(192 * GIB))
    assert find_gpus(root, {}) == [Gpu("AMD", "AMD Instinct MI300X VF")]
    plant(root, {"sys/module/amdgpu/version": "6.14.14\n", "dev/kfd": ""})
    (found,) = check_devices(find_gpus(root, {}), root)
    assert (found.status, "amdgpu 6.14.14" in found.detail) == ("ok", True)


def test_mi300x_without_a_pci_tree_is_found_by_its_compute_driver(tmp_path):
    nodes = "sys/class/kfd/kfd/topology/nodes"
    plant(tmp_path, {f"{nodes}/0/properties": "cpu_cores_count 64\ngfx_target_version 0\n"})
    assert find_gpus(tmp_path, {}) == []
    plant(tmp_path, {f"{nodes}/1/properties": "simd_count 1216\ngfx_target_version 90402\n"})
    assert [gpu.vendor for gpu in find_gpus(tmp_path, {})] == ["AMD"]


def test_graphics_of_a_laptops_processor_is_no_reason_to_refuse_a_cpu_torch(tmp_path):
    (small,) = find_gpus(pci(tmp_path, "0x1638", "0x030000", mem_info_vram_total=str(GIB // 2)), {})
    assert not small.trains
    assert check_devices([small], tmp_path)[0].status == "ok"


def test_gpu_that_the_container_was_not_given(tmp_path):
    assert check_devices([AMD], tmp_path)[0].status == "fail"
    assert "--device=/dev/kfd" in check_devices([AMD], tmp_path)[0].fix
    (shown,) = find_gpus(nvidia(tmp_path, given=False), {})
    assert not shown.trains
    assert check_devices([shown], tmp_path)[0].status == "warn"
    assert "--gpus all" in check_devices([shown], tmp_path)[0].fix
    assert find_gpus(nvidia(tmp_path), {}) == [NVIDIA]


def test_rocm_torch_that_sees_no_gpu_is_told_of_the_device(tmp_path):
    (found,) = check_devices([], tmp_path, rocm=True)
    assert (found.status, "--device=/dev/kfd" in found.fix) == ("warn", True)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_gpu_that_this_user_may_not_open(tmp_path):
    plant(tmp_path, {"dev/kfd": ""})
    (tmp_path / "dev/kfd").chmod(0)
    (found,) = check_devices([AMD], tmp_path)
    assert (found.status, "render" in found.fix) == ("fail", True)


def test_hidden_gpu_does_not_count(tmp_path):
    root = pci(nvidia(tmp_path), "0x74a1", "0x120000")
    assert {gpu.vendor for gpu in find_gpus(root, {})} == {"AMD", "NVIDIA"}
    assert {gpu.vendor for gpu in find_gpus(root, {"ROCR_VISIBLE_DEVICES": ""})} == {"NVIDIA"}
    assert find_gpus(root, {"CUDA_VISIBLE_DEVICES": "-1"}) == []


H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 79 * GIB, "float16": True, "bfloat16": True}


@pytest.mark.parametrize(
    ("device", "precision", "name", "status"),
    [
        (H100, "16-mixed", "gpu numerics", "ok"),
        (H100 | {"bfloat16": False}, "bf16-mixed", "gpu numerics", "fail"),
        (H100 | {"bfloat16": False}, "16-mixed", "gpu numerics", "ok"),
        (H100 | {"float16": False}, "16-mixed", "gpu numerics", "fail"),
        (H100, "", "peak rate", "ok"),
        (H100 | {"name": "NVIDIA H200 NVL"}, "", "peak rate", "warn"),
        (H100 | {"name": "AMD Instinct MI300X VF"}, "", "peak rate", "ok"),
    ],
)
def test_gpu_has_to_compute_in_the_recipes_precision_and_its_peak_is_known_or_not(device, precision, name, status):
    answer = {"nms": True, "devices": [device]}
    assert by_name(judge_probe(answer, precision, gpu_expected=True))[name].status == status


@pytest.mark.parametrize(
    ("gpus", "precision", "status"), [([], "16-mixed", "fail"), ([], "bf16-mixed", None), ([AMD], "16-mixed", None)]
)
def test_fp16_without_a_gpu_is_a_failure(gpus, precision, status):
    found = by_name(check_use(gpus, precision, {}))
    assert (found["precision"].status if found else None) == status


def test_nvidia_gpu_whose_energy_nothing_can_read_is_said():
    (missing,) = check_use([NVIDIA], "", {})
    assert (missing.status, "floodrepro[energy]" in missing.fix) == ("warn", True)
    assert check_use([NVIDIA], "", {"nvidia-ml-py": "13.0"})[0].status == "ok"


@pytest.mark.parametrize(
    "answer", ["ImportError: libamdhip64.so", {"nms": False, "devices": [H100]}, {"nms": True, "devices": []}]
)
def test_torch_that_cannot_use_the_gpu_is_a_failure(answer):
    (found,) = judge_probe(answer, "", gpu_expected=True)
    assert found.status == "fail"


# Packages


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("lightning", "2.6.2"),
        ("lightning", "2.6.3"),
        ("zarr", "3.0.1"),
        ("numcodecs", "0.16.1"),
        ("torchgeo", "0.10.0"),
        ("terratorch", "1.3.0"),
        ("huggingface-hub", "1.0.0"),
        ("scipy", None),
    ],
)
def test_package_that_hurts_is_named_with_its_repair(name, version):
    good, bad = dict(installed()), dict(installed())
    bad.pop(name) if version is None else bad.update({name: version})
    assert all(finding.status == "ok" for finding in check_bounds(good, own_requirements()))
    (found,) = [f for f in check_bounds(bad, own_requirements()) if f.status == "fail"]
    assert found.name == name
    assert "pip install" in found.fix


def test_poisoned_lightning_is_called_what_it_is():
    (found,) = check_bounds({"lightning": "2.6.2"}, ["lightning>=2.6.1,!=2.6.2"])
    assert "steals credentials" in found.detail
    assert "change every token" in found.fix


def test_versions_are_held_against_the_tested_ones():
    tested = "# comment\nzarr==2.18.0\nnumpy==2.4.6\ntorch==2.14.1\nabsent==1\n"
    here = {"zarr": "2.18.0", "numpy": "2.4.6", "torch": "2.14.1+cpu"}
    assert check_tested(here, tested, keeps_torch=False).status == "ok"
    older = check_tested(here | {"numpy": "2.3.0"}, tested, keeps_torch=False)
    assert (older.status, "numpy 2.3.0 (not 2.4.6)" in older.detail) == ("warn", True)
    rocm = here | {"torch": "2.9.1"}
    assert check_tested(rocm, tested, keeps_torch=False).status == "warn"
    assert check_tested(rocm, tested, keeps_torch=True).status == "ok"
    assert "not compared" in check_tested(here, None, keeps_torch=False).detail


# The machine


def test_limits_of_a_container_count_not_those_of_its_host(tmp_path):
    plant(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  1000000 kB\n", "dev/shm/x": ""})
    assert Host.read(tmp_path).memory == 1000000 * 1024
    plant(tmp_path / "sys/fs/cgroup", {"memory.max": "700000000\n", "memory.current": "200000000\n"})
    plant(tmp_path / "sys/fs/cgroup", {"cpu.max": "100000 100000\n"})
    limited = Host.read(tmp_path)
    assert (limited.memory, limited.cores) == (500_000_000, 1)
    plant(tmp_path / "sys/fs/cgroup", {"memory.max": "max\n", "cpu.max": "max 100000\n"})
    assert Host.read(tmp_path).memory == 1000000 * 1024


def test_large_machine_is_enough_for_the_published_recipe():
    assert {finding.status for finding in check_host(BIG, NEEDS, 1, 10**12)} == {"ok"}


@pytest.mark.parametrize(
    ("name", "status", "host", "needs", "free"),
    [
        ("cores", "warn", replace(BIG, cores=8), NEEDS, 10**12),
        ("memory", "warn", replace(BIG, memory=4 * GIB), NEEDS, 10**12),
        ("/dev/shm", "warn", replace(BIG, shm=64 * 2**20), NEEDS, 10**12),
        ("/dev/shm", "fail", replace(BIG, shm=64 * 2**20), replace(NEEDS, own_loader=False), 10**12),
        ("open files", "fail", replace(BIG, files=256), NEEDS, 10**12),
        ("disk", "warn", BIG, NEEDS, 5 * 10**9),
        ("disk", "fail", BIG, NEEDS, 2 * 10**9),
    ],
)
def test_machine_that_is_short_of_something(name, status, host, needs, free):
    found = {finding.name: finding for finding in check_host(host, needs, 1, free) if finding.status != "ok"}
    assert list(found) == [name]
    assert found[name].status == status
    assert found[name].fix


def test_base_model_at_batch_16_does_not_fit_a_laptop_without_a_gpu():
    laptop = replace(BIG, memory=32 * GIB)
    assert by_name(check_host(laptop, NEEDS, 0, 10**12))["memory"].status == "warn"
    assert by_name(check_host(laptop, NEEDS, 1, 10**12))["memory"].status == "ok"


# What is read


def test_needs_are_those_of_the_folded_recipe():
    assert (NEEDS.batch, NEEDS.workers, NEEDS.prefetch, NEEDS.epochs) == (16, 8, 2, 50)
    assert NEEDS.pretrained
    assert NEEDS.own_loader
    assert NEEDS.data_root == Path("ImpactMesh-Flood")
    words = ["--trainer.max_epochs", "3", "--data.init_args.num_workers=2", '--trainer={"precision": "bf16-mixed"}']
    folded = read_needs([BASE, {"data": {"init_args": {"batch_size": 4}}}], [*words, "--trainer.devices", "[1"])
    assert (folded.batch, folded.workers, folded.epochs, folded.precision) == (4, 2, 3, "bf16-mixed")
    assert not read_needs([BASE], ["--model.init_args.model_args.backbone_ckpt_path", "mine.pt"]).pretrained


@pytest.mark.parametrize("name", recipes.shipped())
def test_protocol_is_the_one_that_a_fit_checks_the_data_for(name):
    content = recipes.read(recipes.find(name))
    assert read_needs([content]).protocol == protocol_of(content) is not None
    assert read_needs([content]).model is not None


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_backbone_files_are_those_that_terratorch_asks_for(size):
    import importlib.util

    folder = Path(importlib.util.find_spec("terratorch").origin).parent
    source = (folder / "models/backbones/terramind/model/terramind_register.py").read_text()
    file = sources.backbone_weights(f"terramind_v1_{size}")
    assert f'"hf_hub_id": "{file.repo}",\n        "hf_hub_filename": "{file.name}"' in source


def test_backbone_weights_are_here_or_to_fetch_or_out_of_reach(tmp_path):
    hub = data.Hub("https://hub.invalid", tmp_path, offline=False)
    assert data.check_backbone(replace(NEEDS, pretrained=False), hub).status == "ok"
    missing = data.check_backbone(NEEDS, hub)
    assert (missing.status, "TerraMind_v1_base.pt" in missing.fix) == ("warn", True)
    assert data.check_backbone(NEEDS, replace(hub, offline=True)).status == "fail"
    place = tmp_path / "models--ibm-esa-geospatial--TerraMind-1.0-base"
    plant(place, {"refs/main": "0123abc", "snapshots/0123abc/TerraMind_v1_base.pt": "weights"})
    assert data.check_backbone(NEEDS, replace(hub, offline=True)).status == "ok"


def test_reference_is_looked_for_at_its_revision(tmp_path):
    hub = data.Hub("https://hub.invalid", tmp_path, offline=True)
    assert "--revision" in data.check_reference(hub).fix
    file = sources.REFERENCE
    plant(tmp_path / f"models--{file.repo.replace('/', '--')}/snapshots/{file.revision}", {file.name: "weights"})
    assert data.check_reference(hub).fix == ""


def test_network_is_tried_at_the_hubs_own_address(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert data.check_network(address).status == "ok"
    assert data.check_network(address, timeout=0.5).status == "warn"
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": "http://proxy.invalid:1"})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda _: False)
    assert "proxy" in data.check_network(address).detail


def test_data_that_is_missing_of_another_protocol_or_incomplete(own_chips, tmp_path):
    assert data.check_data(own_chips, "v0", 10**12, offline=True).status == "ok"
    assert data.check_data(own_chips, "v1", 10**12, offline=False).status == "fail"
    nowhere = data.check_data(tmp_path / "nowhere", "v0", 10**12, offline=False)
    assert (nowhere.status, "about 210.0 GB" in nowhere.detail) == ("warn", True)
    assert "floodrepro data fetch" in nowhere.fix
    assert data.check_data(tmp_path / "nowhere", "v0", 10**12, offline=True).status == "fail"
    for file in (own_chips / "data/S1RTC").iterdir():
        file.unlink()
    lacking = data.check_data(own_chips, "v0", 10**12, offline=False)
    assert (lacking.status, "train/S1RTC" in lacking.detail) == ("warn", True)


def test_half_fetched_data_has_to_fit_the_disk(tmp_path):
    files = {"train/DEM.tar": RemoteFile("train/DEM.tar", 5_000_000_000, "0" * 64, None)}
    Ledger.of(tmp_path, "owner/name", "a" * 40, "main", files).save()
    room = data.check_data(tmp_path, "v0", 6 * 10**9, offline=False)
    assert (room.status, "5.0 GB to fetch" in room.detail) == ("warn", True)
    assert data.check_data(tmp_path, "v0", 4 * 10**9, offline=False).status == "fail"


def test_time_of_the_published_run_lies_in_the_estimate():
    """Six GPU-hours are about 26 epochs of it, by the card's own rates."""
    found = estimate_time(replace(NEEDS, epochs=26), "AMD Instinct MI300X", published=True)
    fast, slow = (float(hours) for hours in re.findall(r"([\d.]+) h\b", found.detail))
    assert fast < 6.0 < slow
    assert "estimate" in found.detail


def test_time_of_a_test_is_that_of_forward_passes():
    told = estimate_test(NEEDS, "AMD Instinct MI300X", published=True, passes=2)
    seconds = 2 * 14_556 * 682e9 / 1307.4e12
    assert told.startswith(f"{math.ceil(seconds / 0.4 / 60)} min to {math.ceil(seconds / 0.1 / 60)} min on one AMD")
    assert "40.4 h on two CPU cores for 1 x 14,556" in estimate_test(NEEDS, None, published=True, passes=1)
    assert estimate_test(NEEDS, None, published=False, passes=1).startswith("not estimated")


def test_time_is_not_told_where_no_rate_is_known():
    unknown = [
        estimate_time(NEEDS, "Unheard-of 9000", published=True),
        estimate_time(NEEDS, None, published=False),
        estimate_time(replace(NEEDS, backbone="prithvi"), None, published=True),
    ]
    assert all(finding.detail.startswith("not estimated") for finding in unknown)
    assert estimate_time(NEEDS, None, published=True).status == "warn"  # years, on a CPU


def test_tested_versions_are_a_checkout_s_or_what_pip_was_told_to_keep_to(monkeypatch, tmp_path):
    from floodrepro.system.doctor import packages

    assert packages.tested_versions() == (ROOT / "constraints.txt").read_text()
    monkeypatch.setattr(packages.floodrepro, "__file__", str(tmp_path / "site-packages" / "floodrepro" / "__init__.py"))
    assert packages.tested_versions() is None
    (tmp_path / "rocm-constraints.txt").write_text("lightning==2.6.1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "rocm-constraints.txt"))  # as in the ROCm image
    assert packages.tested_versions() == "lightning==2.6.1\n"
