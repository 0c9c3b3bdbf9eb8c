"""The calls that a worker in a process of its own carries out: whether anybody else's code can have
reached its loaded model.

vLLM's engine core calls such a worker by name, one call after the other, and nothing else runs
there. Its own calls, named below, leave the target's modules as they are. Any other, such as
``collective_rpc`` with a function of the caller's, and with it ``LLM.apply_model``, may change a
module at once, or start a thread that does so later. From the first of them on, nothing is taken
for granted any more. In the caller's own process nothing ever is: it is the caller's to touch at
any time. Imports no vLLM; one record a process.

    pytest tests/unit/test_worker_calls.py tests/engine/test_apply_model.py
"""

import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.replaced import replaced_by

_STEP = "execute_model"
_LEAVE_THE_MODEL = frozenset(
    {
        # Before the first step.
        "get_kv_cache_spec",
        "get_supported_kv_cache_layouts",
        "set_kv_cache_layout",
        "determine_available_memory",
        "initialize_from_config",
        "compile_or_warm_up_model",
        "update_max_model_len",
        "supports_draft_weight_updates",
        "get_supported_tasks",
        # While it serves.
        _STEP,
        "sample_tokens",
        "take_draft_token_ids",
        "check_health",
        "synchronize_device",
        "reset_mm_cache",
        "reset_encoder_cache",
        # Ours, which changes the drafter alone (``swap.worker``).
        "dflash_drafter",
    }
)
"""vLLM's own methods of a worker, and ours, called without anything of its user's to run."""
_OWN = frozenset({"vllm", __name__.partition(".")[0]})


class WorkerCalls:
    """Of this process."""

    def __init__(self) -> None:
        self._none_other: bool | None = None

    @property
    def none_other(self) -> bool:
        """Whether no code but vLLM's and ours can have reached the model since its first step."""
        return self._none_other is True

    def begin(self, method: object, runs_vllms_own: Callable[[], bool]) -> None:
        """A call of the engine core's has come, and is not carried out yet.

        Args:
            method: its name; anything else is a function that came with it.
            runs_vllms_own: ``runs_vllms_own`` of the worker's process, asked at the first step.
        """
        if method not in _LEAVE_THE_MODEL:
            self._none_other = False
        elif method == _STEP and self._none_other is None:
            self._none_other = runs_vllms_own()


def runs_vllms_own(process: Any) -> bool:
    """Whether a vLLM ``WorkerProc`` holds no code but vLLM's and ours that could reach the model in
    a step: no other plug-in, no other worker, no method of either replaced, and no connector, which
    may be the user's own and has threads."""
    worker, config = process.worker.worker, process.worker.vllm_config
    owners = (process, process.worker, worker, worker.model_runner)
    classes = {each for owner in owners for each in type(owner).__mro__}
    return (
        type(process).__qualname__ == "WorkerProc"
        and config.kv_transfer_config is None
        and config.ec_transfer_config is None
        and all(map(_is_vllms_own, classes))
        and not any(other_plug_ins())
    )


def _is_vllms_own(owner: type) -> bool:
    """Whether a class, with each of its methods, is vLLM's, or of Python's own library."""
    root = owner.__module__.partition(".")[0]
    return root in sys.stdlib_module_names or (
        root in _OWN and replaced_by(f"{owner.__module__}:{owner.__qualname__}") is None
    )


def other_plug_ins() -> list[str]:
    """Of those that vLLM loads into each of its processes, neither its own nor this one; and kinds
    of drafter of other packages."""
    allowed = os.environ.get("VLLM_PLUGINS")
    points = [*entry_points(group="vllm.general_plugins"), *entry_points(group=kinds.GROUP)]
    return [
        point.name
        for point in points
        if (allowed is None or point.name in allowed.split(",") or point.group == kinds.GROUP)
        and point.module.partition(".")[0] not in _OWN
    ]


CALLS = WorkerCalls()
