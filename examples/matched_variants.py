"""The drafters that the study at one budget compares, and what differs by one change
(``matched_budget.py``).

    .venv/bin/python examples/matched_budget.py --part heads --list
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

TARGET_LAYERS = {3: "1,3,5", 5: "1,2,3,5,6", 8: "0,1,2,3,4,5,6,7"}
"""How many of the target's eight layers a drafter sees, and which."""
CONTEXTS = {"dflash": "DFlash", "dflare": "DFlare", "dfly": "DFly"}
HEADS: dict[str, dict[str, Any]] = {
    "argmax": {"head": "argmax"},
    "candidates": {"head": "candidates", "head_settings": '{"selector_rank": 64}'},
    "lattice": {
        "head": "lattice",
        "head_settings": '{"lilicorr_hidden_size": 64, "lilicorr_factor_dim": 32}',
    },
    "markov": {"head": "markov", "head_settings": '{"markov_rank": 64}'},
    "convolved": {
        "head": "candidates",
        "head_settings": '{"selector_rank": 64}',
        "conv_kernel_size": 3,
    },
}
"""Heads over the block, a quarter of the published ranks and widths, as the target's hidden size is
a sixteenth; ``convolved`` is ``candidates`` with block-local convolutions."""


@dataclass(frozen=True)
class Variant:
    """One drafter of the study, by its settings."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)


def context_variants() -> list[Variant]:
    """Kind x depth x target layers, gamma constant in all; then, around three layers and five
    target layers, one change at a time."""
    grid = [
        Variant(
            f"{kind}-{layers}x{seen}",
            {"kind": kind, "layers": layers, "target_layer_ids": ids, "gamma_start": 4.0},
        )
        for kind in ("dflash", "dflare")
        for layers in (2, 3, 5)
        for seen, ids in TARGET_LAYERS.items()
    ]
    base = {"layers": 3, "target_layer_ids": TARGET_LAYERS[5]}
    return [
        *grid,
        Variant(
            "dflare-3x5-tied", base | {"kind": "dflare", "tie_context": True, "gamma_start": 4.0}
        ),
        Variant("dflare-3x5-rise", base | {"kind": "dflare", "gamma_start": 1.0}),
        Variant("dflash-3x5-rise", base | {"kind": "dflash", "gamma_start": 1.0}),
        Variant("dflash-3x5-dpace", base | {"kind": "dflash", "weighting": "dpace"}),
        Variant("dflare-3x5-dpace", base | {"kind": "dflare", "weighting": "dpace"}),
    ]


def head_variants() -> list[Variant]:
    """Context x head, with three layers and five target layers; gamma rises, the default."""
    base = {"layers": 3, "target_layer_ids": TARGET_LAYERS[5], "gamma_start": 1.0}
    return [
        Variant(f"{context}-{head}", base | {"kind": context} | flags)
        for context in CONTEXTS
        for head, flags in HEADS.items()
    ]


PARTS = {"contexts": context_variants, "heads": head_variants}
"""The study's parts: their results have one budget, and are compared within a part."""


def contrasts(names: Collection[str]) -> list[tuple[str, str, str]]:
    """Question, variant, and what it is held against, of these variants: what differs by one
    change."""
    found = []
    for layers in (2, 3, 5):
        for seen in TARGET_LAYERS:
            found.append(
                ("DFlare over DFlash", f"dflare-{layers}x{seen}", f"dflash-{layers}x{seen}")
            )
    for kind in ("dflash", "dflare"):
        for layers in (2, 3, 5):
            found += [
                ("more target layers", f"{kind}-{layers}x{b}", f"{kind}-{layers}x{a}")
                for a, b in pairwise(TARGET_LAYERS)
            ]
        for seen in TARGET_LAYERS:
            found += [
                ("more draft layers", f"{kind}-{b}x{seen}", f"{kind}-{a}x{seen}")
                for a, b in pairwise((2, 3, 5))
            ]
    found.append(("own projections of the context", "dflare-3x5", "dflare-3x5-tied"))
    for name, question in (("rise", "a rising gamma"), ("dpace", "D-PACE")):
        found += [(question, f"{kind}-3x5-{name}", f"{kind}-3x5") for kind in ("dflash", "dflare")]
    for context, label in list(CONTEXTS.items())[1:]:
        found += [(f"{label} over DFlash", f"{context}-{head}", f"dflash-{head}") for head in HEADS]
    for head in ("candidates", "lattice", "markov"):
        found += [(f"{head} over argmax", f"{kind}-{head}", f"{kind}-argmax") for kind in CONTEXTS]
    found += [
        ("convolutions beside candidates", f"{kind}-convolved", f"{kind}-candidates")
        for kind in CONTEXTS
    ]
    return [one for one in found if one[1] in names and one[2] in names]
