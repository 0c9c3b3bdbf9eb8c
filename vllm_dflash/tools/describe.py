"""An inspection as text for people. Tests: ``pytest tests/unit/test_tools.py``."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import printable
from vllm_dflash.kinds import kind_of

if TYPE_CHECKING:
    from vllm_dflash.tools.inspect import Inspection


def as_text(found: "Inspection") -> str:
    """Two columns, a table of each target layer's shares, and the problems."""
    rows = _config_rows(found.config) if found.config is not None else []
    rows += _weight_rows(found)
    if found.sound:
        rows.append(
            ("sound", f"yes: all {len(found.drafter_tensors)} tensors are there and finite")
        )
    else:
        rows.append(
            ("sound", f"no, {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}:")
        )
    rows += [("note", warning) for warning in found.warnings]
    lines = [
        str(found.folder),
        *(f"{name:<17} {value}" for name, value in rows),
        *(f"  {problem}" for problem in found.problems),
    ]
    if found.fusion is not None and found.config is not None:
        lines += ["", *_fusion_lines(found.config, found.fusion)]
    return "\n".join(map(printable, lines))


def ranges(numbers: Iterable[int]) -> str:
    """``0-2, 4`` for 0, 1, 2, 4."""
    runs = [
        [n for _, n in group]
        for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _config_rows(config: DrafterConfig) -> list[tuple[str, str]]:
    k, of = (
        config.max_speculative_tokens,
        ("" if config.num_target_layers is None else f" of {config.num_target_layers}"),
    )
    rope = config.rope_scaling
    kind = (
        "plain"
        if rope is None
        else ", ".join(
            f"{name} {value}"
            for name, value in sorted(rope.items(), key=lambda i: i[0] != "rope_type")
        )
    )
    quantization = config.quantization_config
    return [
        ("format", config.format),
        ("context", f"{kind_of(config).label}: {kind_of(config).sentence}"),
        (
            "block size",
            f"{config.block_size}: num_speculative_tokens {f'1 to {k}' if k > 1 else '1'}",
        ),
        (
            "layers",
            (
                f"{config.num_hidden_layers}, hidden size {config.hidden_size}, MLP"
                f" {config.intermediate_size}"
            ),
        ),
        *(("", line) for line in _attention_lines(config)),
        *_over_the_block(config),
        (
            "heads",
            f"{config.num_attention_heads} of {config.head_dim} elements,"
            f" {config.num_key_value_heads} for keys and values"
            + (", with biases" if config.attention_bias else ""),
        ),
        (
            "rotary",
            f"theta {config.rope_theta:g}, {kind}, positions to {config.max_position_embeddings}",
        ),
        (
            "target layers",
            (
                f"{', '.join(map(str, config.target_layer_ids))}{of} (counted from 0; in vLLM's"
                f" numbering, layer + 1: {', '.join(str(i + 1) for i in config.target_layer_ids)})"
            ),
        ),
        ("vocabulary", f"{config.vocab_size} tokens, mask token {config.mask_token_id}"),
        (
            "draft vocabulary",
            (
                "all of them"
                if config.draft_vocab_size is None
                else f"{config.draft_vocab_size} tokens, mapped by d2t"
            ),
        ),
        ("quantization", "none" if quantization is None else str(quantization["quant_method"])),
        *_scales(config),
    ]


def _scales(config: DrafterConfig) -> list[tuple[str, str]]:
    """What becomes of logits and of the target's embedding, where a file says something."""
    said = []
    if config.logit_scale != 1.0:
        said.append(f"times {config.logit_scale:g}")
    if config.logit_cap is not None:
        said.append(f"at most {config.logit_cap:g} by tanh")
    lines = [("probabilities", f"of logits {', '.join(said)}")] if said else []
    if config.input_embedding_scale is not None:
        lines.append(("embedding", f"rows times {config.input_embedding_scale:g}"))
    return lines


def _over_the_block(config: DrafterConfig) -> list[tuple[str, str]]:
    """The head and the convolution, where a drafter has more than argmax."""
    lines = []
    if not kind_of(config).head.is_argmax:
        said = ", ".join(f"{name} {value}" for name, value in config.head.items())
        name = kind_of(config).head.name or "its own"
        lines.append(("head", f"{name}{f': {said}' if said else ''}"))
    if config.conv_kernel_size:
        lines.append(
            (
                "convolution",
                f"{config.conv_kernel_size} rows of the block, groups of"
                f" {config.conv_group_size} channels",
            )
        )
    return lines


def _attention_lines(config: DrafterConfig) -> list[str]:
    lines = []
    for window in dict.fromkeys(config.windows):
        layers = ranges(i for i, w in enumerate(config.windows) if w == window)
        if window is None:
            lines.append(f"{layers}: full attention, a block's tokens see each other")
        else:
            own = (
                "causal in the block"
                if config.sliding_causal
                else "a block's tokens see each other"
            )
            lines.append(f"{layers}: sliding window of {window}, {own}")
    return lines


def _weight_rows(found: "Inspection") -> list[tuple[str, str]]:
    said = "" if found.config is None else f" (config.json says {found.config.dtype})"
    tables = ", ".join(found.own_tables)
    return [
        ("own tables", tables or "none: embedding and lm_head are the target's"),
        ("stored as", (", ".join(found.stored_dtypes) or "nothing that can be read") + said),
        ("parameters", f"{_count(found.parameters)} in {len(found.drafter_tensors)} tensors"),
        (
            "files",
            ", ".join(f"{name} {_count(size)}B" for name, size in found.files.items()) or "none",
        ),
    ]


def _count(number: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} "


def _fusion_lines(config: DrafterConfig, fusion: Sequence[Sequence[float]]) -> list[str]:
    head = "draft layer" + "".join(f"{f'{i}':>7}" for i in config.target_layer_ids)
    rows = [f"{d:>11}" + "".join(f"{share:7.3f}" for share in row) for d, row in enumerate(fusion)]
    return [
        (
            "share of each target layer in a draft layer's context (softmax of"
            f" {kind_of(config).context.shares})"
        ),
        head,
        *rows,
    ]
