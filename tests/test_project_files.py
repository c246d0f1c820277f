"""Layers, licence, citation, changelog, YAML: what a project promises by its files. No TerraTorch here."""

import ast
import hashlib
import re

import yaml

import floodrepro
from doc_commands import DOCUMENTS, ROOT, blocks

LAYERS = [  # as CONTRIBUTING.md has them; nothing imports what stands further down
    ("errors", "console", "lock", "__init__"),
    ("recipe", "run_folder", "system.environment", "system.energy", "system.energy_sources"),
    ("data",),
    ("training",),
    ("evaluation",),
    ("verification", "publishing"),
    ("system",),
    ("cli", "__main__"),
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def rank_of(module: str) -> int:
    package, _, rest = module.removeprefix("floodrepro").lstrip(".").partition(".")
    return RANKS.get(f"{package}.{rest.split('.')[0]}", RANKS.get(package, 0))


def test_no_module_imports_a_layer_above_its_own():
    source, upward = ROOT / "src", []
    for path in (source / "floodrepro").rglob("*.py"):
        module = ".".join(path.relative_to(source).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("floodrepro"):
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                upward += [f"{module} -> {name}" for name in wanted if rank_of(name) > rank_of(module)]
    assert upward == []


def test_licence_is_the_apache_licence_word_for_word():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()  # of apache.org's LICENSE-2.0.txt
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_citation_names_the_version_and_whom_this_stands_on():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (floodrepro.__version__, "Apache-2.0")
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    text = str(citation["references"])
    assert all(word in text for word in ("ImpactMesh-Flood", "2504.11171", "Jakubik", "Rahman"))


def test_changelog_has_this_version():
    assert re.search(rf"^## {re.escape(floodrepro.__version__)}\b", DOCUMENTS["CHANGELOG.md"], re.MULTILINE)


def test_every_yaml_parses_those_in_documents_too():
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("verification/**/*.yaml"), *ROOT.glob("*.yaml")]
    assert len(files) >= 12
    texts = [file.read_text(encoding="utf-8") for file in [*files, ROOT / ".pre-commit-config.yaml"]]
    texts += [body for text in DOCUMENTS.values() for body in blocks(text, "yaml")]
    assert all(yaml.safe_load(text) for text in texts)
