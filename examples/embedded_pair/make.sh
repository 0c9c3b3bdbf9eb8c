#!/usr/bin/env bash
# Makes the embedded pair (target and drafter) from nothing but this interpreter's standard library.
# About 75 minutes on two idle cores. Budgets are variables: TARGET_STEPS=200 DRAFTER_STEPS=400 ./make.sh
# Run again with the same RUN, the drafter's training goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
: "${PYTHON:=python}" "${OUT:=.}" "${RUN:=$OUT/run}" "${TARGET_STEPS:=740}" "${DRAFTER_STEPS:=1600}" "${PROMPTS:=8192}"
export PYTHONPATH="../..${PYTHONPATH:+:$PYTHONPATH}"
# Fewer page faults: a training step allocates and frees the same large buffers over and over (10 % faster).
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=256000000

[ -f "$RUN/prompts.jsonl" ] || {
    mkdir -p "$RUN"
    "$PYTHON" train_target.py --out "$OUT/target" --steps "$TARGET_STEPS"
    "$PYTHON" prompts.py --target "$OUT/target" --out prompts.jsonl --count 128 --held-out
    "$PYTHON" prompts.py --target "$OUT/target" --out "$RUN/prompts.jsonl" --count "$PROMPTS"
}
"$PYTHON" -m vllm_dflash.cli train dflash.toml --target "$OUT/target" --prompts "$RUN/prompts.jsonl" --out "$RUN" --steps "$DRAFTER_STEPS"
mkdir -p "$OUT/dflash"
cp "$RUN/drafter/"* "$OUT/dflash/"
