#!/usr/bin/env bash
# Makes the embedded pair from text: about two hours on two cores, no GPU, no download.
#
#   bash examples/embedded_pair/recipe.sh [GSM8K_TRAIN_JSONL] [WORK_FOLDER]
#
# Every stage that has finished is skipped when the script runs again.
set -euo pipefail
here=$(dirname "$0")
gsm8k=${1:-../shared/data/gsm8k_train.jsonl}
work=${2:-build/pair}
mkdir -p "$work"

# glibc hands large blocks back to the system after every operation, which costs time on a CPU; this keeps them.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

if [ ! -e "$work/target.done" ]; then
    python "$here/train_target.py" --gsm8k "$gsm8k" --output "$work/target"
    touch "$work/target.done"
fi
if [ ! -e "$work/responses.done" ]; then
    python "$here/regenerate.py" --target "$work/target" --gsm8k "$gsm8k" --output "$work/responses.jsonl"
    touch "$work/responses.done"
fi
if [ ! -e "$work/head.done" ]; then
    resume=$(compgen -G "$work/head/checkpoint-*" > /dev/null && echo --resume || true)
    dspark-hf train --model "$work/target" --data "$work/responses.jsonl" --output "$work/head" \
        --layers 3 --markov-rank 64 --batch-size 8 --anchors 32 --epochs 3.5 --max-length 512 \
        --optimizer muon --learning-rate 3e-3 --ce-weight 1 --save-every 300 $resume
    touch "$work/head.done"
fi
if [ ! -e "$work/calibrated.done" ]; then
    python "$here/calibration_prompts.py" --gsm8k "${gsm8k/train/test}" --output "$work/calibration.jsonl"
    dspark-hf calibrate --model "$work/target" --head "$work/head" --prompts "$work/calibration.jsonl" --batch-size 32
    touch "$work/calibrated.done"
fi
python "$here/install.py" --target "$work/target" --head "$work/head"
