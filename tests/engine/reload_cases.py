"""Which changes of weights are tried in engines that run, and what has to come of each: the tests'
lists, and the documents' table.

The table of docs/features.md is what this prints (``test_reload.py``:
``test_the_documents_table``):

    python tests/engine/reload_cases.py
"""

from typing import Any

RUNNERS = ("v1", "v2")
ARCHITECTURES = {"qwen3": "target", "llama": "Llama target"}
"""Of targets, as the table names them. With the V2 runner all of a target's layers are vLLM's own,
so Llama is tried on V1 alone, and there less."""
TARGET_KINDS = {
    "embedding": r"embed_tokens",
    "layer norms": r"layernorm",
    "final norm": r"^model\.norm",
    "query norms": r"q_norm",
    "key norms": r"k_norm",
    "projections": r"_proj\.weight",
    "biases": r"_proj\.bias",
    "lm_head": r"lm_head",
    "all": r".",
}
HEAD_NORMS = ("query norms", "key norms")
"""Kinds that Llama has not."""
LOADED = (*TARGET_KINDS, "merged adapter")
"""Kinds that are loaded with the whole checkpoint."""
WHOLE = (
    "embedding",
    "layer norms",
    "final norm",
    "query norms",
    "key norms",
    "projections",
    "lm_head",
)
"""Kinds that may be loaded alone."""
PAST_LOADERS = (
    "embedding",
    "layer norms",
    "final norm",
    "query norms",
    "key norms",
    "biases",
    "lm_head",
)
"""Of a linear layer's weight vLLM's CPU build keeps the packed form alone, which nothing but a load
changes."""
WAYS = ("new storage", "new parameter", "in place")
SHARED = ("the target's tables", "lm_head")
DRAFTERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "dflash": (
        {"attention_bias": True},
        {
            "format": "speculators",
            "tables": ("embed_tokens.weight", "lm_head.weight"),
            "mask_embedding": True,
        },
        {
            "embedding": r"embed_tokens",
            "mask embedding": r"mask_embedding",
            "layer norms": r"layernorm",
            "final norm": r"^norm",
            "query norms": r"q_norm",
            "key norms": r"k_norm",
            "context fusion": r"^fc|hidden_norm",
            "keys and values": r"[kv]_proj\.weight",
            "other projections": r"(q|o|gate|up|down)_proj\.weight",
            "biases": r"_proj\.bias",
            "lm_head": r"lm_head",
            "all": r".",
        },
    ),
    "the target's tables": (
        {},
        {"format": "speculators", "tables": ("embed_tokens.weight", "lm_head.weight")},
        {"layers": r"_proj", "lm_head": r"lm_head"},
    ),
    "draft vocabulary": (
        {"draft_vocab_size": 200},
        {"format": "speculators"},
        {"d2t": r"d2t", "lm_head": r"lm_head", "all": r"."},
    ),
    "dflare": (
        {"kind": "dflare", "attention_bias": True, "target_layer_ids": (0, 1, 2, 3, 4)},
        {},
        {
            "context fusion": r"layer_fusion|hidden_norm",
            "context keys and values": r"_proj_target\.weight",
            "context biases": r"_proj_target\.bias",
            "key norms": r"k_norm",
            "all": r".",
        },
    ),
    "dflash2": (
        {
            "kind": "dflash2",
            "head": {"selector_rank": 12, "selector_top_k": 5},
            "conv_kernel_size": 2,
            "conv_group_size": 16,
        },
        {},
        {"candidates": r"^candidate_selector", "convolutions": r"_conv\.", "all": r"."},
    ),
    "dspark": (
        {"kind": "dspark", "head": {"markov_rank": 12}},
        {},
        {"Markov head": r"^markov_head", "all": r"."},
    ),
}
"""By drafter its configuration, its checkpoint's form, and by kind of weight its names."""
REFUSALS = {
    "NaN": r"NaN or infinity in layers\.1\.mlp\.up_proj\.weight",
    "shape": r"norm\.weight is \[63\] of floats and should be \[64\] of floats.*stay in force",
    "unknown": (
        r"brings layers\.9\.mlp\.up_proj\.weight, and the running drafter was started without.*stay"
        r" in force"
    ),
    "missing": (
        r"ended without hidden_norm\.weight, layers\.1\.self_attn\.k_proj\.weight.*stay in force"
    ),
}
REFUSING = ("dflash", "dflare")
"""Drafters that updates which do not fit are tried with."""

_QWEN3_CASES = (
    [(way, kind) for way in ("reload", "update") for kind in LOADED]
    + [("reload some", kind) for kind in WHOLE]
    + [(way, kind) for way in WAYS for kind in PAST_LOADERS]
)
_LLAMA_CASES = (
    [("reload", kind) for kind in ("projections", "biases", "all", "merged adapter")]
    + [("update", "all"), ("reload some", "projections")]
    + [(way, k) for way in WAYS for k in PAST_LOADERS if k not in (*HEAD_NORMS, "lm_head")]
)
OTHER_ENGINES = ("tied, all", "with LoRA")
"""Kinds of which each has an engine of its own."""
_OTHER_CASES = [("sleep and wake", "base"), ("reload", "tied, all"), ("reload", "with LoRA")]
TARGET_CASES = [
    (architecture, *case)
    for architecture, cases in zip(ARCHITECTURES, (_QWEN3_CASES, _LLAMA_CASES), strict=True)
    for case in cases + _OTHER_CASES
]
"""Architecture, way and kind."""
DRAFTER_CASES = (
    [
        (name, "draft update", kind)
        for name in DRAFTERS
        for kind in ("base", *DRAFTERS[name][2])
        if (name, kind) != SHARED
    ]
    + [("dflash", "draft load", "all"), ("dflash", "draft load", "base")]
    + [(name, "draft update", "after refusals") for name in REFUSING]
)

FRESH = "a fresh engine's"
PLAIN = "plain vLLM's, not a fresh engine's"
UNCHANGED = "refused by name, nothing changes"
CLOSED = "nothing changes"
NOT_RUN = "not run: vLLM's V2 runner on a CPU cannot verify drafts with LoRA"
AS_QWEN3 = "not run: the target's layers are vLLM's own, as Qwen3's"
PLAIN_IS_WRONG = {*((way, "lm_head") for way in WAYS), ("reload", "tied, all")}
"""vLLM's CPU build packs the lm_head when it is loaded, and where it is the embedding's not even
then."""


def target_result(runner: str, architecture: str, way: str, kind: str) -> str:
    """What text and drafts have to be after one of ``TARGET_CASES``."""
    if (runner, architecture) == ("v2", "llama"):
        return AS_QWEN3
    if (runner, kind) == ("v2", "with LoRA"):
        return NOT_RUN
    return PLAIN if (way, kind) in PLAIN_IS_WRONG else FRESH


_HOW = {
    "reload": "`reload_weights`",
    "update": "`start_weight_update`, `update_weights`, `finish_weight_update`",
    "reload some": "`reload_weights` with one kind's tensors alone",
    "new storage": "a parameter's storage swapped (`.data = `)",
    "new parameter": "a parameter swapped",
    "in place": "a parameter overwritten (`.copy_`)",
    "sleep and wake": "the worker's `sleep` and `wake_up` (on a CPU they move nothing)",
    "draft update": "drafter: `start_draft_weight_update`, one tensor at a time",
    "draft load": "drafter: `load_weights`, one tensor at a time",
}


def table() -> str:
    """The cases that have one result in one line, with the result on both runners."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for case in TARGET_CASES:
        architecture, way, kind = case
        how = f"{ARCHITECTURES[architecture]}: {_HOW[way]}"
        results = (target_result(runner, *case) for runner in RUNNERS)
        lines.setdefault((how, *results), []).append(kind)
    for name, way, kind in DRAFTER_CASES:
        lines.setdefault((f"{_HOW[way]} ({name})", FRESH, FRESH), []).append(kind)
    for name in REFUSING:
        lines[f"drafter: an update that does not fit ({name})", UNCHANGED, UNCHANGED] = [*REFUSALS]
        lines[f"drafter: an update closed without a start ({name})", CLOSED, CLOSED] = ["nothing"]
    lines[
        f"drafter: its {SHARED[1]}, where the target's was equal and vLLM keeps one for both",
        UNCHANGED,
        UNCHANGED,
    ] = ["lm_head"]
    rows = [
        f"| {how} | {', '.join(kinds)} | {v1} | {v2} |" for (how, v1, v2), kinds in lines.items()
    ]
    return "\n".join(["| change | of | V1 | V2 |", "|---|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
