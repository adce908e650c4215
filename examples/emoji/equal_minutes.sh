#!/usr/bin/env bash
# Every few-step method on `emoji` for as many minutes of training: each by its preset, with as many steps as fit.
# A short run of each method tells how many fit; schedules of the learning rate end with the last of them.
# LCM's family and Lightning learn from the pictures, DMD in one call from samples of the teacher, TDM, SiD and DMD2 from prompts alone.
# Drawing the teacher's samples comes on top; the JSON tells it as `data_s`.
#   examples/emoji/equal_minutes.sh MINUTES SEED [METHOD ...]
set -euo pipefail
minutes=$1 seed=$2 methods=${*:3} trial=40
rows=()
train() { # METHOD COMMAND [OPTION ...]
    local name=$1 result=$minutes-$1-$seed.json speed=speed-$1.json steps
    shift
    if [ "$methods" ] && [[ " $methods " != *" $name "* ]]; then return; fi
    if [ ! -e "$speed" ]; then
        fastdiff "$@" --steps $trial --eval-every 0 --proof 0 --json -o "runs/speed-$name" > "$speed.part"
        mv "$speed.part" "$speed"
    fi
    steps=$(python -c "import json; print(round($trial * 60 * $minutes / json.load(open('$speed'))['timings']['training_s']))")
    fastdiff "$@" --seed "$seed" --steps "$steps" --eval-every 0 --keep last --proof 4000 --json -o "runs/$minutes-$name-$seed" > "$result"
    rows+=("$name=$result")
}
train tdm tdm
trial=140 train lightning lightning # all of its phases
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
