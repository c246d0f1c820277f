#!/usr/bin/env bash
# Measure on one GPU: speed and memory beside plain TerraTorch, a planted overflow in fp16 with its rollback, a kill
# with its resume, and energy. It needs no network, no data and no weights. PYTHON names the interpreter.
#
#   scripts/measure-on-gpu.sh OUT           on a GPU
#   scripts/measure-on-gpu.sh --tiny OUT    at toy size, to rehearse it on a CPU
set -euo pipefail
config=terramind_v1_base_impactmesh_flood_amd size=256 batch=8 chips=64 bench=()
if [ "${1:-}" = --tiny ]; then
  shift; config=demo size=32 batch=2 chips=24 bench=(--steps 2 --rounds 1 --size 32 --batch 2)
fi
mkdir -p "${1:?give a folder for the results}"
out=$(realpath "$1") work=$(mktemp -d) python=${PYTHON:-python3}
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
flood() { "$python" -m floodrepro "$@"; }

flood doctor --format json >"$out/doctor.json" || true
for action in train test data; do flood bench "$action" "${bench[@]}" --output "$out"; done

cat >"$work/planted.py" <<'PYTHON'
import torch
from lightning.pytorch.callbacks import Callback


class Overflow(Callback):
    """Activations of the neck become too large for fp16 in step 3; a rehearsal in fp32 gets an inf."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            value = float("inf") if trainer.precision == "32-true" else 1e6
            layer = next(m for m in module.modules() if isinstance(m, torch.nn.ConvTranspose2d))

            def plant(_, inputs, output):
                hook.remove()
                return output + value

            hook = layer.register_forward_hook(plant)
PYTHON
flood data synth --root "$work/chips" --events 8 --chips "$chips" --size "$size" --protocol v0 --seed 1 >&2
fit=(fit --config "$config" --data-root "$work/chips" --runs-root "$work/runs" --save-every 2 --trainer.max_epochs 2
  --data.init_args.batch_size "$batch" --model.init_args.model_args.backbone_pretrained false)
flood "${fit[@]}" --name overflow --on-overflow rollback --trainer.callbacks+=planted.Overflow
flood "${fit[@]}" --name whole
"$python" -m floodrepro "${fit[@]}" --name killed & killed=$!
until [ -e "$work/runs/killed/checkpoints/last.ckpt" ]; do sleep 0.2; kill -0 "$killed"; done
kill -KILL "$killed"; wait "$killed" || true
flood "${fit[@]}" --name killed

for run in overflow whole killed; do cp "$work/runs/$run/run.json" "$out/$run.json"; done
"$python" - "$work/runs" <<'PYTHON' | tee "$out/resume.txt"
import sys, torch
states = [torch.load(f"{sys.argv[1]}/{run}/checkpoints/last.ckpt")["state_dict"] for run in ("whole", "killed")]
worst = max(float((states[0][name].float() - states[1][name].float()).abs().max()) for name in states[0])
print(f"killed and resumed beside uninterrupted: largest difference of a weight {worst:g}")
PYTHON
