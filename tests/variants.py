"""Every kind and shape of drafter that is served, as random checkpoints for
``make_random_target``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairs import make_random_drafter, random_drafter_config
from vllm_dflash import kinds

_ALL_LAYERS = {"target_layer_ids": (0, 1, 2, 3, 4)}
_FEW = {"selector_rank": 12, "selector_top_k": 5}
# Few candidates: where two are a rounding apart, another order of theirs changes all edges.
_LATTICE = {
    "lilicorr_candidate_topk": 4,
    "lilicorr_hidden_size": 48,
    "lilicorr_factor_dim": 24,
    "lilicorr_mlp_ratio": 1.5,
}
_CONVOLUTION = {"conv_kernel_size": 2, "conv_group_size": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Variant:
    """What differs from ``random_drafter_config()`` and from its kind's published format."""

    changes: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    tables: tuple[str, ...] = ()
    mask_embedding: bool = False

    @property
    def tokens(self) -> int:
        """The most tokens that it drafts."""
        return random_drafter_config(**self.changes).max_speculative_tokens

    def make(self, folder: Path) -> Path:
        return make_random_drafter(
            folder,
            config=random_drafter_config(**self.changes),
            format=self.format,
            tables=self.tables,
            mask_embedding=self.mask_embedding,
        )


VARIANTS = {
    "dflash": Variant(),
    "dflash one layer": Variant({"num_hidden_layers": 1, "target_layer_ids": (3,)}),
    "dflash speculators": Variant(format="speculators"),
    "dflash draft vocabulary": Variant({"draft_vocab_size": 200}, format="speculators"),
    "dflash own tables": Variant(
        format="speculators", tables=("embed_tokens.weight", "lm_head.weight")
    ),
    "dflash mask embedding": Variant(mask_embedding=True),
    "dflash biases": Variant({"attention_bias": True}),
    "dflash yarn": Variant({"rope_scaling": _YARN}),
    "dflash llama3 rope": Variant({"rope_scaling": _LLAMA3}),
    "dflash linear rope": Variant({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dflash sliding": Variant({"sliding_windows": (24, 24, 24)}),
    "dflash sliding causal": Variant({"sliding_windows": (24, 24, 24), "sliding_causal": True}),
    "dflash mixed": Variant({"sliding_windows": (24, None, 24)}),
    "dflash mixed causal": Variant({"sliding_windows": (24, None, 24), "sliding_causal": True}),
    "dflash2": Variant({"kind": "dflash2", "head": {"selector_rank": 24, "selector_top_k": 16}}),
    "dflash2 convolution": Variant({"kind": "dflash2", "head": _FEW, **_CONVOLUTION}),
    "dflash2 speculators": Variant(
        {"kind": "dflash2", "head": _FEW, **_CONVOLUTION}, format="speculators"
    ),
    "dspark": Variant({"kind": "dspark", "block_size": 7, "head": {"markov_rank": 24}}),
    "dspark without confidence": Variant(
        {"kind": "dspark", "head": {"markov_rank": 12, "enable_confidence_head": False}},
        format="speculators",
    ),
    "lilicorr": Variant({"kind": "lilicorr", "head": _LATTICE}),
    "lilicorr convolution": Variant(
        {
            "kind": "lilicorr",
            "head": _LATTICE | {"lilicorr_hidden_size": 0, "lilicorr_candidate_topk": 2},
            **_CONVOLUTION,
        }
    ),
    "dflare lattice": Variant(
        _ALL_LAYERS | {"kind": "dflare-lattice", "head": _LATTICE | {"lilicorr_candidate_topk": 2}},
        format="speculators",
    ),
    "dflare markov": Variant(
        _ALL_LAYERS
        | {
            "kind": "dflare-markov",
            "head": {"markov_rank": 12, "confidence_head_with_markov": False},
        }
    ),
    "dflare candidates": Variant(_ALL_LAYERS | {"kind": "dflare-candidates", "head": _FEW}),
    "dflare candidates convolution": Variant(
        _ALL_LAYERS
        | {
            "kind": "dflare-candidates",
            "head": _FEW,
            "conv_kernel_size": 3,
            "conv_group_size": 4,
            "sliding_windows": (None, 24, 24),
        }
    ),
    "dfly": Variant(_ALL_LAYERS | {"kind": "dfly"}),
    "dfly argmax": Variant(
        _ALL_LAYERS | {"kind": "dfly-argmax", "attention_bias": True, "num_hidden_layers": 2}
    ),
    "dfly lattice": Variant(
        _ALL_LAYERS | {"kind": "dfly-lattice", "head": _LATTICE | {"lilicorr_candidate_topk": 2}},
        format="speculators",
    ),
    "dflare": Variant(_ALL_LAYERS | {"kind": "dflare", "num_hidden_layers": 4}),
    "dflare biases": Variant(_ALL_LAYERS | {"kind": "dflare", "attention_bias": True}),
    "dflare mixed": Variant(_ALL_LAYERS | {"kind": "dflare", "sliding_windows": (None, 24, 24)}),
    "dflare speculators": Variant(
        _ALL_LAYERS | {"kind": "dflare", "draft_vocab_size": 300},
        format="speculators",
        mask_embedding=True,
    ),
}
_IN_THERE = {v.changes.get("kind", "dflash") for v in VARIANTS.values()}
VARIANTS |= {
    kind: Variant(_ALL_LAYERS | {"kind": kind}) for kind in kinds.names() if kind not in _IN_THERE
}
"""A kind that has no shape of its own above is served with its head's defaults."""
