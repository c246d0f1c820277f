"""Every command of the README is one that the program takes."""

import shlex

import pytest
import yaml

from conftest import ROOT
from doc_commands import DOCUMENTS, commands_of
from floodrepro.cli.main import COMMANDS

COMMAND_LINES = [shlex.join(["floodrepro", *c.words]) for c in commands_of("README.md", DOCUMENTS["README.md"])]
# Run by other tests with these very flags, or not without a GPU and 200 GB; here it counts that they parse.
SCRIPTS = ("scripts/reproduce.sh --demo", "scripts/test.sh")


def test_readme_has_commands():
    assert len(COMMAND_LINES) >= 8
    assert all(script in (ROOT / "README.md").read_text() for script in SCRIPTS)
    assert all((ROOT / script.split()[0]).is_file() for script in SCRIPTS)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("floodrepro fit ")])
def test_fit_commands_of_the_readme_resolve(line, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "mine.yaml" in line:
        assert cli("configs", "cp", "demo", "mine.yaml").code == 0
    outcome = cli(*shlex.split(line)[1:], "--print_config")
    assert outcome.code == 0, outcome.err
    assert "model" in yaml.safe_load(outcome.out)


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in COMMAND_LINES
        if line.split()[1] in ("validate", "test", "predict", "export") and "--card-only" not in line
    ],
)
def test_checkpoint_commands_of_the_readme_run_on_a_trained_run(line, cli, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = shlex.split(line)[1:]
    name = next(word for word in words if word.startswith("runs/")).split("/")[1]
    (tmp_path / "runs" / name).symlink_to(trained.path)
    if words[0] == "export":
        words += ["--output", "export"]  # the trained run is shared with other tests
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out


@pytest.mark.parametrize(
    "line", [line for line in COMMAND_LINES if line.split()[1] in ("configs", "data", "bench", "doctor")]
)
def test_other_commands_of_the_readme_run(line, cli, chips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ImpactMesh-Flood").symlink_to(chips)
    words = shlex.split(line)[1:]
    if words[:2] == ["data", "fetch"]:  # needs the network; test_fetch.py runs it against a local hub
        (tmp_path / "ImpactMesh-Flood").unlink()
        assert "HF_HUB_OFFLINE" in cli(*words).report[0]
        return
    if words[0] == "doctor":  # what it finds depends on the machine; test_doctor.py plants the faults
        assert "torch" in cli(*words).out
        return
    if words[0] == "bench":
        words += ["--chips", "6", "--size", "64", "--rounds", "2"]
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err


def test_readme_shows_every_command():
    assert {line.split()[1] for line in COMMAND_LINES} == set(COMMANDS)
