"""Engine configuration: our scheduler, which chooses how much to draft, where drafting is adaptive,
room for drafts, and advice for a CPU."""

from typing import Any

from vllm_dflash.patches import adaptive_scheduler, scheduler_steps
from vllm_dflash.patches.guard import afterwards

from vllm_dflash.patch import Patch


def _post_init(vllm_config: Any) -> None:
    """After vLLM's own, which decides on asynchronous scheduling."""
    from vllm_dflash.checks import advise_eager, check_room
    from vllm_dflash.plugin import patch_set

    check_room(vllm_config)
    patch_set().attempt(ADVICE, lambda: advise_eager(vllm_config))
    if all(
        patch_set().fits(patch) for patch in (adaptive_scheduler.PATCH, *scheduler_steps.PATCHES)
    ):
        choose_scheduler(vllm_config)


def choose_scheduler(vllm_config: Any) -> None:
    """Puts our scheduler into vLLM's ``VllmConfig`` where drafting is to be adaptive; does nothing
    where that was done before.

    Raises:
        SettingsError: as ``scheduler_for``.
    """
    from vllm_dflash.adaptive.settings import scheduler_for

    ours = scheduler_for(vllm_config)
    if ours is not None:
        vllm_config.scheduler_config.scheduler_cls = ours


_CONFIG = "vllm.config.vllm:VllmConfig"

PATCH = Patch(
    target="vllm.config.vllm:VllmConfig.__post_init__",
    signatures={
        "vllm.config.vllm:VllmConfig.__post_init__": "self",
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls": "self",
    },
    why=(
        "the scheduler has an official place, scheduler_cls, but nothing asks a plug-in what"
        " belongs there: without this every user would have to name our class, and the right one of"
        " two. Whether vLLM compiles, of which it is advised against on a CPU, is known there"
    ),
    until="vLLM lets a speculative method, or a plug-in, name its scheduler",
    names=(
        f"{_CONFIG}.speculative_config",
        f"{_CONFIG}.additional_config",
        "vllm.config.scheduler:SchedulerConfig.max_num_batched_tokens",
        "vllm.config.scheduler:SchedulerConfig.max_num_scheduled_tokens",
        "vllm.config.speculative:SpeculativeConfig.max_num_new_slots_for_drafting",
    ),
    replace=afterwards(_post_init, "speculative_config"),
)
ADVICE = Patch(
    target="vllm.config:CompilationMode",
    scope="ours",
    needs="optional",
    names=("vllm.config.compilation:CompilationConfig.mode",),
    why=(
        "our drafter serves better without compilation on a CPU, and vLLM compiles where nobody"
        " says otherwise; nothing but a line of advice hangs on it"
    ),
    until="vLLM's CPU build records what it runs, as CUDA graphs do",
)
PATCHES = (PATCH, ADVICE)
