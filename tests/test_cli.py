"""What is answered before torch is imported, and how."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from floodrepro import __version__, console
from floodrepro.cli.main import COMMANDS, Parser

PROBE = """
import json, sys
from floodrepro.cli.main import main
code = main(json.loads(sys.argv[1]))
heavy = sorted(name for name in ("torch", "terratorch", "lightning", "numpy") if name in sys.modules)
print(json.dumps({"code": code, "heavy": heavy}))
"""


def probe(*argv: object) -> tuple[dict, subprocess.CompletedProcess]:
    """Run a command in an interpreter of its own and see what it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([str(a) for a in argv])], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.mark.parametrize("argv", [["--help"], ["--version"], [], ["fit", "--help"], ["configs", "ls"]])
def test_help_and_listings_import_nothing_heavy(argv):
    seen, _ = probe(*argv)
    assert seen == {"code": 0, "heavy": []}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["fti"], "unknown command 'fti'; did you mean 'fit'?"),
        (["fit", "--confg", "demo"], "unknown flag '--confg'; did you mean '--config'?"),
        (["fit", "--config", "demo", "--trainr.max_epochs", "3"], "did you mean '--trainer'?"),
        (["fit", "--config", "demo", "stray"], "unexpected argument 'stray'"),
        (["fit", "--config", "demo", "--trainer.max_epochs"], "needs a value"),
        (["fit"], "required: --config"),
        (["fit", "--config", "no/such.yaml"], "config file not found"),
        (["fit", "--config", "demmo"], "did you mean 'demo'"),
        (["test", "--ckpt", "no/such.ckpt"], "checkpoint not found"),
        (["configs", "show", "nothing"], "config file not found"),
        (["export", "--run", "no/such/run"], "no run folder"),
        (["data", "synth", "--root", "x", "--size", "50"], "--size"),
        (["reproduce", "--from", "fit", "--until", "audit"], "comes after"),
    ],
)
def test_cheap_mistakes_are_answered_before_torch_is_imported(argv, says):
    seen, done = probe(*argv)
    assert seen["code"] == (1 if "checkpoint" in says else 2)
    assert "torch" not in seen["heavy"]
    lines = done.stderr.splitlines()
    assert says in done.stderr
    assert 1 <= len(lines) <= 3
    assert "Traceback" not in done.stderr


def test_yaml_that_does_not_parse_is_named_with_its_line(tmp_path: Path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("trainer:\n  max_epochs: [1, 2\nmodel: x\n")
    seen, done = probe("fit", "--config", broken)
    assert seen == {"code": 2, "heavy": []}
    assert f"{broken}:3" in done.stderr


def test_debug_variable_gives_the_traceback():
    environment = {**os.environ, "FLOODREPRO_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "floodrepro", "fit", "--config", "no/such.yaml"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_entry_point_and_module_say_the_same_version():
    script = Path(sys.executable).with_name("floodrepro")
    for command in ([str(script)], [sys.executable, "-m", "floodrepro"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"floodrepro {__version__}\n"


def test_shipped_recipes_are_listed_shown_and_copied_without_overwriting(cli, tmp_path: Path):
    listed = json.loads(cli("configs", "ls", "--format", "json").out)
    assert set(listed) >= {"demo", "terramind_v1_base_impactmesh_flood_amd", "terramind_v1_tiny_impactmesh_flood"}
    assert cli("configs", "show", "demo").out == (ROOT / "configs" / "demo.yaml").read_text()
    target = tmp_path / "mine.yaml"
    assert cli("configs", "cp", "demo", target).code == 0
    target.write_text("changed")
    again = cli("configs", "cp", "demo", target)
    assert again.code == 2
    assert target.read_text() == "changed"
    assert "not overwritten" in again.err


def test_plain_recipe_keeps_everything_but_the_data_module(cli):
    ours = yaml.safe_load(cli("configs", "show", "demo").out)
    plain = yaml.safe_load(cli("configs", "show", "demo", "--plain").out)
    data = plain.pop("data")
    assert data["class_path"] == "impactmesh.impactmesh_datamodule.ImpactMeshDataModule"
    assert data["init_args"]["means"] == ours.pop("data")["init_args"]["means"]
    assert plain == ours


def test_recipe_that_maps_labels_or_names_no_data_has_no_plain_form(cli, tmp_path: Path):
    refused = cli("configs", "show", "terramind_v1_base_impactmesh_flood_v1_binary", "--plain")
    assert (refused.code, refused.out) == (2, "")
    assert "maps mask values to the classes [0, 0, 1]" in refused.report[0]
    (tmp_path / "half.yaml").write_text("seed_everything: 1\n")
    assert "the section 'data'" in cli("configs", "show", tmp_path / "half.yaml", "--plain").report[0]


def test_flags_are_a_promise():
    """A flag that goes or changes its name breaks someone's script: change this list on purpose only."""
    recipe_flags = ["--config", "--data-root", "--format", "--precision", "--print_config"]
    expected = {
        "fit": sorted(
            [
                *recipe_flags,
                *("--name", "--runs-root", "--seed", "--seeds", "--index", "--resume", "--resume-anyway"),
                *("--on-overflow", "--no-guard", "--save-every"),
                *("--compile", "--channels-last", "--fused", "--deterministic"),
            ]
        ),
        "validate": sorted([*recipe_flags, "--ckpt"]),
        "test": sorted([*recipe_flags, "--ckpt", "--split", "--output"]),
        "predict": sorted([*recipe_flags, "--ckpt", "--output"]),
        "verify": sorted(
            [
                *("--run", "--reference", "--reference-name", "--split", "--require", "--output", "--data-root"),
                *("--no-measure", "--report-only", "--format"),
            ]
        ),
        "export": sorted(
            [
                *("--run", "--ckpt", "--config", "--output", "--name", "--card-only", "--no-card", "--format"),
                *("--pue", "--pue-source", "--grid-intensity", "--grid-source"),
            ]
        ),
        "publish": sorted(
            [
                *("--export", "--repo", "--branch", "--revision", "--private", "--yes"),
                *("--dry-run", "--publish-anyway", "--format"),
            ]
        ),
        "configs": [],
        "data": [],
        "doctor": ["--build", "--config", "--data", "--format"],
        "bench": [],
        "reproduce": sorted(
            [
                *("--protocol", "--size", "--config", "--seeds", "--precision", "--data-root", "--run-dir"),
                *("--revision", "--reference", "--reference-sha256", "--from", "--until", "--dry-run"),
                *("--demo", "--folder", "--format"),
            ]
        ),
    }
    found = {}
    for name, (module, _) in COMMANDS.items():
        parser = Parser(name)
        __import__(module)
        sys.modules[module].add_arguments(parser)
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        found[name] = sorted(set(flags) - {"--help"})
    assert found == expected


def test_flag_of_another_action_is_refused_not_ignored(cli):
    outcome = cli("bench", "train", "--chips", 6)
    assert outcome.code == 2
    assert "'--chips' is no flag of this action" in outcome.err


@pytest.mark.parametrize(
    ("variables", "follows"),
    [
        ({}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"RANK": "3", "LOCAL_RANK": "0"}, True),  # torchrun, another node
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, True),  # started by Lightning inside a batch script
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "2"}, True),
    ],
)
def test_the_first_of_several_processes_knows_itself(variables, follows, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert console.follows() is follows
