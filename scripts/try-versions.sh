#!/usr/bin/env bash
# Run the demo and the smoke tests in a throwaway environment with the newest versions that pyproject.toml admits: about
# 7 GB below TMPDIR. Arguments fix some versions (torch==2.9.1 torchvision==0.24.1), FLOODREPRO_PYTHON another Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

python=$(find_python)
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv"
say "installing the newest versions into a throwaway environment of $("$python" --version)"
installer=("$venv/bin/python" -m pip install --disable-pip-version-check)
if command -v uv >/dev/null; then installer=(uv pip install --python "$venv/bin/python"); fi
"${installer[@]}" --quiet --editable ".[test]" "$@"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$venv/bin/floodrepro" doctor --config demo
"$venv/bin/floodrepro" reproduce --demo --run-dir "$venv/demo"
"$venv/bin/python" -m pytest tests/test_fit.py tests/test_passes.py tests/test_measured.py
