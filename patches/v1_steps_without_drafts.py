"""V1 runner on a CPU: a step that neither drafts nor verified drafts keeps its features, no
more."""

from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Any, proposer: Any) -> Any:
    return proposer.unless_off(original)


_METHOD = "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids"

PATCH = Patch(
    target=_METHOD,
    scope="instance",
    needs="optional",
    fingerprints={_METHOD: {"0.32": "7ba460b9ef2e677b", "0.33": "c0780fef30e00bac"}},
    why=(
        "before it calls the proposer, the runner makes what only a draft needs, in each step;"
        " where the controller drafts nothing for a while that is the larger part of what a drafter"
        " costs. Nothing asks the proposer before"
    ),
    until="vLLM asks the proposer first whether it will draft",
    replace=_replace,
)
