"""floodrepro verify and export from the outside: what they judge, what they refuse, and their exit codes."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from floodrepro.evaluation.chip_table import write_table
from floodrepro.run_folder import RunFolder, sha256_of
from floodrepro.verification.checks import CRITERIA
from verification_fixtures import OTHER, make_run, make_table, write_pair

MEASURED = "verification/evidence/measured.json"
ASKED = "weights,exported_pair,panels,identities"
SCRIPT = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "terratorch", "lightning", "impactmesh"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from floodrepro.cli.main import main
code = main(["verify", *sys.argv[2:]])
Path(sys.argv[1], "report.html").rename(Path(sys.argv[1], "before.html"))
sys.exit(code or main(["verify", *sys.argv[2:4], "--report-only"]))
"""
DAMAGED = {
    "evaluation/test/best.parquet": "events",
    "evaluation/val/best.parquet": "identities",
    "metrics.csv": "convergence",
    MEASURED: "weights",
    "run.json": "provenance",
    "../declared.json": "variance",
}


@pytest.fixture(scope="module")
def verified(cli, trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with its export, chip tables and evidence; the reference is the same weights, moved a little."""
    root = tmp_path_factory.mktemp("verify")
    run = RunFolder(Path(shutil.copytree(trained.path, root / "runs" / "mine")))
    content = torch.load(run.best, weights_only=True)
    content["state_dict"] = {k: v * 1.02 if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    torch.save(content, root / "reference.ckpt")
    cli("export", "--run", run.path).ok()
    cli("verify", "--run", run.path, "--reference", root / "reference.ckpt", "--require", ASKED).ok()
    return run


@pytest.fixture
def own_run(verified: RunFolder, tmp_path: Path) -> RunFolder:
    full_states = shutil.ignore_patterns("last.ckpt", "previous.ckpt")
    return RunFolder(Path(shutil.copytree(verified.path, tmp_path / "mine", ignore=full_states)))


@pytest.fixture
def judge(cli, own_run: RunFolder):
    """Judge a run that may be damaged, without measuring; JSON is what it prints."""
    return partial(cli, "verify", "--run", own_run.path, "--no-measure", "--format", "json")


def results_of(run: RunFolder) -> dict:
    return json.loads(run.results.read_text())


def statuses(outcome) -> dict[str, tuple[str, str]]:
    assert outcome.code == 1, outcome.err
    return {check["id"]: (check["status"], check["finding"]) for check in json.loads(outcome.out)["checks"]}


def test_verify_tests_both_checkpoints_measures_and_answers_every_check(verified: RunFolder):
    found = results_of(verified)
    assert [check["id"] for check in found["checks"]] == list(CRITERIA)
    assert found["reference"]["checkpoint"]["name"] == "reference.ckpt"
    assert all(check["code"].endswith(f".{check['id']}") for check in found["checks"])
    assert "twin" not in str(found["checks"])  # the safetensors themselves were loaded
    assert {"report.md", "report.html", "figures", "evidence"} <= {one.name for one in verified.verification.iterdir()}
    assert (verified.verification / "figures" / "panels.png").is_file()


def test_machine_without_torch_judges_what_is_there_and_makes_the_same_report(own_run: RunFolder, tmp_path: Path):
    """The same bytes whatever the hash seed and the user's own style of plots."""
    before, page = results_of(own_run), own_run.verification / "report.html"
    reference = own_run.evaluation / "reference" / "test" / "reference.parquet"
    flags = ["--run", own_run.path, "--no-measure", "--reference", reference, "--require", ASKED]
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nfigure.facecolor: red\n")
    settings = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    drawn = page.read_bytes().partition(b"How to reproduce")[0]  # below it stands when
    command = map(str, [sys.executable, "-c", SCRIPT, own_run.verification, *flags])
    done = subprocess.run([*command], capture_output=True, text=True, check=False, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    assert results_of(own_run)["checks"] == before["checks"]
    assert page.read_bytes() == page.with_name("before.html").read_bytes()
    assert page.read_bytes().partition(b"How to reproduce")[0] == drawn
    assert str(tmp_path).encode() not in page.read_bytes()


def test_exit_code_is_1_where_a_required_check_is_not_met(judge):
    assert judge("--require", "identities").code == 0
    everything = judge("--require", "all")
    assert everything.code == 1
    assert "variance" in json.loads(everything.out)["summary"]["not_met"]  # skipped, and asked for by name
    unknown = judge("--require", "parity,magic")
    assert (unknown.code, "no check 'magic'" in unknown.err) == (2, True)


def test_damaged_files_fail_their_checks(judge, own_run: RunFolder):
    for name in DAMAGED:
        path = own_run.path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"PAR1 \xff\xfe\x00")
    found = statuses(judge())
    assert {found[check][0] for check in DAMAGED.values()} == {"fail"}, found


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("run.json", {"environment": 5, "chips_per_second": "fast"}),
        ("run.json", {"data": {"chips": 5, "events": [1]}, "rollback": [1], "incidents": [1]}),
        (MEASURED, {"checks": {"weights": {"status": "pass", "finding": "x", "plots": [1]}}}),
        ("../declared.json", {"seeds": [1, "../../etc"]}),
        ("metrics.csv", "epoch,step,val/loss,train/loss\nnan,nan,nan,nan\n"),
    ],
)
def test_edited_records_fail_a_check_and_never_abort(cli, tmp_path: Path, file, change):
    run = make_run(tmp_path / "runs" / "mine")
    path = run.path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.is_file() and path.suffix == ".json" else {}
    held |= {"measured_on": sha256_of(run.best)}
    path.write_text(change if isinstance(change, str) else json.dumps(held | change))
    found = statuses(cli("verify", "--run", run.path, "--no-measure", "--format", "json"))
    assert found.keys() == CRITERIA.keys()
    assert any(status == "fail" and "damaged" in finding for status, finding in found.values()), found


def test_damaged_export_fails_what_is_asked_of_it_and_own_readme_does_not_matter(cli, tmp_path: Path):
    run = make_run(tmp_path / "mine")
    pair = write_pair(run)
    pair.write_bytes(pair.read_bytes()[:50])
    (run.export / "README.md").write_text("no metadata, my own words")
    found = statuses(cli("verify", "--run", run.path, "--format", "json"))
    assert (found["exported_pair"][0], "damaged" in found["exported_pair"][1]) == ("fail", True)
    assert found.keys() == CRITERIA.keys()


def test_table_and_evidence_of_other_weights_are_not_judged(judge, own_run: RunFolder):
    own_run.best.write_bytes(b"other weights")
    found = statuses(judge())
    for name in ("parity", "events", "identities", "weights", "panels"):
        assert (found[name][0], "other weights" in found[name][1]) == ("skip", True)


def test_damaged_reference_no_run_and_output_that_cannot_be_written_are_errors(cli, judge, tmp_path: Path):
    reference, file = tmp_path / "r.parquet", tmp_path / "file"
    reference.write_bytes(b"PAR1 not really")
    file.write_text("in the way")
    for flags, says in ((("--reference", reference), "r.parquet"), (("--output", file), "a file cannot be used")):
        outcome = judge(*flags)
        assert (outcome.code, says in outcome.err) == (1, True)
    assert cli("verify", "--run", tmp_path).code == 2


def test_run_is_exported_first_and_gets_its_card_once_it_is_verified(cli, own_run: RunFolder):
    pair = {path: path.read_bytes() for path in own_run.export.glob("mine.*")}
    cli("export", "--run", own_run.path, "--no-card").ok()  # again: nothing is to be done
    assert cli("export", "--run", own_run.path, "--card-only", "--licence", "mit").code == 0
    assert {path: path.read_bytes() for path in own_run.export.glob("mine.*")} == pair
    card = (own_run.export / "README.md").read_text()
    assert results_of(own_run)["verdict"]["sentence"] in card
    assert "](panels.png)" in card
    pictures = (own_run.export / "panels.png", own_run.verification / "figures" / "panels.png")
    assert len({picture.read_bytes() for picture in pictures}) == 1
    assert (own_run.export / "README-2.md").is_file()  # the card of before


def test_unfinished_run_leaves_nothing_behind_and_no_card_exports_all_the_same(cli, own_run: RunFolder):
    shutil.rmtree(own_run.export)
    own_run.update_record(status="interrupted")
    assert cli("export", "--run", own_run.path).code == 1
    assert not own_run.export.exists()
    assert cli("export", "--run", own_run.path, "--no-card").code == 0
    assert sorted(path.name for path in own_run.export.iterdir()) == ["mine.safetensors", "mine.yaml"]


def test_checkpoint_is_not_exported_with_another_models_recipe(cli, verified: RunFolder, tmp_path: Path):
    other = ("--config", "terramind_v1_base_impactmesh_flood_amd", "--output", tmp_path / "export")
    for flags, code in (((), 1), (("--no-card",), 2)):
        assert cli("export", "--ckpt", verified.best, *other, *flags).code == code
    assert not (tmp_path / "export").exists()


def test_two_maps_of_one_scene_are_compared_by_their_tables_over_tiles(cli, tmp_path: Path):
    run, reference = make_run(tmp_path / "mine"), tmp_path / "theirs.parquet"
    own = {"name": "best.ckpt", "sha256": sha256_of(run.best)}
    write_table(make_table(seed=1, split="map", checkpoint=own), run.evaluation / "map" / "best.parquet")
    write_table(make_table(seed=2, split="map", checkpoint=OTHER), reference)
    flags = ("--no-measure", "--split", "map", "--reference", reference, "--require", "parity", "--format", "json")
    found = json.loads(cli("verify", "--run", run.path, *flags).ok().out)
    assert (found["verdict"]["outcome"], found["run"]["split"]) == ("equivalent", "map")
