"""What one call of `floodrepro reproduce` asks for, and where it all lies. Cheap: nothing here imports torch."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.sources import REFERENCE, HubFile, backbone_weights, cached_file, check_hash, fetch_file
from floodrepro.errors import UsageError
from floodrepro.recipe import PRECISIONS, Recipe
from floodrepro.run_folder import RunFolder
from floodrepro.system.doctor import Needs, read_needs
from floodrepro.training.declared import parse_seeds

STAGES = ("doctor", "fetch", "audit", "fit", "test", "reference", "verify", "export")
PROTOCOLS, SIZES = tuple(DATA_OF), ("base", "tiny")
_SUFFIX = {"v0": "", "v1-binary": "_v1_binary", "v1": "_v1"}


@dataclass(frozen=True)
class Plan:
    """One reproduction.

    Args:
        config: The recipe, by name or path.
        recipe: Its content.
        protocol: `v0`, `v1-binary` or `v1`.
        data_root: The data set's folder.
        run_dir: Folder of the declared runs and of reproduction.json.
        seeds: One for each declared run; the first one is verified.
        revision: Of the data.
        reference: A file, or what is fetched from the hub; None for none.
        reference_sha256: What the reference has to be; None where nothing is asked.
        precision: As `fit` takes it, if it was given.
        overrides: Of the recipe's keys.
    """

    config: str
    recipe: Recipe
    protocol: str
    data_root: Path
    run_dir: Path
    seeds: tuple[int, ...]
    revision: str
    reference: Path | HubFile | None
    reference_sha256: str | None
    precision: str | None
    overrides: tuple[str, ...]

    @property
    def runs(self) -> list[RunFolder]:
        """The declared runs."""
        return [RunFolder(self.run_dir / f"seed-{seed}") for seed in self.seeds]

    @property
    def changes(self) -> list[str]:
        """All overrides of the recipe, the precision among them; not the data's place."""
        precision = [f"--trainer.precision={PRECISIONS[self.precision]}"] if self.precision else []
        return [*precision, *self.overrides]

    @property
    def needs(self) -> Needs:
        """What the recipe asks of the machine."""
        return read_needs([self.recipe], [*recipes.data_overrides(self.data_root, self.recipe), *self.changes])

    @property
    def weights(self) -> list[HubFile]:
        """What is fetched from model repositories: the small files first."""
        needs = self.needs
        backbone = backbone_weights(needs.backbone) if needs.pretrained else None
        files = [backbone, self.reference if self.compares and isinstance(self.reference, HubFile) else None]
        return [file for file in files if file is not None]

    @property
    def compares(self) -> bool:
        """Whether there is a reference for this protocol."""
        return self.reference is not None and (self.protocol != "v1" or isinstance(self.reference, Path))

    @property
    def reference_name(self) -> str:
        """What the report calls the reference."""
        return "IBM's checkpoint" if isinstance(self.reference, HubFile) else str(getattr(self.reference, "stem", ""))

    @property
    def reference_table(self) -> Path:
        """The reference's chip table; in the verified run's folder."""
        name = self.reference.name if self.reference else ""
        return self.runs[0].evaluation / "reference" / "test" / f"{Path(name).stem}.parquet"

    def reference_file(self, *, fetch: bool = False) -> Path:
        """The reference's checkpoint, its hash checked; `fetch` lets it be asked for over the network."""
        if isinstance(self.reference, HubFile):
            path = fetch_file(self.reference) if fetch else cached_file(self.reference)
        else:
            assert self.reference is not None  # `compares` was asked
            path = self.reference
        check_hash(path, self.reference_sha256)
        return path


def make_plan(args: argparse.Namespace) -> Plan:
    """Read the flags of `floodrepro reproduce` and the recipe.

    Raises:
        UsageError: A flag or the recipe cannot be used, or two of them contradict each other.
    """
    if args.config and args.size:
        raise UsageError("--config and --size both choose the recipe", fix="leave one of them out")
    protocol = args.protocol or "v0"
    v0 = "terramind_v1_base_impactmesh_flood_amd"
    name = f"terramind_v1_{args.size or 'base'}_impactmesh_flood{_SUFFIX[protocol]}"
    config = args.config or (v0 if (protocol, args.size or "base") == ("v0", "base") else name)
    path = recipes.find(config)
    recipe = recipes.read(path)
    posed = read_needs([recipe], args.overrides).protocol
    if posed is None or (args.protocol or posed) != posed:
        what = f"the recipe poses {posed or 'none of the protocols'}" + (f", not {protocol}" if args.protocol else "")
        raise UsageError(what, where=path, fix=f"--protocol {posed}" if posed else "see its data.init_args.label_map")
    run_dir = args.run_dir or Path("runs") / f"{path.stem}-reproduction"
    if RunFolder(run_dir).recipe.exists():
        raise UsageError("this is a run folder already, of one run", where=run_dir, fix="--run-dir DIR, another one")
    reference, sha256 = _reference(args)
    seeds = parse_seeds(args.seeds) if args.seeds is not None else [int(recipe.get("seed_everything") or 0)]
    return Plan(
        config=config,
        recipe=recipe,
        protocol=posed,
        data_root=args.data_root or Path("ImpactMesh-Flood"),
        run_dir=run_dir,
        seeds=tuple(seeds),
        revision=args.revision if args.revision is not None else "main",
        reference=reference,
        reference_sha256=sha256,
        precision=args.precision,
        overrides=tuple(args.overrides),
    )


def _reference(args: Any) -> tuple[Path | HubFile | None, str | None]:
    given = args.reference_sha256
    if given is not None and not re.fullmatch("[0-9a-f]{64}", given):
        raise UsageError("--reference-sha256 is no sha256", fix="64 hex digits, as sha256sum prints them")
    if args.reference is None:
        file = HubFile(REFERENCE.repo, REFERENCE.name, REFERENCE.revision)  # the hash may be another mirror's
        return file, given or REFERENCE.sha256
    if args.reference == "none":
        return None, None
    path = Path(args.reference)
    if not path.is_file():
        raise UsageError("the reference is not found", where=path, fix="--reference FILE, or none")
    return path, given
