"""Where the thresholds and the published figures lie, and what they say."""

from importlib import resources
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes


def load_thresholds() -> dict[str, Any]:
    """`verification/thresholds.yaml`: thresholds by check id, and `required`.

    Raises:
        UsageError: The file is missing or no YAML mapping.
    """
    return recipes.read(_folder() / "thresholds.yaml")


def load_published() -> dict[str, dict[str, Any]]:
    """`verification/reference/*.yaml` by stem: published figures with their sources, and the data set's chip counts.

    Raises:
        UsageError: A file is no YAML mapping.
    """
    return {path.stem: recipes.read(path) for path in sorted((_folder() / "reference").glob("*.yaml"))}


def _folder() -> Path:
    packaged = Path(str(resources.files("floodrepro"))) / "verification"  # beside the code: a wheel has it there
    return packaged if (packaged / "thresholds.yaml").is_file() else Path(__file__).parents[3] / "verification"
