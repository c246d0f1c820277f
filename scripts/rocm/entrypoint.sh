#!/usr/bin/env bash
# Entry point of the ROCm image: what would fail an hour later, or silently train on the CPU, fails here.
# Arguments are floodrepro's own: `docker run … floodrepro:rocm fit --config …`
#
#   FLOODREPRO_HOST    where /dev and /workspace are looked for (default: /); the tests set it
set -euo pipefail

fail() {
  printf 'floodrepro: error: %s\n  where: %s\n  to do: %s\n' "$1" "$2" "$3" >&2
  exit 2
}

# Help needs no GPU, and doctor is there to say what is missing.
case " $* " in
  "  " | " doctor "* | *" -h "* | *" --help "* | " -V " | " --version ") exec floodrepro "$@" ;;
esac

root=${FLOODREPRO_HOST:-}
kfd=$root/dev/kfd
[ -e "$kfd" ] || fail "the container has no AMD GPU: /dev/kfd is missing" "docker run" \
  "add --device=/dev/kfd --device=/dev/dri; if the host has no /dev/kfd either, its amdgpu driver is not loaded"

for device in "$kfd" "$root"/dev/dri/renderD*; do
  [ -e "$device" ] || fail "the container has no /dev/dri/renderD*" "docker run" "add --device=/dev/dri"
  [[ -r $device && -w $device ]] || fail "user $(id -u) may not use ${device#"$root"}" "docker run" \
    "add --group-add $(stat -c %g "$device"), the group that owns it on the host"
done

for folder in runs cache; do
  [ -w "$root/workspace/$folder" ] || fail "user $(id -u) may not write to /workspace/$folder" "the folder mounted there" \
    "on the host: chown $(id -u) FOLDER"
done

exec floodrepro "$@"
