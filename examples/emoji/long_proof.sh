#!/usr/bin/env bash
# The long proof: how much of the gap between n network calls and the teacher's 50 a long distillation closes, on `emoji`.
# An hour or more on two CPU cores, minutes on a GPU. Writes runs/long-proof and its table, long_proof.json.
#   examples/emoji/long_proof.sh [STEPS] [SEED]
set -euo pipefail
steps=${1:-6000} seed=${2:-0}
fastdiff train-lcm-lora --base emoji --steps "$steps" --seed "$seed" --proof 1000 --output "runs/long-proof-$seed" --json \
  > "long_proof-$seed.json"
python - "long_proof-$seed.json" <<'PY'
import json, sys
metrics = json.load(open(sys.argv[1]))["metrics"]
for metric, gaps in metrics["gap_closed"].items():
    for calls, gap in gaps.items():
        print(f"{metric:10} {calls:>2} calls: teacher {gap['teacher']:.3f} student {gap['student']:.3f} 50 calls {gap['teacher_50']:.3f} "
              f"gap closed {100 * gap['gap_closed']:.0f} % [{100 * gap['low']:.0f}, {100 * gap['high']:.0f}]")
PY
