"""The whole path at toy size, on a CPU: generated chips, train, test, export, verify, and the model card."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.verify import verify
from floodrepro.errors import FloodreproError
from floodrepro.run_folder import RunFolder, free_name

if TYPE_CHECKING:
    from floodrepro.evaluation.baselines import Baseline
    from floodrepro.evaluation.passes import PassResult

DATA = {"events": 16, "chips": 128, "size": 64, "protocol": "v0", "seed": 42}
MIN_FLOOD_IOU = 0.5  # what the demo promises on events that the model has not seen
SHORTER = 0.4  # of the epochs, for the second model: enough to have learnt something, few enough to differ
# Of the demo's own: that two models of different training are equivalent is not asked, nor a clean checkout.
REQUIRED = "convergence,events,weights,load_back,round_trip,panels,identities,data"


def run_demo(folder: Path, overrides: list[str], output_format: str) -> int:
    """Run it.

    Args:
        folder: Where chips and runs go; chips that are there are taken, a new run gets a free name.
        overrides: Of the demo recipe's keys.
        output_format: text or json.

    Raises:
        FloodreproError: The model has not learnt enough, or a check that the demo asks for did not pass.
    """
    start = time.monotonic()
    data = _chips(folder / "ImpactMesh-Flood")
    path = folder / "runs" / "demo"
    path = path.with_name(free_name(path)) if path.exists() else path
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.evaluation.baselines import evaluate_baselines
    from floodrepro.evaluation.tabulate import run_test
    from floodrepro.publishing.export import export
    from floodrepro.publishing.make_card import add_card, records_of
    from floodrepro.training.fit import fit
    from floodrepro.training.recipe_cli import RecipeCLI

    demo = recipes.find("demo")
    overrides = [*recipes.data_overrides(data, recipes.read(demo)), *overrides]
    console.say("training")
    parsed = RecipeCLI([demo], overrides)
    run = fit(parsed, path).run
    console.say("testing on events that are in no other split")
    result = run_test(RecipeCLI([run.recipe]), run.best).measured
    split = data / "split"
    baselines = evaluate_baselines(
        data / "data",
        train_split=split / "impactmesh_flood_train.txt",
        test_split=split / "impactmesh_flood_test.txt",
    )
    report = _report(run, data, result, baselines)
    if (flood_iou := result.metrics["test/IoU_1"]) < MIN_FLOOD_IOU:
        console.emit(report, _text(report), output_format)
        raise FloodreproError(f"flood IoU {flood_iou:.3f} is below {MIN_FLOOD_IOU}: the model has not learnt enough")
    epochs = max(1, int(parsed.recipe["trainer"]["max_epochs"] * SHORTER))
    console.say(f"training a second model for {epochs} epochs, to compare with")
    second = RecipeCLI([demo], [*overrides, f"--trainer.max_epochs={epochs}"])
    reference = fit(second, path.with_name(f"{path.name}-shorter")).run.best
    recipe, name = recipes.read(run.recipe), run.path.name
    exported = export(run.best, recipe, run.export, name, run.read_record()["data_digest"])
    found, files = verify(run, reference, run.verification, require=REQUIRED, name="the shorter-trained model")
    card = add_card(run.export, name, run.best, records_of(run, run.best, recipe))
    report["where"] |= {"export": str(exported.weights), "card": str(card)}
    report["where"] |= {"report": str(next(file for file in files if file.suffix == ".html"))}
    report |= {
        "verdict": found["verdict"]["sentences"],
        "checks": {check["id"]: check["status"] for check in found["checks"]},
        "summary": found["summary"]["text"],
        "seconds": round(time.monotonic() - start, 1),
    }
    console.emit(report, _text(report), output_format)
    if not found["summary"]["ok"]:
        failed = ", ".join(found["summary"]["required_not_passed"])
        raise FloodreproError(f"checks did not pass: {failed}", where=report["where"]["report"])
    return 0


def _chips(root: Path) -> Path:
    """Generate the demo's chips, or take those that are there; a half-written folder never counts."""
    if (root / "split" / "impactmesh_flood_test.txt").is_file():
        console.say(f"chips are there already: {root}")
        return root
    from floodrepro.data.synth import generate

    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a demo that was stopped while it generated
    console.say(f"generating {DATA['chips']} chips of {DATA['events']} flood events")
    with console.progress("chips") as progress:
        generate(partial, **DATA, progress=progress)  # type: ignore[arg-type]
    partial.replace(root)
    return root


def _report(run: RunFolder, data: Path, result: "PassResult", baselines: "list[Baseline]") -> dict[str, Any]:
    names = {"mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy"}
    model = {name.removeprefix("test/"): value for name, value in result.metrics.items()}
    rows = {"this model": {name: value for name, value in model.items() if name in names}}
    rows |= {f"{b.name} ({b.detail})": b.scores for b in baselines}
    return {
        "split": "test",
        "chips": result.chips["test"],
        "scores": rows,
        "where": {"chips": str(data), "run": str(run.path), "checkpoint": str(run.best), "metrics": str(run.metrics)},
    }


def _text(report: dict[str, Any]) -> str:
    names = ("mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy")
    rows = [[f"test, {report['chips']} chips", *(f"test/{name}" for name in names)]]
    rows += [[label, *(f"{scores[name]:.4f}" for name in names)] for label, scores in report["scores"].items()]
    where = console.columns([[key, value] for key, value in report["where"].items()], right_from=2)
    text = f"{console.columns(rows)}\n\n{where}"
    if "verdict" in report:
        text += f"\n\n{' '.join(report['verdict'])}\n\nchecks: {report['summary']} ({report['seconds']:.0f} s in all)"
    return f"{text}\n\ngenerated chips: this shows that the path works, not how well floods are mapped"
