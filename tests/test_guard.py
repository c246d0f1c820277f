"""The guard: what goes wrong is noticed in its epoch, named, recorded, and never overwrites a good state."""

import csv
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import planting
from floodrepro.errors import Incident
from floodrepro.evaluation.checkpoint import read_checkpoint
from floodrepro.run_folder import RunFolder
from floodrepro.training.diagnosis import ForwardOrder, first_not_finite, not_finite

# fp16 as a GPU would train: GradScaler works on a CPU too, only Lightning's precision key does not offer it there.
SCALER = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu"}}
MIXED = {
    "class_path": "lightning.pytorch.plugins.MixedPrecision",
    "init_args": {"precision": "16-mixed", "device": "cpu", "scaler": SCALER},
}
FP16 = ("--trainer.precision", "null", "--trainer.plugins", json.dumps([MIXED]))
OVERFLOW = ("--trainer.callbacks+=planting.Overflow", "--trainer.callbacks.step", "4")  # the second step of epoch 2


@pytest.fixture
def fit(cli, chips: Path, tmp_path: Path):
    def run(*extra: object, epochs: int = 2):
        outcome = cli(
            *("fit", "--config", "demo", "--data-root", chips, "--runs-root", tmp_path, "--name", "run"),
            *("--trainer.max_epochs", epochs, "--trainer.log_every_n_steps", 1, "--data.init_args.batch_size", 2),
            *("--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 1),
            *extra,
        )
        return outcome, RunFolder(tmp_path / "run")

    return run


def rows(run: RunFolder, column: str) -> list[float]:
    with run.metrics.open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def finite(run: RunFolder, name: str) -> bool:
    weights = read_checkpoint(run.checkpoints / name).weights
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_without_the_guard_one_overflow_leaves_finite_losses_and_nan_evaluations(fit):
    outcome, run = fit(*FP16, *OVERFLOW, "--no-guard")
    assert outcome.code == 0, outcome.err  # nothing stops it
    losses = rows(run, "train/loss")
    assert losses[4] != losses[4], "the overflow's own step"
    assert all(loss == loss for loss in losses[5:6]), "GradScaler skipped the step and the loss is finite again"
    assert rows(run, "val/loss")[0] == rows(run, "val/loss")[0]
    assert rows(run, "val/loss")[1] != rows(run, "val/loss")[1], "running statistics are poisoned for ever"
    assert not finite(run, "last.ckpt")


def test_guarded_training_stops_in_that_epoch_names_the_layer_and_keeps_good_checkpoints(fit):
    outcome, run = fit(*FP16, *OVERFLOW)
    assert outcome.code == 3
    assert len(outcome.report) <= 3
    assert "step 4, epoch 2" in outcome.report[0]
    assert "model.neck.2.fpn1.1" in outcome.report[0]  # the first BatchNorm after the layer that overflowed
    incident = json.loads((run.path / "incident.json").read_text())
    assert incident["kind"] == "loss"
    assert incident["module"] == "model.neck.2.fpn1.1"
    assert (incident["step"], incident["epoch"]) == (4, 1)
    assert len(incident["chips"]) == 2
    assert all(chip.startswith("EMSR") for chip in incident["chips"])
    record = run.read_record()
    assert record["incidents"] == [incident]
    assert record["status"] == "failed"
    assert finite(run, "best.ckpt")
    assert finite(run, "last.ckpt")


def test_rollback_goes_on_in_bf16_once_and_is_recorded(fit):
    outcome, run = fit(*FP16, *OVERFLOW, "--on-overflow", "rollback")
    assert outcome.code == 0, outcome.err
    record = run.read_record()
    assert record["status"] == "finished"
    assert record["rollback"]["step"] == 4
    assert record["rollback"]["state"] == "last.ckpt"
    assert record["rollback"]["precision"][1] == "bf16-mixed"
    assert len(record["incidents"]) == 1
    assert record["environment"]["numerics"]["precision"] == "bf16-mixed"
    assert "rolled back to last.ckpt" in outcome.err
    assert rows(run, "val/loss")[1] == rows(run, "val/loss")[1]
    assert finite(run, "last.ckpt")


def test_rollback_before_the_first_own_state_goes_to_the_one_that_the_run_was_given(fit, tmp_path: Path):
    outcome, run = fit(epochs=1)
    assert outcome.code == 0, outcome.err
    before = rows(run, "train/loss")
    given = run.path.rename(tmp_path / "before") / "checkpoints" / "last.ckpt"
    outcome, run = fit(*FP16, *OVERFLOW, "--on-overflow", "rollback", "--resume", given, "--resume-anyway")
    assert outcome.code == 0, outcome.err
    assert run.read_record()["rollback"]["state"] == "last.ckpt, which the run was started from"
    losses = rows(run, "train/loss")
    assert (losses[:3], len(losses)) == (before, 6), "the first epoch is the given state's, in fp32 as it was"


def test_rollback_starts_when_the_failed_step_is_out_of_memory(fit, monkeypatch):
    monkeypatch.setattr(planting.Forgotten, "graphs", [])
    gc.collect()
    gc.disable()  # it might come by in time, or not
    try:
        outcome, _ = fit(*FP16, *OVERFLOW, "--trainer.callbacks+=planting.Forgotten", "--on-overflow", "rollback")
    finally:
        gc.enable()
    assert outcome.code == 0, outcome.err
    assert len(planting.Forgotten.graphs) > 5, "the failed attempt and the one after it"


def test_a_second_overflow_after_a_rollback_stops_the_run(fit):
    poison = ("--trainer.callbacks+=planting.Poison", "--trainer.callbacks.step", 4)
    outcome, run = fit(*poison, "--trainer.callbacks.name", "model.head.head.2.bias", "--on-overflow", "rollback")
    assert outcome.code == 3, outcome.err
    assert len(run.read_record()["incidents"]) == 2
    assert finite(run, "best.ckpt")


def test_poisoned_running_statistics_are_found_before_the_validation_of_their_epoch(fit):
    name = "model.decoder.decoder.blocks.1.conv1.1.running_var"
    outcome, run = fit(
        *("--trainer.callbacks+=planting.Poison", "--trainer.callbacks.step", 3, "--trainer.callbacks.name", name)
    )
    assert outcome.code == 3
    incident = json.loads((run.path / "incident.json").read_text())
    assert incident["kind"] == "state"
    assert incident["module"] == name.rsplit(".", 1)[0]
    assert incident["step"] == 3
    assert incident["epoch"] == 0
    assert not run.best.exists(), "nothing was measured or saved with it"
    assert not (run.checkpoints / "last.ckpt").exists()


def test_weights_are_checked_before_a_state_within_the_epoch_is_saved(fit):
    name = "model.head.head.2.weight"
    poison = ("--trainer.callbacks+=planting.Poison", "--trainer.callbacks.step", 4, "--trainer.callbacks.name", name)
    outcome, run = fit(*poison, "--save-every", 2)
    assert outcome.code == 3
    assert torch.load(run.checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
    assert finite(run, "last.ckpt")


def test_one_class_everywhere_warns_twice_and_stops_the_third_time(fit):
    outcome, run = fit("--trainer.callbacks+=planting.OneClass", epochs=5)
    assert outcome.code == 3
    assert outcome.err.count("class 0 was predicted everywhere in validation") == 3  # two warnings and the report
    assert json.loads((run.path / "incident.json").read_text())["kind"] == "collapse"
    assert run.read_record()["incidents"][0]["epoch"] == 2


def test_collapse_is_no_overflow_and_not_rolled_back(fit):
    outcome, run = fit("--trainer.callbacks+=planting.OneClass", "--on-overflow", "rollback", epochs=5)
    assert outcome.code == 3
    assert "rollback" not in run.read_record()


def test_gradient_norms_loss_scale_and_skipped_steps_are_logged_per_epoch(fit):
    outcome, run = fit(*FP16)
    assert outcome.code == 0, outcome.err
    assert len(rows(run, "train/grad_norm")) == 2
    assert all(
        0 <= norm <= largest
        for norm, largest in zip(rows(run, "train/grad_norm"), rows(run, "train/grad_norm_max"), strict=True)
    )
    assert rows(run, "train/grad_norm")[1] > 0  # the first step's is inf: it is skipped and not counted
    assert rows(run, "train/loss_scale")[0] > 0
    # GradScaler starts at 65,536 and halves it until gradients fit: a step is skipped each time.
    skipped = rows(run, "train/skipped_steps")[-1]
    assert rows(run, "train/loss_scale")[-1] == 65536 / 2**skipped
    assert run.read_record()["progress"]["skipped_steps"] == skipped


def test_gradient_norms_of_adamw_in_one_kernel_are_not_those_of_the_scaled_loss(fit):
    """Lightning leaves unscaling to an optimizer that does it itself, after the guard has looked."""
    norms = {}
    for option in ((), ("--fused",)):
        outcome, run = fit(*FP16, *option)
        assert outcome.code == 0, outcome.err
        norms[option] = rows(run, "train/grad_norm") + rows(run, "train/grad_norm_max")
        run.path.rename(run.path.with_name(f"run{len(norms)}"))
    assert norms[()][1] > 0  # of the second epoch: the first step's is inf
    assert norms[("--fused",)] == pytest.approx(norms[()], rel=0.02)


@pytest.mark.parametrize(("batches", "accumulate"), [(3, 1), (1, 2)])  # of twelve chips
def test_loss_of_an_epoch_is_the_mean_of_its_steps(fit, batches, accumulate):
    """An accumulated loss reaches callbacks divided; an epoch's last batch ends a step, and is logged, in any case."""
    outcome, run = fit(
        *("--data.init_args.batch_size", 12 // batches, "--trainer.accumulate_grad_batches", accumulate),
    )
    assert outcome.code == 0, outcome.err
    steps = np.reshape(rows(run, "train/loss"), (2, batches))
    assert len(np.unique(steps)) == steps.size
    assert rows(run, "train/loss_epoch") == pytest.approx(steps.mean(axis=1).tolist(), rel=1e-6)


class Chain(nn.Module):
    """Named against their forward order."""

    def __init__(self) -> None:
        super().__init__()
        self.a_last = nn.BatchNorm1d(2)
        self.b_first = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a_last(self.b_first(x))


def test_modules_are_ranked_in_the_order_in_which_they_run():
    chain, order = Chain(), ForwardOrder()
    order.watch(chain)
    chain(torch.zeros(3, 2))
    order.done()
    assert order.names[:2] == ["b_first", "a_last"]
    with torch.no_grad():
        chain.a_last.weight[0] = float("nan")
        chain.b_first.bias[0] = float("inf")
    assert first_not_finite(not_finite(chain), order.names) == "b_first.bias"
    chain.a_last.running_mean[0] = float("inf")
    # A forward poisons statistics before a step can poison weights.
    assert first_not_finite(not_finite(chain), order.names) == "a_last.running_mean"


def test_large_finite_weights_are_no_incident():
    chain = Chain()
    with torch.no_grad():
        chain.b_first.weight.fill_(3e38)  # their sum overflows
    assert not_finite(chain) == []


def test_hooks_that_learn_the_order_are_taken_away():
    chain, order = Chain(), ForwardOrder()
    order.watch(chain)
    chain(torch.zeros(3, 2))
    order.done()
    assert not any(module._forward_hooks for module in chain.modules())


def test_incident_has_its_own_exit_code():
    assert Incident("loss", "the loss is nan", module=None, epoch=0, step=1, chips=()).exit_code == 3
