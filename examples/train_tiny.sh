#!/usr/bin/env bash
# From a target to a served drafter in one go, on two cores in a few minutes: prompts from the
# standard library's source, answers, features, training, proof, export, and a server that drafts
# with the result. Stopped, it goes on from there with the same OUT.
#   examples/train_tiny.sh                                  the embedded target, from .venv
#   STEPS=60 PROMPTS=200 SERVE=no examples/train_tiny.sh    smaller, without the server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-/tmp/train-tiny}
STEPS=${STEPS:-500}
PROMPTS=${PROMPTS:-1536}
SERVE=${SERVE:-yes}
BIN=${BIN:-$here/../.venv/bin}
pair=$here/embedded_pair

mkdir -p "$OUT"
[ -f "$OUT/prompts.jsonl" ] || "$BIN/python" "$pair/prompts.py" --target "$pair/target" \
    --out "$OUT/prompts.jsonl" --count "$PROMPTS"
"$BIN/vllm-dflash" train "$pair/dflash.toml" --target "$pair/target" \
    --prompts "$OUT/prompts.jsonl" --held-out-prompts "$pair/prompts.jsonl" \
    --out "$OUT/run" --steps "$STEPS" --dtype float32 "$@"
[ "$SERVE" = no ] || DRAFTER=$OUT/run/drafter VLLM="$BIN/vllm" MEMORY=${MEMORY:-0.1} \
    "$here/serve.sh"
