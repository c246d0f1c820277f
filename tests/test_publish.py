"""Publishing: what is listed is what is uploaded, in one commit, by huggingface_hub's own client to a local server."""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from card_runs import make_run, verify
from floodrepro.errors import CheckpointError
from hub_server import HubServer, Model

REPO = "me/flood"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "mine")
    verify(run)
    return run


@pytest.fixture
def exported(cli, run, tmp_path) -> Path:
    """The export of a run whose required checks passed."""
    outcome = cli("export", "--run", run.path, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    return tmp_path / "out"


@pytest.fixture
def failed(cli, tmp_path) -> Path:
    """The export of a run of which a required check failed."""
    run = make_run(tmp_path / "runs" / "failed")
    verify(run, failing="weights")
    assert cli("export", "--run", run.path).code == 0
    return run.export


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def publish(cli, server, monkeypatch):
    """Publish from this process, which is offline but for the local server."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()  # one that an earlier test opened may know a proxy

    def call(folder: Path, *flags: str, token: str = server.token):
        monkeypatch.setenv("HF_TOKEN", token)
        return cli("publish", "--export", folder, "--repo", REPO, *flags)

    return call


def environment(server: HubServer, folder: Path) -> dict[str, str]:
    """What a user's shell would hold."""
    return {
        **{"PATH": os.environ["PATH"], "HOME": str(folder.parent), "HF_HOME": str(folder.parent / "hf")},
        **{"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
        **{"NO_PROXY": "*", "HF_TOKEN": server.token, "HF_HUB_DISABLE_XET": "1"},
        **{name: value for name, value in os.environ.items() if name == "PYTHONPATH"},
    }


def in_own_process(server: HubServer, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "floodrepro", "publish", "--export", str(folder), "--repo", REPO, *flags]
    env = environment(server, folder)
    return subprocess.run(argv, capture_output=True, text=True, env=env, check=False, timeout=60)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def dry(cli, folder: Path, *flags: str) -> dict:
    outcome = cli("publish", "--export", folder, "--repo", REPO, "--dry-run", "--format", "json", *flags)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


# Looking before leaping


def test_dry_run_lists_files_hashes_and_place_and_contacts_nobody(server, exported):
    done = in_own_process(server, exported, "--dry-run", "--branch", "v2")
    assert done.returncode == 0, done.stderr
    for name, content in files_of(exported).items():
        assert re.search(rf"{re.escape(name)} +{len(content):,} +{hashlib.sha256(content).hexdigest()}", done.stdout)
    assert f"{server.url}/{REPO}" in done.stdout
    assert "branch v2" in done.stdout
    assert json.loads((exported / "results.json").read_text())["verdict"]["sentences"][0] in done.stdout
    assert server.requests == []


def test_other_files_of_the_folder_stay_and_are_named(cli, exported):
    (exported / "notes.txt").write_text("mine")
    plan = dry(cli, exported)
    assert plan["left_out"] == ["notes.txt"]
    assert sorted(plan["files"]) == ["README.md", "mine.safetensors", "mine.yaml", "results.json"]
    assert plan["objection"] == ""


def test_without_a_terminal_and_without_yes_nothing_is_sent(server, exported, publish):
    done = publish(exported)
    assert done.code == 2
    assert "no terminal to ask on" in done.err
    assert server.requests == []


@pytest.mark.parametrize(("typed", "code", "commits"), [(REPO, 0, 2), ("yes", 2, None)])
def test_on_a_terminal_the_repositorys_name_has_to_be_typed(server, exported, typed, code, commits):
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "floodrepro", "publish", "--export", str(exported), "--repo", REPO]
    streams = {"stdin": theirs, "stderr": theirs, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment(server, exported), text=True, **streams) as process:
        os.close(theirs)
        os.write(ours, f"{typed}\n".encode())
        out = process.stdout.read()
    asked = os.read(ours, 2**16).decode()
    os.close(ours)
    assert process.returncode == code, asked
    assert f"type {REPO} to upload" in asked
    if commits:
        assert len(server.models[REPO].branches["main"]) == commits
        assert server.url in out
    else:
        assert server.requests == []


# The upload


def test_upload_is_one_commit_and_the_same_bytes(server, exported):
    done = in_own_process(server, exported, "--yes", "--private", "--format", "json")
    assert done.returncode == 0, done.stderr
    model = server.models[REPO]
    assert model.private
    assert model.branches["main"] == [{}, files_of(exported)]
    assert model.messages == ["Add mine.safetensors"]
    assert json.loads(done.stdout)["commit"].startswith(f"{server.url}/{REPO}/commit/")


def test_branch_is_made_and_main_left_alone(server, exported, publish):
    assert publish(exported, "--yes", "--branch", "seed-7").code == 0
    branches = server.models[REPO].branches
    assert branches["main"] == [{}]
    assert branches["seed-7"][-1] == files_of(exported)


def test_private_is_not_uploaded_into_a_repository_that_is_public_already(server, exported, publish):
    server.models[REPO] = Model(private=False)
    done = publish(exported, "--yes", "--private")
    assert done.code == 1
    assert "exists already and is public" in done.err
    assert server.models[REPO].branches["main"] == [{}]


# What the hub may answer


def told(outcome, *words: str) -> None:
    assert outcome.code == 1
    assert len(outcome.report) == 3, outcome.err
    for word in words:
        assert word in "\n".join(outcome.report)


def test_token_that_is_refused_missing_or_of_no_right_is_told(server, exported, publish, monkeypatch):
    told(publish(exported, "--yes", token="hf_wrong"), "HTTP 401", "hf auth login")
    assert server.models == {}
    told(publish(exported, "--yes", "--repo", "someone-else/flood"), "HTTP 403", "don't have the rights")
    server.requests.clear()
    told(publish(exported, "--yes", token=""), "no token", "hf auth login")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told(publish(exported, "--yes"), "HF_HUB_OFFLINE")
    assert server.requests == []


def test_repository_that_vanishes_and_hub_that_is_not_there_are_told(server, exported, publish, monkeypatch):
    server.models = Forgetful()
    told(publish(exported, "--yes"), "HTTP 404", "--repo")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens
    told(publish(exported, "--yes"), "cannot be reached", "HF_ENDPOINT")


class Forgetful(dict):
    """Repositories that are gone as soon as they are made."""

    def __setitem__(self, key: str, value: object) -> None:
        pass


# What must not be published by accident


def test_required_checks_that_did_not_pass_have_to_be_said_word_for_word(server, failed, publish):
    sentence = "Required checks did not pass: weights (failed)."
    told(publish(failed, "--yes"), sentence, "--publish-anyway")
    told(publish(failed, "--yes", "--publish-anyway", "Required checks did not pass"), sentence)
    assert server.requests == []
    done = publish(failed, "--yes", "--publish-anyway", sentence)
    assert done.code == 0, done.err
    card = server.models[REPO].branches["main"][-1]["README.md"].decode()
    assert card.split("\n---\n", 1)[1].strip().startswith(f"**{sentence}**")


def test_run_that_was_not_verified_is_not_published_unsaid(cli, tmp_path):
    run = make_run(tmp_path / "bare")
    assert cli("export", "--run", run.path).code == 0
    assert dry(cli, run.export)["objection"] == "Not verified: none of the required checks was run."
    refusal = cli("publish", "--export", run.export, "--repo", REPO, "--yes")
    assert (refusal.code, len(refusal.report)) == (1, 3)


def test_edited_card_has_to_be_said(cli, exported):
    card = exported / "README.md"
    card.write_text(card.read_text().replace("0.4667", "0.9667"))
    assert dry(cli, exported)["objection"] == "README.md was edited after the export."
    assert cli("publish", "--export", exported, "--repo", REPO, "--yes").code == 1


def test_card_that_no_longer_begins_with_the_failure_is_refused_whatever_is_said(cli, failed):
    card, sentence = failed / "README.md", "Required checks did not pass: weights (failed)."
    card.write_text(card.read_text().replace(f"**{sentence}**", "All is well."))
    said = f"{sentence} README.md was edited after the export."
    refusal = cli("publish", "--export", failed, "--repo", REPO, "--yes", "--publish-anyway", said)
    assert refusal.code == 1
    assert f"does not say: {sentence}" in refusal.err


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.yaml", "results.json"])
def test_file_that_is_another_than_the_card_speaks_of_is_refused(cli, exported, name):
    with (exported / name).open("ab") as file:
        file.write(b" ")
    refusal = cli("publish", "--export", exported, "--repo", REPO, "--dry-run")
    assert refusal.code == 1
    assert f"{name} is not the file that the card speaks of" in refusal.err
    (exported / name).unlink()
    assert "it is missing" in cli("publish", "--export", exported, "--repo", REPO, "--dry-run").err


def test_good_results_of_other_weights_are_refused_even_with_a_matching_seal(cli, failed, exported):
    """The results of a run that passed, beside the weights of one that failed, and the seal forged to fit."""
    shutil.copy(exported / "results.json", failed / "results.json")
    results = json.loads((failed / "results.json").read_text())
    results["run"]["checkpoint"]["sha256"] = "a" * 64
    (failed / "results.json").write_text(json.dumps(results))
    card = failed / "README.md"
    digest = hashlib.sha256((failed / "results.json").read_bytes()).hexdigest()
    card.write_text(re.sub(r'("results.json": ")[0-9a-f]+', rf"\g<1>{digest}", card.read_text()))
    refusal = cli("publish", "--export", failed, "--repo", REPO, "--dry-run")
    assert refusal.code == 1
    assert f"results.json is of the checkpoint {'a' * 64}" in refusal.err


def test_folder_without_a_card_of_floodrepros_is_refused(cli, exported):
    (exported / "README.md").unlink()
    for content in (None, "# my own card\n"):
        if content:
            (exported / "README.md").write_text(content)
        refusal = cli("publish", "--export", exported, "--repo", REPO, "--dry-run")
        assert refusal.code == 2
        assert "--card-only" in refusal.err


@pytest.mark.parametrize("repo", ["flood", "a/b/c", "me/", "me/flood..git"])
def test_name_that_can_be_no_repository_is_a_usage_error(cli, exported, repo):
    assert cli("publish", "--export", exported, "--repo", repo, "--dry-run").code == 2


def test_file_that_changes_between_the_plan_and_the_upload_is_not_sent(server, exported, publish, monkeypatch):
    from floodrepro.publishing import upload

    plan = upload.make_plan(exported, REPO, branch="main", private=False)
    next(exported.glob("*.yaml")).write_text("another: text\n")
    monkeypatch.setenv("HF_TOKEN", server.token)
    with pytest.raises(CheckpointError, match=r"\.yaml was changed since the plan was made"):
        upload.upload(plan)
    assert len(server.models[REPO].branches["main"]) == 1  # the repository's own beginning
