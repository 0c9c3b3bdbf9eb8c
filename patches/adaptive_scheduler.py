"""Adaptive drafting: our scheduler extends vLLM's, and says in vLLM's own fields how much to draft
and to verify."""

from collections.abc import Sequence
from typing import Any

from vllm_dflash.patch import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"


def plan_drafts(scheduler_output: Any, k: int) -> None:
    """K of a step, in its ``SchedulerOutput``: the model runner, and asynchronous scheduling's
    placeholders, take it from there."""
    scheduler_output.num_spec_tokens_to_schedule = k


def cut_drafts(draft_token_ids: Any, drafts: list[list[int]]) -> None:
    """What the scheduler takes in of a step's ``DraftTokenIds``, [B] lists."""
    draft_token_ids.draft_token_ids = drafts


def cut_placeholders(request: Any, tokens: Sequence[int]) -> None:
    """The places that a ``Request`` keeps for drafts that are not known yet."""
    request.spec_token_ids = tokens


PATCH = Patch(
    target=_SCHEDULER,
    scope="ours",
    needs="optional",
    fingerprints={f"{_ASYNC}._update_after_schedule": "60faeadbc775ed7c"},
    signatures={
        f"{_SCHEDULER}.__init__": "self, vllm_config, ...",
        f"{_SCHEDULER}.schedule": "self, ...",
        f"{_SCHEDULER}._update_after_schedule": "self, scheduler_output",
        f"{_SCHEDULER}.update_from_output": "self, scheduler_output, model_runner_output",
        f"{_SCHEDULER}.update_draft_token_ids": "self, draft_token_ids",
    },
    names=(
        "vllm.config.scheduler:SchedulerConfig.scheduler_cls",
        "vllm.config.scheduler:SchedulerConfig.async_scheduling",
        "vllm.config.speculative:SpeculativeConfig.num_speculative_tokens_per_batch_size",
        "vllm.v1.core.sched.output:SchedulerOutput.num_spec_tokens_to_schedule",
        "vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens",
        "vllm.v1.core.sched.output:SchedulerOutput.finished_req_ids",
        "vllm.v1.outputs:DraftTokenIds.draft_token_ids",
        "vllm.v1.outputs:DraftTokenIds.req_ids",
        "vllm.v1.request:Request.spec_token_ids",
        "vllm.v1.request:Request.num_computed_tokens",
        "vllm.v1.request:Request.num_tokens",
        "vllm.v1.request:Request.sampling_params",
        f"{_SCHEDULER}.requests",
        f"{_SCHEDULER}.num_spec_tokens",
    ),
    looked_up={
        # Set here for vLLM to read: renamed, the controller would plan for nobody.
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls": ("scheduler_cls",),
        f"{_RUNNER}.propose_draft_token_ids": ("num_spec_tokens_to_schedule",),
        f"{_SCHEDULER}.update_draft_token_ids": ("draft_token_ids",),
    },
    why=(
        "a step's drafts are chosen where requests are scheduled; scheduler_cls is vLLM's own place"
        " for such a class"
    ),
    until="never: vLLM asks for it",
)
