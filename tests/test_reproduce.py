"""The whole path against a stand-in for the hub: killed, gone on with, skipped, refused.

The processes are real, and so are the clients: data, backbone and reference come over HTTP from `hub_server`. A forge
forks them, so that a kill costs no import of TerraTorch.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from conftest import ROOT
from floodrepro.cli.reproduction.plan import STAGES
from floodrepro.cli.reproduction.runner import LOCK, RECORD
from floodrepro.data import sources
from floodrepro.data.synth import generate
from floodrepro.evaluation import chip_table
from floodrepro.run_folder import RunFolder
from floodrepro.training.starting_point import tensor_sha256
from forge import Forge
from hub_server import HubServer

TINY = ("--size", "tiny", "--precision", "fp32")
SMALL = ("--trainer.max_epochs=2", "--data.init_args.batch_size=2", "--data.init_args.num_workers=0")


class OnlineForge(Forge):
    """A forge whose children speak to the local hub, and to nothing else."""

    def __init__(self, environment: dict[str, str]) -> None:
        file = ROOT / "tests" / "forge.py"
        self._process = subprocess.Popen(
            [sys.executable, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()


@dataclass
class World:
    """The hub, what it serves, and one process that forks all others."""

    hub: HubServer
    forge: Forge
    folder: Path
    environment: dict[str, str]
    commit: str
    reference_sha256: str
    encoder: dict[str, torch.Tensor]

    def __call__(
        self, run_dir: Path, *argv: object, kill_when: Callable[[], bool] | None = None, **request: Any
    ) -> tuple[int, str]:
        """Exit code and all output of `floodrepro reproduce`; with a condition, SIGKILL as soon as it holds."""
        file = self.folder / "log"
        file.unlink(missing_ok=True)
        words = ["reproduce", *TINY, "--run-dir", run_dir, "--reference-sha256", self.reference_sha256, *argv, *SMALL]
        killer = threading.Thread(target=kill, args=(run_dir, kill_when))
        if kill_when:
            killer.start()
        code = self.forge.ask(argv=[str(word) for word in words], log=str(file), **request)["code"]
        if kill_when:
            killer.join()
        return code, file.read_text()

    def begins(self, run_dir: Path, *argv: object, **how: Any) -> str:
        """The output of a call that was killed."""
        code, log = self(run_dir, *argv, **how)
        assert code == -signal.SIGKILL, log
        return log


def kill(run_dir: Path, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 240  # where many share the cores
    while not condition():
        assert time.monotonic() < end, "the moment to strike never came"
        time.sleep(0.01)
    os.kill(int((run_dir / LOCK).read_text()), signal.SIGKILL)


def record_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / RECORD).read_text())


def events_of(run_dir: Path) -> dict[str, list[str]]:
    """What happened to each stage, in turn."""
    events: dict[str, list[str]] = {}
    for line in record_of(run_dir)["log"]:
        events.setdefault(line["stage"], []).append(line["event"])
    return events


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for protocol in ("v0", "v1"):
        generate(folder / protocol, events=5, chips=10, size=32, protocol=protocol, seed=3, layout="hub")
    with HubServer() as hub:
        commit = hub.commit(files_of(folder / "v0"), "v0")
        hub.commit(files_of(folder / "v1"))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"},
            **{"NO_PROXY": "*", "OMP_NUM_THREADS": "1"},
        }
        forge = OnlineForge(environment)
        # A short training gives both: a Lightning checkpoint with hyper_parameters, and an encoder to begin with.
        words = ["fit", "--config", "terramind_v1_tiny_impactmesh_flood", "--precision", "fp32", "--data-root"]
        words += [str(folder / "v0"), "--runs-root", str(folder), "--name", "made", *SMALL, "--trainer.max_epochs=1"]
        words += ["--model.init_args.model_args.backbone_pretrained=false"]
        answer = forge.ask(argv=words, log=str(folder / "made.log"))
        assert answer == {"code": 0}, (folder / "made.log").read_text()
        checkpoint = folder / "made" / "checkpoints" / "best.ckpt"
        content = torch.load(checkpoint, weights_only=True)
        assert "hyper_parameters" in content
        prefix = "model.encoder.encoder."
        encoder = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
        buffer = io.BytesIO()
        torch.save(encoder, buffer)
        published = sources.REFERENCE
        hub.serve(published.repo, {published.name: checkpoint.read_bytes()}, published.revision)
        backbone = sources.backbone_weights("terramind_v1_tiny")
        hub.serve(backbone.repo, {backbone.name: buffer.getvalue()})
        sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        yield World(hub, forge, folder, environment, commit, sha256, encoder)
        forge.close()


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """Two declared runs on version 0, started five times: killed in the fetch, in the fit, in verify, then whole."""
    hub, run_dir, data = world.hub, world.folder / "run", world.folder / "data"
    asked = ("--revision", "v0", "--data-root", data, "--seeds", "1,2")
    archive, run = "train/S2L2A.tar", RunFolder(run_dir / "seed-1")
    half = data / f"{archive}.partial"
    hub.fault(archive, rate=200_000)
    log = world.begins(run_dir, *asked, kill_when=lambda: half.exists() and half.stat().st_size > 100_000)
    assert "[2/8] fetch" in log
    assert "[3/8] audit" not in log
    assert not (data / archive).exists()
    # Of the first run's two epochs, three batches each, in the second one.
    log = world.begins(run_dir, *asked, strike=[{"at": "step", "count": 5}])
    assert "[4/8] fit" in log
    assert run.read_record()["status"] == "running"
    log = world.begins(run_dir, *asked, kill_when=(run.verification / "evidence" / "weights.json").exists)
    assert "[7/8] verify" in log
    assert not run.results.exists()
    code, log = world(run_dir, *asked)
    assert code == 1, log  # two chips of one event cannot show parity
    assert "required, and not passed: parity" in log
    return run_dir


def test_killed_in_three_stages_the_path_goes_on_to_report_and_card(world, finished):
    assert events_of(finished) == {
        "doctor": ["started", "done", *["unchanged"] * 3],
        "fetch": ["started", "started", "done", *["unchanged"] * 2],
        "audit": ["started", "done", *["unchanged"] * 2],
        "fit": ["started", "started", "done", "unchanged"],
        "test": ["started", "done", "unchanged"],
        "reference": ["started", "done", "unchanged"],
        "verify": ["started", "started", "done"],
        "export": ["started", "done"],
    }
    run, other = (RunFolder(finished / f"seed-{seed}") for seed in (1, 2))
    assert [r.read_record()["status"] for r in (run, other)] == ["finished", "finished"]
    assert len(run.read_record()["resumes"]) == 1
    found = json.loads(run.results.read_text())
    assert [c["status"] for c in found["checks"] if c["id"] in ("weights", "load_back", "data")] == ["pass"] * 3
    [variance] = [check for check in found["checks"] if check["id"] == "variance"]
    assert "2 runs" in variance["reason"]
    assert (run.verification / "report.html").is_file()
    card = (run.export / "README.md").read_text()
    assert "IBM's checkpoint" in card
    assert (run.export / f"{finished.name}.safetensors").is_file()
    assert record_of(finished)["stages"]["verify"]["code"] == 1


def test_what_came_before_a_kill_is_not_fetched_again(world, finished):
    data, archive = world.folder / "data", "train/S2L2A.tar"
    first, second = world.hub.starts_of(archive)[:2]
    assert (first, second >= 100_000) == (0, True)
    for path, content in world.hub.commits[world.commit].items():
        assert (data / path).read_bytes() == content
        if path.endswith(".tar") and path != archive:
            assert world.hub.starts_of(path) == [0]
    for weights in (sources.REFERENCE, sources.backbone_weights("terramind_v1_tiny")):
        assert world.hub.starts_of(weights.name) == [0], "fit and tests take them from the cache"


def test_training_begins_with_the_backbone_that_the_hub_gave(world, finished):
    tensors = json.loads(RunFolder(finished / "seed-2").starting_point.read_text())["tensors"]
    began = {name: entry["sha256"] for name, entry in tensors.items() if name.startswith("encoder.encoder.")}
    assert began == {f"encoder.encoder.{name}": tensor_sha256(value) for name, value in world.encoder.items()}


def test_reference_is_tested_by_the_same_code_on_the_same_chips(world, finished):
    run = RunFolder(finished / "seed-1")
    ours = chip_table.read(run.evaluation / "test" / "best.parquet")
    theirs = chip_table.read(run.evaluation / "reference" / "test" / f"{Path(sources.REFERENCE.name).stem}.parquet")
    assert chip_table.refuse_to_compare(ours, theirs) is None
    assert theirs.metadata["checkpoint"]["sha256"] == world.reference_sha256
    for key in ("data_digest", "protocol", "precision", "device"):
        assert ours.metadata[key] == theirs.metadata[key]
    assert (ours.counts != theirs.counts).any()


def test_second_start_skips_everything_and_a_moved_revision_is_noticed(world, finished):
    hub, data = world.hub, world.folder / "data"
    asked = ("--data-root", data, "--seeds", "1,2")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    hub.forget()
    code, log = world(finished, "--revision", "v0", *asked)
    assert (code, log.count("nothing to do")) == (1, len(STAGES))
    assert hub.sent == []
    changed = {path.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert changed <= {RECORD, LOCK}
    moved = hub.commit(files_of(world.folder / "v0") | {"README.md": b"moved\n"}, "v0")
    code, log = world(finished, "--revision", "v0", *asked)
    assert code == 1
    assert moved in log
    assert f"--revision {world.commit}" in log
    assert "[2/8] fetch: stopped" in log
    assert "[3/8]" not in log
    code, log = world(finished, "--revision", world.commit, *asked)
    assert (code, log.count("nothing to do")) == (1, len(STAGES) - 1), "the same data: only the fetch looks again"
    hub.refs["v0"] = world.commit


def test_wrong_reference_stops_the_path_before_the_long_download(world, tmp_path: Path):
    data, wrong = tmp_path / "data", "0" * 64
    range_ = ("--from", "fetch", "--until", "fetch")
    code, log = world(tmp_path / "run", "--revision", "v0", "--data-root", data, *range_, "--reference-sha256", wrong)
    assert code == 1
    assert f"sha256 {world.reference_sha256}, expected {wrong}" in log
    assert "to do: delete it and start again" in log
    assert not data.exists()


PLAIN = """
import json, sys
from terratorch.cli_tools import build_lightning_cli  # what the command terratorch calls with its arguments
for argv in json.loads(sys.argv[1]):
    cli = build_lightning_cli(argv)
    print(json.dumps({name: float(value) for name, value in cli.trainer.callback_metrics.items()}))
"""


def test_recipe_and_exported_yaml_fit_and_test_in_plain_terratorch_on_the_extracted_folder(
    world, finished, tmp_path: Path, cli
):
    """The card's commands, on the shipped recipe as it is, on its form without floodrepro, and on what was exported."""
    run = RunFolder(finished / "seed-1")
    shipped = ROOT / "configs" / "terramind_v1_tiny_impactmesh_flood.yaml"
    plain, exported = tmp_path / "plain.yaml", run.export / f"{finished.name}.yaml"
    assert cli("configs", "cp", shipped.stem, plain, "--plain").code == 0
    assert not any("class_path: floodrepro" in config.read_text() for config in (plain, exported))
    root = tmp_path / "ImpactMesh-Flood"
    shutil.copytree(world.folder / "data" / "split", root / "split")
    for archive in (world.folder / "data").glob("*/*.tar"):
        with tarfile.open(archive) as tar:
            tar.extractall(root / "data", filter="data")
    small = ["--trainer.precision=32-true", *SMALL, "--trainer.max_epochs=1"]
    commands = [
        [command, f"--config={config}", *small, *([f"--ckpt_path={run.best}"] if command == "test" else [])]
        for config in (shipped, plain, exported)
        for command in ("fit", "test")
    ]
    argv = [sys.executable, "-c", PLAIN, json.dumps(commands)]
    offline = world.environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(figures) == len(commands)
    assert all(fitted["val/loss"] > 0 for fitted in figures[::2])
    ours = chip_table.read(run.evaluation / "test" / "best.parquet").metadata["metrics"]
    for tested in figures[1::2]:
        assert {name: tested[name] for name in ours} == pytest.approx(ours, abs=1e-6)


def test_folder_of_a_plain_download_is_taken_on_v1_data_with_the_binary_protocol(world):
    """As someone would who knows the card alone: hf download, then the path on the folder that it left."""
    data, run_dir = world.folder / "downloaded", world.folder / "binary"
    hf = Path(sys.executable).with_name("hf")
    what = [*("download", "ibm-esa-geospatial/ImpactMesh-Flood"), "--repo-type", "dataset", "--local-dir", str(data)]
    for command in (what, sources.REFERENCE.command[1:]):
        subprocess.run([hf, *command], env=world.environment, check=True, capture_output=True)
    world.hub.forget()
    asked = ("--protocol", "v1-binary", "--data-root", data, "--seeds", 3, "--from", "audit")
    code, log = world(run_dir, *asked)
    assert code == 1, log
    assert "required, and not passed: parity" in log
    assert {sent.path for sent in world.hub.sent} <= {sources.backbone_weights("terramind_v1_tiny").name}
    run = RunFolder(run_dir / "seed-3")
    ours = chip_table.read(run.evaluation / "test" / "best.parquet")
    theirs = chip_table.read(run.evaluation / "reference" / "test" / f"{Path(sources.REFERENCE.name).stem}.parquet")
    assert (ours.metadata["protocol"], ours.num_classes) == ("v1-binary", 2)
    assert chip_table.refuse_to_compare(ours, theirs) is None
    assert list(events_of(run_dir)) == list(STAGES[2:])


# What is answered without TerraTorch


def test_dry_run_prints_every_command_with_its_cost_contacts_nobody_and_writes_nothing(tmp_path: Path):
    """Through the script, which passes everything on."""
    probe = {"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    where = ("--data-root", tmp_path / "data", "--run-dir", tmp_path / "run", "--seeds", "42,43")
    script = [ROOT / "scripts" / "reproduce.sh", "--dry-run", "--format", "json", "--revision", "abc", *where]
    done = subprocess.run([*script, "--trainer.max_epochs=3"], capture_output=True, text=True, env=probe, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert tuple(plan) == STAGES
    for name, lines in plan.items():
        assert all(line.startswith(("floodrepro ", "hf ")) for line in lines[:-1]), name
        assert "time" in lines[-1]
        assert "disk" in lines[-1]
    assert f"--revision {sources.REFERENCE.revision}" in plan["fetch"][1]
    assert "--revision abc --protocol v0" in plan["fetch"][2]
    assert "--seeds 42,43 --trainer.max_epochs=3" in plan["fit"][0]
    assert len(plan["test"]) == 3
    assert not any(path.name in ("data", "run") for path in tmp_path.iterdir())


def test_dry_run_does_without_torch():
    probe = "import sys; from floodrepro.cli.main import main; main(['reproduce', '--dry-run']); "
    done = subprocess.run([sys.executable, "-c", probe + "sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("argv", "config"),
    [
        ((), "terramind_v1_base_impactmesh_flood_amd"),
        (("--size", "tiny"), "terramind_v1_tiny_impactmesh_flood"),
        (("--protocol", "v1-binary"), "terramind_v1_base_impactmesh_flood_v1_binary"),
        (("--protocol", "v1", "--size", "tiny"), "terramind_v1_tiny_impactmesh_flood_v1"),
        (("--config", "terramind_v1_base_impactmesh_flood_v1"), "terramind_v1_base_impactmesh_flood_v1"),
    ],
)
def test_protocol_and_size_choose_the_recipe(cli, argv, config):
    [fit] = json.loads(cli("reproduce", "--dry-run", "--format", "json", "--from", "fit", "--until", "fit", *argv).out)[
        "fit"
    ][:1]
    assert f"--config {config} " in fit
    assert "--seeds 42 --index 0" in fit


def test_three_classes_have_no_reference_and_it_is_said_why(cli):
    def planned(*argv: str) -> dict[str, list[str]]:
        return json.loads(cli("reproduce", "--dry-run", "--format", "json", *argv).out)

    plan = planned("--protocol", "v1")
    assert "two classes" in plan["reference"][0]
    assert "--reference" not in plan["verify"][0]
    assert not any(sources.REFERENCE.name in line for line in plan["fetch"])
    assert planned("--reference", "none")["reference"] == ["left out: --reference none"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--from", "fti"], "invalid choice: 'fti'"),
        (["--from", "fit", "--until", "audit"], "--from fit comes after --until audit"),
        (["--config", "demo", "--size", "tiny"], "--config and --size both choose the recipe"),
        (["--config", "demo", "--protocol", "v1"], "the recipe poses v0, not v1"),
        (["--data.init_args.label_map=[1, 0]"], "the recipe poses none of the protocols"),
        (["--reference", "no/such.pt"], "the reference is not found"),
        (["--reference-sha256", "abc"], "is no sha256"),
        (["--seeds", "1,1"], "--seeds"),
        (["--demo", "--seeds", "1"], "--seeds is no flag of the demo"),
        (["--demo", "--from", "fit"], "--from is no flag of the demo"),
        (["--folder", "demo"], "--folder is the demo's"),
    ],
)
def test_wrong_flag_is_a_usage_error_before_anything_is_made(cli, tmp_path: Path, argv, says):
    outcome = cli("reproduce", *argv, *(() if "--demo" in argv else ("--run-dir", tmp_path / "run")))
    assert outcome.code == 2
    assert says in outcome.report[0]
    assert list(tmp_path.iterdir()) == []


def test_fp16_without_a_gpu_is_refused_before_the_download(cli, tmp_path: Path, monkeypatch):
    for vendor in ("CUDA", "HIP", "ROCR"):
        monkeypatch.setenv(f"{vendor}_VISIBLE_DEVICES", "")
    weightless = ("--reference", "none", "--model.init_args.model_args.backbone_pretrained=false")
    outcome = cli("reproduce", "--data-root", tmp_path / "data", "--run-dir", tmp_path / "run", *weightless)
    assert outcome.code == 1
    assert "fp16 does not run on a CPU" in outcome.err
    assert "the machine will not do" in outcome.report[0]
    assert events_of(tmp_path / "run") == {"doctor": ["started", "stopped"]}


def test_disk_that_is_too_small_stops_the_fetch_with_what_to_do(cli, tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**20)
    with HubServer() as hub:
        generate(tmp_path / "v0", events=3, chips=6, size=64, protocol="v0", seed=3, layout="hub")
        hub.commit(files_of(tmp_path / "v0"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        huggingface_hub.close_session()
        flags = ("--from", "fetch", "--reference", "none", "--model.init_args.model_args.backbone_pretrained=false")
        outcome = cli("reproduce", "--data-root", tmp_path / "data", "--run-dir", tmp_path / "run", *flags)
        assert hub.sent == []
    assert outcome.code == 1
    assert "the disk is too small" in outcome.report[0]
    assert "--root on another disk" in outcome.report[2]
    assert events_of(tmp_path / "run") == {"fetch": ["started", "stopped"]}


def test_failing_audit_stops_the_path_and_mended_data_lets_it_go_on(cli, tmp_path: Path):
    data, run_dir = tmp_path / "data", tmp_path / "run"
    generate(data, events=3, chips=3, size=32, protocol="v0", seed=3)
    val = data / "split" / "impactmesh_flood_val.txt"
    whole = val.read_text()
    val.write_text(whole + (data / "split" / "impactmesh_flood_train.txt").read_text())
    asked = ("reproduce", "--data-root", data, "--run-dir", run_dir, "--from", "audit")
    outcome = cli(*asked)
    assert outcome.code == 1
    assert "the audit found 2 errors" in outcome.report[0]
    assert "it is in train and in val" in outcome.err
    assert events_of(run_dir) == {"audit": ["started", "stopped"]}
    val.write_text(whole)
    asked = (*asked, "--until", "audit")
    assert cli(*asked).code == 0
    assert "nothing to do" in cli(*asked).err
    (data / "data-manifest.json").unlink()  # what a stage left has to be there, and as it was
    assert "floodrepro data audit" in cli(*asked).err
    (data / "data" / "DEM" / "note").touch()
    assert "floodrepro data audit" in cli(*asked).err
    assert events_of(run_dir)["audit"][2:] == ["started", "done", "unchanged", *["started", "done"] * 2]


def test_two_reproductions_in_one_folder_are_refused_and_so_is_a_run_folder(cli, tmp_path: Path):
    asked = ("reproduce", "--run-dir", tmp_path, "--from", "audit", "--until", "audit")
    with (tmp_path / LOCK).open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = cli(*asked)
    assert "another reproduction" in outcome.report[0]
    (tmp_path / "recipe.yaml").touch()
    assert "a run folder already" in cli(*asked).report[0]


def test_half_of_an_exported_pair_is_made_anew(world, finished):
    """As after a kill between the two files: the weights are there and the YAML is not."""
    pair = RunFolder(finished / "seed-1").export / finished.name
    before = pair.with_suffix(".yaml").read_bytes()
    pair.with_suffix(".yaml").unlink()
    code, log = world(finished, "--data-root", world.folder / "data", "--seeds", "1,2", "--from", "export")
    assert code == 0, log
    assert pair.with_suffix(".yaml").read_bytes() == before
