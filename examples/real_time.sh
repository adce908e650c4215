#!/usr/bin/env bash
# The whole chain of SDXS (Song et al. 2024): a small network, a tiny decoder, one step, control. On the embedded checkpoint in
# three quarters of an hour of one CPU core; on your own:
#   BASE=sd21 CONTROLNET=owner/canny-of-sd21 PROMPTS=prompts.txt examples/real_time.sh runs/real-time
# Every part goes on where it was stopped. The last lines compare speed and quality with the start.
set -euo pipefail
base=${BASE:-emoji} layout=${LAYOUT:-sdxs-512} controlnet=${CONTROLNET:-emoji} out=${1:-runs/real-time}
shift || true # what is left goes to real_time.py
shared=(--base "$base" --json ${PROMPTS:+--prompts "$PROMPTS"} ${DEVICE:+--device "$DEVICE"})
python -c 'import cv2' 2> /dev/null || { echo 'error: edges for control need OpenCV: pip install ".[control]"' >&2; exit 2; }
mkdir -p "$out"
fastdiff prune "${shared[@]}" --layout "$layout" -o "$out/small" > "$out/prune.json"
fastdiff distill-vae "${shared[@]}" -o "$out/vae" > "$out/vae.json"
fastdiff sdxs "${shared[@]}" --init "$out/small/model" --vae "$out/vae/tiny-vae" -o "$out/one" > "$out/one.json"
fastdiff distill-controlnet "${shared[@]}" --controlnet "$controlnet" --init "$out/one/model" --one-step \
    --vae "$out/vae/tiny-vae" -o "$out/control" > "$out/control.json"
python "$(dirname "$0")/real_time.py" "$out" --base "$base" ${DEVICE:+--device "$DEVICE"} "$@"
