"""Generated chips and one trained run, made once and shared by the tests that only read them."""

import contextlib
import functools
import gc
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

# Before any library that could is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from floodrepro.cli.main import main
from floodrepro.data.synth import generate
from floodrepro.run_folder import RunFolder, sha256_of
from floodrepro.system import environment

ROOT = Path(__file__).parents[1]
ASK_TORCH = functools.cache(environment.ask_torch)
CHIPS = {"events": 6, "chips": 18, "size": 32, "protocol": "v0", "seed": 1}
PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 350_000, 0, -10, 5_200_000)}  # of GeoTIFFs
# Flags of fit for a smaller demo: half of the time, and a state of 8 MB, not 169. terratorch_runs.py has the backbone.
SMALL = (
    *("--data.init_args.batch_size", 2, "--data.init_args.timesteps", "[1,2]"),
    *("--model.init_args.model_args.backbone", "thin_terramind"),
    *("--model.init_args.model_args.backbone_temporal_n_timestamps", 2),
    *("--model.init_args.model_args.backbone_temporal_pooling", "mean"),
    *("--model.init_args.model_args.decoder_channels", "[32,16,8,8]"),
)
# Files that one process takes together, for what is dear to make: a fork server, or the trained run. They come first,
# so that no process is left alone with them at the end.
TOGETHER = (
    ("resume", "callbacks_exact_resume", "ddp", "bench", "environment", "callbacks_nan_guard"),
    ("demo",),
    ("verify", "measured", "fit", "passes", "docs", "doctor", "cli"),
)
FAULTS = set(re.findall(r"`(test_\w+)` \|$", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.M))


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> list[str]:
        """The error report at the end of stderr."""
        lines = self.err.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("floodrepro: error:")]
        return lines[starts[-1] :] if starts else []

    def ok(self) -> "Outcome":
        """Itself, if the command succeeded."""
        assert self.code == 0, self.err
        return self


@pytest.hookimpl(tryfirst=True)  # -m chooses in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of TOGETHER before the others; the faults of docs/reliability.md get a mark."""
    first = [f"test_{name}.py" for group in TOGETHER for name in group]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
    for item in items:
        if item.originalname in FAULTS:
            item.add_marker("faults")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
            return next((group[0] for group in TOGETHER if name in group), name)

    return Scheduler(config, log)


def pytest_collection_finish() -> None:
    """Take back what importing TerraTorch, as some files do, allows: float32 products in bf16 where the CPU has it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_float32_matmul_precision("highest")
    gc.freeze()  # what is imported by now stays: the collector need not go through it again and again


def call(*argv: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in argv])
    return Outcome(code, out.getvalue(), err.getvalue())


def save(path: Path, pixels: np.ndarray, names: Sequence[str] = (), **profile: Any) -> Path:
    """A GeoTIFF of (C, H, W) or (H, W), 10 m pixels in UTM unless the profile says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = pixels.reshape(-1, *pixels.shape[-2:])
    size = dict(zip(("count", "height", "width"), bands.shape, strict=True))
    with rasterio.open(path, "w", **PLACE | size | {"driver": "GTiff", "dtype": pixels.dtype} | profile) as file:
        file.write(bands)
        if names:
            file.descriptions = tuple(names)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Times and hashes of a folder's files; the lock and the log belong to whoever tries."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt")]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_of(path)) for path in files}


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    return call


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the doctor ask torch, which takes seconds, once for all tests."""
    monkeypatch.setattr(environment, "ask_torch", ASK_TORCH)


@pytest.fixture(scope="session")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen chips of six events, protocol v0, extracted."""
    root = tmp_path_factory.mktemp("chips") / "ImpactMesh-Flood"
    generate(root, **CHIPS)
    return root


@pytest.fixture
def own_chips(chips: Path, tmp_path: Path) -> Path:
    """A copy of the chips, to be damaged."""
    return Path(shutil.copytree(chips, tmp_path / "chips"))


@pytest.fixture(scope="session")
def trained(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two epochs of the demo recipe."""
    runs = tmp_path_factory.mktemp("runs")
    place = ("--data-root", chips, "--runs-root", runs, "--name", "trained")
    call("fit", "--config", "demo", *place, "--trainer.max_epochs", "2").ok()
    return RunFolder(runs / "trained")


@pytest.fixture(scope="session")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the checks are given of a sound run; no test changes it."""
    from verification_fixtures import sound_evidence  # the other tests need none of its libraries

    return sound_evidence(tmp_path_factory.mktemp("evidence"))
