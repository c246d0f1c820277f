"""README and docs say what the program does: commands, flags, links, messages; the README's commands run."""

import contextlib
import importlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import FAULTS, ROOT
from floodrepro import recipe as recipes
from floodrepro.cli.main import COMMANDS, Parser, main
from floodrepro.verification.report import run_facts

DOCUMENTS = {  # text by path relative to the repository
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
_MARK = re.compile(r"# needs ((?:a GPU|the network).*)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# flood: docs/mi300x.md's shell function around `docker run`
_PROGRAM = re.compile(r"(?:srun |docker run .* )?flood(?:repro)?(?::rocm)? +(?![()&])(.+)")


@dataclass(frozen=True)
class Command:
    """A `floodrepro` command line of a document."""

    document: str
    words: tuple[str, ...]  # what follows `floodrepro`, shell variables replaced by 0
    mark: str = ""  # what it needs, by a comment above it

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def commands_of(document: str, text: str) -> list[Command]:
    """The commands of a document's shell blocks; a comment line such as `# needs a GPU` marks the one below it."""
    found, mark = [], ""
    shell = "".join(body for language, body in _BLOCK.findall(text) if language in ("sh", "bash"))
    for line in shell.replace("\\\n", " ").splitlines():
        if program := _PROGRAM.match(line):
            words = tuple("0" if word.startswith("$") else word for word in shlex.split(program[1]))
            found.append(Command(document, words, mark))
        mark = needs[1] if (needs := _MARK.match(line)) else ""
    return found


ALL = [command for document, text in DOCUMENTS.items() for command in commands_of(document, text)]
REPORTED = {"name": "a run", "split": "val", "protocol": "v0", "command": ["floodrepro", "fit", "--config=demo"]}
for data in ({"commit": "da7a" * 10}, {"generated": "floodrepro data synth --events 16"}):
    facts = run_facts(REPORTED | {"data": data}, {"name": "IBM's model"})
    ALL += [Command("report", tuple(shlex.split(text)[1:])) for label, text in facts.items() if "command" in label]
README = [c for c in ALL if c.document == "README.md"]
# map needs a scene (tests/test_map_command.py); fit is what the fixture has run; verify: tests/test_verify.py
LEFT_OUT = ("map", "fit", "verify")
RUN = [c for c in README if not c.mark and c.words[0] not in LEFT_OUT and "ibm.pt" not in str(c)]
PROSE = {document: _BLOCK.sub("", text) for document, text in DOCUMENTS.items()}
FOREIGN = {"--signal", "--nproc-per-node", "--trainer.sync_batchnorm", "--torch-backend", "--no-deps", "--group-add"}
FOREIGN |= {"--ipc", "--shm-size", "--rocm", "--tiny"}  # of other programs, that prose names


def flags_of(name: str) -> set[str]:
    parser = Parser(name)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Parser, "read", lambda self, **options: sys.exit())  # by then all flags are there
        getattr(importlib.import_module(COMMANDS[name][0]), f"_{name}")(parser)
    actions = [action.choices for action in parser._actions if action.dest == "action" and action.choices]
    children = [child for choices in actions if isinstance(choices, dict) for child in choices.values()]
    return {flag for one in (parser, *children) for flag in one._option_string_actions}


@pytest.mark.parametrize("command", list(dict.fromkeys(ALL)), ids=str)
def test_command_of_a_document_is_taken_by_the_program(command: Command, monkeypatch, capsys):
    read, taken = Parser.read, []

    def read_and_stop(parser: Parser, **options: bool) -> None:
        taken.append(read(parser, **options))
        sys.exit()

    for check in ("existing_file", "new_file"):
        monkeypatch.setattr(f"floodrepro.cli.main.{check}", Path)
    monkeypatch.setattr(Parser, "read", read_and_stop)
    assert main(command.words) == 0, capsys.readouterr().err
    assert taken or "--help" in command.words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_flags_that_prose_names_exist(document):
    known = set().union(*(flags_of(name) for name in COMMANDS)) | FOREIGN
    for span in re.findall(r"`([^`]+)`", PROSE[document]):
        words = span.replace("\\|", "|").split()
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", PROSE[document]):
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), link
        if anchor:
            text = _BLOCK.sub("", target.read_text(encoding="utf-8")).lower()
            heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads}, link


def test_messages_of_the_troubleshooting_page_are_messages_of_the_program():
    """Those of other programs are named here; of ours every part between dots has to stand in the source."""
    foreign = ("operator torchvision", "out of memory", "CUDA-capable", "429", "Bus error")
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


def test_readme_shows_every_command_that_a_newcomer_needs():
    assert {c.words[0] for c in README} >= set(COMMANDS) - {"validate", "publish", "bench"}
    assert len(DOCUMENTS["README.md"].splitlines()) <= 110
    assert "scripts/reproduce.sh --demo" in DOCUMENTS["README.md"]
    assert (ROOT / "scripts/reproduce.sh").is_file()


@pytest.mark.parametrize("command", RUN, ids=lambda c: shlex.join(c.words))
def test_command_of_the_readme_runs(command: Command, cli, trained, chips, asked_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained.path)
    (tmp_path / "ImpactMesh-Flood").symlink_to(chips)
    words = list(command.words)
    if words[0] == "export":  # the trained run is shared with other tests
        words += ["--output", "out"]
    told = cli(*words)
    assert told.code in ((0, 1) if words[0] == "doctor" else (0,)), told.err  # it depends on the machine
    assert told.out
