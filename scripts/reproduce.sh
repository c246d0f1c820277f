#!/usr/bin/env bash
# Make .venv, then run `floodrepro reproduce`. If it is interrupted, run the same command again.
#
#   scripts/reproduce.sh --demo      at toy size on a CPU, without a download but for packages
#   scripts/reproduce.sh [flags]     with a GPU; scripts/reproduce.sh --help lists the flags
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

setup_venv
case " $* " in *" --demo "*) export HF_HUB_OFFLINE=1 ;; esac # it needs nothing from the network
exec .venv/bin/floodrepro reproduce "$@"
