"""What a verdict rests on and torch has to measure: chip tables that are missing, and `verification/evidence/`."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import DataError, FloodreproError, RunFolderError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.measured import panels, weights
from floodrepro.evaluation.tabulate import run_test, table_path
from floodrepro.publishing.bundle import read_weights
from floodrepro.publishing.export import export
from floodrepro.publishing.measured import measure_load_back, measure_round_trip
from floodrepro.run_folder import RunFolder, config_beside, sha256_of, write_atomically
from floodrepro.training.recipe_cli import RecipeCLI


class Measurement:
    """Measures what the checks of one run are given.

    Args:
        run: The run folder.
        folder: Where the measurements go, `<name>.json` and `panels.npz`.
        split: Which chip tables.
        data_root: Where the chips are, if not where the recipe says.
    """

    def __init__(self, run: RunFolder, folder: Path, split: str, data_root: Path | None) -> None:
        self._run, self._folder, self._split, self._data_root = run, folder, split, data_root
        self._digest = sha256_of(run.best)

    def table_of(self, checkpoint: Path) -> Path:
        """The chip table of a checkpoint; it is tested first if it has none.

        A checkpoint outside a run folder is read with the config beside it or, without one, with this run's, and its
        table is kept in this run's `evaluation/reference/`.

        Raises:
            FloodreproError: It cannot be tested.
        """
        home = RunFolder.of_checkpoint(checkpoint)
        folder = None if home else self._run.evaluation / "reference"
        path = table_path(checkpoint, self._split, folder)
        if not path.is_file() or not _is_of(path, checkpoint):
            console.say(f"{checkpoint} has no chip table over {self._split} yet: testing it")
            run_test(self._parse(self._config_of(checkpoint)), checkpoint, split=self._split, folder=folder)
        return path

    def measure(self) -> None:
        """Weights, both ways of loading the export, and the panels; each leaves its file, whatever the others do."""
        run, checkpoint = self._run, self._run.best
        start = run.starting_point if run.starting_point.is_file() else None
        self._keep("weights", lambda: weights.measure(run.recipe, checkpoint, start))
        with tempfile.TemporaryDirectory() as scratch:
            config, exported, note = self._exported(Path(scratch))
            self._keep("load_back", lambda: measure_load_back(run.recipe, checkpoint, config, exported) | note)
            self._keep("round_trip", lambda: measure_round_trip(checkpoint, exported) | note)
        self._keep("panels", self._panels)

    def _panels(self) -> dict[str, Any]:
        table = chip_table.read(table_path(self._run.best, self._split))
        with tempfile.TemporaryDirectory() as scratch:
            recipe = self._run.recipe
            if self._data_root:
                recipe = Path(scratch) / recipe.name
                recipe.write_text(recipes.to_yaml(self._parse(self._run.recipe).recipe), encoding="utf-8")
            return panels.measure(recipe, self._run.best, table, self._folder)

    def _exported(self, scratch: Path) -> tuple[Path, Path, dict[str, Any]]:
        """The pair in `export/` if it is the best checkpoint's; else one that is made for this measurement alone."""
        for exported in sorted(self._run.export.glob("*.safetensors")):
            source = read_weights(exported).metadata.get("source_sha256")
            if exported.with_suffix(".yaml").is_file() and source == self._digest:
                return exported.with_suffix(".yaml"), exported, {"pair": "as it lies in export/"}
        made = export(self._run.best, recipes.read(self._run.recipe), scratch, "export")
        return made.config, made.weights, {"pair": "made for this check: export/ holds none of this checkpoint"}

    def _config_of(self, checkpoint: Path) -> Path:
        try:
            return config_beside(checkpoint)
        except UsageError:
            return self._run.recipe

    def _parse(self, config: Path) -> RecipeCLI:
        overrides = recipes.data_overrides(self._data_root, recipes.read(config)) if self._data_root else []
        return RecipeCLI([config], overrides)

    def _keep(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Write a measurement, or why it could not be made: a check that reads that fails."""
        console.say(f"measuring: {name.replace('_', ' ')}")
        path = self._folder / f"{name}.json"
        try:
            found = measure()
        except DataError as error:  # the chips are elsewhere: nothing is wrong with the run
            console.warn(f"{name} is left out: {error.what}")
            path.unlink(missing_ok=True)
            return
        except FloodreproError as error:
            found = {"problem": error.what}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"measured_on": self._digest} | found, indent=1) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"the evidence cannot be written: {error.strerror}", where=path, fix="--output DIR puts it elsewhere"
            ) from error


def _is_of(table: Path, checkpoint: Path) -> bool:
    try:
        return bool((chip_table.read(table).metadata.get("checkpoint") or {}).get("sha256") == sha256_of(checkpoint))
    except TableError:
        return False
