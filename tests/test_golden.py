"""Twenty training losses of the tiny recipe on generated chips: training computes what it did when they were written.

On the stack of the file (versions, CPU, threads) they are equal to the bit. On another one rounding errors grow with
each step, to 1e-2 at worst of what was measured: there 1e-5 applies to two steps and 5e-2 from there on. 1e-5 sees a
learning rate that is 1 % higher and matrices that are multiplied in bf16. The file is made anew only for a change of
numerics that is meant and understood, and the commit says what changed the losses:

    FLOODREPRO_WRITE_GOLDEN=1 scripts/test.sh tests/test_golden.py
"""

import hashlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from floodrepro import console, recipe as recipes
from floodrepro.training.terratorch_cli import RecipeCLI, without_files

FILE = Path(__file__).parent / "golden" / "tiny_v0_32px.json"
RECIPE = "terramind_v1_tiny_impactmesh_flood"
OVERRIDES = (
    *("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--data.init_args.num_workers=0"),
    "--model.init_args.model_args.backbone_pretrained=false",
    *("--data.init_args.batch_size=2", "--trainer.limit_val_batches=1"),
)
_PACKAGES = ("lightning", "terratorch", "impactmesh", "segmentation_models_pytorch")


class Losses(Callback):
    """The loss of every step as the training step returned it: logs would round it and leave steps out."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def train(root: Path, *overrides: str, steps: int = 20) -> tuple[list[float], Any]:
    """Losses of the steps, and the training chips as they were read."""
    path = recipes.find(RECIPE)
    place = recipes.data_overrides(root, recipes.read_yaml(path))
    cli = RecipeCLI([path], [*OVERRIDES, f"--trainer.max_steps={steps}", *place, *overrides])
    losses, threads = Losses(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums are split between threads: another number of them, other roundings
    try:
        without_files(cli.config)
        cli.build()
        cli.trainer.callbacks.append(losses)
        with console.stdout_to_stderr():
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    finally:
        torch.set_num_threads(threads)
    return losses.losses, cli.datamodule.train_dataset


def stack() -> dict[str, Any]:
    """What the bits of a loss depend on, besides recipe and chips."""
    info = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    found = dict(line.replace("\t", "").split(":", 1) for line in info.splitlines() if ":" in line)
    cpu = [found.get(key, "") for key in ("model name", "cpu family", "model", "stepping")]
    return {
        **{package: version(package) for package in _PACKAGES},
        "torch": torch.__version__,  # with the build: +cpu and +cu130 are different binaries
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "cpu": " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *cpu]),
    }


def digest_of(dataset: Any) -> str:
    """Digest of the training chips' values as read; their files' bytes depend on GDAL's version."""
    digest = hashlib.sha256()
    for number, chip in enumerate(dataset.chips):
        batch = dataset.__getitems__([number])
        for part in dataset.parts:
            [values] = batch[part] if part != "DEM" else batch[part][:, None, None]  # time and band, as the others
            digest.update(f"{chip} {part.replace('MASK', 'mask')} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def assert_close(losses: list[float], expected: list[float]) -> None:
    """By the tolerance between stacks."""
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-5)
    np.testing.assert_allclose(losses[2:], expected[2:], rtol=5e-2)


def test_training_gives_the_golden_losses_to_the_bit_or_on_another_stack_within_the_tolerance(chips):
    losses, dataset = train(chips)
    if os.environ.get("FLOODREPRO_WRITE_GOLDEN"):
        content = {"schema": 2, "loss": losses, "chips_sha256": digest_of(dataset), "stack": stack()}
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    golden = json.loads(FILE.read_text())
    assert len(golden["loss"]) == 20
    assert digest_of(dataset) == golden["chips_sha256"]
    if golden["stack"] == stack():
        assert losses == golden["loss"]
    else:
        assert_close(losses, golden["loss"])


def test_one_percent_of_learning_rate_is_caught_even_by_another_stacks_tolerance(chips):
    losses, _ = train(chips, "--optimizer.init_args.lr=1.01e-4", steps=3)
    with pytest.raises(AssertionError):
        assert_close(losses, json.loads(FILE.read_text())["loss"][:3])
