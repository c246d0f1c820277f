"""Evidence that needs torch, measured once and kept as JSON: the checks that read it need neither model nor GPU."""

from pathlib import Path

from jsonargparse import Namespace

from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import without_files


def build_on_cpu(recipe: Path) -> RecipeCLI:
    """Build what a recipe describes, from random weights, for looking at the model itself: on a CPU, in fp32.

    Raises:
        UsageError: The recipe does not build here.
    """

    def on_cpu(config: Namespace) -> None:
        without_files(config, progress_bar=False)
        config.trainer.accelerator, config.trainer.precision = "cpu", "32-true"

    cli = RecipeCLI([recipe])
    cli.build(on_cpu)
    return cli
