#!/usr/bin/env bash
# From a clone to a trained, tested, exported model.
#
#   scripts/reproduce.sh --demo [--folder DIR] [overrides]    toy size, on a CPU, no account, no GPU
#
# Safe to run again: chips are reused, a new run gets a new name, nothing is overwritten.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

case " $* " in
  *" --help "* | *" -h "*) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *" --demo "*) ;;
  *) fail "only the demo runs by itself so far" "scripts/reproduce.sh --demo; README.md has the real run on a GPU" ;;
esac

setup_venv ""
# The demo needs nothing from the network, and must not wait for one.
export HF_HUB_OFFLINE=1
exec .venv/bin/floodrepro reproduce "$@"
