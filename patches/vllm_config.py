"""Engine configuration: our scheduler, which chooses how much to draft, where drafting is adaptive."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patching import Patch
from vllm_dflash.supported import SUPPORTED_VLLM


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def post_init(self: Any) -> None:
        from vllm_dflash.adaptive.settings import settle_scheduler

        original(self)
        # After vLLM's own, which decides on asynchronous scheduling.
        settle_scheduler(self)

    return post_init


PATCH = Patch(
    target="vllm.config.vllm:VllmConfig.__post_init__",
    versions=SUPPORTED_VLLM,
    fingerprints={
        "vllm.config.vllm:VllmConfig.__post_init__": "01f9a1819b757397",
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls": "ff5b69804ee85b71",
    },
    why=(
        "the scheduler has an official place, scheduler_cls, but nothing asks a plug-in what belongs there: without this every user "
        "would have to name our class, and the right one of two"
    ),
    until="vLLM lets a speculative method, or a plug-in, name its scheduler",
    replace=_replace,
)
