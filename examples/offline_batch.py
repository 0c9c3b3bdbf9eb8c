r"""Offline batch: decodes a file of prompts with the ``LLM`` class and a DFlash drafter, and prints
what was accepted.

The second command needs a GPU.

    .venv/bin/python examples/offline_batch.py
    python examples/offline_batch.py --target Qwen/Qwen3-8B --drafter z-lab/Qwen3-8B-DFlash-b16 \
        -k 15 prompts.jsonl
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams

PAIR = Path(__file__).resolve().parent / "embedded_pair"


def main() -> None:
    """Reads ``{"prompt": ...}`` lines, writes the continuations and the mean acceptance length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prompts",
        nargs="?",
        type=Path,
        default=PAIR / "prompts.jsonl",
        help="a file with one {'prompt': ...} a line",
    )
    parser.add_argument("--target", default=str(PAIR / "target"))
    parser.add_argument("--drafter", default=str(PAIR / "dflash"))
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=8, help="how many of the prompts")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.5,
        help="share of the GPU's memory, or on a CPU of the machine's, for vLLM",
    )
    arguments = parser.parse_args()
    prompts = [
        json.loads(line)["prompt"] for line in arguments.prompts.read_text().strip().split("\n")
    ][: arguments.limit]
    speculative = {
        "method": "dflash",
        "model": arguments.drafter,
        "num_speculative_tokens": arguments.num_speculative_tokens,
    }
    llm = LLM(
        arguments.target,
        speculative_config=speculative,
        gpu_memory_utilization=arguments.memory,
        disable_log_stats=False,
    )
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    )
    for output in outputs:
        print(f"--- prompt\n{output.prompt}\n--- continuation\n{output.outputs[0].text}")
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    drafts, accepted = (
        counts["vllm:spec_decode_num_drafts"],
        counts["vllm:spec_decode_num_accepted_tokens"],
    )
    print(
        f"mean acceptance length {1 + accepted / drafts:.2f} tokens a target step, over {drafts}"
        " steps"
    )


if __name__ == "__main__":
    main()
