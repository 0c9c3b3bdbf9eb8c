"""One vLLM engine with the drafter, over the doctor's prompts; started by ``pair_runs.run_engine``.

python -m vllm_dflash.tools.engine_run JOB REPORT      JOB is JSON, REPORT the file to write
"""

import json
import sys
from pathlib import Path
from typing import Any

_BATCH = 8
_CPU_CACHE_BYTES = 1 << 30


def main(job: dict[str, Any], report: Path) -> None:
    """Generates, prints ``done N`` after every N prompts, and writes tokens and vLLM's own counters."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    speculative = {"method": "dflash", "model": job["draft"], "num_speculative_tokens": job["num_speculative_tokens"]}
    # Without it, the CPU's cache takes a share of the machine's memory, which other work may need.
    cache = {"kv_cache_memory_bytes": _CPU_CACHE_BYTES} if current_platform.is_cpu() else {}
    llm = LLM(
        job["target"], skip_tokenizer_init=True, dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=_BATCH,
        enforce_eager=True, disable_log_stats=False, generation_config="vllm", seed=0, speculative_config=speculative,
        # Whole drafts, as the reference loop has them: tau of drafts that are verified in part is another figure.
        additional_config={"dflash": {"adaptive": False}}, **cache,
    )  # fmt: skip
    eos = job["eos_token_id"]
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, stop_token_ids=None if eos is None else [eos], detokenize=False
    )
    tokens = []
    for at in range(0, len(job["prompts"]), _BATCH):
        batch = [{"prompt_token_ids": ids} for ids in job["prompts"][at : at + _BATCH]]
        tokens += [list(output.outputs[0].token_ids) for output in llm.generate(batch, params, use_tqdm=False)]
        print(f"done {len(batch)}", flush=True)
    values = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    result = {
        "tokens": tokens,
        "drafts": int(getattr(values.get("drafts"), "value", 0)),
        "per_position": [int(v) for v in getattr(values.get("accepted_tokens_per_pos"), "values", [])],
    }
    report.write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
