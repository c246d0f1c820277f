#!/usr/bin/env bash
# Make or reuse .venv with the test extras and run the whole test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

setup_venv dev
export HF_HUB_OFFLINE=1
# Two processes with one thread each: torch's threads of two processes on two cores wait for each other most of the time.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
say "running the tests"
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
