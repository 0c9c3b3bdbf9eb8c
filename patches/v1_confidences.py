"""V1 runner on a CPU: the drafter's confidences reach the scheduler with the drafts, as a list that
the runner hands on."""

from vllm_dflash.patch import Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

PATCH = Patch(
    target=f"{_RUNNER}._get_draft_token_ids_cpu",
    scope="ours",
    needs="optional",
    fingerprints={
        f"{_RUNNER}._get_draft_token_ids_cpu": "6edab22cb7838f88",
        f"{_RUNNER}.take_draft_token_ids": "a60223819adb8400",
    },
    why=(
        "drafts come back as the very list that the proposer made, which has the confidences with"
        " it; a copy would lose them, and adaptive drafting would cut drafts by what was accepted"
        " before alone. vLLM's record of drafts has no other place for them"
    ),
    until="vLLM's DraftTokenIds has a place for probabilities",
)
