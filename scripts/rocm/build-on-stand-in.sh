#!/usr/bin/env bash
# Builds Dockerfile.rocm with a real Docker, and tries what it built, where AMD's base image is out of reach.
#
#   scripts/rocm/build-on-stand-in.sh    as root on Debian, with Docker running and debootstrap installed
#
#   FLOODREPRO_PYTHON    prefix of a Python 3.12 that is copied into the stand-in (default: that of python3.12)
#
# The stand-in is Debian with a Python 3.12 in /opt/venv and the same release of torch, in its build for CUDA, that calls
# itself AMD's (disguise.py). So this shows the steps, users, folders, entry point and pins of the image at work, and
# nothing of ROCm. Needs 25 GB below Docker's folder and 1 GB below TMPDIR; images floodrepro:stand-in* are replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case " $* " in
  *" --help "* | *" -h "*) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac

say() { printf 'stand-in: %s\n' "$*" >&2; }
prefix=${FLOODREPRO_PYTHON:-$(python3.12 -c 'import sys; print(sys.base_prefix)')}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! docker image inspect floodrepro:stand-in-base >/dev/null 2>&1; then
  say "making the base from Debian and $prefix"
  debootstrap --variant=minbase --include=ca-certificates,libssl3,libffi8,zlib1g,libbz2-1.0,liblzma5,libsqlite3-0,libexpat1 \
    bookworm "$folder/root" >"$folder/debootstrap.log"
  cp -a "$prefix/." "$folder/root/usr/local/"
  # How this machine reaches its package index holds inside too.
  for file in etc/pip.conf etc/ssl/certs/ca-certificates.crt; do
    [ ! -e "/$file" ] || cp -L "/$file" "$folder/root/$file"
  done
  tar -C "$folder/root" -c . | docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' \
    - floodrepro:stand-in-debian >/dev/null
  rm -rf "$folder/root"
  say "installing torch 2.9.1 in it"
  cp scripts/rocm/disguise.py "$folder/"
  docker build --network host -t floodrepro:stand-in-base -f - "$folder" <<'BASE'
FROM floodrepro:stand-in-debian
RUN ldconfig && python3.12 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir --quiet torch==2.9.1 torchvision==0.24.1
COPY disguise.py /tmp/
RUN /opt/venv/bin/python /tmp/disguise.py
BASE
fi

say "building Dockerfile.rocm on it"
# One line of it is another; the rest is built as it stands.
sed 's|^FROM .*|FROM floodrepro:stand-in-base|' Dockerfile.rocm >"$folder/Dockerfile"
docker build --network host --build-arg REVISION="$(git rev-parse HEAD)" -t floodrepro:stand-in -f "$folder/Dockerfile" .

# Two nodes that are /dev/null stand for the GPU's: the entry point asks only whether they are there and may be used.
group=4242
mkdir "$folder"/{data,runs,cache}
chown 10001:10001 "$folder"/{data,runs,cache}
mknod -m 660 "$folder/null" c 1 3
chgrp "$group" "$folder/null"
bare=(docker run --rm --network none)
gpu=(--device "$folder/null:/dev/kfd" --device "$folder/null:/dev/dri/renderD128")
flood=(--network none "${gpu[@]}" --group-add "$group" --ipc=host -v "$folder/data:/workspace/data"
  -v "$folder/runs:/workspace/runs" -v "$folder/cache:/workspace/cache")

# Runs a command that has to end with an exit code and to print a text.
expect() {
  local code=$1 text=$2 said status=0
  shift 2
  said=$("$@" 2>&1) || status=$?
  if [ "$status" -ne "$code" ] || [[ $said != *"$text"* ]]; then
    say "expected exit code $code and '$text', got $status from: $*"
    printf '%s\n' "$said" | tail -20 >&2
    exit 1
  fi
  say "ok: ${*: -3}: $text"
}

expect 0 "usage: floodrepro COMMAND" "${bare[@]}" floodrepro:stand-in
expect 0 "0 fail" "${bare[@]}" floodrepro:stand-in doctor
expect 2 "/dev/kfd is missing" "${bare[@]}" floodrepro:stand-in fit
expect 2 "add --group-add $group" "${bare[@]}" "${gpu[@]}" floodrepro:stand-in fit
expect 0 "checks: 10 passed, 2 failed, 2 skipped" docker run --rm "${flood[@]}" floodrepro:stand-in \
  reproduce --demo --folder runs/demo
[ "$(stat -c %u "$folder/runs/demo")" -eq 10001 ] || { say "the demo belongs to another user"; exit 1; }

say "stopping a fit in its first epochs, and starting it again"
docker rm --force floodrepro-stand-in-fit >/dev/null 2>&1 || true
docker run -d --name floodrepro-stand-in-fit "${flood[@]}" floodrepro:stand-in \
  fit --config demo --data-root runs/demo/ImpactMesh-Flood --name stopped >/dev/null
trap 'docker rm --force floodrepro-stand-in-fit >/dev/null; rm -rf "$folder"' EXIT
until docker logs floodrepro-stand-in-fit 2>&1 | grep -q "epoch 2/"; do sleep 1; done
docker stop --time 600 floodrepro-stand-in-fit >/dev/null
ended() { [ "$(docker wait floodrepro-stand-in-fit)" -eq "$1" ] || { docker logs floodrepro-stand-in-fit | tail; exit 1; }; }
ended 143
docker start floodrepro-stand-in-fit >/dev/null
ended 0
cmp "$folder/runs/stopped/metrics.csv" "$folder/runs/demo/runs/demo/metrics.csv"
say "ok: the metrics of the stopped run are the bytes of the demo's"
docker image ls --format 'stand-in: {{.Repository}}:{{.Tag}} {{.Size}}' floodrepro >&2
