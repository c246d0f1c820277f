"""README and docs say what the program does: commands, flags, links, messages. No TerraTorch is imported here."""

import importlib
import re
from pathlib import Path

import pytest

from conftest import FAULTS
from doc_commands import DOCUMENTS, ROOT, Command, code_spans, commands_of, prose
from floodrepro import recipe as recipes
from floodrepro.cli.main import COMMANDS, Parser, main

ALL = [command for document, text in DOCUMENTS.items() for command in commands_of(document, text)]
FOREIGN = {  # flags that prose names and that belong to other programs
    *("--ckpt_path", "--signal", "--nproc-per-node", "--trainer.sync_batchnorm", "--torch-backend", "--no-deps"),
    *("--device", "--group-add", "--ipc", "--shm-size", "--time", "--rocm", "--tiny", "--output_dir"),
}


def flags_of(name: str) -> set[str]:
    parser = Parser(name)
    getattr(importlib.import_module(COMMANDS[name][0]), f"_{name}_flags")(parser)
    actions = [action.choices for action in parser._actions if action.dest == "action" and action.choices]
    children = [child for choices in actions if isinstance(choices, dict) for child in choices.values()]
    return {flag for one in (parser, *children) for flag in one._option_string_actions}


@pytest.mark.parametrize("command", list(dict.fromkeys(ALL)), ids=str)
def test_command_of_a_document_is_taken_by_the_program(command: Command, monkeypatch, capsys):
    name, taken = command.words[0], []
    monkeypatch.setattr("floodrepro.cli.main.existing_file", Path)
    if name in COMMANDS:
        module = importlib.import_module(COMMANDS[name][0])
        monkeypatch.setattr(module, f"_run_{name}", lambda args: taken.append(args) or 0)
    assert main(command.words) == 0, capsys.readouterr().err
    assert taken or "--help" in command.words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_that_prose_names_exist(document):
    known = set().union(*(flags_of(name) for name in COMMANDS)) | FOREIGN
    for span in code_spans(DOCUMENTS[document]):
        words = span.split()
        if words[0] == "floodrepro" and len(words) > 1 and words[1].islower() and words[1].isalpha():
            assert words[1] in COMMANDS, span
            known_here = flags_of(words[1])
        elif words[0].startswith("--"):
            known_here = known
        else:
            continue
        flags = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
        unknown = {flag for flag in flags - known_here if flag[2:].split(".")[0].rstrip("+") not in recipes.SECTIONS}
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


def test_messages_of_the_troubleshooting_page_are_messages_of_the_program():
    """Those of other programs are named here; of ours every part between dots has to stand in the source."""
    foreign = ("operator torchvision", "No module named pip", "out of memory", "CUDA-capable", "429", "Bus error")
    foreign += ("unable to open", "Too Many", "nvidia-", "HF_HUB_OFFLINE", "/dev/kfd is", "lightning")
    source = " ".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "\0", re.sub(r'"\s*f?"', "", source))
    rows = re.findall(r"^\| (.*?) \|", DOCUMENTS["docs/troubleshooting.md"], re.MULTILINE)
    ours = [m for row in rows for m in re.findall(r"`([^`]+)`", row) if not m.startswith(foreign)]
    assert len(ours) > 10
    parts = [part.strip(" ,?") for message in ours for part in re.split(r"…|\b[NM]\b", message)]
    assert [part for part in parts if part and part not in source] == []


def test_every_fault_of_the_reliability_page_is_planted_by_a_test():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert len(FAULTS) >= 24
    assert [name for name in sorted(FAULTS) if f"def {name}(" not in source] == []
