# shellcheck shell=bash
# Sourced by the other scripts: makes .venv at the tested versions, or uses the one that is there.
#
#   setup_venv EXTRA     EXTRA is "" or an extra of pyproject.toml, such as dev
#
#   FLOODREPRO_PYTHON    interpreter to make .venv with (default: the first of python3.12, python3.11, python3
#                        that is 3.11 or 3.12)
#   FLOODREPRO_TORCH     "pinned" (default), or "keep": take torch from the interpreter's own packages, as on a ROCm
#                        image, and leave the torch family out of the constraints

TORCH_FAMILY='^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=='

say() { printf 'floodrepro: %s\n' "$*" >&2; }

fail() {
  printf 'floodrepro: error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  to do: %s\n' "$2" >&2
  exit 2
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${FLOODREPRO_PYTHON:-}" ]; then
    fits "$FLOODREPRO_PYTHON" || fail "FLOODREPRO_PYTHON=$FLOODREPRO_PYTHON is not Python 3.11 or 3.12" \
      "point it at another interpreter, or unset it"
    printf '%s\n' "$FLOODREPRO_PYTHON"
    return
  fi
  for candidate in python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 on PATH" "install one, or set FLOODREPRO_PYTHON to its path"
}

setup_venv() {
  local extra=$1 python constraints stamp wanted have
  local -a make_options=()
  constraints=constraints.txt
  if [ "${FLOODREPRO_TORCH:-pinned}" = keep ]; then
    make_options=(--system-site-packages)
  fi
  if [ -e .venv ] && ! fits .venv/bin/python; then
    fail "the .venv that is here has no Python 3.11 or 3.12 in it" "move .venv away and run this again"
  fi
  if [ ! -e .venv ]; then
    python=$(find_python) || exit 2
    say "making .venv with $("$python" --version)"
    "$python" -m venv "${make_options[@]}" .venv || fail ".venv could not be made" "on Debian: apt install python3-venv"
  fi
  if [ "${FLOODREPRO_TORCH:-pinned}" = keep ]; then
    constraints=.venv/constraints-without-torch.txt
    grep -vE "$TORCH_FAMILY" constraints.txt >"$constraints"
  fi
  # Installing again takes a while even when there is nothing to do: skip it while what it depends on is unchanged.
  wanted=$(cat pyproject.toml "$constraints" | cksum)
  stamp=.venv/floodrepro-installed
  for have in "$extra" dev; do  # dev holds all the others
    if [ "$(cat "$stamp" 2>/dev/null)" = "$have $wanted" ]; then
      say "using .venv as it is"
      return
    fi
  done
  say "installing at the versions of constraints.txt (the first time: several GB, some minutes)"
  rm -f "$stamp"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    --editable ".${extra:+[$extra]}" || fail "the installation failed" "see pip's message above; it is safe to run this again"
  printf '%s\n' "$extra $wanted" >"$stamp"
}
