"""Seeds: the same one gives the same bits, declared ones are all run and none is dropped."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from floodrepro.errors import UsageError
from floodrepro.evaluation.checkpoint import read_checkpoint
from floodrepro.run_folder import RunFolder
from floodrepro.training.declared import parse_seeds
from floodrepro.training.determinism import plain_attention, undetermined_operations

SHORT = ("--trainer.max_epochs", 1, "--data.init_args.batch_size", 2, "--trainer.limit_train_batches", 2)


@pytest.fixture
def fit(cli, chips: Path, tmp_path: Path):
    def run(*extra: object):
        return cli("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, *SHORT, *extra)

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(path / "checkpoints" / "last.ckpt").weights)


def test_one_seed_gives_one_result_and_another_seed_another(fit, tmp_path: Path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        outcome = fit("--seed", seed, "--name", name)
        assert outcome.code == 0, outcome.err
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == (tmp_path / "b" / "metrics.csv").read_bytes()
    assert RunFolder(tmp_path / "c").read_record()["seed"] == 8


def test_declared_runs_are_written_down_first_and_a_failure_stays_listed(fit, tmp_path: Path):
    taken = tmp_path / "three" / "seed-8"
    taken.mkdir(parents=True)
    (taken / "notes.txt").write_text("another's")  # this run cannot begin
    outcome = fit("--seeds", "7,8,9", "--name", "three", "--format", "json")
    assert outcome.code == 1
    runs = json.loads(outcome.out)["runs"]
    assert {seed: run["status"] for seed, run in runs.items()} == {"7": "finished", "8": "not started", "9": "finished"}
    assert "seed 8 failed and stays listed" in outcome.err
    declared = json.loads((tmp_path / "three" / "declared.json").read_text())
    assert declared["seeds"] == [7, 8, 9]
    assert (taken / "notes.txt").read_text() == "another's"
    started = RunFolder(tmp_path / "three" / "seed-7").read_record()["started"]
    assert declared["declared"] <= started
    again = fit("--seeds", "7,8,9", "--name", "three")
    assert "seed 7 is finished already" in again.err
    other = fit("--seeds", "7,9", "--name", "three")
    assert other.code == 2
    assert "other runs were declared here" in other.err
    recipe = fit("--seeds", "7,8,9", "--name", "three", "--optimizer.init_args.lr", "2e-4")
    assert recipe.code == 2
    assert "the recipe differs" in recipe.err


def test_an_index_runs_its_own_seed_only(fit, tmp_path: Path):
    outcome = fit("--seeds", "7,8", "--name", "array", "--index", 1)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "array").iterdir()) == ["declared.json", "seed-8"]
    assert fit("--seeds", "7,8", "--name", "array", "--index", 2).code == 2


@pytest.mark.parametrize("text", ["", "7;8", "7,7", "-1,2", "a"])
def test_a_list_of_seeds_is_checked_before_anything_starts(text):
    with pytest.raises(UsageError):
        parse_seeds(text)


def test_deterministic_mode_is_on_and_in_the_record(fit, tmp_path: Path):
    outcome = fit("--deterministic", "--name", "fixed")
    assert outcome.code == 0, outcome.err
    record = RunFolder(tmp_path / "fixed").read_record()
    assert record["environment"]["numerics"]["deterministic_algorithms"] is True
    assert record["undetermined_operations"] == []  # on a CPU
    assert not RunFolder(tmp_path / "fixed").recipe.read_text().count("deterministic: false")


def test_operations_without_a_deterministic_form_are_named_once_and_other_warnings_shown():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as others, undetermined_operations() as names:
            warnings.simplefilter("always")
            torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))
            # What torch's attention says on a GPU.
            said = "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call …"
            warnings.warn(said, stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    finally:
        torch.use_deterministic_algorithms(before)
    assert names == {"put_", "Flash Attention"}
    assert [str(warning.message) for warning in others] == ["something else"]


def test_options_that_may_change_roundings_are_off_recorded_and_part_of_the_run(fit, tmp_path: Path):
    assert fit("--name", "plain").code == 0
    off = {"compiled": False, "channels_last": False, "fused": False}
    assert RunFolder(tmp_path / "plain").read_record()["numerics"] == off
    for name, flag, key in (("nhwc", "--channels-last", "channels_last"), ("one", "--fused", "fused")):
        outcome = fit("--name", name, flag)
        assert outcome.code == 0, outcome.err
        assert RunFolder(tmp_path / name).read_record()["numerics"] == off | {key: True}
    plain, nhwc, fused = (weights(tmp_path / name) for name in ("plain", "nhwc", "one"))
    assert plain.keys() == nhwc.keys() == fused.keys()
    assert all(torch.allclose(plain[name], fused[name], atol=1e-5) for name in plain)
    # NHWC gives the same outputs to 1e-5, but dropout draws in memory order: other masks, and so another run.
    assert not all(torch.equal(plain[name], nhwc[name]) for name in plain)


@pytest.mark.parametrize(("device", "wanted", "kernels"), [("cuda", True, 0), ("cuda", False, 3), ("cpu", True, 3)])
def test_deterministic_runs_on_a_gpu_keep_to_plain_attention(device, wanted, kernels):
    backends = torch.backends.cuda

    def enabled() -> int:
        return sum([backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()])

    assert enabled() == 3
    with plain_attention(torch.device(device), wanted=wanted):
        assert enabled() == kernels
        assert backends.math_sdp_enabled()
    assert enabled() == 3
