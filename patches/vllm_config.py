"""Engine configuration: our scheduler, which chooses how much to draft, where drafting is adaptive."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_dflash.patch import Patch


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
    signatures={
        "vllm.config.vllm:VllmConfig.__post_init__": "self",
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls": "self",
    },
    why=(
        "the scheduler has an official place, scheduler_cls, but nothing asks a plug-in what belongs there: without this every user "
        "would have to name our class, and the right one of two"
    ),
    until="vLLM lets a speculative method, or a plug-in, name its scheduler",
    replace=_replace,
)
