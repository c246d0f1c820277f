"""Training through the command line: what a run folder holds, what is refused, and what your own recipe may contain."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

import terratorch_runs  # noqa: F401  # has the backbone of SMALL
from conftest import SMALL, content
from floodrepro import recipe as recipes
from floodrepro.run_folder import RunFolder, sha256_of
from test_splits import ids_of

ONE_STEP = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches=1", "--trainer.limit_val_batches", 1)
CALLBACKS = """
from lightning.pytorch.callbacks import Callback
class Faulty(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        {}["my_missing_key"]
class Overflow(Callback):
    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == 3 and trainer.precision == "32-true":
            next(pl_module.parameters()).data.fill_(float("inf"))
"""


@pytest.fixture
def fit(cli, chips: Path, tmp_path: Path):
    def run(*extra: object, name: str = "run", steps: tuple = ONE_STEP, size: tuple = SMALL, root: Path = chips):
        where = ("--data-root", root, "--runs-root", tmp_path, "--name", name)
        return cli("fit", "--config", "demo", *where, *size, *steps, *extra)

    return run


def test_run_folder_holds_what_was_run_and_its_best_epoch(trained, chips):
    recipe, record = recipes.read_yaml(trained.recipe), trained.read_record()
    assert recipe["trainer"]["max_epochs"] == 2
    assert recipe["data"]["init_args"]["data_root"] == str(chips / "data")
    assert record["recipe_sha256"] == recipes.fingerprint(recipe)
    assert record["recipe_sha256"] in trained.recipe.read_text().splitlines()[0]
    assert (record["status"], record["progress"]["epochs"], record["seed"]) == ("finished", 2, 42)
    assert (set(record["data"]["digests"]), len(record["data"]["listed"])) == ({"train", "val"}, 3)
    assert record["environment"]["packages"]["terratorch"]
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert "epoch 2/2" in trained.log.read_text()
    # Record, metrics and checkpoint agree on the best epoch.
    losses = {int(row["epoch"]): float(row["val/loss"]) for row in trained.read_metrics() if row["val/loss"]}
    saved = torch.load(trained.best, weights_only=True)
    assert sorted(losses) == [0, 1]
    assert record["best_epoch"] == min(losses, key=losses.get) == saved["epoch"]
    assert record["best_metrics"]["val/loss"] == losses[record["best_epoch"]]
    assert (record["monitor"], record["mode"]) == ("val/loss", "min")
    assert record["checkpoint_sha256"] == sha256_of(trained.best)


def test_finished_run_is_left_alone_and_the_same_command_exits_0(cli, trained, chips):
    before = content(trained.path)
    where = ("--data-root", chips, "--runs-root", trained.path.parent, "--name", trained.path.name)
    outcome = cli("fit", "--config", "demo", *where, "--trainer.max_epochs", 2)
    assert (outcome.code, "finished already" in outcome.err, content(trained.path) == before) == (0, True, True)


@pytest.mark.parametrize(("name", "code", "says"), [("run/a.txt", 2, "holds no run"), ("run", 1, "cannot be written")])
def test_what_is_in_the_way_of_the_run_folder_is_left_alone(fit, name, code, says, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    outcome = fit()
    assert (outcome.code, says in outcome.report[0]) == (code, True), outcome.err
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_more_epochs_extend_a_finished_run(fit, tmp_path: Path, monkeypatch):
    forget = "floodrepro.training.terratorch_cli.forget_pretrained_weights"
    with monkeypatch.context() as patch:  # "last" of a run without a state is none: it needs its pretrained weights
        patch.setattr(forget, lambda _: pytest.fail("forgotten"))
        fit("--ckpt_path", "last", "--trainer.max_epochs", 2, "--trainer.max_steps", 1).ok()
    fit("--ckpt_path", "last", "--trainer.max_epochs", 2).ok()  # no longer a limit of steps
    run = RunFolder(tmp_path / "run")
    assert [row["epoch"] for row in run.read_metrics() if row.get("val/loss")] == ["0", "1"]
    record = run.read_record()
    assert (record["status"], record["progress"]["epochs"]) == ("finished", 2)
    for state in ("last", "previous"):
        (run.checkpoints / f"{state}.ckpt").unlink()
    assert fit("--trainer.max_epochs", 3).code == 2 and run.best.is_file()  # from the start it would be overwritten


def test_weights_start_a_new_run_and_what_does_not_fit_is_named(fit, trained, tmp_path: Path):
    start = ("--weights", trained.best, "--optimizer.init_args.lr", 0.0)
    (tmp_path / "run").mkdir()  # of a fit that was killed before its first state
    (tmp_path / "run" / "run.json").write_text('{"status": "running", "started_from": {"file": "x", "sha256": "y"}}')
    fit().ok()
    assert RunFolder(tmp_path / "run").read_record()["started_from"] is None
    shutil.rmtree(tmp_path / "run")
    fit(*start, size=()).ok()
    assert "finished already" in fit(*start, size=()).ok().err  # as every command that is given again
    assert "this one has trained" in fit(*start, "--weights", tmp_path / "run/checkpoints/best.ckpt", size=()).err
    begun = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    source = torch.load(trained.best, weights_only=True)["state_dict"]
    learned = [key for key in source if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(begun[key], source[key]) for key in learned)  # the learning rate is 0
    decoder = ("--model.init_args.model_args.decoder_channels", "[32,16,8,8]")
    other = fit("--weights", trained.best, name="other", size=decoder)
    assert (other.code, "do not fit" in other.err, "decoder" in other.err) == (0, True, True), other.err


def test_fast_dev_run_leaves_no_file_and_print_config_shows_all_layers_and_makes_nothing(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("--trainer.fast_dev_run", "true", steps=()).ok()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    layer = tmp_path / "mine.yaml"
    layer.write_text("data: {init_args: {batch_size: 4}}\ntrainer: {max_epochs: 7}\n")
    outcome = fit("--config", layer, "--print_config", "--precision", "bf16", size=(), steps=()).ok()
    recipe = yaml.safe_load(outcome.out)
    assert (recipe["data"]["init_args"]["batch_size"], recipe["trainer"]["max_epochs"]) == (4, 7)
    assert recipe["data"]["class_path"] == recipes.read_yaml(recipes.find("demo"))["data"]["class_path"]
    assert recipe["trainer"]["precision"] == "bf16-mixed"
    assert "gradient_clip_val" in recipe["trainer"]  # a default that the recipe does not name
    assert list(tmp_path.iterdir()) == [layer]
    assert "--trainer.max_epochs" in fit("--trainer.help").out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: fp16 is fine")
def test_fp16_on_a_cpu_is_refused_with_the_alternative(fit, tmp_path: Path):
    outcome = fit("--trainer.precision", "16-mixed")
    assert (outcome.code, "--precision fp32" in outcome.err, list(tmp_path.iterdir())) == (2, True, [])
    assert fit("--trainer.logger", "false").code == 2  # Lightning's refusal: LearningRateMonitor needs one


def test_damaged_chip_ends_the_fit_with_what_where_and_what_to_do(fit, own_chips, tmp_path: Path):
    damaged = ids_of(own_chips, "train")[:2]
    for chip in damaged:
        (own_chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").write_bytes(b"not a zip")
    epoch = ("--trainer.max_epochs", 1, "--trainer.limit_val_batches", 1, "--data.init_args.batch_size", 6)
    outcome = fit("--data.init_args.num_workers", 2, root=own_chips, steps=epoch)  # the error is one of a worker
    assert (outcome.code, len(outcome.report)) == (1, 3)
    assert damaged[0] in outcome.report[0] or damaged[1] in outcome.report[0]
    assert "  where: " in outcome.report[1]
    assert "_S1RTC.zarr.zip" in outcome.report[1]
    assert "  to do: " in outcome.report[2]
    run = RunFolder(tmp_path / "run")
    assert run.read_record()["status"] == "failed"
    assert outcome.report[0] in run.log.read_text()
    fit("--skip-damaged", 2, root=own_chips, steps=epoch).ok()
    assert sorted(run.read_record()["failed_chips"]) == sorted(damaged)


@pytest.fixture
def mine(tmp_path: Path) -> tuple[object, ...]:
    """Flags that name a folder of modules of one's own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(CALLBACKS)
    return "--custom_modules_path", tmp_path / "mine"


def test_overflow_is_rolled_back_to_the_last_good_state_and_the_run_ends_in_bf16(fit, mine, tmp_path: Path):
    overflow = (*mine, "--trainer.callbacks+=mine.Overflow", "--on-overflow", "rollback", "--save-every", 2)
    fit(*overflow, steps=("--trainer.max_epochs", 1, "--trainer.limit_val_batches", 1)).ok()
    record = RunFolder(tmp_path / "run").read_record()
    assert (record["status"], record["progress"]["step"]) == ("finished", 6)
    assert record["rollback"]["state"] == record["resumes"][0]["from"] == "last.ckpt"
    assert record["rollback"]["precision"] == ["32-true", "bf16-mixed"]
    assert record["environment"]["numerics"]["precision"] == "bf16-mixed"
    assert [incident["step"] for incident in record["incidents"]] == [record["rollback"]["step"]] == [3]


def test_fit_that_waited_for_the_lock_takes_up_what_the_other_one_trained(fit, trained, tmp_path: Path, monkeypatch):
    def while_the_other_ends(path: Path, timeout: float) -> FileLock:
        shutil.copytree(trained.path, tmp_path / "run", dirs_exist_ok=True)
        return FileLock(path, timeout=timeout)

    monkeypatch.setattr("floodrepro.training.fit.FileLock", while_the_other_ends)
    outcome = fit("--trainer.max_epochs", 2, steps=(), size=())
    assert (outcome.code, "finished already" in outcome.err) == (0, True), outcome.err
    assert (tmp_path / "run" / "run.json").read_bytes() == trained.record.read_bytes()


def test_unexpected_error_shows_its_traceback_and_keeps_it(fit, mine, tmp_path: Path):
    outcome = fit(*mine, "--trainer.callbacks+=mine.Faulty")
    assert (outcome.code, "Traceback" in outcome.err) == (1, True)
    for text in (outcome.err, (tmp_path / "run" / "log.txt").read_text()):
        assert "KeyError: 'my_missing_key'" in text


def test_monitor_precision_loggers_and_checkpoints_of_your_own_are_kept(fit, tmp_path: Path):
    recipe = recipes.read_yaml(recipes.find("demo"))
    for callback in recipe["trainer"]["callbacks"]:
        if callback["class_path"].endswith("ModelCheckpoint"):
            callback["init_args"] |= {"monitor": "val/mIoU", "mode": "min"}
    mine = tmp_path / "mine"
    path = tmp_path / "mine.yaml"
    path.write_text(recipes.to_yaml(recipe))
    outcome = fit(
        *("--config", path, "--precision", "bf16", "--format", "json", "--trainer.max_epochs", 2),
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        *("--trainer.callbacks.dirpath", mine, "--trainer.callbacks.monitor", "val/mIoU"),
        *("--trainer.callbacks.mode", "max", "--trainer.callbacks.save_top_k", 2, "--trainer.callbacks.save_last=true"),
        "--trainer.logger+=lightning.pytorch.loggers.CSVLogger",
        *("--trainer.logger.save_dir", mine, "--trainer.logger.name", "logs"),
    ).ok()
    assert "ModelCheckpoint monitors val/mIoU with mode: min, which prefers the worst epoch" in outcome.err
    assert "epoch 2/2" in outcome.err
    run = RunFolder(tmp_path / "run")
    scores = {int(row["epoch"]): float(row["val/mIoU"]) for row in run.read_metrics() if row.get("val/mIoU")}
    record = json.loads(outcome.out)  # stdout holds the result and nothing else
    assert (record["run"], record["monitor"]) == (str(run.path), "val/mIoU")
    assert record["environment"]["numerics"]["precision"] == "bf16-mixed"
    assert record["best_epoch"] == min(scores, key=scores.get)
    assert [path.name for path in run.checkpoints.glob("*best*")] == ["best.ckpt"]
    assert (mine / "last.ckpt").is_file()
    assert (mine / "logs" / "version_0" / "metrics.csv").is_file()
