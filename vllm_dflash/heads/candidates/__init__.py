"""A walk through candidates: DFlash2's selector (z-lab/dflash; no paper yet).

Of each row the ``selector_top_k`` best tokens by their own logits u are candidates. An edge from
token a before a row to a candidate b of it scores ``u(b) + (P[a] * W h) . S[b]``, with the row's
hidden state h, and codebooks P and S of rank ``selector_rank``. From the anchor on the best edge is
taken, row after row. The modules are in ``modules.py``.
"""

from typing import TYPE_CHECKING

from vllm_dflash.kinds import Head, Setting, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

PART = "candidate_selector"


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this head has."""
    rank = config.head["selector_rank"]
    return {
        f"{PART}.predecessor_codebook": (config.vocab_size, rank),
        f"{PART}.successor_codebook": (config.vocab_size, rank),
        f"{PART}.hidden_projection.weight": (rank, config.hidden_size),
    }


CANDIDATES = Head(
    modules=f"{__name__}.modules",
    own_tensors=own_tensors,
    name="candidates",
    sentence="walks through the best of each row by what goes with what",
    settings={
        "selector_rank": Setting(256),
        "selector_top_k": Setting(16, least=2, most=256, counts_tokens=True),
    },
    parts=(PART,),
    bare_rows=True,
)
