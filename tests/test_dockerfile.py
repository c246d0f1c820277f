"""What the ROCm image promises, read from its files without Docker, and its entry point."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import floodrepro
from conftest import ROOT
from floodrepro.cli.main import COMMANDS, Parser
from floodrepro.system import container

FILES = ("Dockerfile.rocm", "requirements-rocm.txt", "compose.rocm.yaml", ".dockerignore")
FILES += ("scripts/rocm/entrypoint.sh", "docs/mi300x.md")
Texts = dict[str, str]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Keyword and value of each instruction, in order; comments and line breaks are gone."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"[ \t]*\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def values(texts: Texts, keyword: str) -> list[str]:
    return [value for key, value in instructions(texts["Dockerfile.rocm"]) if key == keyword]


def settings(texts: Texts, keyword: str) -> dict[str, str]:
    """The pairs of all ENV or LABEL instructions."""
    pairs = re.findall(r'([\w.]+)=("[^"]*"|\S+)', " ".join(values(texts, keyword)))
    return {name: value.strip('"') for name, value in pairs}


def installs(texts: Texts) -> list[str]:
    return [run for run in values(texts, "RUN") if re.search(r"\bpip\b[^&]*\binstall\b", run)]


def requirements(texts: Texts) -> list[str]:
    return [line for line in texts["requirements-rocm.txt"].splitlines() if line and not line.startswith("#")]


def names(specifications: list[str]) -> set[str]:
    return {container.normalized(re.match(r"[\w.-]+", line)[0]) for line in specifications}


# What the image promises. Each is a function of its files that raises AssertionError.


def base_image_is_pinned_by_digest(texts: Texts) -> None:
    (base,) = values(texts, "FROM")
    assert re.fullmatch(r"docker\.io/rocm/pytorch:\S+_pytorch_release_2\.9\.1@sha256:[0-9a-f]{64}", base)


def constraints_are_written_from_metadata_before_any_install(texts: Texts) -> None:
    runs = values(texts, "RUN")
    first_install = runs.index(installs(texts)[0])
    written = [run for run in runs[:first_install] if "container.py constraints" in run]
    assert written == ["python container.py constraints --tested constraints.txt > rocm-constraints.txt"]


def constraints_are_in_the_environment_of_every_install(texts: Texts) -> None:
    steps = instructions(texts["Dockerfile.rocm"])
    set_at = [i for i, (key, value) in enumerate(steps) if key == "ENV" and re.search(r"\bPIP_CONSTRAINT=", value)]
    assert len(set_at) == 1
    assert set_at[0] < steps.index(("RUN", installs(texts)[0]))
    assert settings(texts, "ENV").get("PIP_CONSTRAINT") == "/opt/floodrepro/rocm-constraints.txt"
    assert values(texts, "WORKDIR")[0] == "/opt/floodrepro"  # where the constraints were written
    assert not any(re.search(r"PIP_CONSTRAINT|--isolated|env -", run) for run in values(texts, "RUN"))


def nothing_asks_for_another_torch(texts: Texts) -> None:
    assert names(requirements(texts)) & {*container.FAMILY} == set()
    words = {word.strip("'\"") for run in installs(texts) for word in run.split()}
    assert not any(re.match(rf"({'|'.join(container.FAMILY)})\b(?!\.)", word) for word in words)


def no_other_index_is_used(texts: Texts) -> None:
    text = texts["requirements-rocm.txt"] + " ".join(value for _, value in instructions(texts["Dockerfile.rocm"]))
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"index|find.links|https?://|git\+|\s-[if]\s", text, re.IGNORECASE)


def every_install_is_followed_by_the_assertions(texts: Texts) -> None:
    for run in installs(texts):
        assert re.fullmatch(
            r"python -m pip install [^&]*&& python container\.py check --constraints (\S+)( &&.*)?", run
        )
        assert re.search(r"--constraints rocm-constraints\.txt\b", run)
        assert not re.search(r"\|\||;|\bset \+e|\btrue\b", run)
    assert installs(texts)[-1].endswith("&& floodrepro doctor --build")


def requirements_are_floodrepros_own(texts: Texts) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(requirements(texts)) == names(project["dependencies"]) - {"torch", "torchvision"}
    assert not any(re.search("[<>=!~]", line) for line in requirements(texts))  # constraints.txt has the versions


def user_has_no_rights_on_the_host(texts: Texts) -> None:
    assert re.fullmatch(r"[1-9]\d*", values(texts, "USER")[-1])
    assert f"useradd --uid {values(texts, 'USER')[-1]} " in " ".join(values(texts, "RUN"))
    last_run = max(i for i, (key, _) in enumerate(instructions(texts["Dockerfile.rocm"])) if key == "RUN")
    assert ("USER", values(texts, "USER")[-1]) in instructions(texts["Dockerfile.rocm"])[last_run:]


def groups_of_the_gpu_are_given_by_number_at_run_time(texts: Texts) -> None:
    assert not re.search(r"usermod|groupadd|gpasswd|\brender\b|\bvideo\b", " ".join(values(texts, "RUN")))
    given = " ".join(service(texts)["group_add"])
    assert re.fullmatch(r"\$\{RENDER_GID:\?[^}]+\} \$\{VIDEO_GID:\?[^}]+\}", given)  # required, with no default


def folders_are_mounted(texts: Texts) -> None:
    (volumes,) = [json.loads(value) for value in values(texts, "VOLUME")]
    assert volumes == ["/workspace/data", "/workspace/runs", "/workspace/cache"]
    assert [mount.rsplit(":", 1)[1] for mount in service(texts)["volumes"]] == volumes
    assert values(texts, "WORKDIR")[-1] == "/workspace"  # runs/ is relative to it
    made = next(run for run in values(texts, "RUN") if "mkdir" in run)
    assert all(folder in made for folder in volumes)
    assert f"chown -R {values(texts, 'USER')[-1]} /workspace" in made


def caches_outlive_the_container(texts: Texts) -> None:
    environment = settings(texts, "ENV")
    caches = [environment.get(name, "") for name in ("MIOPEN_USER_DB_PATH", "MIOPEN_CUSTOM_CACHE_DIR", "HF_HOME")]
    assert all(cache.startswith("/workspace/cache/") for cache in caches)
    assert len(set(caches)) == 3


def entry_point_looks_for_the_gpu(texts: Texts) -> None:
    *_, script = json.loads(values(texts, "ENTRYPOINT")[0])
    assert script == "/opt/floodrepro/entrypoint.sh"
    assert "scripts/rocm/entrypoint.sh ./" in values(texts, "COPY")
    assert "/dev/kfd is missing" in texts["scripts/rocm/entrypoint.sh"]


def labels_say_what_is_inside(texts: Texts) -> None:
    labels, (base,) = settings(texts, "LABEL"), values(texts, "FROM")
    image, tag, digest = re.fullmatch(r"(\S+?):(\S+)@(\S+)", base).groups()
    prefix = "org.opencontainers.image"
    assert labels[f"{prefix}.base.name"] == f"{image}:{tag}"
    assert labels[f"{prefix}.base.digest"] == digest
    assert labels[f"{prefix}.version"] == floodrepro.__version__
    assert labels[f"{prefix}.revision"] == "$REVISION"
    inside = (labels["floodrepro.rocm"], labels["floodrepro.python"], labels["floodrepro.torch"])
    assert inside == re.fullmatch(r"rocm([\d.]+)_\w+?[\d.]+_py([\d.]+)_pytorch_release_([\d.]+)", tag).groups()


def nothing_changes_numerics_or_spoofs_the_gpu(texts: Texts) -> None:
    switches = r"expandable_segments|AOTRITON|TUNABLEOP|NHWC|HSA_OVERRIDE|\w*ALLOC_CONF|MIOPEN_(FIND|DEBUG)"
    said = json.dumps([instructions(texts["Dockerfile.rocm"]), service(texts)]) + texts["scripts/rocm/entrypoint.sh"]
    assert not re.search(switches, said)


def compose_gives_the_gpu_and_no_more(texts: Texts) -> None:
    given = service(texts)
    assert given["devices"] == ["/dev/kfd", "/dev/dri"]
    assert given.get("ipc") == "host"
    assert given["build"]["dockerfile"] == "Dockerfile.rocm"
    assert set(given) == {"image", "build", "devices", "group_add", "ipc", "volumes"}  # not privileged, no capability


def documented_run_gives_the_same_as_compose(texts: Texts) -> None:
    text = re.sub(r"\s*\\\n\s*", " ", texts["docs/mi300x.md"])
    runs = [line for line in re.findall(r"^ *(docker run .*)$", text, re.MULTILINE) if "--entrypoint" not in line]
    given = service(texts)
    flags = [*(f"--device={device}" for device in given["devices"]), f"--ipc={given['ipc']}"]
    flags += [f'--group-add "${name}"' for name in ("RENDER_GID", "VIDEO_GID")]
    flags += [f'-v "$PWD/{mount.rsplit("/", 1)[1]}:{mount}"' for mount in json.loads(values(texts, "VOLUME")[0])]
    assert len(runs) == 2  # the function and the fit in the background
    assert [flag for run in runs for flag in flags if flag not in run] == []
    assert f"install -d -o {values(texts, 'USER')[-1]} " in text


def build_context_holds_what_is_copied_and_no_more(texts: Texts) -> None:
    first, *rest = [line for line in texts[".dockerignore"].splitlines() if line and not line.startswith("#")]
    allowed = {line[1:] for line in rest if line.startswith("!")}
    copied = {source for value in values(texts, "COPY") for source in value.split()[:-1]}
    assert first == "*"
    assert all((ROOT / source).exists() for source in copied)
    assert all({source, *map(str, Path(source).parents)} & allowed for source in copied)
    assert all(any(source.startswith(name) for source in copied) for name in allowed)


def service(texts: Texts) -> dict:
    return yaml.safe_load(texts["compose.rocm.yaml"])["services"]["floodrepro"]


D, R, C = "Dockerfile.rocm", "requirements-rocm.txt", "compose.rocm.yaml"
CHECK = " \\\n && python container.py check --constraints rocm-constraints.txt"
WRITE = "RUN python container.py constraints --tested constraints.txt > rocm-constraints.txt\n"
INSTALL = "RUN python -m pip install --no-cache-dir -r requirements-rocm.txt"
# The promise, and what breaks it: file, text, and what stands in its place.
BROKEN: list[tuple[Callable[[Texts], None], str, str, str]] = [
    (base_image_is_pinned_by_digest, D, "@sha256:7fe531fa", "@sha256:"),
    (base_image_is_pinned_by_digest, D, "release_2.9.1@", "release_2.10.0@"),
    (constraints_are_written_from_metadata_before_any_install, D, WRITE, f"RUN pip install rich\n{WRITE}"),
    (constraints_are_written_from_metadata_before_any_install, D, WRITE, "RUN pip freeze > rocm-constraints.txt\n"),
    (constraints_are_in_the_environment_of_every_install, D, "ENV PIP_CONSTRAINT=", "ENV CONSTRAINT="),
    (constraints_are_in_the_environment_of_every_install, D, "floodrepro/rocm-constraints", "other/rocm-constraints"),
    (constraints_are_in_the_environment_of_every_install, D, INSTALL, INSTALL.replace("RUN", "RUN PIP_CONSTRAINT=")),
    (constraints_are_in_the_environment_of_every_install, D, "pip install", "pip --isolated install"),
    (nothing_asks_for_another_torch, R, "terratorch\n", "terratorch\ntorchvision\n"),
    (nothing_asks_for_another_torch, R, "terratorch\n", "terratorch\ntorch>=2.9\n"),
    (nothing_asks_for_another_torch, D, "--no-cache-dir .", "--no-cache-dir . triton==3.5.1"),
    (no_other_index_is_used, R, "terratorch\n", "--extra-index-url somewhere\nterratorch\n"),
    (no_other_index_is_used, D, "--no-cache-dir -r", "--no-cache-dir -i somewhere -r"),
    (no_other_index_is_used, D, "ENV PIP_CONSTRAINT", "ENV PIP_INDEX_URL=somewhere PIP_CONSTRAINT"),
    (every_install_is_followed_by_the_assertions, D, f"-r requirements-rocm.txt{CHECK}", "-r requirements-rocm.txt"),
    (every_install_is_followed_by_the_assertions, D, CHECK, f"{CHECK} || true"),
    (every_install_is_followed_by_the_assertions, D, " && floodrepro doctor --build", " && floodrepro --version"),
    (requirements_are_floodrepros_own, R, "impactmesh\n", ""),
    (requirements_are_floodrepros_own, R, "zarr\n", "zarr>=3\n"),
    (user_has_no_rights_on_the_host, D, "USER 10001", "USER root"),
    (user_has_no_rights_on_the_host, D, "USER 10001", "USER 0"),
    (user_has_no_rights_on_the_host, D, "WORKDIR /workspace\n", "USER 0\nWORKDIR /workspace\n"),
    (groups_of_the_gpu_are_given_by_number_at_run_time, D, "--create-home flood", "--create-home -G video flood"),
    (groups_of_the_gpu_are_given_by_number_at_run_time, C, "${RENDER_GID:?", "render # "),
    (folders_are_mounted, C, ":/workspace/runs", ":/runs"),
    (folders_are_mounted, D, '"/workspace/runs", ', ""),
    (folders_are_mounted, D, "chown -R 10001", "chown -R root"),
    (caches_outlive_the_container, D, "=/workspace/cache/miopen/db", "=/tmp/miopen/db"),
    (caches_outlive_the_container, D, "MIOPEN_CUSTOM_CACHE_DIR=/workspace/cache/miopen/kernels", "A=b"),
    (entry_point_looks_for_the_gpu, D, '["/bin/bash", "/opt/floodrepro/entrypoint.sh"]', '["floodrepro"]'),
    (labels_say_what_is_inside, D, f'version="{floodrepro.__version__}"', 'version="0.0.1"'),
    (labels_say_what_is_inside, D, 'base.digest="sha256:7', 'base.digest="sha256:8'),
    (labels_say_what_is_inside, D, 'floodrepro.torch="2.9.1"', 'floodrepro.torch="2.10.0"'),
    *(
        (nothing_changes_numerics_or_spoofs_the_gpu, D, "ENV MIOPEN_USER", f"ENV {switch} MIOPEN_USER")
        for switch in (
            "PYTORCH_HIP_ALLOC_CONF=expandable_segments:True",
            "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1",
            "PYTORCH_TUNABLEOP_ENABLED=1",
            "HSA_OVERRIDE_GFX_VERSION=9.4.2",
        )
    ),
    (nothing_changes_numerics_or_spoofs_the_gpu, C, "    ipc:", "    environment: [TUNABLEOP_TUNING=1]\n    ipc:"),
    (compose_gives_the_gpu_and_no_more, C, "    ipc: host\n", "    ipc: host\n    privileged: true\n"),
    (compose_gives_the_gpu_and_no_more, C, "      - /dev/kfd\n", ""),
    (compose_gives_the_gpu_and_no_more, C, "    ipc: host\n", ""),
    (documented_run_gives_the_same_as_compose, "docs/mi300x.md", " --ipc=host", ""),
    (documented_run_gives_the_same_as_compose, "docs/mi300x.md", '--group-add "$RENDER_GID"', "--group-add render"),
    (documented_run_gives_the_same_as_compose, "docs/mi300x.md", "-o 10001", "-o root"),
    (build_context_holds_what_is_copied_and_no_more, ".dockerignore", "!configs\n", ""),
    (build_context_holds_what_is_copied_and_no_more, ".dockerignore", "!src\n", "!src\n!runs\n"),
]


@pytest.fixture
def texts() -> Texts:
    return {name: (ROOT / name).read_text() for name in FILES}


@pytest.mark.parametrize("promise", dict.fromkeys(promise for promise, *_ in BROKEN), ids=lambda f: f.__name__)
def test_image_keeps_its_promise(texts, promise):
    promise(texts)


@pytest.mark.parametrize(
    ("promise", "file", "old", "new"), BROKEN, ids=[f"{p.__name__}-{i}" for i, (p, *_) in enumerate(BROKEN)]
)
def test_broken_image_does_not(texts, promise, file, old, new):
    assert old in texts[file]
    texts[file] = texts[file].replace(old, new)
    with pytest.raises(AssertionError):
        promise(texts)


def test_hadolint_finds_nothing_and_nothing_is_hidden_from_it():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--failure-threshold", "style", ROOT / D], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "hadolint" not in (ROOT / D).read_text()
    assert not list(ROOT.glob(".hadolint*"))


@pytest.mark.parametrize(
    "line", re.findall(r"^(?:flood (\w.*)|  (fit .*))$", (ROOT / "docs/mi300x.md").read_text(), re.M)
)
def test_documented_commands_are_those_of_the_program(line):
    name, *words = shlex.split("".join(line))
    command = importlib.import_module(COMMANDS[name][0])
    parser = Parser(name)
    command.add_arguments(parser)
    assert parser.parse_args(words)


# The entry point


HOST_USER = 65534


@pytest.fixture
def host() -> Iterator[Path]:
    """What the entry point looks at: a GPU's devices, and the mounted folders; nobody may go in."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("dev/dri", "workspace/runs", "workspace/cache", "bin"):
        (folder / name).mkdir(parents=True)
    for name in ("dev/kfd", "dev/dri/card0", "dev/dri/renderD128"):
        (folder / name).touch()
    (folder / "bin" / "floodrepro").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "bin" / "floodrepro").chmod(0o755)
    shutil.copy(ROOT / "scripts" / "rocm" / "entrypoint.sh", folder)
    for path in (p for p in folder.rglob("*") if "workspace" in p.parts or "dev" in p.parts):
        path.chmod(0o777 if path.is_dir() else 0o666)
    yield folder
    shutil.rmtree(folder)


def enter(host: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the entry point, as a user whom file permissions hold back."""
    someone = {"user": HOST_USER, "group": HOST_USER, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.run(
        ["/bin/bash", str(host / "entrypoint.sh"), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": f"{host}/bin:/usr/bin:/bin", "FLOODREPRO_HOST": str(host)},
        check=False,
        **someone,
    )


def test_entry_point_hands_over_to_floodrepro(host):
    done = enter(host, "fit", "--name", "a b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fit\n--name\na b\n", "")


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda host: (host / "dev/kfd").unlink(), ["/dev/kfd is missing", "--device=/dev/kfd --device=/dev/dri"]),
        (lambda host: (host / "dev/dri/renderD128").unlink(), ["no /dev/dri/renderD*", "--device=/dev/dri"]),
        (lambda host: (host / "dev/kfd").chmod(0o000), ["may not use /dev/kfd", "--group-add "]),
        (lambda host: (host / "dev/dri/renderD128").chmod(0o444), ["may not use /dev/dri/renderD128", "--group-add "]),
        (lambda host: (host / "workspace/runs").chmod(0o555), ["may not write to /workspace/runs", "chown "]),
        (lambda host: (host / "workspace/cache").chmod(0o555), ["may not write to /workspace/cache", "chown "]),
    ],
)
def test_entry_point_names_what_is_missing_and_the_flag_that_gives_it(host, plant, said):
    plant(host)
    done = enter(host, "fit", "--config", "demo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 3
    assert [part for part in said if part not in done.stderr] == []


@pytest.mark.parametrize("arguments", [(), ("--help",), ("fit", "--help"), ("doctor",), ("doctor", "--format", "json")])
def test_help_and_doctor_need_no_gpu(host, arguments):
    (host / "dev/kfd").unlink()
    assert enter(host, *arguments).returncode == 0
