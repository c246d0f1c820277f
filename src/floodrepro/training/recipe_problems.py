"""All that is wrong with a recipe, in one list. jsonargparse stops at the first problem."""

import copy
import re
from argparse import ArgumentError
from collections.abc import Iterator
from typing import Any

from floodrepro.recipe import Recipe, unknown_sections

_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN = re.compile(r"(?:Option|does not accept option) '([^']+)'")
_GROUP = re.compile(r"Group '([^']+)' does not accept option")
_KEY = re.compile(r'Parser key "([^"]+)"')
_EXPECTED = re.compile(r"Expected (?:a|one of) (<class '[^']+'>|[^.\n]+)")
_LIMIT = 50  # more problems than anyone mends in one go


def list_problems(parser: Any, recipe: Recipe) -> list[str]:
    """Check a recipe against the signatures of the classes that it names.

    The recipe is parsed, the key that the parser objects to is noted and taken out of a copy, and so on until the rest
    is accepted or an objection names no key that can be found.

    Args:
        parser: LightningArgumentParser of TerraTorch's command-line class.
        recipe: Content of the YAML.

    Returns:
        One line for each problem, the key first; empty if there is none.
    """
    unknown = unknown_sections(recipe)
    problems = list(unknown.values())
    rest = {key: value for key, value in copy.deepcopy(recipe).items() if key not in unknown}
    # Paths are noted before anything is taken out: a list that has lost an item counts the rest differently.
    paths = {id(node): where for where, node, _ in _walk(rest)}
    while len(problems) < _LIMIT:
        try:
            parser.parse_object(rest, defaults=False)
        except ArgumentError as error:
            message = str(error)
        else:
            break
        problem = _take_out(rest, paths, message)
        if problem is None:
            # A section may be missing because it was taken out, or because another config brings it.
            if not problems and "arguments are required" not in message:
                problems.append(describe(message))
            break
        problems.append(problem)
    return problems


def describe(message: str) -> str:
    """The core of jsonargparse's objection in one line, without the whole value that it repeats."""
    message = message.split("Given value type:")[0]
    unknown, key, found = _UNKNOWN.search(message), list(_KEY.finditer(message)), list(_CLASS.finditer(message))
    if unknown:
        return f"unknown key '{unknown.group(1)}'" + (f" of {found[-1].group(1)}" if found else "")
    if key and _EXPECTED.search(message) and not (found and len(key) == 1):
        return f"{key[-1].group(1)}: {_expectation(message)}"
    return " ".join((message[found[-1].start() :] if found else message).split())


def _take_out(recipe: Recipe, paths: dict[int, str], message: str) -> str | None:
    """Remove from *recipe* what *message* is about and describe it; None where it cannot be found."""
    class_match = _CLASS.search(message)
    if class_match is None:
        return _take_out_plain(recipe, message)
    class_path = class_match.group(1)
    # What is nested deepest stands last in the message.
    detail = message[class_match.end() :].split("- Expected a <class 'NoneType'>")[0]
    nested = list(_CLASS.finditer(detail))
    if nested:
        class_path, detail = nested[-1].group(1), detail[nested[-1].end() :]
    unknown, key = _UNKNOWN.search(detail), _KEY.search(detail)
    name = unknown.group(1) if unknown else key.group(1) if key else None
    for _, node, holder in list(_walk(recipe)):
        if node.get("class_path") != class_path:
            continue
        where = paths[id(node)]
        if name is None:
            _remove(holder, node)
            reason = " ".join(detail.split("- Not a valid subclass")[0].strip(" :\n").split())
            return f"{where}.class_path: '{class_path}' does not import ({reason})"
        arguments = node.get("init_args") or {}
        if name.split(".")[0] in arguments:
            value = arguments.pop(name.split(".")[0])
            if unknown:
                return f"{where}.init_args.{name}: unknown key of {class_path.rsplit('.', 1)[-1]}"
            return f"{where}.init_args.{name}: {_expectation(detail)}, got {value!r}"
    return None


def _take_out_plain(recipe: Recipe, message: str) -> str | None:
    group, unknown, key = _GROUP.search(message), _UNKNOWN.search(message), _KEY.search(message)
    if unknown:
        where = f"{group.group(1)}.{unknown.group(1)}" if group else unknown.group(1)
        return f"{where}: unknown key" if _delete(recipe, where) is not None else None
    if key:
        value = _delete(recipe, key.group(1))
        return f"{key.group(1)}: {_expectation(message)}, got {value!r}" if value is not None else None
    return None


def _expectation(message: str) -> str:
    names = [match.group(1).removeprefix("<class '").removesuffix("'>") for match in _EXPECTED.finditer(message)]
    wanted = [name for name in dict.fromkeys(names) if name != "NoneType"]
    return f"expected {' or '.join(wanted)}" if wanted else "not a value that is accepted here"


def _walk(node: Any, where: str = "", holder: Any = None) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every dict below *node*, with its dotted path and the dict or list that holds it."""
    if isinstance(node, dict):
        yield where, node, holder
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from _walk(value, f"{where}.{key}" if where else str(key), node)


def _remove(holder: Any, node: dict[str, Any]) -> None:
    if isinstance(holder, list):
        holder[:] = [item for item in holder if item is not node]
    else:
        del holder[next(key for key, value in holder.items() if value is node)]


def _delete(recipe: Recipe, where: str) -> Any:
    """Remove the entry at a dotted path of plain keys and return it; None where there is nothing."""
    node: Any = recipe
    *parents, leaf = where.split(".")
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    return node.pop(leaf, None) if isinstance(node, dict) else None
