#!/usr/bin/env bash
# Every few-step method on `emoji` for as many minutes of training: each by its preset, with as many steps as fit.
# LCM's family and Lightning learn from the pictures, DMD in one call from samples of the teacher, TDM, SiD and DMD2 from prompts alone.
# Drawing the teacher's samples comes on top; the JSON tells it as `data_s`.
#   examples/emoji/equal_minutes.sh MINUTES [SEED]
set -euo pipefail
minutes=$1 seed=${2:-0}
shared=(--seed "$seed" --max-time "${minutes}m" --steps 100000 --eval-every 0 --keep last --json --proof 4000)
train() { # NAME COMMAND [OPTION ...]
    name=$1
    shift
    fastdiff "$@" "${shared[@]}" -o "runs/$minutes-$name-$seed" > "$minutes-$name-$seed.json"
}
train lcm train-lcm-lora --target zero --weighting none
train pcm train-lcm-lora --target edge
train tcd train-lcm-lora
train dmd dmd
train sid sid
train dmd2 dmd --recipe dmd2
train lightning lightning
train tdm tdm
train tdm-any tdm --any-steps
train tdm2 tdm --num-steps 2
train tdm1 tdm --num-steps 1
rows=()
for name in lcm pcm tcd dmd sid dmd2 lightning tdm tdm-any tdm2 tdm1; do rows+=("$name=$minutes-$name-$seed.json"); done
python "$(dirname "$0")/table.py" "${rows[@]}"
