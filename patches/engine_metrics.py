"""Engine core: our recorder watches the scheduler of an engine that has one of our drafters."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_dflash.metrics.engine import attach

        original(self, *args, **kwargs)
        attach(self)

    return init


PATCH = Patch(
    target="vllm.v1.engine.core:EngineCore.__init__",
    versions=SUPPORTED_VLLM,
    fingerprints={
        "vllm.v1.engine.core:EngineCore.__init__": "7194526c41548dcc",
        "vllm.v1.engine.core:EngineCore.step": "f877e9d6a4de1ca4",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "d285784b0bfeee09",
    },
    why=(
        "lengths, steps without drafts and their times are seen in the engine's process only; the hook for metrics, a stat logger, runs in "
        "the API server, gets none of them, and is not asked by an offline LLM. An engine without our drafters is left as it is"
    ),
    until="vLLM lets a plug-in observe steps in the engine's process",
    replace=_replace,
)
