#!/usr/bin/env bash
# Makes the embedded pair (target and drafter) from nothing but this interpreter's standard library.
# About 75 minutes on two idle cores. Budgets are variables: TARGET_STEPS=200 DRAFTER_MINUTES=10 ./make.sh
set -euo pipefail
cd "$(dirname "$0")"
: "${PYTHON:=python}" "${OUT:=.}" "${TARGET_STEPS:=740}" "${DRAFTER_MINUTES:=35}" "${SEQUENCES:=8192}" "${GENERATE_MINUTES:=10}"
export PYTHONPATH="../..${PYTHONPATH:+:$PYTHONPATH}"
# Fewer page faults: a training step allocates and frees the same large buffers over and over (10 % faster).
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_TOP_PAD_=256000000
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$PYTHON" train_target.py --out "$OUT/target" --steps "$TARGET_STEPS"
"$PYTHON" generate.py --target "$OUT/target" --prompts prompts.jsonl --out "$scratch/data.npz" --sequences "$SEQUENCES" --minutes "$GENERATE_MINUTES"
"$PYTHON" train_drafter.py --target "$OUT/target" --data "$scratch/data.npz" --prompts prompts.jsonl --out "$OUT/dflash" --minutes "$DRAFTER_MINUTES"
