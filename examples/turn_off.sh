#!/usr/bin/env bash
# Three ways a vLLM environment can look with this package installed; each line shows what
# vLLM's processes would do.
#   examples/turn_off.sh
set -euo pipefail
STATUS=${STATUS:-$(cd "$(dirname "$0")" && pwd)/../.venv/bin/vllm-dflash}

show() { "$STATUS" status | grep '^plug-in' || true; }

echo "as installed:"
show
echo "VLLM_DFLASH=0 (method dflash is vLLM's own):"
VLLM_DFLASH=0 show
echo "VLLM_PLUGINS='' (vLLM loads no plug-in at all):"
VLLM_PLUGINS='' show
# The same variables in front of `vllm serve` or of a script that uses LLM do it for that run.
