#!/usr/bin/env bash
# The report on SmolLM2: plain decoding, this package's drafter, vLLM's own dflash, n-gram lookup
# and EAGLE-3, on HumanEval, everyday questions and German ones, into bench/. What it does is in
# variables:
#   EAGLE3=HEAD ./report.sh                       # with EAGLE-3, where there is a head
#   REPEATS=1 CONCURRENCY=1,8 NUM_PROMPTS=16 ./report.sh
# It takes some ten hours on two slow cores; report.md is written anew after every repeat.
set -euo pipefail
cd "$(dirname "$0")"
: "${BENCH:=vllm-dflash bench}" "${DRAFT:=dflash}" "${EAGLE3:=}" "${OUT:=bench}"
: "${METHODS:=plain,dflash:1,dflash:3,dflash:5,dflash:7,adaptive,native:7,ngram}"
: "${CONCURRENCY:=1,2,4,8,16,32}" "${NUM_PROMPTS:=16,16,16,16,32,64}" "${TEMPERATURE:=0,1}"
: "${MAX_TOKENS:=32-96}" "${REPEATS:=3}" "${KV_CACHE_BYTES:=805306368}"

head=()
[ -z "$EAGLE3" ] || {
    METHODS=$METHODS,eagle3:3,eagle3:5
    head=(--eagle3 "$EAGLE3")
}
# shellcheck disable=SC2086  # BENCH may be several words
$BENCH --target smollm2 --draft "$DRAFT" "${head[@]}" --methods "$METHODS" \
    --dataset humaneval --prompts everyday.jsonl --prompts german.jsonl \
    --concurrency "$CONCURRENCY" --num-prompts "$NUM_PROMPTS" --temperature "$TEMPERATURE" \
    --max-tokens "$MAX_TOKENS" --repeats "$REPEATS" --dtype float32 \
    --engine-args "{\"kv_cache_memory_bytes\": $KV_CACHE_BYTES}" --out "$OUT" "$@"
