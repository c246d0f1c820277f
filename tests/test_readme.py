"""The README's commands run as they stand, on generated chips and a run of the demo's recipe."""

import shlex

import pytest

from conftest import ROOT
from doc_commands import DOCUMENTS, Command, commands_of
from floodrepro.cli.main import COMMANDS

ALL = commands_of("README.md", DOCUMENTS["README.md"])
# map needs a scene (tests/test_map_command.py); fit is what the fixture has run; verify: tests/test_verify.py
LEFT_OUT = ("map", "fit", "verify")
RUN = [c for c in ALL if not c.mark and c.words[0] not in LEFT_OUT and "ibm.pt" not in str(c)]


def test_readme_shows_every_command_that_a_newcomer_needs():
    assert {c.words[0] for c in ALL} >= set(COMMANDS) - {"validate", "publish", "bench"}
    assert len(DOCUMENTS["README.md"].splitlines()) <= 110
    assert "scripts/reproduce.sh --demo" in DOCUMENTS["README.md"]
    assert (ROOT / "scripts/reproduce.sh").is_file()


@pytest.mark.parametrize("command", RUN, ids=lambda c: shlex.join(c.words))
def test_command_of_the_readme_runs(command: Command, cli, trained, chips, asked_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained.path)
    (tmp_path / "ImpactMesh-Flood").symlink_to(chips)
    words = list(command.words)
    if words[0] == "export":  # the trained run is shared with other tests
        words += ["--output", "out"]
    told = cli(*words)
    assert told.code in ((0, 1) if words[0] == "doctor" else (0,)), told.err  # it depends on the machine
    assert told.out
