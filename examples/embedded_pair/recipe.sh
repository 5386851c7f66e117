#!/usr/bin/env bash
# Trains the embedded pair further: less than two hours on one core, no GPU, no download.
#
#   bash examples/embedded_pair/recipe.sh [GSM8K_TRAIN_JSONL] [WORK_FOLDER]
#
# Goes on from the pair in the package. Every stage that has finished is skipped when the script runs again.
set -euo pipefail
here=$(dirname "$0")
gsm8k=${1:-../shared/data/gsm8k_train.jsonl}
work=${2:-build/pair}
start="$here/../../dspark_hf/pair"
mkdir -p "$work"

# glibc hands large blocks back to the system after every operation, which costs time on a CPU; this keeps them.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

if [ ! -e "$work/target.done" ]; then
    python "$here/train_target.py" --gsm8k "$gsm8k" --start "$start/target" --output "$work/target_1" \
        --steps 470 --learning-rate 1.5e-3
    # A short run of mostly problems made by rules makes numbers better and other text worse: go a third of the way.
    python "$here/train_target.py" --gsm8k "$gsm8k" --start "$work/target_1" --output "$work/target_2" \
        --steps 80 --learning-rate 8e-4 --made 0.75 --seed 1
    python "$here/average.py" --first "$work/target_1" --second "$work/target_2" --share 0.333 --output "$work/target"
    touch "$work/target.done"
fi
if [ ! -e "$work/responses.done" ]; then
    python "$here/regenerate.py" --target "$work/target" --gsm8k "$gsm8k" --output "$work/responses.jsonl"
    touch "$work/responses.done"
fi
if [ ! -e "$work/head.done" ]; then
    resume=$(compgen -G "$work/head/checkpoint-*" > /dev/null && echo --resume || true)
    dspark-hf train --model "$work/target" --data "$work/responses.jsonl" --output "$work/head" \
        --head "$start/head" --batch-size 8 --anchors 32 --epochs 2.8 --max-length 512 \
        --optimizer muon --learning-rate 2e-3 --ce-weight 1 --save-every 300 $resume
    touch "$work/head.done"
fi
if [ ! -e "$work/calibrated.done" ]; then
    python "$here/calibration_prompts.py" --gsm8k "${gsm8k/train/test}" --output "$work/calibration.jsonl"
    dspark-hf calibrate --model "$work/target" --head "$work/head" --prompts "$work/calibration.jsonl" --batch-size 32
    touch "$work/calibrated.done"
fi
python "$here/install.py" --target "$work/target" --head "$work/head"
