#!/usr/bin/env bash
# The long proof on `emoji`: how much of the gap between n network calls and the teacher's 50 a long distillation closes.
# Students as published for their steps: LCM (jumps to zero; 1 and 2 calls), PCM (4 phases; 4 calls), DMD (1 call), Lightning
# (from 32 steps down), SDXS (a pruned network and a tiny decoder; 1 call). About five hours on one CPU core, minutes on a GPU.
#   examples/emoji/long_proof.sh [SEED]
set -euo pipefail
seed=${1:-0}
shared=(--warmup 50 --proof 4000 --seed "$seed" --json)
lcm=(--ema 0.99 --batch-size 32 --lora-rank 64 --lora-alpha 64)
dmd=(--ema 0.99 --lora-layers all --lora-rank 32 --lora-alpha 32 --lr 5e-4 --pairs 4320 --reg-batch 12)
fastdiff train-lcm-lora "${shared[@]}" "${lcm[@]}" --steps 1500 --weighting inverse-step -o "runs/long-lcm-$seed" > "long-lcm-$seed.json"
fastdiff train-lcm-lora "${shared[@]}" "${lcm[@]}" --steps 1200 --target edge --skip 4 -o "runs/long-pcm-$seed" > "long-pcm-$seed.json"
fastdiff dmd "${shared[@]}" "${dmd[@]}" --steps 1200 -o "runs/long-dmd-$seed" > "long-dmd-$seed.json"
light=(--ema 0.995 --guidance 3.25 --lora-rank 64 --lora-alpha 64 --lr 1e-3 --lora-only --eval-every 0 --steps 4100)
fastdiff lightning "${shared[@]}" "${light[@]}" --stages 32:8:18,8:4:8,4:2:5,2:1:10 --phases switch:1,mse:8,cond:1,uncond:2 \
    -o "runs/long-light-$seed" > "long-light-$seed.json"
small=(--seed "$seed" --json)
fastdiff prune "${small[@]}" --layout sdxs-512 --steps 2000 --ema 0.99 -o "runs/long-small-$seed" > "long-small-$seed.json"
fastdiff distill-vae "${small[@]}" --pairs 4320 --steps 4000 -o "runs/long-vae-$seed" > "long-vae-$seed.json"
fastdiff sdxs --ema 0.99 --proof 4000 "${small[@]}" --init "runs/long-small-$seed/model" --vae "runs/long-vae-$seed/tiny-vae" \
    --steps 2400 --match-steps 200 --pairs 4320 -o "runs/long-sdxs-$seed" > "long-sdxs-$seed.json"
names=(LCM PCM DMD Lightning SDXS)
files=(lcm pcm dmd light sdxs)
rows=()
for i in "${!names[@]}"; do rows+=("${names[$i]}=long-${files[$i]}-$seed.json"); done
python "$(dirname "$0")/table.py" "${rows[@]}"
