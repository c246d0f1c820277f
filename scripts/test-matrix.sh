#!/usr/bin/env bash
# The smoke tests (fit, resume, test, export, load back, safetensors) with other versions than those of constraints.txt.
#
#   scripts/test-matrix.sh [NAME…]    torch-2.9.1: the torch of the ROCm image, in its build for PyPI
#                                     terratorch-newest: the newest terratorch that Python and pyproject.toml admit
#                                     (default: both, one after the other)
#
#   FLOODREPRO_PYTHON    interpreter (default: the first of python3.12, python3.11, python3 that is 3.11 or 3.12)
#
# Each makes an environment of about 7 GB below TMPDIR (default: /tmp) and removes it again, whatever happens.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

SMOKE=(
  tests/test_fit.py::test_record_and_metrics_and_checkpoint_agree_on_the_best_epoch
  tests/test_fit.py::test_importing_terratorch_leaves_the_process_alone_and_asks_no_network
  tests/test_golden.py::test_training_gives_the_golden_losses_to_the_bit_or_on_another_stack_within_the_tolerance
  tests/test_resume.py::test_killed_run_resumes_to_the_same_weights
  tests/test_resume.py::test_full_state_holds_no_code_and_can_be_tested
  tests/test_passes.py::test_metrics_equal_plain_terratorch_to_six_digits
  tests/test_passes.py::test_predicted_masks_are_georeferenced_and_score_what_test_scores
  tests/test_export.py::test_export_holds_the_checkpoint_bit_for_bit
  tests/test_export.py::test_plain_terratorch_without_floodrepro_predicts_the_same
  tests/test_export.py::test_export_is_tested_like_the_checkpoint_and_finds_its_own_config
)

case " $* " in
  *" --help "* | *" -h "*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

# Constraints of an environment: what stays pinned, and what is pinned elsewhere than in constraints.txt.
constraints_of() {
  case $1 in
    torch-2.9.1) grep -vE "$TORCH_FAMILY" constraints.txt; printf '%s\n' torch==2.9.1 torchvision==0.24.1 ;;
    terratorch-newest) grep -vE '^(terratorch|torchgeo)==' constraints.txt ;;
    *) fail "no environment '$1'" "scripts/test-matrix.sh --help" ;;
  esac
}

[ $# -gt 0 ] || set -- torch-2.9.1 terratorch-newest
for name in "$@"; do constraints_of "$name" >/dev/null; done  # before anything is made: are all names known?
python=$(find_python) || exit 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

failed=()
for name in "$@"; do
  venv=$folder/$name
  constraints_of "$name" >"$folder/$name.txt"
  say "$name: making an environment with $("$python" --version)"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$folder/$name.txt" \
    --editable ".[test]" || fail "$name: the installation failed" "see pip's message above"
  say "$name: $("$venv/bin/python" -m pip list --format freeze \
    | grep -E '^(torch|torchvision|terratorch|torchgeo|lightning|numpy)==' | tr '\n' ' ')"
  "$venv/bin/python" -m pytest -n0 "${SMOKE[@]}" || failed+=("$name")
  rm -rf "$venv"
done
[ ${#failed[@]} -eq 0 ] || { say "failed: ${failed[*]}"; exit 1; }
say "passed: $*"
