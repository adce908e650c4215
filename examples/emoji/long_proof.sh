#!/usr/bin/env bash
# The long proof on `emoji`: how much of the gap between n network calls and the teacher's 50 a long distillation closes.
# Two students, as published for few and for more steps: LCM (jumps to zero; 1 and 2 calls) and PCM (4 phases; 4 calls).
# About 75 minutes on one CPU core, or on two with both runs at once; minutes on a GPU.
#   examples/emoji/long_proof.sh [SEED]
set -euo pipefail
seed=${1:-0}
shared=(--batch-size 32 --lora-rank 64 --lora-alpha 64 --ema 0.99 --warmup 50 --proof 2000 --seed "$seed" --json)
fastdiff train-lcm-lora "${shared[@]}" --steps 1500 --weighting inverse-step --output "runs/long-lcm-$seed" > "long-lcm-$seed.json"
fastdiff train-lcm-lora "${shared[@]}" --steps 1200 --target edge --skip 4 --output "runs/long-pcm-$seed" > "long-pcm-$seed.json"
python - "long-lcm-$seed.json" "long-pcm-$seed.json" <<'PY'
import json, sys
print("| student | calls | metric | undistilled | student | teacher, 50 calls | gap closed |\n|" + " --- |" * 7)
for name, path in zip(("LCM", "PCM"), sys.argv[1:]):
    for metric, gaps in json.load(open(path))["metrics"]["gap_closed"].items():
        for calls, gap in gaps.items():
            closed, low, high = (100 * gap[k] for k in ("gap_closed", "low", "high"))
            print(f"| {name} | {calls} | {metric} | {gap['teacher']:.3f} | {gap['student']:.3f} | {gap['teacher_50']:.3f} "
                  f"| {closed:.0f} % [{low:.0f}, {high:.0f}] |")
PY
