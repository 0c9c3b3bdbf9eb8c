#!/usr/bin/env bash
# Makes the embedded target and its two drafters from nothing but this interpreter's standard
# library. About two hours on two idle cores. Budgets are variables:
#   TARGET_STEPS=200 DRAFTER_STEPS=400 ./make.sh
# Run again with the same RUN, the drafter's training goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
: "${PYTHON:=python}" "${OUT:=.}" "${RUN:=$OUT/run}"
: "${TARGET_STEPS:=740}" "${DRAFTER_STEPS:=1600}" "${PROMPTS:=8192}"
export PYTHONPATH="../..${PYTHONPATH:+:$PYTHONPATH}"
# Fewer page faults: a training step allocates and frees the same large buffers over and over
# (10 % faster).
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000
export MALLOC_TOP_PAD_=256000000

[ -f "$RUN/prompts.jsonl" ] || {
    mkdir -p "$RUN"
    "$PYTHON" train_target.py --out "$OUT/target" --steps "$TARGET_STEPS"
    "$PYTHON" prompts.py --target "$OUT/target" --out prompts.jsonl --count 128 --held-out
    "$PYTHON" prompts.py --target "$OUT/target" --out "$RUN/prompts.jsonl" --count "$PROMPTS"
}
train() { # a kind, and more flags: its run, and the drafter from there
    kind=$1
    shift
    "$PYTHON" -m vllm_dflash.cli train dflash.toml --target "$OUT/target" \
        --prompts "$RUN/prompts.jsonl" --out "$RUN/$kind" \
        --steps "$DRAFTER_STEPS" --kind "$kind" "$@"
    mkdir -p "$OUT/$kind"
    cp "$RUN/$kind/drafter/"* "$OUT/$kind/"
}
train dflash
# The same answers; its draft layers begin as the DFlash's, and how it sees the target is learned
# anew.
mkdir -p "$RUN/dflare"
[ -d "$RUN/dflare/generate" ] || cp -r "$RUN/dflash/generate" "$RUN/dflare/"
train dflare --layers 3 --target-layer-ids 0,1,2,3,4,5,6,7 --init-layers "$OUT/dflash"
