"""DFly (Tencent/AngelSpec; no paper yet): DFlash's context vector, and each draft layer's own
mixture of target layers added to it.

Layer d's context is ``hidden_norm(fc(h) + sum_t softmax(F)[d, t] h_t)``, with DFlare's F
(``layer_fusion_weights``, D x T); its keys and values come from the weights of the block's own. The
modules are in ``context.py``.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dflash.heads.candidates import CANDIDATES
from vllm_dflash.heads.correction import CORRECTION
from vllm_dflash.heads.lattice import LATTICE
from vllm_dflash.heads.markov import MARKOV
from vllm_dflash.kinds import ARGMAX, OURS, Context, Kind, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

SHARES = "layer_fusion_weights"


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this context has."""
    hidden = config.hidden_size
    return {
        "fc.weight": (hidden, config.num_features * hidden),
        SHARES: (config.num_hidden_layers, config.num_features),
        "hidden_norm.weight": (hidden,),
    }


CONTEXT = Context(
    modules=f"{__name__}.context",
    own_tensors=own_tensors,
    width=lambda config: config.num_hidden_layers * config.hidden_size,
    over_context=("fc.weight", "k_proj.weight", "v_proj.weight"),
    own_projections={},
    shares=SHARES,
)

KIND = Kind(
    name="dfly",
    label="DFly",
    sentence="one context vector a token, and each draft layer's own mixture added",
    architecture="Qwen3DFlyModel",
    format="AngelSpec",
    speculators_architecture="DFlySpeculator",
    context=CONTEXT,
    layers=lambda target_layers: min(5, target_layers // 2),
    features=lambda layers, target_layers: layers,
    head=CORRECTION,
    is_flat=True,
)

ARGMAX_OVER_DFLY = replace(
    KIND,
    name="dfly-argmax",
    label="DFly without a head",
    architecture="DFlyArgmaxDraftModel",
    format=OURS,
    speculators_architecture="DFlyArgmaxSpeculator",
    head=ARGMAX,
    is_flat=False,
)

CANDIDATES_OVER_DFLY = replace(
    ARGMAX_OVER_DFLY,
    name="dfly-candidates",
    label="DFly with candidates",
    architecture="DFlyCandidatesDraftModel",
    speculators_architecture="DFlyCandidatesSpeculator",
    head=CANDIDATES,
    convolves=True,
)

MARKOV_OVER_DFLY = replace(
    ARGMAX_OVER_DFLY,
    name="dfly-markov",
    label="DFly with a Markov head",
    architecture="DFlyMarkovDraftModel",
    speculators_architecture="DFlyMarkovSpeculator",
    head=MARKOV,
    first_row=0,
)

LATTICE_OVER_DFLY = replace(
    CANDIDATES_OVER_DFLY,
    name="dfly-lattice",
    label="DFly with LiLiCorr's lattice",
    architecture="DFlyLatticeDraftModel",
    speculators_architecture="DFlyLatticeSpeculator",
    head=LATTICE,
)

KINDS = (KIND, ARGMAX_OVER_DFLY, CANDIDATES_OVER_DFLY, MARKOV_OVER_DFLY, LATTICE_OVER_DFLY)
