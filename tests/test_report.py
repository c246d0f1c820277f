"""The report: in a reviewer's order, nothing softened or hidden, nothing loaded, the same bytes every time."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from floodrepro.errors import TableError
from floodrepro.verification import results as results_file
from floodrepro.verification.checks import CRITERIA, Evidence, figure
from floodrepro.verification.figures import panels_png, png
from floodrepro.verification.report import draw, md, render, run_facts, to_html, write_report
from verification_fixtures import OTHER, make_table, summarise

# A picture of which every pixel is known: half of the flood missed, a stripe ignored.
TRUTH, PREDICTION = np.zeros((2, 32, 32), np.int8)
TRUTH[:16], PREDICTION[:, :16], TRUTH[:, -4:] = 1, 1, -1
SEEN = {"before_rgb": np.full((32, 32, 3), 90, np.uint8), "before_vv": np.full((32, 32), -20.0, np.float32)}
SEEN |= {"event_rgb": SEEN["before_rgb"], "event_vv": SEEN["before_vv"], "title": "worst: a chip, flood IoU 0.333"}
PICTURE = panels_png([SEEN | {"truth": TRUTH, "prediction": PREDICTION}], ["rest", "flood"], 1)


def summary_of(evidence: Evidence, **changes: Any) -> dict[str, Any]:
    return summarise(replace(evidence, **changes))


@pytest.fixture(scope="module")
def whole(evidence: Evidence) -> dict[str, Any]:
    return summarise(evidence)


@pytest.fixture(scope="module")
def pages(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "evidence").mkdir()
    (folder / "evidence" / "panels.png").write_bytes(PICTURE)
    page = write_report(whole, folder)
    return (folder / "report.md").read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


def test_report_has_the_order_that_a_reviewer_wants(pages: tuple[str, str]):
    parts = ["# Verification of seed-42, a model that maps flood", "Equivalent", "docs/statistics.md", "forest.png"]
    parts += ["Not the published data", "## Scores", "panels.png", "events.png", "## Checks", "lie in the run's folder"]
    parts += [">pass, equivalent<", "<details", "| figure | value | interval | n |\n", "## How to reproduce", "FILE is"]
    places = [pages[0].index(part) for part in parts]
    assert places == sorted(places)


def test_worst_checks_come_first_and_every_one_names_the_function_that_made_it(evidence: Evidence):
    bad = {"status": "fail", "finding": "not finite (a.b): 1", "values": [figure("not finite", 1, at_most=0)]}
    results = summary_of(evidence, measured=evidence.measured | {"weights": bad})
    markdown = render(results, {})
    table = markdown.split("## Checks")[1].split("<details")[0]
    statuses = re.findall(r'<span class="(\w+)">', table)
    assert statuses == sorted(statuses, key=["fail", "undecided", "skip", "pass"].index)
    assert "not finite (a.b): 1" in table
    for check in results["checks"]:
        assert f"`{check['code']}`" in markdown
    assert results["verdict"]["word"] == "failed"
    assert "Required and not met: Weights and buffers" in markdown
    assert "Failed: Weights and buffers (not finite (a.b): 1)" in results["summary"]["text"]  # the card's text as well


def test_shortened_list_of_required_checks_is_shown_as_shortened_and_skipped_ones_are_no_passes(evidence: Evidence):
    results = summarise(evidence, "identities")
    assert results["summary"]["ok"]
    assert "list of required checks was shortened; not asked for: Against the reference" in render(results, {})
    summary = summary_of(evidence, measured={})["summary"]
    assert summary["not_met"] == ["weights", "exported_pair"]
    assert sum(summary[word] for word in ("passed", "failed", "undecided", "skipped")) == len(CRITERIA)


def test_no_reference_is_no_failure_and_a_wrong_one_no_difference(evidence: Evidence):
    alone = summary_of(evidence, reference=None, absent={"reference": ("skip", "none was given")})
    assert (alone["verdict"]["word"], alone["summary"]["ok"], alone["forest"]["series"]) == ("not compared", True, [])
    wrong = summary_of(evidence, reference=make_table(11, seed=1, checkpoint=OTHER), reference_name="ibm/x")
    assert (wrong["verdict"]["outcome"], wrong["summary"]["ok"]) == (None, False)
    assert "The run was not compared with ibm/x: wrong reference" in wrong["verdict"]["sentence"]


def test_what_went_wrong_on_the_way_stands_above_the_scores(evidence: Evidence):
    record = {"status": "interrupted", "incidents": [{"kind": "loss", "detail": "the loss is nan", "step": 7}]}
    record |= {"rollback": {"step": 7, "precision": ["16-mixed", "bf16-mixed"]}, "resumes": [{"changes": ["root"]}]}
    record |= {"reason": "/mnt/data is full: 3/4 of /scratch/me/x.ckpt was written"}  # no folder is told
    found = summary_of(evidence, record=evidence.record | record)
    assert found["run"]["reason"] == "data is full: 3/4 of x.ckpt was written"
    above = render(found, {}).split("## Scores")[0]
    for says in ("status of the run: interrupted", "the loss is nan", "continued in bf16-mixed", "a change: root"):
        assert says in above


def test_published_columns_stand_beside_the_same_chips_alone(evidence: Evidence):
    entry = {"name": "A paper", "protocol": "v0", "split": "test", "source": "p", "figures": {"IoU_1": 0.4}}
    for chips, stands in ((96, True), (14_556, False)):
        results = summary_of(evidence, published={"a": entry | {"chips": chips}})
        assert ("A paper" in [column["label"] for column in results["scores"]["columns"]]) is stands
    assert re.search("96 chips.*14,556", results["banner"])


def test_scores_have_baselines_precision_recall_the_truth_s_share_and_a_dash_for_what_is_absent(evidence: Evidence):
    counts = np.zeros_like(evidence.table.counts)
    counts[:, 1, 1] = evidence.table.counts.sum(axis=(1, 2))
    flooded = summary_of(evidence, table=replace(evidence.table, counts=counts), reference=None)
    assert "| rest IoU | \N{EN DASH} |" in render(flooded, {})
    counts = np.zeros_like(counts)
    counts[:, :, 1] = evidence.table.counts.sum(axis=2)
    found = summary_of(evidence, baselines={"everything": replace(evidence.table, counts=counts)})["scores"]
    rows = {row["label"]: row["values"] for row in found["rows"]}
    assert [column["label"] for column in found["columns"]] == ["seed-42", "IBM's model", "everything"]
    share = rows["share of flood in the truth"][0]
    assert rows["flood precision"][2] == pytest.approx(share)
    assert rows["flood recall"][2] == 1.0
    assert rows["flood IoU, mean over 11 events"][0] > 0.5


def test_facts_name_the_devices_the_batch_the_time_and_what_the_reference_is(evidence: Evidence, pages):
    facts = run_facts(evidence.record | {"processes": 2, "ended": "2026-03-04T10:00:00+00:00"})
    assert (facts["device"], facts["chips in a step"]) == ("2 x AMD Instinct MI300X", "16, 8 in each process")
    assert facts["from start to end"] == "3 days, 0:00:00"
    assert "| reference (FILE) | IBM's model: a U-Net trained on radar |" in pages[0]
    assert "Differences over 12 events with 90% intervals" in pages[0]


def test_markup_in_a_name_is_text(evidence: Evidence):
    page = to_html(render(summary_of(evidence, reference_name="<script>alert(1)</script> | **bold**"), {}), {}, "x & y")
    assert ("<script>" in page, "alert(1)" in page) == (False, True)
    markup = "</code><script>alert(1)</script>"
    results = summary_of(evidence) | {"banner": markup, "warnings": [markup]}
    results["verdict"] = dict.fromkeys(results["verdict"], markup)
    for check in results["checks"]:
        check |= {"outcome": markup, "code": markup, "title": markup}
    assert "<script" not in to_html(render(results, {}), {}, markup)
    assert md("a|b\n*c* <i>") == "a\\|b \\*c\\* &lt;i&gt;"


def test_page_is_one_file_and_loads_nothing(pages: tuple[str, str]):
    loaded = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', pages[1])
    assert len(loaded) >= 4
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert "default-src 'none'" in pages[1]
    assert not re.search(r"@import|url\(", pages[1])


def test_no_figure_is_written_to_another_place(whole: dict[str, Any]):
    plot = next(check["plots"][0] for check in whole["checks"] if check["id"] == "events")
    found = {"checks": [{"plots": [plot | {"name": "../../evil"}]}], "forest": whole["forest"]}
    assert set(draw(found, Path("nowhere"))) == {"figures/forest.png", "figures/______evil.png"}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 1}', {"checks": 5}, {"verdict": "x"}, {"checks": [{"status": "good"}]}]
)
def test_damaged_results_are_an_error_that_says_what_to_do(tmp_path: Path, content: Any, whole: dict[str, Any]):
    (tmp_path / "results.json").write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(TableError, match=r"(?s)missing, damaged.*floodrepro verify"):
        results_file.load(tmp_path / "results.json")


def test_figures_show_the_margin_hits_misses_and_what_is_ignored(whole: dict[str, Any]):
    forest, panels = (matplotlib.image.imread(io.BytesIO(one))[..., :3] for one in (png(whole["forest"]), PICTURE))
    assert (np.abs(forest - np.array([216, 236, 216]) / 255).max(axis=-1) < 0.01).sum() > 500
    for colour in ((213, 94, 0), (240, 228, 66), (140, 140, 140), (0, 114, 178)):  # miss, false alarm, ignored, hit
        found = np.abs(panels - np.array(colour) / 255).max(axis=-1) < 0.02
        assert found.sum() > 300
    assert (np.diff(found[-19].astype(int)) == 1).sum() == 1  # the colour of flood and hit is once in the legend
    assert forest.shape[1] < 600  # a phone shows all of it, and its labels can be read
