"""Hidden states that are corrected by the token before: TreeFlash's formula, as DFly has it
(Tencent/AngelSpec).

Row after row, the hidden state h becomes ``h + W3 (silu(W1 x) * W2 x)`` with x the norms of h and
of the embedding of the token before it side by side; the best token by lm_head's logits of that is
taken. ``enable_hidden_correction: false``: nothing is added. The modules are in ``modules.py``.
"""

from typing import TYPE_CHECKING

from vllm_dflash.kinds import Head, Setting, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

PART = "hidden_correction"


def width(config: "DrafterConfig") -> int:
    """Elements between the matrices; 0 in the settings is the drafter's own."""
    return config.head["hidden_correction_intermediate_size"] or config.hidden_size


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this head has."""
    if not config.head["enable_hidden_correction"]:
        return {}
    hidden, inner = config.hidden_size, width(config)
    return {
        f"{PART}.hidden_norm.weight": (hidden,),
        f"{PART}.embed_norm.weight": (hidden,),
        f"{PART}.gate_proj.weight": (inner, 2 * hidden),
        f"{PART}.up_proj.weight": (inner, 2 * hidden),
        f"{PART}.down_proj.weight": (hidden, inner),
    }


CORRECTION = Head(
    modules=f"{__name__}.modules",
    own_tensors=own_tensors,
    name="correction",
    sentence="changes each hidden state by the token before",
    settings={
        "enable_hidden_correction": Setting(True, absent=True),
        "hidden_correction_intermediate_size": Setting(0, absent=0, least=0),
    },
    says={"hidden_correction_type": "swiglu"},
    parts=(PART,),
)
