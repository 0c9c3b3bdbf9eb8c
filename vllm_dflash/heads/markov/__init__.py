"""A bias from the token before: DSpark's Markov head (deepseek-ai/DSpark), and its confidence head.

Row after row, the scores are ``u + W2 W1[a]`` with the row's logits u, the token a before it, and
``markov_rank`` numbers between the two. ``enable_confidence_head``: the probability that a token is
accepted is ``sigmoid(w . [h, W1[a]] + c)`` of the row's hidden state h (``W1[a]`` with
``confidence_head_with_markov`` alone). The modules are in ``modules.py``.
"""

from typing import TYPE_CHECKING

from vllm_dflash.kinds import Head, Setting, Tensors

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this head has."""
    rank, head = config.head["markov_rank"], config.head
    tensors: Tensors = {
        "markov_head.markov_w1.weight": (config.vocab_size, rank),
        "markov_head.markov_w2.weight": (config.vocab_size, rank),
    }
    if head["enable_confidence_head"]:
        width = config.hidden_size + rank * head["confidence_head_with_markov"]
        tensors |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return tensors


MARKOV = Head(
    modules=f"{__name__}.modules",
    own_tensors=own_tensors,
    name="markov",
    sentence="adds what the token before says",
    settings={
        "markov_rank": Setting(256),
        "enable_confidence_head": Setting(True, absent=False),
        "confidence_head_with_markov": Setting(True, absent=False),
    },
    parts=("markov_head", "confidence_head"),
    says={"markov_head_type": "vanilla"},
)
