"""DFlare (arXiv 2606.02091): a context vector for each draft layer, and projections for the
context.

Layer d's context is ``hidden_norm(sum_t softmax(F)[d, t] h_t)``, with a learned F
(``layer_fusion_weights``, D x T); its keys and values come from ``k_proj_target`` and
``v_proj_target``. The modules are in ``context.py``.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dflash.heads.candidates import CANDIDATES
from vllm_dflash.heads.lattice import LATTICE
from vllm_dflash.heads.markov import MARKOV
from vllm_dflash.kinds import OURS, Context, Kind, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

SHARES = "layer_fusion_weights"
_PROJECTIONS = {"k_proj_target": "k_proj", "v_proj_target": "v_proj"}


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this context has."""
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    tensors: Tensors = {SHARES: (config.num_hidden_layers, config.num_features)}
    tensors["hidden_norm.weight"] = (hidden,)
    for i in range(config.num_hidden_layers):
        for name in _PROJECTIONS:
            tensors[f"layers.{i}.self_attn.{name}.weight"] = (kv_size, hidden)
            if config.attention_bias:
                tensors[f"layers.{i}.self_attn.{name}.bias"] = (kv_size,)
    return tensors


CONTEXT = Context(
    modules=f"{__name__}.context",
    own_tensors=own_tensors,
    width=lambda config: config.num_hidden_layers * config.hidden_size,
    over_context=tuple(_PROJECTIONS),
    own_projections=_PROJECTIONS,
    shares=SHARES,
)

KIND = Kind(
    name="dflare",
    label="DFlare",
    sentence="a context vector a token for each draft layer",
    architecture="QwenDFlareDraftModel",
    format="AngelSlim",
    speculators_architecture="DFlareSpeculator",
    context=CONTEXT,
    layers=lambda target_layers: min(7, target_layers // 2),
    # A quarter of the target's layers (9 of 36), but two more than the draft's.
    features=lambda layers, target_layers: max(layers + 2, round(target_layers / 4)),
    exported_as="DFlashDraftModel",
    also_named=("DFlareQwen3Model",),
)

CANDIDATES_OVER_DFLARE = replace(
    KIND,
    name="dflare-candidates",
    label="DFlare with candidates",
    architecture="DFlareCandidatesDraftModel",
    format=OURS,
    speculators_architecture="DFlareCandidatesSpeculator",
    head=CANDIDATES,
    convolves=True,
)

MARKOV_OVER_DFLARE = replace(
    KIND,
    name="dflare-markov",
    label="DFlare with a Markov head",
    architecture="DFlareMarkovDraftModel",
    format=OURS,
    speculators_architecture="DFlareMarkovSpeculator",
    head=MARKOV,
    first_row=0,
)

LATTICE_OVER_DFLARE = replace(
    KIND,
    name="dflare-lattice",
    label="DFlare with LiLiCorr's lattice",
    architecture="DFlareLatticeDraftModel",
    format=OURS,
    speculators_architecture="DFlareLatticeSpeculator",
    head=LATTICE,
    convolves=True,
)

KINDS = (KIND, CANDIDATES_OVER_DFLARE, MARKOV_OVER_DFLARE, LATTICE_OVER_DFLARE)
