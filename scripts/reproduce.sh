#!/usr/bin/env bash
# From a clone to a trained, tested, verified, exported model.
#
#   scripts/reproduce.sh --demo [--folder DIR] [overrides]    toy size, on a CPU, no account, no GPU
#   scripts/reproduce.sh [flags] [overrides]                  the real run, on a GPU: floodrepro reproduce --help
#
# Safe to run again: what is done is left out, what was stopped goes on, nothing is overwritten.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

case " $* " in
  *" --help "* | *" -h "*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

setup_venv ""
case " $* " in
  *" --demo "*) export HF_HUB_OFFLINE=1 ;; # it needs nothing from the network, and must not wait for one
esac
exec .venv/bin/floodrepro reproduce "$@"
