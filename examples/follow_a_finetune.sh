#!/usr/bin/env bash
# A drafter follows its target, on two cores in some 6 minutes: the embedded target is fine-tuned
# on another kind of text (LoRA, merged), its drafter is served with it and drafts less well, a
# refresh trains it on for what was served, and a swap puts the new one into the running server.
# Ends with tau before and after, over prompts that nothing was trained on. Stopped, it goes on from
# there with the same OUT; another PORT where 8000 is taken.
#   examples/follow_a_finetune.sh                                       from .venv
#   OUT=/tmp/quick STEPS=40 MINUTES=1 REQUESTS=96 examples/follow_a_finetune.sh    to see it run
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-/tmp/follow}
STEPS=${STEPS:-240}       # of the fine-tuning
REQUESTS=${REQUESTS:-320} # that are served, and recorded
MINUTES=${MINUTES:-8}     # of training, at most
PORT=${PORT:-8000}
BIN=${BIN:-$here/../.venv/bin}
drafters=$OUT/drafters
server=http://127.0.0.1:$PORT
note() { echo "[$(date +%H:%M:%S)] $*"; }

mkdir -p "$drafters"
if [ ! -f "$OUT/prompts.jsonl" ]; then
    note "fine-tuning the target, $STEPS steps"
    "$BIN/python" "$here/follow/finetune.py" --out "$OUT" --steps "$STEPS"
fi
[ -d "$drafters/first" ] || cp -r "$here/embedded_pair/dflash" "$drafters/first"
draft=$drafters/refreshed/drafter
[ -e "$draft" ] || draft=$drafters/first

note "starting the server with $draft; its log is $OUT/server.log"
# Every draft is whole: what is shown is the drafter's tau, whatever drafting pays here.
VLLM_DFLASH_RECORD=$OUT/traffic VLLM_DFLASH_RECORD_MAX_DAYS=1 VLLM_DFLASH_SWAP_FROM=$drafters \
    "$BIN/vllm" serve "$OUT/target" --host 127.0.0.1 --port "$PORT" --served-model-name followed \
    --dtype float32 --enforce-eager --max-model-len 512 --kv-cache-memory-bytes 268435456 \
    --generation-config vllm --additional-config '{"dflash": {"adaptive": false}}' \
    --speculative-config "{\"method\": \"dflash\", \"model\": \"$draft\"}" \
    --middleware vllm_dflash.training.recorder.TrafficRecorder \
    --middleware vllm_dflash.swap.endpoint.DrafterEndpoint \
    --worker-extension-cls vllm_dflash.swap.worker.DrafterSwap >"$OUT/server.log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid 2>/dev/null || true' EXIT
until curl -sf "$server/health" >/dev/null; do
    kill -0 $pid 2>/dev/null || {
        tail -n 30 "$OUT/server.log" >&2
        exit 1
    }
    sleep 1
done

"$BIN/vllm-dflash" swap --server "$server"
ask() { "$BIN/python" "$here/follow/ask.py" "$server" "$OUT/prompts.jsonl" "$@"; }
measure() { ask --first 0 --count 64 --ignore-eos; } # full answers are not recorded
if [ ! -f "$OUT/before.txt" ]; then
    measure >"$OUT/before.part"
    mv "$OUT/before.part" "$OUT/before.txt"
fi
note "serving $REQUESTS requests, which are recorded"
ask --first 64 --count "$REQUESTS"
note "a refresh: answers, tau of the old drafter, $MINUTES minutes of training, tau of the new one"
"$BIN/vllm-dflash" refresh "$here/follow/refresh.toml" --server "$server" \
    --target "$OUT/target" --draft "$draft" --dtype float32 \
    --traffic "$OUT/traffic" --out "$drafters/refreshed" --minutes "$MINUTES" \
    --held-out 48 --swap || [ $? = 3 ]
"$BIN/vllm-dflash" swap --server "$server"
echo "served before the refresh: $(cat "$OUT/before.txt")"
echo "served after it:           $(measure)"
