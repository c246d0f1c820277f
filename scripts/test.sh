#!/usr/bin/env bash
# Make or reuse .venv with the test extras and run the whole test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

setup_venv dev
export HF_HUB_OFFLINE=1
say "running the tests"
exec .venv/bin/python -m pytest "$@"
