"""The walk through candidates (``heads/candidates``) over each context: DFlash2, and DFlare with
its head."""

from dataclasses import replace

from vllm_dflash.heads.candidates import CANDIDATES
from vllm_dflash.kinds.dflare import KIND as DFLARE
from vllm_dflash.kinds.dflash import KIND as DFLASH

KINDS = (
    replace(
        DFLASH,
        name="dflash2",
        label="DFlash2",
        architecture="DFlash2DraftModel",
        speculators_architecture="DFlash2Speculator",
        head=CANDIDATES,
        # By the published name vLLM keeps such a drafter off its V1 model runner.
        served_as="DFlashCandidatesDraftModel",
    ),
    replace(
        DFLARE,
        name="dflare-candidates",
        label="DFlare with candidates",
        architecture="DFlareCandidatesDraftModel",
        format="vllm-dflash",
        speculators_architecture="DFlareCandidatesSpeculator",
        head=CANDIDATES,
    ),
)
