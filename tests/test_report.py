"""What the report promises: nothing softened, nothing hidden, nothing loaded, and the same bytes every time."""

import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from floodrepro.errors import FloodreproError, RunFolderError, TableError
from floodrepro.publishing.shortfall import shortfall
from floodrepro.verification import results as results_file
from floodrepro.verification.check import Check, Evidence, Plot, SeedRun, Table, Value
from floodrepro.verification.figure_panels import panels_png
from floodrepro.verification.report import write_report
from floodrepro.verification.wording import NOTHING
from verification_fixtures import all_ignored, healthy, make_table

MADE = "2026-01-02T05:00:00+00:00"
REQUIRED = ["parity", "weights"]
PUBLISHED = {
    "paper": {
        **{"name": "A paper", "protocol": "v0", "chips": 14556, "source": "table 2", "figures": {"IoU_1": 0.3753}},
        "sha256": "4e" * 32,  # of the healthy evidence's reference
    },
    "other": {"name": "Of v1", "protocol": "v1", "source": "table 3", "figures": {"IoU_1": 0.9}},
    "dataset": {"name": "no figures", "protocol": "v0"},
}


def parity(**changes: Any) -> Check:
    difference = Value(
        *("flood IoU, difference to the reference", -0.4, "pp", -1.1, 0.3, 0.9, "event jackknife", 96, 12),
        threshold="interval within ±2 pp",
        ok=True,
    )
    healthy_check = Check(
        *("parity", "Parity with the reference", "Flood IoU is equivalent.", "pass"),
        reason="flood IoU is equivalent within ±2 pp (90 % CI -1.1 to +0.3 pp, 12 events)",
        values=[difference, Value("flood IoU", 0.7464)],
        notes=["A note."],
        evidence=["evaluation/test/best.parquet"],
    )
    return replace(healthy_check, **changes)


def weights(**changes: Any) -> Check:
    check = Check("weights", "Weights and buffers", "All are finite.", "pass", values=[Value("not finite", 0, ok=True)])
    return replace(check, **changes)


def pictured() -> Check:
    """A check with a plot of each kind, gaps in them, and tables short and long."""
    many = [f"EMSR{n}" for n in range(60)]
    third = [0.1, None, 0.4]
    plots = [
        Plot("curve", "lines", "Loss", "epoch", "loss", [{"label": "a", "x": [0, 1, 2], "y": third, "low": third}]),
        Plot("points", "scatter", "IoU", "x", "y", [{"label": "b", "x": third, "y": third}]),
        Plot("bars", "bars", "IoU", "x", "y", [{"label": "c", "x": ["r", "s"], "y": [1.0, None]}]),
        Plot("forest", "forest", "IoU", "x", "", [{"label": "d", "x": [0.5] * 60, "y": many, "low": [0.4] * 60}]),
        Plot("panels", "panels", "Chips", caption="A row a chip."),
    ]
    tables = [Table("Short", ["event", "IoU"], [["EMSR1", 0.5], ["EMSR2", None]]), Table("Long", ["n"], [[1]] * 40)]
    return Check("events", "Event by event", "Flood is found.", "pass", tables=tables, plots=plots)


def skipped() -> Check:
    return Check("variance", "Variance over seeds", "All runs are reported.", "skip", "one run: variance unknown")


def summarise(evidence: Evidence, *checks: Check, required: list[str] = REQUIRED) -> dict[str, Any]:
    return results_file.summarise(evidence, checks, required, MADE)


def panels(rows: int = 1, size: int = 32) -> dict[str, Any]:
    """Panels of which every pixel is known: VV is -20 dB all over, half the flood missed, a stripe ignored."""
    truth = np.zeros((rows, size, size), np.int8)
    truth[:, : size // 2] = 1
    prediction = np.zeros_like(truth)
    prediction[:, :, : size // 2] = 1
    truth[:, :, -4:] = -1
    vv = np.full((rows, size, size), -20.0, np.float32)
    rgb = np.full((rows, size, size, 3), 90, np.uint8)
    return {
        **{
            "titles": np.array(["worst: EMSR9001_1_35TMF_x413905_y4537585"] * rows),
            "before_rgb": rgb,
            "event_rgb": rgb,
        },
        **{"before_vv": vv, "event_vv": vv, "truth": truth, "prediction": prediction},
        **{"metres_per_pixel": np.array(10.0), "class_names": np.array(["rest", "flood"])},
    }


def add_panels(folder: Path) -> None:
    (folder / "evidence").mkdir(parents=True)
    np.savez(folder / "evidence" / "panels.npz", **panels())


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return replace(healthy(tmp_path_factory.mktemp("healthy")), published=PUBLISHED)


@pytest.fixture(scope="module")
def whole(evidence: Evidence) -> dict[str, Any]:
    return summarise(evidence, parity(), weights(), pictured())


def written(results: dict[str, Any], folder: Path) -> tuple[str, str]:
    write_report(results, folder)
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """report.md and report.html with every kind of figure in them."""
    folder = tmp_path_factory.mktemp("pages") / "report"
    add_panels(folder)
    return written(whole, folder)


def words(page: str) -> str:
    """An HTML page's text, without style and tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<style>.*?</style>", " ", page)))


def test_same_results_give_the_same_bytes_in_every_interpreter_and_without_torch(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    results_file.save(whole, tmp_path / "results.json")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nfigure.facecolor: red\naxes.grid: True\n")
    code = (
        "import sys; from pathlib import Path\n"
        "for name in ('torch', 'terratorch', 'lightning', 'pandas'): sys.modules[name] = None\n"
        "from floodrepro.verification import report, results\n"
        "report.write_report(results.load(Path(sys.argv[1])), Path(sys.argv[2]))\n"
    )
    seen = []
    for run, (hash_seed, settings) in enumerate([("1", ""), ("2", str(tmp_path / "matplotlibrc"))]):
        folder = tmp_path / f"elsewhere-{run}"
        add_panels(folder)
        variables = os.environ | {"PYTHONHASHSEED": hash_seed, "TZ": f"UTC{run}"}
        variables |= {"MATPLOTLIBRC": settings} if settings else {}
        command = [sys.executable, "-c", code, str(tmp_path / "results.json"), str(folder)]
        subprocess.run(command, check=True, env=variables, timeout=120)
        (folder / "evidence" / "panels.npz").unlink()
        seen.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert len(seen[0]) == 2 + 5
    assert seen[0] == seen[1]
    text = b"".join(content for path, content in seen[0].items() if path.suffix != ".png").decode()
    assert str(tmp_path) not in text


def test_every_score_of_the_report_is_in_the_results(
    whole: dict[str, Any], pages: tuple[str, str], tmp_path: Path
) -> None:
    results_file.save(whole, tmp_path / "results.json")
    section = pages[0].split("## Scores")[1].split("## Checks")[0]
    shown = re.findall(r"(?<=\| )\d+\.\d+(?= \|)", section)

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, float):
            yield value

    known = {f"{number:.4f}" for number in numbers(json.loads((tmp_path / "results.json").read_text())["scores"])}
    assert len(shown) >= 15
    assert set(shown) <= known


def test_figures_of_another_protocol_or_without_figures_do_not_stand_beside_ours(whole: dict[str, Any]) -> None:
    assert [column["key"] for column in whole["scores"]["columns"]] == ["ours", "reference", "paper"]
    flood = whole["scores"]["rows"][0]
    assert (flood["metric"], flood["paper"]) == ("IoU_1", 0.3753)
    assert "on other chips" in whole["scores"]["columns"][2]["note"]


def test_skip_is_counted_and_shown_as_a_skip(evidence: Evidence, tmp_path: Path) -> None:
    results = summarise(evidence, parity(), weights(status="fail", reason="1 of 180 holds NaN"), skipped())
    assert results["summary"]["text"] == "1 passed, 1 failed, 1 skipped"
    markdown, page = written(results, tmp_path / "report")
    for id_, title, status in (
        ("parity", "Parity with the reference", "pass"),
        ("weights", "Weights and buffers", "fail"),
        ("variance", "Variance over seeds", "skip"),
    ):
        assert re.search(rf"\| {title} \| \**{status}\** \|", markdown)
        assert re.search(rf"### \d\. {title}: {status}\n", markdown)
        section = page.split(f'<section class="check" id="check-{id_}">')[1].split("</section>")[0]
        assert re.findall(r'class="badge (\w+)"', section) == [status]
    row = page.split('href="#check-variance"')[1].split("</tr>")[0]
    assert "skip" in words(row)
    assert "pass" not in words(row)


def test_partial_report_says_so_before_anything_else(evidence: Evidence, tmp_path: Path) -> None:
    markdown, page = written(summarise(evidence, parity(), weights(), skipped()), tmp_path / "partial")
    sentence = "Partial report: 1 of 3 checks were skipped (variance)"
    assert 0 < markdown.index(sentence) < markdown.index("## Verdict")
    assert 0 < page.index(sentence) < page.index('id="verdict"')
    markdown, page = written(summarise(evidence, parity(), weights()), tmp_path / "whole")
    assert "Partial" not in markdown
    assert "Partial" not in page


def test_required_check_that_was_not_made_is_not_passed(evidence: Evidence, tmp_path: Path) -> None:
    results = summarise(evidence, parity(), required=["parity", "provenance"])
    assert results["summary"]["required_not_passed"] == ["provenance"]
    assert results["summary"]["partial"]
    assert not results["summary"]["ok"]
    assert results["verdict"]["equivalent"] is None
    assert "required checks were not made (provenance)" in written(results, tmp_path / "report")[0]


def test_incidents_rollback_resume_and_dropped_seeds_stand_above_the_scores(evidence: Evidence, tmp_path: Path) -> None:
    record = {
        **evidence.record,
        "incidents": [{"kind": "state", "detail": "running_var is inf", "step": 120, "epoch": 3}],
        "rollback": {"step": 120, "state": "last.ckpt", "precision": ["16-mixed", "bf16-mixed"]},
        "resumes": [{"from": "last.ckpt", "changes": ["trainer.max_epochs: 5 became 9"]}],
        "numerics": {"compiled": True, "channels_last": False},
    }
    seeds = [SeedRun(42, "finished", evidence.table, "seed-42"), SeedRun(43, "failed", None, "seed-43")]
    results = summarise(replace(evidence, record=record, seeds=seeds), parity(), weights())
    markdown, page = written(results, tmp_path / "report")
    for words_of in (
        *(
            "running_var is inf",
            "went on in bf16-mixed",
            "trainer.max_epochs: 5 became 9",
            "roundings were on: compiled",
        ),
        "43 (failed)",
    ):
        assert markdown.index("## Verdict") < markdown.index(words_of) < markdown.index("## Scores")
        assert page.index('id="verdict"') < page.index(words_of) < page.index('id="scores"')


def test_healthy_run_has_no_warning(whole: dict[str, Any]) -> None:
    assert whole["warnings"] == []


def test_verdict_is_as_strong_as_the_evidence_and_no_stronger(evidence: Evidence) -> None:
    def verdict(given: Evidence, *checks: Check) -> tuple[bool | None, str]:
        found = summarise(given, *checks)["verdict"]
        assert len(found["sentences"]) == 2
        assert all(sentence.endswith(".") for sentence in found["sentences"])
        assert "confirmed" not in " ".join(found["sentences"])
        return found["equivalent"], " ".join(found["sentences"])

    equivalent, text = verdict(evidence, parity(), weights())
    assert equivalent is True
    assert "Compared with reference.ckpt, flood IoU is equivalent within ±2 pp" in text
    assert "what another seed would give" in text
    assert "fewer than 60 events" in text

    equivalent, text = verdict(evidence, parity(status="fail", reason="not shown to be equivalent"), weights())
    assert equivalent is False
    assert text.startswith("Compared with reference.ckpt, ")

    equivalent, text = verdict(evidence, parity(), weights(status="skip", reason="it was not measured"))
    assert equivalent is None
    assert text.startswith("Nothing is claimed")
    assert "weights (skipped)" in text

    equivalent, text = verdict(evidence, parity(status="skip", reason="one event only"), weights())
    assert (equivalent, text[:17]) == (None, "Nothing is said a")

    equivalent, text = verdict(replace(evidence, reference=None), parity(status="skip"), weights())
    assert equivalent is None
    assert text.startswith("No reference was given, so that nothing is said about a reproduction")


def test_a_checkpoint_compared_with_itself_is_told(evidence: Evidence) -> None:
    warnings = summarise(replace(evidence, reference=evidence.table), parity())["warnings"]
    assert any("comparison with itself" in warning for warning in warnings)


def test_generated_chips_are_not_taken_for_the_published_split(evidence: Evidence) -> None:
    dataset = {"data_of": {"v0": "v0"}, "chips": {"v0": {"test": 14556}}}
    warnings = summarise(
        replace(evidence, published={"dataset": dataset, "reference": {"sha256": "4e" * 32}}), parity()
    )["warnings"]
    assert [warning[:26] for warning in warnings] == ["Generated or partial data:"]
    dataset["chips"]["v0"]["test"] = 96
    assert (
        summarise(replace(evidence, published={"dataset": dataset, "reference": {"sha256": "4e" * 32}}), parity())[
            "warnings"
        ]
        == []
    )


def test_what_is_undefined_is_null_and_never_zero(evidence: Evidence, tmp_path: Path) -> None:
    table = all_ignored(make_table(events=2))
    results = summarise(replace(evidence, table=table), parity(values=[Value("IoU", float("nan")), Value("x", np.inf)]))
    assert [row["ours"] for row in results["scores"]["rows"]] == [None] * len(results["scores"]["rows"])
    assert [value["value"] for value in results["checks"][0]["values"]] == [None, None]
    markdown, _ = written(results, tmp_path / "report")
    assert f"| **flood IoU** (primary) | {NOTHING} |" in markdown


def test_subsets_of_the_test_have_their_own_scores(evidence: Evidence, tmp_path: Path) -> None:
    results = summarise(replace(evidence, subsets={"holdout": make_table(events=3, seed=42)}), parity())
    assert (results["subsets"]["holdout"]["n_events"], results["subsets"]["holdout"]["n_chips"]) == (3, 24)
    assert "### Subset holdout" in written(results, tmp_path / "report")[0]


def test_saved_results_are_read_as_they_were(whole: dict[str, Any], tmp_path: Path) -> None:
    results_file.save(whole, tmp_path / "verification" / "results.json")
    assert results_file.load(tmp_path / "verification" / "results.json") == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 0}, "schema 0"),
        ({"schema": 99, "floodrepro": "9.1"}, "schema 99"),
        ({"schema": None}, "holds no schema"),
        ({"checks": {}}, "checks is missing or of another type"),
        ({"summary": {"passed": 3, "failed": 0, "skipped": 0, "text": "3 passed"}}, "the checks say 2 passed"),
    ],
)
def test_results_of_another_schema_or_edited_by_hand_are_refused(
    evidence: Evidence, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    results = summarise(evidence, parity(), weights(), skipped())
    (tmp_path / "results.json").write_text(json.dumps(results | change), encoding="utf-8")
    with pytest.raises(TableError, match=said) as caught:
        results_file.load(tmp_path / "results.json")
    assert caught.value.fix


def test_skip_edited_to_a_pass_is_refused(evidence: Evidence, tmp_path: Path) -> None:
    results = summarise(evidence, parity(), weights(status="skip"))
    results["checks"][1]["status"] = "pass"
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(TableError, match="contradict themselves"):
        results_file.load(tmp_path / "results.json")


def test_missing_and_damaged_results_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FloodreproError) as caught:
        results_file.load(tmp_path / "results.json")
    assert "floodrepro verify" in caught.value.report()
    (tmp_path / "results.json").write_text('{"schema": 1, "checks": [', encoding="utf-8")
    with pytest.raises(TableError, match="damaged"):
        results_file.load(tmp_path / "results.json")


def test_folder_that_cannot_be_written_is_a_clear_error(evidence: Evidence, tmp_path: Path) -> None:
    whole = summarise(evidence, parity())
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match="cannot be written") as caught:
        write_report(whole, tmp_path / "taken")
    assert "--output" in (caught.value.fix or "")
    with pytest.raises(RunFolderError, match="cannot be written"):
        results_file.save(whole, tmp_path / "taken" / "results.json")


class Page(html.parser.HTMLParser):
    """Tags that are open, tags that close nothing, and all that a page would load."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loaded: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [given["id"]] if "id" in given else []
        self.loaded += [given[key] for key in ("src", "srcset", "data", "poster", "action") if key in given]
        self.loaded += [tag] if tag in ("script", "iframe", "object", "embed", "link", "base") else []
        self.targets += [given["href"]] if "href" in given else []

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def read(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    return parser


def test_html_is_well_formed_and_loads_nothing(pages: tuple[str, str]) -> None:
    page = pages[1]
    parser = read(page)
    assert (parser.open, parser.wrong) == ([], [])
    assert len(parser.ids) == len(set(parser.ids))
    assert len(parser.loaded) == 5
    assert all(source.startswith("data:image/png;base64,") for source in parser.loaded)
    assert {target.removeprefix("#") for target in parser.targets} <= set(parser.ids)
    assert not re.search(r"url\(|@import", page)


def test_text_of_a_check_is_text(evidence: Evidence, tmp_path: Path) -> None:
    planted = "<script>alert(1)</script> | [x](https://evil.example)"
    table = Table(planted, [planted], [[planted]])
    plot = Plot("../../outside", "bars", "a", series=[{"label": "b", "x": ["c"], "y": [1.0]}], caption=f'" {planted}')
    check = weights(
        title=planted, reason=planted, notes=[planted], evidence=[planted], tables=[table], plots=[plot], claim=planted
    )
    markdown, page = written(summarise(evidence, parity(), check), tmp_path / "a" / "b")
    parser = read(page)
    assert (parser.open, parser.wrong) == ([], [])
    assert "script" not in parser.loaded
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in markdown.replace(f"`{planted}`", "")
    assert not re.search(r"(?<!\\)\]\(https", markdown.replace(f"`{planted}`", ""))
    row = next(line for line in markdown.splitlines() if line.startswith("| 2 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    outside = [path for path in tmp_path.rglob("*.png") if (tmp_path / "a" / "b" / "figures") not in path.parents]
    assert outside == []


def pixels(picture: bytes) -> np.ndarray:
    return np.rint(255 * matplotlib.image.imread(io.BytesIO(picture))[..., :3]).astype(int).reshape(-1, 3)


def share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == colour).all(axis=1).mean())


def test_panels_show_decibels_as_they_are_and_each_kind_of_error() -> None:
    seen = pixels(panels_png(panels()))
    assert share(seen, (51, 51, 51)) > 0.1  # -20 of -25 to 0 dB is a fifth of white; a second logarithm would not be
    cell = share(seen, (51, 51, 51)) / 2
    assert share(seen, (0xD5, 0x5E, 0x00)) == pytest.approx(
        cell * 12 / 64, rel=0.1
    )  # missed: half the height, 12 of 32
    assert share(seen, (0xF0, 0xE4, 0x42)) == pytest.approx(cell / 4, rel=0.1)  # false alarms: a quarter
    missing = panels() | {"event_vv": np.full((1, 32, 32), np.nan, np.float32)}
    assert share(pixels(panels_png(missing)), (51, 51, 51)) == pytest.approx(cell, rel=0.05)


def test_damaged_panels_are_an_error_and_absent_ones_are_told(evidence: Evidence, tmp_path: Path) -> None:
    whole = summarise(evidence, parity(), replace(pictured(), plots=pictured().plots[-1:]))
    markdown, page = written(whole, tmp_path / "report")
    assert "no picture" in markdown
    assert "no picture" in words(page)
    (tmp_path / "report" / "evidence").mkdir()
    (tmp_path / "report" / "evidence" / "panels.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TableError, match="cannot be read"):
        write_report(whole, tmp_path / "report")


def test_demos_report_in_the_repository_is_what_its_results_give(tmp_path: Path):
    folder = Path(__file__).parents[1] / "verification" / "demo"
    found = results_file.load(folder / "results.json")
    shutil.copytree(folder / "evidence", tmp_path / "evidence")
    write_report(found, tmp_path)
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {f.name for f in (folder / "figures").iterdir()}
    assert found["run"]["environment"]["code"]["dirty"] is False
    for file in ("results.json", "report.md", "report.html"):
        text = (folder / file).read_text()
        assert not re.search(r"(?<![\w.])/(home|tmp|work|root|mnt)/", text), file


def test_a_shorter_list_of_required_checks_buys_the_exit_code_and_no_claim(evidence: Evidence) -> None:
    bad = Check("weights", "Weights", "All are finite.", "fail", "two are NaN")
    results = results_file.summarise(evidence, [parity(), bad], ["parity"], MADE, ["parity", "weights"])
    assert results["summary"]["ok"] is True
    assert results["verdict"]["equivalent"] is not True
    assert "weights (failed)" in results["verdict"]["sentences"][1]
    assert shortfall(results) == "Required checks did not pass: weights (failed)."


def test_places_on_a_machine_are_no_part_of_results_in_sentences_either() -> None:
    said = "data.init_args.data_root: '/home/alice/secret/data' became '/mnt/x'; 3 chips/s, and/or, https://a.b/c/d"
    told = results_file._without_paths({"resumes": [{"changes": [said], "from": "/srv/runs/last.ckpt"}]})
    changes = "data.init_args.data_root: 'data' became 'x'; 3 chips/s, and/or, https://a.b/c/d"
    assert told == {"resumes": [{"changes": [changes], "from": "last.ckpt"}]}


@pytest.mark.parametrize(
    ("record", "split", "warning"),
    [
        ({"processes": 8, "batch_size": 16}, "test", "8 processes trained with 16 chips each: a step saw 128"),
        ({"data_warnings": ["3 events lie in train and in val"]}, "test", "3 events lie in train and in val."),
        ({}, "val", "of the split val, which training saw"),
    ],
)
def test_what_makes_the_scores_another_experiment_s_is_a_warning(evidence: Evidence, record, split, warning) -> None:
    assert not any(warning in line for line in summarise(evidence, parity())["warnings"])
    table = replace(evidence.table, metadata=evidence.table.metadata | {"split": split})
    other = replace(evidence, record=evidence.record | record, table=table)
    assert any(warning in line for line in summarise(other, parity())["warnings"])


def test_a_reference_that_no_one_published_and_a_recipe_that_no_one_ships_are_warnings(evidence: Evidence) -> None:
    unknown = replace(evidence, published={name: PUBLISHED[name] for name in ("other", "dataset")})
    assert any("is no published checkpoint that is known here" in line for line in summarise(unknown)["warnings"])
    changed = json.loads(json.dumps(evidence.recipe))
    changed["optimizer"]["init_args"]["lr"] = 0.5
    changed["seed_everything"], changed["data"]["init_args"]["data_root"] = 7, "/elsewhere"
    [line] = [
        line for line in summarise(replace(evidence, recipe=changed))["warnings"] if "none that is shipped" in line
    ]
    assert line == "The recipe is none that is shipped: demo has another optimizer.init_args.lr."
