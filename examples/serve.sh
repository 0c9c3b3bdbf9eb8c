#!/usr/bin/env bash
# Serves a target with a DFlash drafter, asks it for one completion, shows what was accepted,
# and stops it.
#   examples/serve.sh                                  the embedded pair, from .venv
#   TARGET=Qwen/Qwen3-8B DRAFTER=z-lab/Qwen3-8B-DFlash-b16 K=15 VLLM=vllm examples/serve.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
TARGET=${TARGET:-$here/embedded_pair/target}
DRAFTER=${DRAFTER:-$here/embedded_pair/dflash}
K=${K:-7}
PORT=${PORT:-8000}
MEMORY=${MEMORY:-0.5} # share of the GPU's memory, or on a CPU of the machine's
VLLM=${VLLM:-$here/../.venv/bin/vllm}

"$VLLM" serve "$TARGET" --port "$PORT" --served-model-name pair --gpu-memory-utilization "$MEMORY" \
    --speculative-config \
    "{\"method\": \"dflash\", \"model\": \"$DRAFTER\", \"num_speculative_tokens\": $K}" &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT

until curl -sf "http://localhost:$PORT/health" >/dev/null; do
    kill -0 $server 2>/dev/null || {
        echo "the server has stopped: its last lines say why" >&2
        exit 1
    }
    sleep 1
done
curl -s "http://localhost:$PORT/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "pair", "prompt": "def read_json(path):\n", "max_tokens": 96, "temperature": 0}'
echo
curl -s "http://localhost:$PORT/metrics" | grep '^vllm:spec_decode.*_total'
