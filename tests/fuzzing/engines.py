"""From settings as they are drawn to the arguments of both engines. Pure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzzing.draw import MAX_MODEL_LEN, ORDINARY
from fuzzing.pairs import Pair
from lora import RANK

_OWN = ("max_loras", "reasoning", "override")
"""Of ``draw.ORDINARY`` what is no argument of vLLM's as it stands."""
_PLAIN = {
    "max_num_seqs": 32,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
}


def shared_args(pair: Pair, common: dict[str, Any], include: Sequence[str]) -> dict[str, Any]:
    """Those of both engines."""
    args = {"model": str(pair.target), "max_model_len": MAX_MODEL_LEN}
    args |= {name: value for name, value in common.items() if name not in _OWN}
    if "thinking_token_budget" in include:
        args["reasoning_config"] = {"reasoning_start_str": "def", "reasoning_end_str": "return"}
    if common["enable_lora"]:
        args |= {"max_lora_rank": RANK, "max_loras": common.get("max_loras", 1)}
    reasoning = common.get("reasoning", "none")
    if reasoning != "none":
        args["structured_outputs_config"] = common["structured_outputs_config"] | {
            "reasoning_parser": "parentheses",
            "reasoning_parser_plugin": str(Path(__file__).parent / "reasoning.py"),
            "enable_in_reasoning": reasoning == "inside",
        }
    override = common.get("override", "none")
    if override != "none":
        args["hf_overrides"] = pair.overrides[override]
    return args


def plain_args(shared: dict[str, Any]) -> dict[str, Any]:
    """Those of the engine without a drafter: each round whole and at once."""
    return shared | _PLAIN


def draft_args(
    shared: dict[str, Any], settings: dict[str, Any], drafter: Path, method: str
) -> dict[str, Any]:
    """Those of the engine with drafts. ``method``: a key of ``fuzzer.METHODS``."""
    speculative: dict[str, Any] = {"num_speculative_tokens": settings["num_speculative_tokens"]}
    if method == "ngram":
        speculative |= {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        speculative |= {
            "method": "dflash",
            "model": str(drafter),
            "draft_sample_method": settings["draft_sample_method"],
        }
    args = shared | settings["args"] | {"speculative_config": speculative}
    if shared["enable_lora"]:
        # vLLM starts no other beside a drafter.
        least = args["max_num_seqs"] * (settings["num_speculative_tokens"] + 1)
        args["max_num_batched_tokens"] = max(least, args["max_num_batched_tokens"])
    if method == "ours":
        args["additional_config"] = {"dflash": {"adaptive": settings["plan"] != "whole"}}
    return args


def kinds(common: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What is special about two engines, to be counted."""
    found = [f"plan {settings['plan']}", settings["draft_sample_method"]]
    found += [
        f"{name} {value}"
        for name, value in common.items()
        if value != ORDINARY[name] and (name != "max_loras" or common["enable_lora"])
    ]
    found.append("AsyncLLM" if settings["asynchronous"] else "LLM")
    if settings.get("own_process") and not settings["asynchronous"]:
        found.append("LLM with its core in a process of its own")
    if settings.get("resets"):
        found.append("prefix cache dropped in mid-run")
    if settings["args"]["max_num_batched_tokens"] < 64:
        found.append("fewer than 64 tokens a step")
    return found
