"""Twenty training losses of the tiny recipe on generated chips, which tests/test_golden.py compares and makes anew.

    .venv/bin/python tests/golden/make.py /tmp/new.json
    .venv/bin/python scripts/compare_losses.py tests/golden/tiny_v0_64px.json /tmp/new.json --exact

The golden file says what training computed on the day it was made. It is made anew, with ``--replace``, only when a
change of numerics is meant and understood: a new version of torch or TerraTorch in constraints.txt, a recipe that
changed on purpose, another generator of chips. The commit that does so says what changed the losses and by how much
(``compare_losses.py`` prints it). A test that fails is no reason: whoever regenerates to make it pass has thrown away
the only witness that training still computes what it did. One file holds one stack; on others a tolerance applies.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lightning.pytorch.callbacks import Callback

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.synth import generate
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import without_files

GOLDEN = Path(__file__).with_name("tiny_v0_64px.json")
RECIPE = "terramind_v1_tiny_impactmesh_flood"
STEPS, THREADS = 20, 2
CHIPS = {"events": 6, "chips": 18, "size": 64, "protocol": "v0", "seed": 1}
OVERRIDES = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.precision=32-true",
    "--model.init_args.model_args.backbone_pretrained=false",
    # Six steps an epoch and three validations: ReduceLROnPlateau (patience 2) cannot act within the twenty steps, and
    # the losses do not hang on which side of a threshold a rounding error falls.
    "--data.init_args.batch_size=2",
    "--data.init_args.num_workers=0",
)
# segmentation_models_pytorch has the decoder's blocks and the dice loss.
_PACKAGES = ("torch", "lightning", "terratorch", "impactmesh", "segmentation_models_pytorch")


class Losses(Callback):
    """The loss of every step as the training step returned it: logs would round it and leave steps out."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Note the loss; float32 is widened to Python's double, which changes no bit of it."""
        assert outputs["loss"].dtype == torch.float32
        self.losses.append(outputs["loss"].item())


def make_losses(
    root: Path, *, overrides: Sequence[str] = (), steps: int = STEPS, threads: int = THREADS
) -> dict[str, Any]:
    """Train and return the content of a loss file.

    Args:
        root: Folder of chips that were generated with `CHIPS`.
        overrides: Of recipe keys, after `OVERRIDES`.
        steps: Optimiser steps.
        threads: Of torch; put back afterwards.
    """
    path = recipes.find(RECIPE)
    given = [*OVERRIDES, f"--trainer.max_steps={steps}", *recipes.data_overrides(root, recipes.read(path)), *overrides]
    cli = RecipeCLI([path], given)
    recording = Losses()
    with threads_of_torch(threads):
        cli.build(lambda config: without_files(config, progress_bar=False))
        cli.trainer.callbacks.append(recording)
        with console.stdout_to_stderr():
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        stack = describe_stack()
    return {
        "schema": 1,
        "recipe_sha256": recipes.fingerprint(without_place(cli.recipe, root)),
        "chips_sha256": digest_of_chips(cli.datamodule.train_dataset),
        "steps": list(range(1, len(recording.losses) + 1)),
        "loss": recording.losses,
        "stack": stack,
    }


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Sums are split between threads: another number of them, other roundings."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_stack() -> dict[str, Any]:
    """What the bits of a loss depend on, besides recipe and chips."""
    return {
        **{package: version(package) for package in _PACKAGES},
        "torch": torch.__version__,  # with the build: +cpu and +cu130 are different binaries
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_model": cpu_model(),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """Name and numbers of the CPU: virtual machines call many different ones "Intel(R) Xeon(R) Processor"."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    first = info.read_text().split("\n\n")[0]
    found = dict(line.replace("\t", "").split(":", 1) for line in first.splitlines() if ":" in line)
    numbers = [f"{key}{found[key]}" for key in ("cpu family", "model", "stepping") if key in found]
    return ", ".join([found.get("model name", platform.machine()).strip(), *numbers])


def without_place(recipe: recipes.Recipe, root: Path) -> recipes.Recipe:
    """The recipe as if the chips lay in ImpactMesh-Flood: its fingerprint must not hang on a temporary folder."""
    return json.loads(json.dumps(recipe).replace(json.dumps(str(root))[1:-1], "ImpactMesh-Flood"))


def digest_of_chips(dataset: Any) -> str:
    """Digest of the training chips' values as read; not of their files, whose bytes hang on GDAL's version."""
    digest = hashlib.sha256()
    for raw in map(dataset.__getitem__, range(len(dataset))):
        for name in (*dataset.modalities, "mask"):
            digest.update(f"{raw['chip']} {name} {raw[name].dtype} {tuple(raw[name].shape)}".encode())
            digest.update(raw[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_text(content: dict[str, Any]) -> str:
    """A loss file's text; Python writes the shortest decimals that read back as the same float."""
    return json.dumps(content, indent=1) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Make a loss file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Overrides of recipe keys, such as --optimizer.init_args.lr=1e-3, may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--replace", action="store_true", help="overwrite it: read the top of this script first")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch (default: %(default)s)")
    parser.add_argument("--matmul", default="highest", choices=("highest", "high", "medium"), help="float32 precision")
    args, overrides = parser.parse_known_args(argv)
    if args.output.exists() and not args.replace:
        parser.error(f"{args.output} exists; --replace overwrites it")
    torch.set_float32_matmul_precision(args.matmul)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "ImpactMesh-Flood"
        generate(root, **CHIPS)
        args.output.write_text(to_text(make_losses(root, overrides=overrides, threads=args.threads)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
