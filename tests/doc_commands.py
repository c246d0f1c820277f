"""The commands that README and docs show, and what their prose names: one reader for all tests of documents."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = {  # text by path relative to the repository
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
_MARK = re.compile(r"# needs ((?:a GPU|the network).*)")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LAUNCHERS = ("srun", "torchrun", "exec", "docker", "podman")
_NAMES = ("floodrepro", "flood")  # flood: docs/mi300x.md's shell function around `docker run`


@dataclass(frozen=True)
class Command:
    """A `floodrepro` command line of a document."""

    document: str
    words: tuple[str, ...]  # what follows `floodrepro`, shell variables replaced by 0
    mark: str = ""  # what it needs, by a comment above it

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return _BLOCK.sub("", text)


def code_spans(text: str) -> list[str]:
    """Inline code of a document's prose, without what a table escapes."""
    return [span.replace("\\|", "|").replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def commands_of(document: str, text: str) -> list[Command]:
    """The commands of a document's shell blocks; a comment line such as `# needs a GPU` marks the one below it."""
    found, mark = [], ""
    shell = "".join(body for language, body in _BLOCK.findall(text) if language in ("sh", "bash"))
    for line in shell.replace("\\\n", " ").splitlines():
        if words := _words(line):
            found.append(Command(document, words, mark))
        mark = hit[1] if (hit := _MARK.match(line.strip())) else ""
    return found


def _words(line: str) -> tuple[str, ...]:
    """What follows the program on a line of shell, up to the next operator; empty for any other line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a string of several lines: no command of ours
        return ()
    while words and re.fullmatch(r"\w+=.*", words[0]):  # VARIABLE=value in front
        words.pop(0)
    if words[:2] in (["docker", "build"], ["docker", "save"]) or "--entrypoint" in words:
        return ()
    places = [i for i, word in enumerate(words) if Path(word).name.partition(":")[0] in _NAMES]
    if not places or (places[0] > 0 and words[0] not in _LAUNCHERS):
        return ()
    rest = words[places[0] + 1 :]
    end = next((i for i, word in enumerate(rest) if set(word) <= set("();<>|&") or word == "$@"), len(rest))
    return tuple("0" if word.startswith("$") else word for word in rest[:end])
