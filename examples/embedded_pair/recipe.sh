#!/usr/bin/env bash
# Trains the embedded pair: two to three hours on one core, no GPU, no download.
#
#   bash examples/embedded_pair/recipe.sh [GSM8K_TRAIN_JSONL] [WORK_FOLDER]
#
# Goes on from the first pair, which it takes from this repository's history. Every stage that has finished is skipped
# when the script runs again.
set -euo pipefail
here=$(dirname "$0")
gsm8k=${1:-../shared/data/gsm8k_train.jsonl}
work=${2:-build/pair}
start="$work/start"
first_pair=941f30fb4cfa5822f644ac1b895fd650bef4be79
mkdir -p "$work"

# glibc hands large blocks back to the system after every operation, which costs time on a CPU; this keeps them.
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

if [ ! -e "$work/start.done" ]; then
    git -C "$here" rev-parse --quiet --verify "$first_pair^{commit}" > /dev/null ||
        { echo "The recipe begins with the pair of commit $first_pair; fetch the whole history: git fetch --unshallow"; exit 1; }
    git -C "$here/../.." archive "$first_pair" dspark_hf/pair | tar --extract --one-top-level="$start" --strip-components 2
    touch "$work/start.done"
fi
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
# A run of `dspark-hf train` that was interrupted goes on from its last checkpoint.
train() {
    local output=$1 resume=()
    shift
    if compgen -G "$output/checkpoint-*" > /dev/null; then resume=(--resume); fi
    dspark-hf train --model "$work/target" --output "$output" --batch-size 8 --anchors 32 --max-length 512 \
        --optimizer muon --ce-weight 1 --save-every 300 "$@" "${resume[@]}"
}
if [ ! -e "$work/head_1.done" ]; then
    train "$work/head_1" --head "$start/head" --data "$work/responses.jsonl" --epochs 2.8 --learning-rate 2e-3
    touch "$work/head_1.done"
fi
# More passes over the same answers make the head worse: one over new answers, mostly of code.
if [ ! -e "$work/more.done" ]; then
    python "$here/more_prompts.py" --gsm8k "$gsm8k" --output "$work/more"
    for way in "greedy 0" "sampled 0.7"; do
        read -r name temperature <<< "$way"
        dspark-hf regenerate --model "$work/target" --head "$work/head_1" --data "$work/more/$name.jsonl" \
            --output "$work/more/${name}_answers.jsonl" --temperature "$temperature" --max-new-tokens 256 \
            --max-length 512 --batch-size 64
    done
    cat "$work"/more/*_answers.jsonl > "$work/more.jsonl"
    touch "$work/more.done"
fi
if [ ! -e "$work/head.done" ]; then
    train "$work/head_2" --head "$work/head_1" --data "$work/more.jsonl" --epochs 1 --learning-rate 1.5e-3
    # A third of the way, as with the target: problems would be drafted worse otherwise.
    python "$here/average.py" --heads --first "$work/head_1" --second "$work/head_2" --share 0.333 --output "$work/head"
    touch "$work/head.done"
fi
if [ ! -e "$work/calibrated.done" ]; then
    python "$here/calibration_prompts.py" --gsm8k "${gsm8k/train/test}" --output "$work/calibration.jsonl"
    dspark-hf calibrate --model "$work/target" --head "$work/head" --prompts "$work/calibration.jsonl" --batch-size 32
    touch "$work/calibrated.done"
fi
python "$here/install.py" --target "$work/target" --head "$work/head"

# What came out, beside what it began with.
for pair in "$work" "$start"; do
    python "$here/measure.py" --target "$pair/target" --gsm8k "${gsm8k/train/test}" --limit 150
    dspark-hf eval --model "$pair/target" --head "$pair/head" --max-new-tokens 256 --batch-size 16 --dtype float32
done
