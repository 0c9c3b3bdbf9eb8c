"""A lattice of candidates, scored as a whole: LiLiCorr (arXiv 2608.20530).

Of each row the ``lilicorr_candidate_topk`` best tokens by their own logits are candidates. A small
transformer over all of a block's candidates reads the target's embedding of each, its probability
and rank, and the row's hidden state. Of what it makes of a candidate, and of the context of the
token before the anchor, come two unit vectors of ``lilicorr_factor_dim`` elements, out and in; an
edge from candidate a to the next row's candidate b scores ``out(a) . in(b)`` times
``lilicorr_logit_scale``. From the anchor, which has an out of its own, the best edge is taken, row
after row. The modules are in ``modules.py``.
"""

from typing import TYPE_CHECKING

from vllm_dflash.kinds import Head, Setting, Tensors, kind_of

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

PART = "lilicorr"
FEATURES = 5
"""What a candidate's probability and rank are given as."""


def width(config: "DrafterConfig") -> int:
    """Elements of a candidate's state; 0 in the settings is the drafter's own."""
    return config.head["lilicorr_hidden_size"] or config.hidden_size


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only this head has."""
    head, inner = config.head, width(config)
    wide = int(inner * head["lilicorr_mlp_ratio"])
    linear = {
        "pass_hidden_proj": (inner, config.hidden_size),
        "context_proj": (inner, kind_of(config).context.width(config)),
        "feature_mlp.up_proj": (inner, FEATURES),
        "feature_mlp.down_proj": (inner, inner),
        "factor_input_proj": (inner, 3 * inner),
        **dict.fromkeys(
            ("out_head", "in_head", "anchor_out_head"), (head["lilicorr_factor_dim"], inner)
        ),
    }
    if inner != config.hidden_size:
        linear["token_proj"] = (inner, config.hidden_size)
    tensors: Tensors = {
        "slot_embedding": (1, 1, config.max_speculative_tokens, 1, inner),
        "rank_embedding": (1, 1, 1, head["lilicorr_candidate_topk"], inner),
        "relative_slot_bias": (head["lilicorr_num_heads"], 2 * config.block_size - 1),
        "same_slot_bias": (head["lilicorr_num_heads"],),
        "feature_norm.weight": (FEATURES,),
        "feature_norm.bias": (FEATURES,),
        "output_norm.weight": (inner,),
        "anchor_norm.weight": (inner,),
    }
    for i in range(head["lilicorr_num_layers"]):
        layer = f"layers.{i}"
        tensors |= {
            f"{layer}.attn_norm.weight": (inner,),
            f"{layer}.mlp_norm.weight": (inner,),
            f"{layer}.attn.in_proj_weight": (3 * inner, inner),
            f"{layer}.attn.in_proj_bias": (3 * inner,),
        }
        linear |= {
            f"{layer}.attn.out_proj": (inner, inner),
            f"{layer}.mlp.up_proj": (wide, inner),
            f"{layer}.mlp.down_proj": (inner, wide),
        }
    for name, shape in linear.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {f"{PART}.{name}": shape for name, shape in tensors.items()}


def problem(config: "DrafterConfig") -> tuple[str, str] | None:
    """A setting that does not fit the others, and what it has to be."""
    head, inner = config.head, width(config)
    if inner % head["lilicorr_num_heads"]:
        return "lilicorr_num_heads", f"a divisor of the {inner} elements of a candidate's state"
    if int(inner * head["lilicorr_mlp_ratio"]) < 1:
        return "lilicorr_mlp_ratio", f"1 / {inner} or more"
    return None


LATTICE = Head(
    modules=f"{__name__}.modules",
    own_tensors=own_tensors,
    name="lattice",
    sentence="ranks the best of a whole block by a small network",
    settings={
        "lilicorr_candidate_topk": Setting(8, least=2, most=16, counts_tokens=True),
        "lilicorr_hidden_size": Setting(256, least=0),
        "lilicorr_num_layers": Setting(2, most=64),
        "lilicorr_num_heads": Setting(4),
        "lilicorr_mlp_ratio": Setting(2.0, most=64),
        "lilicorr_factor_dim": Setting(64),
        "lilicorr_vector_eps": Setting(1e-6, most=0.5),
        "lilicorr_logit_scale": Setting(10.0),
    },
    says={"lilicorr_enabled": True},
    parts=(PART,),
    renamed=(
        ("feature_mlp.0.", "feature_norm."),
        ("feature_mlp.1.", "feature_mlp.up_proj."),
        ("feature_mlp.3.", "feature_mlp.down_proj."),
        (".mlp.0.", ".mlp.up_proj."),
        (".mlp.2.", ".mlp.down_proj."),
    ),
    problem=problem,
    over_block=True,
)
