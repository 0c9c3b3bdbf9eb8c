"""A worker in a process of its own: each call that it carries out is seen before it runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_dflash.patches.guard import instead

from vllm_dflash.patch import Patch
from vllm_dflash.worker_calls import CALLS, runs_vllms_own

_PROCESS = "vllm.v1.executor.multiproc_executor:WorkerProc"
_WRAPPER = "vllm.v1.worker.worker_base:WorkerWrapperBase"


def _execute_worker_rpc(original: Callable[..., Any], self: Any, rpc_request: Any) -> Any:
    method, *_ = rpc_request
    CALLS.begin(method, partial(runs_vllms_own, self))
    return original(self, rpc_request)


PATCH = Patch(
    target=f"{_PROCESS}._execute_worker_rpc",
    needs="optional",
    fingerprints={
        f"{_PROCESS}._execute_worker_rpc": {"0.32": "718f55dccafe4e06", "0.33": "7e63220394be58fb"},
        f"{_PROCESS}.worker_busy_loop": {"0.32": "2a9a02ca399e1271", "0.33": "2727349d193b4bfd"},
    },
    names=(
        f"{_PROCESS}.worker",
        f"{_WRAPPER}.worker",
        f"{_WRAPPER}.vllm_config",
        "vllm.v1.worker.cpu_worker:CPUWorker.model_runner",
        "vllm.config.vllm:VllmConfig.kv_transfer_config",
        "vllm.config.vllm:VllmConfig.ec_transfer_config",
    ),
    why=(
        "whether a call from outside can have reached the target's modules; where none has, not"
        " every forward need look at each of them, some 90 us of a small model's. No hook is asked"
        " when a call arrives"
    ),
    until="vLLM says when a call from outside has run in a worker",
    replace=instead(_execute_worker_rpc, "worker.vllm_config.speculative_config"),
)
