"""V2 runner: an engine's steps are measured when all that vLLM warms up is warm."""

from collections.abc import Callable
from typing import Any

from vllm_dflash.patches.guard import afterwards, instead, part_of_ours

from vllm_dflash.log import logger
from vllm_dflash.patch import Patch


def _measure(worker: Any) -> None:
    from vllm_dflash.adaptive.settings import is_adaptive

    if not (worker.use_v2_model_runner and is_adaptive(worker.vllm_config)):
        return
    try:
        part_of_ours("vllm_dflash.drafting.measure_v2", "measure")(worker)
    except Exception as error:  # what chooses must not end what serves
        logger.warning("the cost of steps is not measured, and a guess stands for it: %s", error)


def _before_it_is_watched(original: Callable[[Any], None], worker: Any) -> None:
    """From then on vLLM takes a kernel that is compiled for a request's."""
    _measure(worker)
    original(worker)


_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_WARM_UP = "vllm.v1.worker.gpu.warmup"
_OUTPUT = "vllm.v1.core.sched.output"
_READ_OF_RUNNER = (
    "device kv_cache_config kv_caches kv_connector max_model_len max_num_reqs max_num_tokens"
    " model_config speculator"
)
_GIVEN = {
    "NewRequestData": (
        "block_ids lora_request mm_features num_computed_tokens pooling_params prefill_token_ids"
        " prompt_token_ids req_id sampling_params"
    ),
    "CachedRequestData": "new_block_ids num_computed_tokens num_output_tokens req_ids",
    "SchedulerOutput": (
        "finished_req_ids num_scheduled_tokens num_spec_tokens_to_schedule scheduled_cached_reqs"
        " scheduled_new_reqs scheduled_spec_decode_tokens total_num_scheduled_tokens"
    ),
}
_SIGNATURES = {
    f"{_WORKER}.execute_model": "self, scheduler_output",
    f"{_WORKER}.sample_tokens": "self, grammar_output",
    f"{_WARM_UP}:_warmup_block_counter": "model_runner",
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": "self",
    f"{_OUTPUT}:CachedRequestData.make_empty": "cls",
    f"{_OUTPUT}:SchedulerOutput.make_empty": "cls",
}
_NAMES = (
    f"{_WORKER}.use_v2_model_runner",
    "vllm.v1.worker.worker_base:WorkerBase.rank",
    "vllm.v1.worker.worker_base:WorkerBase.vllm_config",
    *(f"{_RUNNER}.{name}" for name in _READ_OF_RUNNER.split()),
    *(f"{_OUTPUT}:{cls}.{name}" for cls, names in _GIVEN.items() for name in names.split()),
    "vllm.v1.kv_cache_interface:KVCacheConfig.num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheConfig.kv_cache_groups",
    "vllm.v1.worker.gpu.kv_connector:KVConnector.set_disabled",
)
_WHY = (
    "what a step costs by its rows and contexts decides how much is drafted, and is measured where"
    " no request waits; vLLM has no hook for a plug-in at an engine's warm-up"
)
_UNTIL = "vLLM lets a plug-in run at warm-up"

PATCHES = (
    Patch(
        target=f"{_WORKER}._maybe_activate_jit_monitor",
        needs="optional",
        signatures={f"{_WORKER}._maybe_activate_jit_monitor": "self", **_SIGNATURES},
        names=_NAMES,
        # The last that warm-up does, after CUDA graphs.
        looked_up={_WORKER: ("_maybe_activate_jit_monitor", "capture_model")},
        why=_WHY,
        until=_UNTIL,
        replace=instead(_before_it_is_watched),
    ),
    Patch(
        target=f"{_CPU_WORKER}.compile_or_warm_up_model",
        needs="optional",
        signatures={f"{_CPU_WORKER}.compile_or_warm_up_model": "self", **_SIGNATURES},
        names=_NAMES,
        why=f"{_WHY}. A CPU's worker has a warm-up of its own",
        until=_UNTIL,
        replace=afterwards(_measure),
    ),
)
