"""One vLLM engine with the drafter, over the doctor's prompts; started by ``pair_runs.run_engine``.

pytest tests/engine/test_doctor.py
"""

from typing import Any

from vllm_dflash.adaptive.settings import SECTION
from vllm_dflash.engines.child import Parent, Work, generate, serve, start_llm
from vllm_dflash.formats import METHOD

_BATCH = 8


def begin(pair: dict[str, Any]) -> tuple[Work, None]:
    """Starts the engine for a ``Pair``, as its fields; its one job is all prompts."""
    speculative = {
        "method": METHOD,
        "model": pair["draft"],
        "num_speculative_tokens": pair["num_speculative_tokens"],
    }
    llm = start_llm(
        {
            "model": pair["target"],
            "skip_tokenizer_init": True,
            "dtype": pair["dtype"],
            "max_model_len": pair["max_model_len"],
            "max_num_seqs": _BATCH,
            "enforce_eager": True,
            "disable_log_stats": False,
            "generation_config": "vllm",
            "seed": 0,
            "speculative_config": speculative,
            # Whole drafts, as the reference loop has them: tau of drafts that are verified in part
            # is another figure.
            "additional_config": {SECTION: {"adaptive": False}},
        }
    )

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

    return run, None


if __name__ == "__main__":
    serve(begin)
