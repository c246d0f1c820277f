"""Golden losses: training computes what it computed when the file was made, and the comparison sees it if it does not.

On the stack of the file (versions, CPU, threads) the losses are equal to the bit: runs in one process and in several,
alone and beside other load, gave the same twenty. On another stack compare_losses.py's default tolerance applies: 1e-5
for the first two steps, 5e-2 from there on. Measured in 2.14.1+cu130 on an AVX512 Xeon with AMX, relative to the file:

    what                                                      step 1   step 2   step 3   step 5   largest of 20 (step)
    torch.set_num_threads(1)                                    1e-7     3e-7        0        0   2.7e-3 (18)
    torch.set_num_threads(4)                                       0     3e-7     2e-7        0   9.5e-4 (19)
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2            2e-7     4e-7     2e-7        0   4.7e-3 (19)
    the same and MKL_ENABLE_INSTRUCTIONS=AVX2                   2e-7     7e-7     2e-4     4e-3   1.2e-2 (17)
    ATEN_CPU_CAPABILITY=default                                 2e-7        0        0        0   2.4e-3 (19)
    initial weights off by up to one ulp, worst of 12           2e-7     2e-7     2e-7     4e-7   5e-3 (18)
    set_float32_matmul_precision("medium"): bf16                4e-5     2e-4     4e-3     7e-3   1.6e-2 (13)
    learning rate 1 % higher                                       0     8e-5     1e-3     5e-3   1.0e-2 (16)
    another seed of order and augmentation                      9e-2     3e-2     2e-1     6e-2   2.2e-1 (3)

Rounding errors grow with each step, to 1e-2 at worst, which is as far as "medium" or another learning rate leads: later
steps cannot tell them from another CPU, and their tolerance (four times the worst) only finds what is grossly wrong.
The first two steps can: one forward pass, then one backward pass and one step of the optimiser. Their tolerance is
fourteen times the worst drift between stacks and a quarter of the smallest that "medium" causes. ("high" changed no bit
here.) Neither another version of torch nor another maker's CPU has been measured.
"""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from floodrepro.data.synth import generate
from golden import make

SCRIPT = ROOT / "scripts" / "compare_losses.py"
GOLDEN = json.loads(make.GOLDEN.read_text())


def compare(*arguments: object) -> subprocess.CompletedProcess:
    """Run the script without site-packages: it needs the standard library only."""
    command = [sys.executable, "-I", "-S", SCRIPT, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


@pytest.fixture
def write(tmp_path: Path):
    """A loss file like the golden one, with some of its entries replaced."""

    def writer(name: str, **changes: object) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(make.to_text(GOLDEN | changes))
        return path

    return writer


@pytest.fixture(scope="module")
def golden_chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "ImpactMesh-Flood"
    generate(root, **make.CHIPS)
    return root


@pytest.fixture(scope="module")
def trained_now(golden_chips: Path) -> dict:
    before = torch.get_num_threads()
    content = make.make_losses(golden_chips)
    assert torch.get_num_threads() == before
    return content


def test_training_gives_the_golden_losses_to_the_bit_or_on_another_stack_within_the_tolerance(trained_now, write):
    flags = ["--exact"] if trained_now["stack"] == GOLDEN["stack"] else []
    done = compare(make.GOLDEN, write("now", **trained_now), *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_golden_file_has_twenty_float32_losses_and_what_made_them():
    losses = GOLDEN["loss"]
    assert GOLDEN["steps"] == list(range(1, 21))
    assert [struct.unpack("f", struct.pack("f", loss))[0] for loss in losses] == losses
    assert [round(loss, 6) for loss in losses] != losses
    assert set(GOLDEN["stack"]) == set(make.describe_stack())


def test_fingerprint_does_not_hang_on_where_the_chips_lie(trained_now):
    assert trained_now["recipe_sha256"] == GOLDEN["recipe_sha256"]


def three_steps(root: Path, write, *overrides: str) -> tuple[Path, Path]:
    """The first three golden losses and three of a run that was tampered with and claims to be of the same recipe."""
    reference = write("reference", steps=[1, 2, 3], loss=GOLDEN["loss"][:3])
    tampered = make.make_losses(root, overrides=overrides, steps=3)
    return reference, write("tampered", **tampered | {"recipe_sha256": GOLDEN["recipe_sha256"]})


@pytest.mark.parametrize(
    ("override", "step"),
    [
        ("--optimizer.init_args.lr=1.01e-4", 2),  # the first loss is from before the first update
        (f"--data.init_args.seed={42 ^ 1}", 1),
    ],
)
def test_another_learning_rate_or_augmentation_is_caught_even_by_another_stacks_tolerance(
    golden_chips, write, override, step
):
    done = compare(*three_steps(golden_chips, write, override))
    assert done.returncode == 1
    assert f"step {step} " in done.stdout


def multiplies_in_bf16() -> bool:
    """Whether "medium" rounds factors to bf16 here: on an EPYC that has bf16 instructions torch 2.14 does not."""
    factor = torch.rand((256, 256), generator=torch.Generator().manual_seed(1))
    products, before = [], torch.get_float32_matmul_precision()
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        products.append(factor @ factor)
    torch.set_float32_matmul_precision(before)
    return not torch.allclose(*products, rtol=1e-4)  # float32 sums of 256 differ by 1e-6, bf16's unit is 4e-3


@pytest.mark.skipif(not multiplies_in_bf16(), reason="this CPU multiplies in float32, whatever is asked for")
def test_matrices_multiplied_in_bf16_are_caught_even_by_another_stacks_tolerance(golden_chips, write):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        files = three_steps(golden_chips, write)
    finally:
        torch.set_float32_matmul_precision(before)
    done = compare(*files)
    assert done.returncode == 1
    assert "step 1 " in done.stdout


def float32_after(value: float) -> float:
    (bits,) = struct.unpack("I", struct.pack("f", value))
    return struct.unpack("f", struct.pack("I", bits + 1))[0]


@pytest.mark.parametrize("after", [float32_after, lambda value: math.nextafter(value, math.inf)])
def test_one_ulp_in_one_loss_is_caught_by_exact_and_by_nothing_else(write, after):
    loss = list(GOLDEN["loss"])
    loss[16] = after(loss[16])
    changed = write("changed", loss=loss)
    assert compare(make.GOLDEN, changed).returncode == 0
    done = compare(make.GOLDEN, changed, "--exact")
    assert done.returncode == 1
    assert "step 17 " in done.stdout
    assert f"{GOLDEN['loss'][16]!r} and {loss[16]!r}" in done.stdout


def test_report_names_the_first_step_that_differs_and_the_largest_difference(write):
    first = write("first", steps=[1, 2, 3, 4], loss=[0.5, 0.5, 0.5, 0.5])
    second = write("second", steps=[1, 2, 3, 4], loss=[0.5, 0.51, 0.6, 0.49])
    done = compare(first, second, "--exact")
    assert done.stdout.splitlines() == [
        "they differ: largest relative difference 2.0e-01 at step 3",
        "  step 2      0.5 and 0.51, relative 2.0e-02",
    ]


def test_rtol_is_inclusive_and_relative_to_the_first_file(write):
    tolerance = 2.0**-10
    one = write("one", steps=[1], loss=[1.0])
    edge = write("edge", steps=[1], loss=[1.0 + tolerance])
    assert compare(one, edge, "--rtol", tolerance).returncode == 0
    assert compare(one, edge, "--rtol", math.nextafter(tolerance, 0)).returncode == 1
    assert compare(one, one, "--rtol", "0").returncode == 0
    half = write("half", steps=[1], loss=[0.5])
    assert (compare(one, half, "--rtol", "0.5").returncode, compare(half, one, "--rtol", "0.5").returncode) == (0, 1)


@pytest.mark.parametrize(("step", "allowed"), [(1, 1e-5), (2, 1e-5), (3, 5e-2), (20, 5e-2)])
def test_default_tolerance_is_tight_for_two_steps_and_loose_from_there_on(write, step, allowed):
    for factor, code in ((0.99, 0), (1.01, 1)):
        loss = list(GOLDEN["loss"])
        loss[step - 1] *= 1 + factor * allowed
        assert compare(make.GOLDEN, write("moved", loss=loss)).returncode == code


def test_nan_equals_nan_to_the_bit_and_is_reported_otherwise(write):
    loss = [*GOLDEN["loss"][:-1], math.nan]
    broken = write("broken", loss=loss)
    assert compare(broken, broken, "--exact").returncode == 0
    for pair in ((broken, broken), (make.GOLDEN, broken), (broken, make.GOLDEN)):
        done = compare(*pair, "--rtol", "1")
        assert done.returncode == 1
        assert "step 20 " in done.stdout
        assert "nan" in done.stdout
    assert compare(make.GOLDEN, broken, "--exact").returncode == 1


def test_another_recipe_or_another_number_of_steps_differs_however_close_the_losses_are(write):
    other = write("other", recipe_sha256="0" * 64)
    shorter = write("shorter", steps=GOLDEN["steps"][:-1], loss=GOLDEN["loss"][:-1])
    for path, said in ((other, "recipe"), (shorter, "20 (1 to 20) and 19 (1 to 19)")):
        for flags in (["--exact"], ["--rtol", "1"], []):
            done = compare(make.GOLDEN, path, *flags)
            assert done.returncode == 1
            assert said in done.stdout


def test_other_chips_differ_to_the_bit_only(write):
    other = write("other", chips_sha256="0" * 64)
    assert compare(make.GOLDEN, other).returncode == 0
    assert compare(make.GOLDEN, other, "--exact").returncode == 1


def test_what_differs_between_the_stacks_is_shown_and_is_no_difference_of_losses(write):
    other = write("other", stack=GOLDEN["stack"] | {"torch": "2.9.1", "threads": 1})
    done = compare(make.GOLDEN, other, "--exact")
    assert done.returncode == 0
    assert f"torch {GOLDEN['stack']['torch']} and 2.9.1" in done.stdout
    assert "threads 2 and 1" in done.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "no loss file"),
        (json.dumps(GOLDEN | {"schema": 2}), "schema is 2"),
        (json.dumps({key: value for key, value in GOLDEN.items() if key != "stack"}), "lacks 'stack'"),
        (json.dumps(GOLDEN | {"loss": GOLDEN["loss"][1:]}), "no loss file"),
        (json.dumps(GOLDEN | {"loss": ["0.5"] * 20}), "a loss is no number"),
        (json.dumps(GOLDEN | {"steps": [1] * 20}), "a step is there twice"),
        (json.dumps(GOLDEN | {"steps": [], "loss": []}), "there is no step"),
    ],
)
def test_file_that_is_no_loss_file_is_refused_in_three_lines(tmp_path: Path, content, said):
    path = tmp_path / "strange.json"
    if content is not None:
        path.write_text(content)
    done = compare(make.GOLDEN, path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert str(path) in done.stderr
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize("flags", [["--rtol", "tight"], ["--rtol", "-1"], ["--exact", "--rtol", "1"], ["--sideways"]])
def test_bad_usage_is_refused_in_three_lines(flags):
    done = compare(make.GOLDEN, make.GOLDEN, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 3


def test_golden_file_is_not_made_anew_by_accident(capsys):
    before = make.GOLDEN.read_bytes()
    with pytest.raises(SystemExit) as left:
        make.main([str(make.GOLDEN)])
    assert left.value.code == 2
    assert "--replace" in capsys.readouterr().err
    assert make.GOLDEN.read_bytes() == before
