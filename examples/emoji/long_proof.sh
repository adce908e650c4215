#!/usr/bin/env bash
# The long proof on `emoji`: how much of the gap between n network calls and the teacher's 50 a long distillation closes.
# Three students, as published for their steps: LCM (jumps to zero; 1 and 2 calls), PCM (4 phases; 4 calls), DMD (1 call).
# About two hours on one CPU core, or half of it on two with two runs at once; minutes on a GPU.
#   examples/emoji/long_proof.sh [SEED]
set -euo pipefail
seed=${1:-0}
shared=(--ema 0.99 --warmup 50 --proof 2000 --seed "$seed" --json)
lcm=(--batch-size 32 --lora-rank 64 --lora-alpha 64)
dmd=(--lora-layers all --lora-rank 32 --lora-alpha 32 --lr 5e-4 --pairs 4320 --reg-batch 12)
fastdiff train-lcm-lora "${shared[@]}" "${lcm[@]}" --steps 1500 --weighting inverse-step -o "runs/long-lcm-$seed" > "long-lcm-$seed.json"
fastdiff train-lcm-lora "${shared[@]}" "${lcm[@]}" --steps 1200 --target edge --skip 4 -o "runs/long-pcm-$seed" > "long-pcm-$seed.json"
fastdiff dmd "${shared[@]}" "${dmd[@]}" --steps 1200 -o "runs/long-dmd-$seed" > "long-dmd-$seed.json"
python "$(dirname "$0")/table.py" LCM="long-lcm-$seed.json" PCM="long-pcm-$seed.json" DMD="long-dmd-$seed.json"
