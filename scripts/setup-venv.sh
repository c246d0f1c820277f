# shellcheck shell=bash
# Sourced by the other scripts: `setup_venv [EXTRA]` makes .venv at the tested versions, or uses the one that is there.
# EXTRA is an extra of pyproject.toml. FLOODREPRO_PYTHON names the interpreter to make .venv with.

say() { printf 'floodrepro: %s\n' "$*" >&2; }
fail() { printf 'floodrepro: error: %s\n  to do: %s\n' "$1" "$2" >&2; exit 2; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
  for python in ${FLOODREPRO_PYTHON:-python3.12 python3.11 python3.13 python3}; do
    if fits "$python"; then echo "$python"; return; fi
  done
  fail "no Python 3.11 to 3.13 was found" "install one, or set FLOODREPRO_PYTHON to its path"
}

setup_venv() {
  local python extra=${1:-} stamp=.venv/floodrepro-installed sum backend=cpu
  if [ ! -e .venv ]; then
    python=$(find_python) || exit 2
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail ".venv could not be made" "on Debian: apt install python3-venv"
  fi
  fits .venv/bin/python || fail "the .venv that is here has no Python 3.11 to 3.13" "move .venv away, run this again"
  sum=$(cat pyproject.toml constraints.txt | cksum)
  # shellcheck disable=SC2254  # a pattern: an environment with an extra has all that one without needs
  case $(cat "$stamp" 2>/dev/null) in ${extra:-*}" $sum") say "using .venv as it is"; return ;; esac
  if command -v uv >/dev/null; then
    if [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || [ -e /dev/dxg ]; then backend=auto; fi
    say "installing with uv, torch for: $backend (auto: this machine's GPU, several GB)"
    set -- uv pip install --python .venv/bin/python --torch-backend "$backend"
  else
    say "installing: several GB, with torch for CUDA (with uv on PATH, a small torch for CPUs where no GPU is)"
    set -- .venv/bin/python -m pip install --disable-pip-version-check
  fi
  set -- "$@" --quiet --constraint constraints.txt --editable ".${extra:+[$extra]}"
  "$@" || fail "the installation failed" "see the message above, then run this again: $*"
  echo "$extra $sum" >"$stamp"
}
