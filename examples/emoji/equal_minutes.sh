#!/usr/bin/env bash
# Every few-step method on `emoji` for as many minutes of training: each by its preset, with as many steps as fit.
# LCM's family and Lightning learn from the pictures, DMD in one call from samples of the teacher, TDM, SiD and DMD2 from prompts alone.
# The minutes are those of the training steps. Drawing the teacher's samples comes on top (`data_s` in the JSON), as do the
# measurements for convergence.py.
#   examples/emoji/equal_minutes.sh MINUTES SEED [METHOD[=STEPS] ...]
# `--max-time` finds the number of steps, which needs a core of its own. Beside other work, measure it first and give it.
set -euo pipefail
minutes=$1 seed=$2 methods=${*:3} rows=()
shared=(--seed "$seed" --eval-every 60 --patience 0 --keep last --json --proof 4000)
train() { # NAME COMMAND [OPTION ...]
    local name=$1 result=$minutes-$1-$seed.json length=(--steps 100000 --max-time "${minutes}m")
    shift
    if [ "$methods" ]; then
        if [[ ! " $methods " =~ " $name"(=([0-9]+))?" " ]]; then return; fi
        if [ "${BASH_REMATCH[2]}" ]; then length=(--steps "${BASH_REMATCH[2]}"); fi
    fi
    fastdiff "$@" "${shared[@]}" "${length[@]}" -o "runs/$minutes-$name-$seed" > "$result"
    rows+=("$name=$result")
}
train tdm tdm
train lightning lightning
train pcm train-lcm-lora --target edge
train lcm train-lcm-lora --target zero --weighting none
train tcd train-lcm-lora
train dmd dmd
train dmd2 dmd --recipe dmd2
train sid sid
train tdm2 tdm --num-steps 2
train tdm1 tdm --num-steps 1
train tdm-any tdm --any-steps
python "$(dirname "$0")/table.py" "${rows[@]}"
