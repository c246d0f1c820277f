"""A checkpoint is loaded strictly and as tensors only, and a file that is none is named for what it is."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.publishing.export import export
from floodrepro.run_folder import config_beside
from floodrepro.training.checkpoint import check_finite, load_weights, read_checkpoint

LAYOUTS = {  # where a file keeps its state dict, and how names begin there: Lightning's, IBM's, DDP's, compiled, timm's
    "lightning.ckpt": ("state_dict", "model."),
    "ibm.pt": ("", "model."),
    "ddp.pt": ("model_state_dict", "module."),
    "compiled.pt": ("state_dict", "model._orig_mod."),
    "timm.pth": ("model", ""),
    "torch.safetensors": ("", ""),
}


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("name", [*LAYOUTS, "export.safetensors", "safetensors.pt"])
def test_every_layout_loads_into_the_model(name, tmp_path: Path):
    path, weights = tmp_path / name, model().state_dict()
    if name in LAYOUTS:
        key, prefix = LAYOUTS[name]
        state = {f"{prefix}{k}": v for k, v in weights.items()} | {"criterion.weight": torch.ones(2)}  # of a loss
        torch.save({key: state, "epoch": 3} if key else state, path)
    else:
        save_file(weights, path)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert load_weights(fresh, read_checkpoint(path)) == ""
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in weights.items())


def test_strict_refuses_what_does_not_fit_and_lenient_reports_it(tmp_path: Path, capsys):
    weights = model().state_dict()
    weights["stray"] = weights.pop("0.bias")
    weights["1.weight"] = torch.ones(7)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"1 missing \(0.bias\), 1 unexpected \(stray\), 1 of another shape"):
        load_weights(model(), read_checkpoint(tmp_path / "w.pt"))
    fresh = model()
    nn.init.zeros_(fresh[0].weight)
    told = load_weights(fresh, read_checkpoint(tmp_path / "w.pt"), strict=False)
    assert told == "1 missing (0.bias), 1 unexpected (stray), 1 of another shape or kind (1.weight)"
    assert told in capsys.readouterr().err
    assert torch.equal(fresh[0].weight, weights["0.weight"])
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not this model's"):
        load_weights(model(), read_checkpoint(tmp_path / "other.pt"), strict=False)
    torch.save({name: tensor.to(torch.int8) for name, tensor in model().state_dict().items()}, tmp_path / "int8.pt")
    with pytest.raises(CheckpointError, match=r"6 of another shape or kind \(0.bias"):
        load_weights(model(), read_checkpoint(tmp_path / "int8.pt"))


def test_tensors_that_are_no_weights_are_refused(tmp_path: Path):
    for content, says in (
        ({"model.w": torch.ones(2), "w": torch.zeros(2)}, "two tensors have one name"),
        ({"w": torch.tensor([complex(0, float("nan"))])}, "not finite: w"),
        ({"w": torch.eye(3).to_sparse()}, "no plain tensor: w"),
        ({"w": torch.ones(2, device="meta")}, "no plain tensor: w"),
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=says):
            check_finite(read_checkpoint(tmp_path / "w.pt"))


def test_old_format_cut_anywhere_and_odd_hyper_parameters_end_in_no_traceback(tmp_path: Path):
    path = tmp_path / "w.pt"
    odd = {"state_dict": model().state_dict(), "hyper_parameters": {"model_args": "text"}}
    torch.save(odd, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path).hyper_parameters == {}
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("name", ["1.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_neither_used_nor_exported(tmp_path: Path, name: str):
    weights = model().state_dict()
    weights[name][0] = float("nan")
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=f"not finite: {name}"):
        load_weights(model(), read_checkpoint(tmp_path / "w.pt"))
    with pytest.raises(CheckpointError, match=f"not finite: {name}"):
        export(tmp_path / "w.pt", recipes.read_yaml(recipes.find("demo")), tmp_path / "out", "mine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "says", "fix"),
    [  # what it holds, or what becomes of a whole one
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer", "git lfs pull"),
        ("w.pt", b"\n <!DOCTYPE html><html>Sign in</html>", "a web page", "hf download"),
        ("w.safetensors", lambda whole: whole[:-20], "cut short", "copy it again"),
        ("w.pt", lambda whole: whole[:-200], "damaged or cut short", "copy it again"),
        ("w.pt", lambda whole: whole.replace(b"\0\0\x80\x3f", b"\0\0\x80\x7f", 1), "checksum of", "copy it again"),
        ("w.pt", b"", "0 bytes", "copy it again"),
        ("notes.txt", b"no weights here", "no checkpoint", "copy it again"),
        ("w.pt", {"epoch": 3}, "without a state dict", ""),
        ("w.pt", {1: torch.ones(1)}, "without a state dict", ""),
    ],
)
def test_file_that_is_no_checkpoint_is_named_for_what_it_is(name, content, says, fix, tmp_path: Path):
    path = tmp_path / name
    (torch.save if name == "w.pt" else save_file)(model().state_dict(), path)
    if callable(content) or isinstance(content, bytes):
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=says) as error:
        read_checkpoint(path)
    assert fix in (error.value.fix or "")
    assert error.value.where == str(path)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_checkpoint_that_runs_code_is_not_opened(tmp_path: Path, form):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"state_dict": {"w": torch.ones(1)}, "extra": Payload(trace)}
    torch.save(content, path) if form == "zip" else path.write_bytes(pickle.dumps({"extra": Payload(trace)}))
    with pytest.raises(CheckpointError, match="holds code, not only tensors" if form == "zip" else "no checkpoint"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("argv", "config", "fix"),
    [
        (("test", "--ckpt", "model.pt"), "model.yaml", "--config model.yaml"),
        (("test", "--ckpt", "run/checkpoints/best.ckpt"), "run/recipe.yaml", "run/recipe.yaml"),
        (("verify", "--run", "run"), "run/recipe.yaml", "--trust-code"),
        (("verify", "--run", "own", "--reference", "run/checkpoints/best.ckpt"), "run/recipe.yaml", "--trust-code"),
    ],
)
def test_code_of_a_download_runs_only_where_it_is_asked_for(cli, tmp_path: Path, argv, config, fix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mods").mkdir()
    (tmp_path / "mods" / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    for name in ("run", "own"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text("model: {}\ndata: {}\n")
        torch.save(model().state_dict(), tmp_path / name / "checkpoints" / "best.ckpt")
    (tmp_path / config).write_text("custom_modules_path: mods\nmodel: {}\ndata: {}\n")
    torch.save(model().state_dict(), tmp_path / "model.pt")
    outcome = cli(*argv)
    assert (outcome.code, "custom_modules_path" in outcome.err, fix in outcome.report[-1]) == (1, True, True)
    assert not (tmp_path / "ran").exists()


def test_config_beside_is_the_twin_or_the_only_recipe(tmp_path: Path):
    (tmp_path / "scene.yaml").write_text("DEM: {files: dem.tif}")
    with pytest.raises(UsageError, match="0 configs lie beside"):
        config_beside(tmp_path / "a.ckpt")
    (tmp_path / "mine.yaml").write_text("model: {}")
    assert config_beside(tmp_path / "a.ckpt") == tmp_path / "mine.yaml"
    (tmp_path / "mine.yaml").write_text("[")
    (tmp_path / "a.yaml").write_text("model: {}")
    assert config_beside(tmp_path / "a.ckpt") == tmp_path / "a.yaml"


def test_module_of_the_working_folder_is_not_imported(tmp_path: Path):
    """``python -m`` would look there first, as the installed script does not: beside a download it may be anything."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('imported')\n")
    argv = [sys.executable, "-m", "floodrepro", "configs", "ls"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "demo" in done.stdout) == (0, True), done.stderr


def test_checkpoint_with_a_class_names_it_and_how_to_strip_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trained.pt"
    torch.save({"state_dict": {"model.w": torch.ones(1)}, "config": tmp_path}, path)
    with pytest.raises(CheckpointError, match=r"class pathlib.*PosixPath") as error:
        read_checkpoint(path)
    advice = error.value.fix
    exec(advice[advice.index('"') + 1 : advice.rindex('"')], {})
    assert read_checkpoint(tmp_path / "weights.pt").weights["w"] == 1
