"""README and docs say what the program does: commands, flags, links, values, names of tests. No TerraTorch here."""

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from doc_commands import DOCUMENTS, ROOT, Command, code_spans, commands_of, prose
from floodrepro import recipe as recipes
from floodrepro.cli.main import COMMANDS, Parser, _flags, main
from floodrepro.data.names import S2_BANDS
from floodrepro.recipe import SECTIONS
from floodrepro.verification.battery import CHECKS

BASE, V1 = "terramind_v1_base_impactmesh_flood_amd", "terramind_v1_base_impactmesh_flood_v1"
ALL = [command for document, text in DOCUMENTS.items() for command in commands_of(document, text)]
SHOWN = [command for command in ALL if command.document != "docs/cli.md"]  # that page is help texts
# Run as they stand: by test_readme.py, which also checks that it leaves no command out, and by this file.
RUN_WHOLE = {("README.md", name) for name in ("validate", "test", "predict", "configs", "data", "bench", "doctor")}
RUN_WHOLE |= {("docs/protocols.md", "data")}
# For the others: where the command is run with the flags that documents show.
RUN_BY = {
    "fit": ("test_fit.py", "test_guard.py", "test_repeat.py", "test_resume.py"),
    "validate": ("test_passes.py",),
    "test": ("test_passes.py", "test_chip_table.py"),
    "predict": ("test_passes.py",),
    "verify": ("test_verify.py",),
    "export": ("test_export.py", "card_runs.py"),
    "publish": ("test_publish.py",),
    "configs": ("test_cli.py",),
    "data": ("test_audit.py", "test_fetch.py"),
    "doctor": ("test_doctor.py",),
    "bench": ("test_bench_train.py", "test_bench_test.py"),
    "reproduce": ("test_demo.py", "test_reproduce.py"),
}
FOREIGN = {  # flags that prose names and that belong to other programs
    *("--ckpt_path", "--signal", "--nproc-per-node", "--trainer.sync_batchnorm"),
    *("--device", "--group-add", "--ipc", "--security-opt", "--shm-size", "--entrypoint", "--time"),
}


def flags_of(name: str) -> set[str]:
    parser = Parser(name)
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    return set(_flags(parser))


@pytest.mark.parametrize("command", list(dict.fromkeys(ALL)), ids=str)
def test_command_of_a_document_is_taken_by_the_program(command: Command, monkeypatch, capsys):
    if command.words[0] in COMMANDS:
        taken = []
        module = importlib.import_module(COMMANDS[command.words[0]][0])
        monkeypatch.setattr(module, "run", lambda args: taken.append(args) or 0)
    assert main(command.words) == 0, capsys.readouterr().err
    assert taken or "--help" in command.words


def test_a_wrong_command_in_a_document_would_be_found():
    assert main(("fit", "--config", "demo", "--nam", "x")) == 2
    assert main(("data", "audit", "--root", "x")) == 2


def test_commands_are_read_out_of_any_shell():
    lines = 'A=1 srun floodrepro fit --index "$X" && echo\n'
    lines += "# needs a GPU, two hours\ndocker run -v a:b floodrepro:rocm doctor\n"
    text = f"```sh\n{lines}cd floodrepro\ndocker build -t floodrepro:rocm .\n```\n"
    assert [(command.words, command.mark) for command in commands_of("x.md", text)] == [
        (("fit", "--index", "0"), ""),
        (("doctor",), "a GPU, two hours"),
    ]
    of_page = commands_of("x.md", f"All commands of this page need a GPU.\n\n{text}")
    assert [command.mark for command in of_page] == ["a GPU", "a GPU, two hours"]


def needs(command: Command) -> str:
    """What a command cannot do without: fp16 a GPU, the hub the network."""
    words = command.words
    if words[:2] == ("data", "fetch") or (words[0] == "publish" and "--dry-run" not in words):
        return "the network"
    if words[0] == "reproduce" and not {"--demo", "--dry-run"} & set(words):
        return "a GPU"
    precision = words[words.index("--precision") + 1] if "--precision" in words else ""
    if words[0] == "bench":
        return "a GPU" if precision == "fp16" else ""
    config = words[words.index("--config") + 1] if words[0] == "fit" else ""
    if config in recipes.shipped() and not precision:
        precision = recipes.read(recipes.find(config))["trainer"]["precision"]
    return "a GPU" if precision in ("fp16", "16-mixed") else ""


def test_command_that_needs_a_gpu_or_the_network_says_so():
    unsaid = [f"{command} (needs {needs(command)})" for command in SHOWN if needs(command) not in command.mark]
    assert unsaid == []


def test_any_other_command_is_run_by_a_test_with_these_flags():
    tests = {name: "".join((ROOT / "tests" / file).read_text() for file in files) for name, files in RUN_BY.items()}
    assert set(tests) == set(COMMANDS)
    others = [c for c in SHOWN if not c.mark and (c.document, c.words[0]) not in RUN_WHOLE]
    never = [str(c) for c in others if not all(re.search(rf"{flag}\b", tests[c.words[0]]) for flag in c.flags)]
    assert never == []


def test_commands_of_the_protocol_page_run(tmp_path: Path, monkeypatch):
    """Shrunk, for time."""
    monkeypatch.chdir(tmp_path)
    [synth, audit] = commands_of("docs/protocols.md", DOCUMENTS["docs/protocols.md"])
    assert (synth.words[:2], audit.words[:2]) == (("data", "synth"), ("data", "audit"))
    assert main([*synth.words[:-8], *("--chips", "16", "--size", "32"), *synth.words[-6:]]) == 0
    assert main([*audit.words, "--jobs", "1"]) == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_that_prose_names_exist(document):
    known = set().union(*(flags_of(name) for name in COMMANDS)) | FOREIGN | {"--help", "--demo"}
    for span in code_spans(DOCUMENTS[document]):
        words = span.split()
        if words[0] == "floodrepro" and len(words) > 1 and words[1].islower():
            assert words[1] in COMMANDS, span
            known_here = flags_of(words[1]) | {"--help"}
        elif words[0].startswith("--"):
            known_here = known
        else:
            continue
        flags = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
        unknown = {flag for flag in flags - known_here if flag[2:].split(".")[0] not in SECTIONS}
        assert unknown == set(), span


def links_of(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if not re.match(r"\w+:", link)]


def anchors_of(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in links_of(DOCUMENTS[document]):
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        document = ahead.pop()
        if document in DOCUMENTS and document not in reached:
            reached.add(document)
            targets = ((ROOT / document).parent / link.partition("#")[0] for link in links_of(DOCUMENTS[document]))
            ahead += [str(Path(os.path.normpath(target)).relative_to(ROOT)) for target in targets]
    assert set(DOCUMENTS) - reached == set()


def test_cli_reference_is_what_its_script_prints():
    script = [sys.executable, str(ROOT / "scripts" / "make_cli_reference.py")]
    done = subprocess.run(script, capture_output=True, env={**os.environ, "COLUMNS": "40"}, check=True)
    assert done.stdout.decode() == DOCUMENTS["docs/cli.md"], "scripts/make_cli_reference.py > docs/cli.md"


def rows_of(text: str) -> list[list[str]]:
    """Cells of all table rows, heads included."""
    lines = (line.strip().strip("|") for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def described(text: str) -> dict[str, str]:
    """Key and value of each row of the recipe page, keys with the heading that they stand under."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        head, _, body = section.partition("\n")
        if head.startswith("`") or head == "Top level":
            prefix = "" if head == "Top level" else f"{head.strip('`')}."
            found |= {prefix + row[0].strip("`"): row[1] for row in rows_of(body) if row[0].startswith("`")}
    return found


def leaves(node: object, path: str) -> dict[str, object]:
    """Values by path; an item of a list of classes goes by its class, and `init_args` below it is left out."""
    if isinstance(node, dict) and node:
        return {k: v for key, below in node.items() for k, v in leaves(below, f"{path}.{key}".lstrip(".")).items()}
    if isinstance(node, list) and isinstance(node[0], dict):
        found: dict[str, object] = {}
        for item in node:
            name = item.get("name") or item["class_path"].rsplit(".", 1)[-1]
            arguments = item.get("init_args", {k: v for k, v in item.items() if k not in ("name", "class_path")})
            found |= leaves(arguments, f"{path}.{name}") if arguments else {f"{path}.{name}": None}
        return found
    return {path: node}


def test_recipe_page_has_every_key_and_its_value():
    recipe = {
        path.replace(".necks.", "."): value for path, value in leaves(recipes.read(recipes.find(BASE)), "").items()
    }
    page = described(DOCUMENTS["docs/recipe.md"])
    elsewhere = {"data.init_args.means.S2L2A", "data.init_args.stds.S2L2A"}  # on the page of protocols
    assert page.keys() == recipe.keys()
    for path in page.keys() - elsewhere:
        assert yaml.safe_load(page[path].strip("`") or "null") == recipe[path], path


def test_protocol_page_has_the_recipes_statistics():
    old, new = (recipes.read(recipes.find(name))["data"]["init_args"] for name in (BASE, V1))
    columns = [
        [value for modality in ("S2L2A", "S1RTC", "DEM") for value in data[key][modality]]
        for data in (old, new)
        for key in ("means", "stds")
    ]
    rows = [row for row in rows_of(DOCUMENTS["docs/protocols.md"]) if re.match(r"S2L2A|S1RTC|DEM", row[0])]
    assert [row[0].split()[1] for row in rows[:12]] == list(S2_BANDS)
    assert [[float(cell) for cell in row[1:]] for row in rows] == [list(row) for row in zip(*columns, strict=True)]


def test_protocol_page_names_every_shipped_recipe_under_its_protocol():
    from floodrepro.data.presence import protocol_of

    rows = {row[0].strip("`"): row[-1] for row in rows_of(DOCUMENTS["docs/protocols.md"]) if row[0].startswith("`")}
    named = {name: protocol for protocol, cell in rows.items() for name in re.findall(r"`(\w+)`", cell)}
    assert named == {name: protocol_of(recipes.read(path)) for name, path in recipes.shipped().items()}


def test_tests_that_documents_name_exist():
    for document, text in DOCUMENTS.items():
        for entry in re.split(r"\n(?:- |\n)", text):
            files = [ROOT / file for file in re.findall(r"\btests/\w+\.py", entry)]
            missing = [str(file) for file in files if not file.is_file()]
            assert missing == [], document
            tests = "".join(file.read_text() for file in files)
            names = re.findall(r"\btest(?:_[A-Za-z0-9]+){3,}", re.sub(r"tests/\w+\.py", "", entry))
            assert [name for name in names if f"def {name}(" not in tests] == [], document


def test_every_footgun_names_a_test():
    entries = re.findall(r"^- \*\*.*?(?=^- |^## |\Z)", DOCUMENTS["docs/footguns.md"], re.DOTALL | re.MULTILINE)
    assert len(entries) > 30
    assert [entry for entry in entries if "`test_" not in entry] == []


def segmentation_tasks() -> str:
    """Source of the installed TerraTorch's task, read without importing it."""
    file = importlib.metadata.distribution("terratorch").locate_file("terratorch/tasks/segmentation_tasks.py")
    return Path(str(file)).read_text(encoding="utf-8")


def test_dice_loss_of_the_installed_terratorch_reads_no_class_weights():
    calls = [node for node in ast.walk(ast.parse(segmentation_tasks())) if isinstance(node, ast.Call)]
    [dice] = [call for call in calls if ast.unparse(call.func).endswith("DiceLoss")]
    assert "weight" not in ast.unparse(dice)


def test_test_step_of_the_installed_terratorch_is_not_tiled_unless_told():
    tree = ast.parse(segmentation_tasks())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    tiled = {f.name for f in functions if "self.tiled_inference_parameters:" in ast.unparse(f)}
    assert tiled == {"predict_step"}
    [init] = [f for f in functions if "tiled_inference_on_testing" in [a.arg for a in f.args.args]]
    defaults = dict(zip([a.arg for a in init.args.args][-len(init.args.defaults) :], init.args.defaults, strict=True))
    assert ast.literal_eval(defaults["tiled_inference_on_testing"]) is False


def test_checks_of_the_verification_page_are_the_battery():
    section = DOCUMENTS["docs/verification.md"].partition("## The checks")[2].partition("\n## ")[0]
    assert [row[0].strip("`") for row in rows_of(section)[1:]] == list(CHECKS)
