#!/usr/bin/env bash
# Make .venv, then run `floodrepro reproduce` with the given flags. If it is interrupted, run the same command again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup-venv.sh

setup_venv
case " $* " in *" --demo "*) export HF_HUB_OFFLINE=1 ;; esac # it needs nothing from the network
exec .venv/bin/floodrepro reproduce "$@"
