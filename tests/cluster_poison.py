"""A scheduler whose engine ends when a certain prompt comes: what a request that kills an engine
looks like, on demand."""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from cluster_workers import POISON


class PoisonedScheduler(Scheduler):
    """vLLM's own, but for one prompt."""

    def add_request(self, request: Any) -> None:
        if request.prompt_token_ids == POISON:
            raise RuntimeError("poisoned, as the test asks")
        super().add_request(request)
