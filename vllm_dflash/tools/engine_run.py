"""One vLLM engine with the drafter, over the doctor's prompts; started by ``pair_runs.run_engine``.
Where it is asked to, it measures what its steps cost, at warm-up, as an engine that serves.

pytest tests/engine/test_doctor.py
"""

from dataclasses import asdict
from typing import Any

from vllm_dflash.adaptive.settings import SECTION
from vllm_dflash.cost_profile import GUESS
from vllm_dflash.engines.child import CPU_CACHE_BYTES, Parent, Work, generate, serve, start_llm
from vllm_dflash.formats import METHOD
from vllm_dflash.tools.break_even import BreakEven, break_even

_BATCH = 8
_MOST_ON_CPU, _MOST_ELSEWHERE = 64, 256
"""Requests at a time for which costs are measured and shown."""


def begin(pair: dict[str, Any]) -> tuple[Work, dict[str, Any] | None]:
    """Starts the engine for a ``Pair``, as its fields; its one job is all prompts. It is ready with
    a ``BreakEven``, as its fields, or None where steps were not measured."""
    speculative = {
        "method": METHOD,
        "model": pair["draft"],
        "num_speculative_tokens": pair["num_speculative_tokens"],
    }
    costs = pair["costs"]
    llm = start_llm(
        {
            "model": pair["target"],
            "skip_tokenizer_init": True,
            "dtype": pair["dtype"],
            "disable_log_stats": False,
            "generation_config": "vllm",
            "seed": 0,
            "speculative_config": speculative,
            # Steps are measured for the controller. It is stopped below.
            "additional_config": {SECTION: {"adaptive": costs is not None}},
            **(_limits(costs, pair["max_model_len"]) if costs else _least(pair["max_model_len"])),
        }
    )
    measured = _measured(llm, costs["positions"]) if costs else None

    def run(job: dict[str, Any], parent: Parent) -> dict[str, Any]:
        """Tokens of each of the job's ``prompts``, and vLLM's own counters."""
        from vllm import SamplingParams

        eos = pair["eos_token_id"]
        params = SamplingParams(
            temperature=0,
            max_tokens=pair["max_tokens"],
            ignore_eos=True,
            stop_token_ids=None if eos is None else [eos],
            detokenize=False,
        )
        parts = [job["prompts"][at : at + _BATCH] for at in range(0, len(job["prompts"]), _BATCH)]
        tokens = [
            list(output.outputs[0].token_ids)
            for part in parts
            for output in generate(llm, part, params, parent)
        ]
        values = {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric
            for metric in llm.get_metrics()
        }
        return {
            "tokens": tokens,
            "drafts": int(getattr(values.get("drafts"), "value", 0)),
            "per_position": [
                int(v) for v in getattr(values.get("accepted_tokens_per_pos"), "values", [])
            ],
        }

    return run, None if measured is None else asdict(measured)


def _least(needed: int) -> dict[str, Any]:
    """Of an engine that is asked for its text alone."""
    return {"max_model_len": needed, "max_num_seqs": _BATCH, "enforce_eager": True}


def _limits(costs: dict[str, Any], needed: int) -> dict[str, Any]:
    """Of one whose steps are measured: as it will be served, and contexts as long as its cache
    holds. On a CPU that is half of it, and the rest is for the drafter's."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {"max_model_len": costs["max_model_len"] or -1, "max_num_seqs": _MOST_ELSEWHERE}
    fitting = max(needed, CPU_CACHE_BYTES // 2 // costs["position_bytes"])
    return {"max_model_len": min(costs["positions"], fitting), "max_num_seqs": _MOST_ON_CPU}


def _measured(llm: Any, positions: int) -> BreakEven | None:
    """What the engine measured at its warm-up. From here on drafts are whole, as the reference
    loop's: tau of drafts that are verified in part is another figure."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.draft_whole()
    controller, most = scheduler.controller, scheduler.max_num_running_reqs
    if controller.profile is GUESS:
        return None
    k, block = controller.max_draft, controller.block_size
    return break_even(controller.profile, k, block, most, positions)


if __name__ == "__main__":
    serve(begin)
