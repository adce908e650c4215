#!/usr/bin/env bash
# The long proof on `emoji`: how much of the gap between n network calls and the teacher's 50 a long distillation closes.
# Each method with the steps that it was published for: LCM's family (TCD), DMD (1 call), Lightning (from 32 steps down), SDXS (a
# pruned network and a tiny decoder; 1 call). All of them learn from the teacher's samples of the shipped prompts, none from the pictures.
# About two hours of one CPU core.
#   examples/emoji/long_proof.sh [SEED]
set -euo pipefail
seed=${1:-0}
taught=(--seed "$seed" --eval-every 0 --json --data teacher --teacher-steps 8 --teacher-guidance 3)
shared=("${taught[@]}" --proof 4000)
fastdiff train-lcm-lora "${shared[@]}" --pairs 4320 -o "runs/long-lcm-$seed" > "long-lcm-$seed.json"
dmd=(--ema 0.99 --lora-layers all --lora-rank 32 --lora-alpha 32 --lr 5e-4 --reg-batch 12 --warmup 50 --steps 1200)
fastdiff dmd "${shared[@]}" --pairs 8640 "${dmd[@]}" -o "runs/long-dmd-$seed" > "long-dmd-$seed.json"
light=(--ema 0.995 --guidance 3.25 --lora-rank 64 --lora-alpha 64 --lr 1e-3 --lora-only --warmup 50 --steps 2400)
fastdiff lightning "${shared[@]}" --pairs 4320 "${light[@]}" --stages 32:8:18,8:4:8,4:2:5,2:1:10 \
    --phases switch:1,mse:8,cond:1,uncond:2 -o "runs/long-light-$seed" > "long-light-$seed.json"
fastdiff distill-vae --seed "$seed" --json -o "runs/long-vae-$seed" > "long-vae-$seed.json"
fastdiff prune "${taught[@]}" --proof 2000 --layout sdxs-512 --pairs 8640 --ema 0.99 --steps 2000 \
    -o "runs/long-small-$seed" > "long-small-$seed.json"
fastdiff sdxs "${shared[@]}" --init "runs/long-small-$seed/model" --vae "runs/long-vae-$seed/tiny-vae" --pairs 4320 \
    --ema 0.99 --mix-prompts 0.5 --match-steps 120 --steps 1000 -o "runs/long-sdxs-$seed" > "long-sdxs-$seed.json"
names=(LCM DMD Lightning SDXS)
files=(lcm dmd light sdxs)
rows=()
for i in "${!names[@]}"; do rows+=("${names[$i]}=long-${files[$i]}-$seed.json"); done
python "$(dirname "$0")/table.py" "${rows[@]}"
