"""floodrepro verify from the outside: what it judges, what it refuses, and its exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from floodrepro.evaluation import chip_table
from floodrepro.run_folder import RunFolder
from floodrepro.verification import battery
from floodrepro.verification.battery import CHECKS

WITHOUT_TORCH = """
import sys
for name in ("torch", "terratorch", "lightning", "impactmesh"):
    sys.modules[name] = None
from floodrepro.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
CHEAP = ("identities", "data")


@pytest.fixture(scope="module")
def verified(cli, trained, tmp_path_factory) -> tuple[RunFolder, Path]:
    """A run with its chip table and evidence, and a reference checkpoint: the same weights, moved a little."""
    root = tmp_path_factory.mktemp("verify")
    run = RunFolder(Path(shutil.copytree(trained.path, root / "runs" / "mine")))
    shutil.rmtree(run.evaluation, ignore_errors=True)
    content = torch.load(run.best, weights_only=True)
    content["state_dict"] = {k: v * 1.02 if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    torch.save(content, root / "reference.ckpt")
    outcome = cli("verify", "--run", run.path, "--reference", root / "reference.ckpt", "--require", ",".join(CHEAP))
    assert outcome.code == 0, outcome.err
    return run, root / "reference.ckpt"


@pytest.fixture
def own_run(verified, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(verified[0].path, tmp_path / "mine")))


def results_of(run: RunFolder) -> dict:
    return json.loads((run.verification / "results.json").read_text())


def test_verify_tests_both_checkpoints_measures_and_answers_every_check(verified):
    run, reference = verified
    found = results_of(run)
    assert [check["id"] for check in found["checks"]] == list(CHECKS)
    status = {check["id"]: check["status"] for check in found["checks"]}
    for id_ in ("weights", "load_back", "round_trip", "panels", "identities", "data"):
        assert status[id_] == "pass", found["checks"]
    assert status["variance"] == "skip"
    assert (run.evaluation / "test" / "best.parquet").is_file()
    assert (run.evaluation / "reference" / "test" / f"{reference.stem}.parquet").is_file()
    assert found["reference"]["name"] == "reference"
    assert {"report.md", "report.html", "figures", "evidence"} <= {path.name for path in run.verification.iterdir()}


def test_a_report_is_made_again_to_the_byte_without_torch(verified, tmp_path: Path):
    run = RunFolder(Path(shutil.copytree(verified[0].path, tmp_path / "other" / "mine")))
    before = {path: path.read_bytes() for path in run.verification.rglob("*") if path.is_file()}
    for path in (run.verification / "report.md", run.verification / "report.html"):
        path.unlink()
    command = [sys.executable, "-c", WITHOUT_TORCH, "verify", "--run", run.path, "--report-only"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if results_of(run)["summary"]["ok"] else 1), done.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_machine_without_torch_judges_what_is_there(verified, tmp_path: Path):
    run = RunFolder(Path(shutil.copytree(verified[0].path, tmp_path / "other" / "mine")))
    before = results_of(run)
    table = run.evaluation / "reference" / "test" / "reference.parquet"
    command = [sys.executable, "-c", WITHOUT_TORCH, "verify", "--run", run.path, "--no-measure", "--reference", table]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert "error" not in done.stderr, done.stderr
    for now, then in zip(results_of(run)["checks"], before["checks"], strict=True):
        assert now == then


def test_exit_code_is_1_unless_all_required_checks_passed(cli, own_run):
    table = own_run.evaluation / "reference" / "test" / "reference.parquet"
    flags = ("verify", "--run", own_run.path, "--no-measure")
    assert cli(*flags, "--require", "identities").code == 0
    everything = cli(*flags, "--reference", table, "--require", "all", "--format", "json")
    assert everything.code == 1
    assert "variance" in json.loads(everything.out)["summary"]["required_not_passed"]  # skipped, hence not passed
    assert "variance" not in cli(*flags, "--require", "identities").out.split("required, and not passed")[1:]
    default = cli(*flags)
    assert default.code == 1
    assert "required, and not passed: parity" in default.out
    assert "No reference was given" in default.out


def test_unknown_check_is_refused_before_anything_is_done(cli, own_run):
    outcome = cli("verify", "--run", own_run.path, "--require", "parity,magic")
    assert outcome.code == 2
    assert "no check 'magic'" in outcome.err
    assert "loading" not in outcome.err


def test_table_of_other_weights_than_the_run_has_is_not_judged(cli, own_run):
    content = torch.load(own_run.best, weights_only=True)
    content["state_dict"] = {k: v * 2 if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    torch.save(content, own_run.best)
    outcome = cli("verify", "--run", own_run.path, "--no-measure", "--format", "json")
    assert outcome.code == 1
    checks = {check["id"]: check for check in json.loads(outcome.out)["checks"]}
    for id_ in ("parity", "events", "calibration", "identities"):
        assert checks[id_]["status"] == "skip"
        assert "made from other weights" in checks[id_]["reason"]


def test_evidence_of_other_weights_than_the_run_has_is_not_judged(cli, own_run):
    file = own_run.verification / "evidence" / "weights.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"measured_on": "0" * 64}))
    outcome = cli("verify", "--run", own_run.path, "--no-measure", "--format", "json")
    checks = {check["id"]: check for check in json.loads(outcome.out)["checks"]}
    assert (checks["weights"]["status"], checks["load_back"]["status"]) == ("skip", "pass")
    assert "measured on other weights" in checks["weights"]["reason"]


def test_reference_over_other_chips_fails_parity_by_name(cli, own_run, tmp_path: Path):
    table = chip_table.read(own_run.evaluation / "reference" / "test" / "reference.parquet")
    chip_table.write(table.subset(table.chips[1:]), tmp_path / "fewer.parquet")
    outcome = cli("verify", "--run", own_run.path, "--no-measure", "--reference", tmp_path / "fewer.parquet")
    assert outcome.code == 1
    assert "wrong reference: other chips: 1" in outcome.out


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", b"{}"])
def test_damaged_reference_is_an_error_that_names_it(cli, own_run, tmp_path: Path, content):
    (tmp_path / "r.parquet").write_bytes(content)
    outcome = cli("verify", "--run", own_run.path, "--no-measure", "--reference", tmp_path / "r.parquet")
    assert outcome.code == 1
    assert "r.parquet" in outcome.err
    assert len(outcome.report) <= 3


def test_folder_without_a_run_is_refused(cli, tmp_path: Path):
    outcome = cli("verify", "--run", tmp_path)
    assert outcome.code == 2
    assert "no run folder" in outcome.err


def test_output_that_cannot_be_written_is_an_error(cli, own_run, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    outcome = cli("verify", "--run", own_run.path, "--no-measure", "--output", tmp_path / "file")
    assert outcome.code == 1
    assert "cannot be written" in outcome.err


def test_an_incident_stands_in_results_and_at_the_top_of_the_report(cli, own_run):
    incident = {"kind": "loss", "detail": "the loss is nan", "module": "model.neck", "epoch": 1, "step": 7, "chips": []}
    own_run.update_record(
        incidents=[incident], rollback={"step": 7, "state": "last.ckpt", "precision": ["16-mixed", "bf16-mixed"]}
    )
    outcome = cli("verify", "--run", own_run.path, "--no-measure")
    report = (own_run.verification / "report.md").read_text()
    for text in (outcome.out, report[: report.index("## Scores")]):
        assert "rolled back at step 7" in text
        assert "the loss is nan" in text


def test_a_table_that_lies_nowhere_near_a_run_is_of_no_run():
    assert battery.run_of(Path("/table.parquet")) is None
