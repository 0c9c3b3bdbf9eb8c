"""DFlash (arXiv 2602.06036): one context vector a token, ``hidden_norm(fc(features))``.

Each draft layer projects it with the weights of its own keys and values. The modules are in
``context.py``. With another head than argmax it was published under names of their own.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dflash.heads.candidates import CANDIDATES
from vllm_dflash.heads.lattice import LATTICE
from vllm_dflash.heads.markov import MARKOV
from vllm_dflash.kinds import Context, Kind, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this context has."""
    hidden = config.hidden_size
    return {"fc.weight": (hidden, config.num_features * hidden), "hidden_norm.weight": (hidden,)}


CONTEXT = Context(
    modules=f"{__name__}.context",
    own_tensors=own_tensors,
    width=lambda config: config.hidden_size,
    over_context=("fc.weight", "k_proj.weight", "v_proj.weight"),
    own_projections={},
)

KIND = Kind(
    name="dflash",
    label="DFlash",
    sentence="one context vector a token for all draft layers",
    architecture="DFlashDraftModel",
    format="z-lab",
    speculators_architecture="DFlashSpeculator",
    context=CONTEXT,
    layers=lambda target_layers: min(5, target_layers // 2 - 1),
    features=lambda layers, target_layers: layers,
    is_known_to_vllm=True,
)

DFLASH2 = replace(
    KIND,
    name="dflash2",
    label="DFlash2",
    architecture="DFlash2DraftModel",
    speculators_architecture="DFlash2Speculator",
    head=CANDIDATES,
    convolves=True,
    # By the published name vLLM keeps such a drafter off its V1 model runner.
    served_as="DFlashCandidatesDraftModel",
)

DSPARK = replace(
    KIND,
    name="dspark",
    label="DSpark",
    architecture="Qwen3DSparkModel",
    format="deepseek",
    speculators_architecture="DSparkSpeculator",
    head=MARKOV,
    first_row=0,
    is_flat=True,
    # By the published name vLLM runs its own, under a method of its own.
    own_method="dspark",
    served_as="DFlashQwen3DSparkModel",
)

LILICORR = replace(
    KIND,
    name="lilicorr",
    label="LiLiCorr",
    architecture="LiLiCorrDraftModel",
    speculators_architecture="LiLiCorrSpeculator",
    head=LATTICE,
    convolves=True,
    is_known_to_vllm=False,
    # By the published name vLLM keeps such a drafter off its V1 model runner.
    served_as="DFlashLiLiCorrDraftModel",
)

KINDS = (KIND, DFLASH2, DSPARK, LILICORR)
