"""Publishing: what is listed is what is uploaded, in one commit, by huggingface_hub's own client to a local server."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from conftest import files_of
from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError
from floodrepro.publishing.card import write_card
from floodrepro.publishing.upload import make_plan, upload
from hub_server import HubServer
from verification_fixtures import gather, keep, make_run, summarise, write_pair

REPO = "me/flood"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The export of a verified run to which nothing objects."""
    run = make_run(tmp_path / "runs" / "mine")
    results = summarise(gather(run))
    results["summary"]["objection"] = ""
    keep(results, run)
    write_card(write_pair(run), run.best, recipes.read_yaml(run.recipe), run, licence="apache-2.0")
    return run.export


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


@pytest.fixture
def publish(cli, server, monkeypatch):
    """Publish from this process, which is offline but for the local server."""
    server.speak_to(monkeypatch)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")

    def call(folder: Path, *flags: str, token: str = server.token):
        monkeypatch.setenv("HF_TOKEN", token)
        return cli("publish", "--export", folder, "--repo", REPO, *flags)

    return call


def edit_results(folder: Path, part: str, **changes: str) -> None:
    results = json.loads((folder / "results.json").read_text())
    (results["run"]["checkpoint"] if part == "checkpoint" else results[part]).update(changes)
    (folder / "results.json").write_text(json.dumps(results))


def told(outcome, *words: str) -> None:
    assert (outcome.code, len(outcome.report)) == (1, 3), outcome.err
    for word in words:
        assert word in "\n".join(outcome.report)


def dry(cli, folder: Path) -> dict:
    return json.loads(cli("publish", "--export", folder, "--repo", REPO, "--dry-run", "--format", "json").ok().out)


def test_dry_run_lists_files_hashes_and_place_and_nothing_is_sent_without_a_yes(server, exported: Path, publish):
    (exported / "notes.txt").write_text("mine")
    done = publish(exported, "--dry-run", "--branch", "v2").ok()
    for name in ("README.md", "mine.safetensors", "mine.yaml", "results.json"):
        assert f"{name}: {hashlib.sha256((exported / name).read_bytes()).hexdigest()}" in done.out
    for line in (f"endpoint: {server.url}", f"repo: {REPO}", "branch: v2", "licence: apache-2.0", "- notes.txt"):
        assert line in done.out
    silent = publish(exported)
    assert (silent.code, "--dry-run --yes is required" in silent.err) == (2, True)
    assert server.requests == []


def test_one_commit_of_a_private_repository_has_the_same_bytes(server, exported: Path, publish):
    done = publish(exported, "--yes", "--private", "--format", "json")
    model = server.models[REPO]
    assert (model.private, model.branches["main"]) == (True, [{}, files_of(exported)])
    assert model.messages == ["Add mine.safetensors"]
    assert json.loads(done.out)["commit"].startswith(f"{server.url}/{REPO}/commit/")


def test_branch_is_made_and_a_public_repository_takes_nothing_private(server, exported: Path, publish):
    assert publish(exported, "--yes", "--branch", "seed-7").code == 0
    branches = server.models[REPO].branches
    assert branches["seed-7"][-1] == files_of(exported)
    told(publish(exported, "--yes", "--private"), "is public already")
    assert branches["main"] == [{}]


def test_token_that_is_refused_missing_or_of_no_right_and_no_hub_are_told(server, exported: Path, publish, monkeypatch):
    told(publish(exported, "--yes", token="hf_wrong"), "401", "hf auth login")
    assert server.models == {}
    told(publish(exported, "--yes", "--repo", "someone-else/flood"), "403", "don't have the rights")
    told(publish(exported, "--yes", token=""), "401", "hf auth login")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told(publish(exported, "--yes"), "HF_HUB_OFFLINE")
    assert server.models == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:pa55@127.0.0.1:9")  # discard: nobody listens
    told(down := publish(exported, "--yes"), "cannot be reached", "HF_ENDPOINT")
    assert "pa55" not in down.err


def test_run_that_was_not_verified_and_required_checks_that_are_not_met_have_to_be_forced(server, exported, publish):
    edit_results(exported, "summary", objection="Required and not met: Weights and buffers.")
    told(publish(exported, "--yes"), "Weights and buffers", "--force")
    (exported / "results.json").unlink()
    told(publish(exported, "--yes"), "not verified", "--force")
    assert server.requests == []
    assert publish(exported, "--yes", "--force").code == 0


def test_undecided_comparison_is_published_with_its_word_and_results_of_other_weights_are_not(cli, exported: Path):
    edit_results(exported, "verdict", word="undecided", outcome="undecided")
    plan = dry(cli, exported)
    assert (plan["objection"], plan["verdict"].split(". ")[0]) == ("", "undecided")
    edit_results(exported, "checkpoint", sha256="a" * 64)
    told(cli("publish", "--export", exported, "--repo", REPO, "--yes"), "of another version or checkpoint")
    edit_results(exported, "run", checkpoint="text")
    told(cli("publish", "--export", exported, "--repo", REPO, "--dry-run"), "results are missing, damaged")


def test_card_in_the_authors_own_words_is_published_as_it_is_unless_it_cannot_be_read(cli, exported: Path):
    (exported / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    assert dry(cli, exported)["licence"] == "mit"
    (exported / "README.md").write_text("no metadata at all\n")
    assert dry(cli, exported)["licence"] == ""
    for damaged in (b"---\nlicense: [mit\n---\nwords\n", b"---\nlicense: mit\n---\n\xff\xfe\n"):
        (exported / "README.md").write_bytes(damaged)
        outcome = cli("publish", "--export", exported, "--repo", REPO, "--dry-run")
        assert (outcome.code, "README.md" in outcome.report[1]) == (1, True)


def test_what_changed_after_it_was_listed_and_links_are_not_uploaded(server, exported: Path, publish):
    plan = make_plan(exported, REPO, branch="main", private=False)
    publish(exported, "--dry-run")  # sets the token
    (exported / "README.md").write_text("another card")
    with pytest.raises(CheckpointError, match=r"README\.md has changed since it was listed"):
        upload(plan)
    (exported / "README.md").unlink()
    (exported / "README.md").symlink_to("/etc/hostname")
    refused = publish(exported, "--yes")
    assert (refused.code, "this is a link" in refused.err) == (2, True)
    assert server.requests == []


def test_name_that_can_be_no_repository_and_a_folder_without_a_whole_pair_and_a_card_are_refused(cli, exported: Path):
    for repo in ("flood", "a/b/c", "me/", "me/flood..git"):
        assert cli("publish", "--export", exported, "--repo", repo, "--dry-run").code == 2
    for name, code in {"mine.yaml": 1, "README.md": 2, "mine.safetensors": 2}.items():
        (exported / name).unlink()
        assert cli("publish", "--export", exported, "--repo", REPO, "--dry-run").code == code
