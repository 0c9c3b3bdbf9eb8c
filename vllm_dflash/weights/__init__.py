"""Which tensors a drafter's checkpoint holds, and a check of a folder against that list before
anything is loaded.

Reads safetensors headers and two small tables only, so the engine, the tools and the tests share
it. A tensor that is missing or of another shape would otherwise show only as low acceptance. Tests:
``pytest tests/unit/test_weights.py tests/unit/test_broken_weights.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import IGNORED_TENSORS, tensor_name
from vllm_dflash.kinds import kind_of, own_tensors
from vllm_dflash.weights.headers import read_headers, weight_files
from vllm_dflash.weights.mask_embedding import read_mask_embedding
from vllm_dflash.weights.messages import CAME_WITH, some
from vllm_dflash.weights.quantization import check_left_out, check_packed, check_quantization
from vllm_dflash.weights.reading import open_weights
from vllm_dflash.weights.values import target_ids

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_WHOLE = frozenset({"I64", "I32", "I16"})
READABLE = (
    _FLOATS
    | _WHOLE
    | {
        "BOOL",
        "U8",
        "I8",
        "U16",
        "U32",
        "U64",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "F8_E8M0",
    }
)
"""What quantized layers are stored as; safetensors knows more, such as F4 and F6, that torch has no
arithmetic for."""


def expected_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a drafter of ``config`` must have, by our name, with its shape (``[out,
    in]`` for matrices)."""
    hidden, inter, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, q_size),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.attention_bias:
        layer |= {
            f"self_attn.{n}_proj.bias": (size,)
            for n, size in (("q", q_size), ("k", kv_size), ("v", kv_size), ("o", hidden))
        }
    if config.conv_kernel_size:
        taps, groups = config.conv_kernel_size, hidden // config.conv_group_size
        for name in ("attention_conv", "mlp_conv"):
            layer[f"{name}.base_kernel"] = (2, taps, hidden)
            layer[f"{name}.kernel_projection.weight"] = (2 * taps * groups, hidden)
    tensors: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)} | own_tensors(config)
    for i in range(config.num_hidden_layers):
        tensors |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if config.draft_vocab_size is not None:
        tensors |= {
            "lm_head.weight": (config.draft_vocab_size, hidden),
            "d2t": (config.draft_vocab_size,),
        }
    return tensors


def optional_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint may hold in place of the target's; no embedding where the head
    reads the target's."""
    hidden = config.hidden_size
    tables: dict[str, tuple[int, ...]] = {"lm_head.weight": (config.draft_tokens, hidden)}
    if not kind_of(config).head.over_block:
        tables["embed_tokens.weight"] = (config.vocab_size, hidden)
    return tables


def check_tensors(
    config: DrafterConfig, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Refuses a folder for the first of its ``tensor_problems``; errors name the folder."""
    for error in tensor_problems(config, folder, dtype):
        raise error.at(folder)


def tensor_problems(
    config: DrafterConfig | None, folder: str | Path, dtype: torch.dtype | None = None
) -> Iterator[DrafterConfigError]:
    """Everything that headers and the two small tables show to be wrong, for all who judge a
    folder.

    Args:
        config: None where the folder's is unusable: then only the files are looked at.
        dtype: that in which it will serve; None: config.json's.
    """
    try:
        found = read_headers(folder)
    except DrafterConfigError as error:
        yield error
        found = None  # its tensors would be listed as missing
    if config is None:
        return
    shapes = {name: shape for name, (_, shape) in (found or {}).items()}
    dtypes = {name: dtype for name, (dtype, _) in (found or {}).items()}
    named = {tensor_name(name): dtype for name, dtype in dtypes.items()}
    checks: list[Callable[[], object]] = [
        lambda: check_quantization(config, dtype),
        lambda: read_mask_embedding(folder, config, dtype),
    ]
    if found is not None:
        each: list[Callable[[], object]] = [
            lambda: check_dtypes(config, dtypes),
            lambda: check_shapes(config, shapes),
        ]
        try:
            check_tables(config, dtypes)
        except DrafterConfigError as error:
            yield error
            each = []  # they would name the same tensors
        checks = [
            *each,
            lambda: check_packed(config, named),
            *checks,
            lambda: check_draft_vocabulary(config, folder),
        ]
    for check in checks:
        try:
            check()
        except DrafterConfigError as error:
            yield error


def check_tables(config: DrafterConfig, found: Iterable[str]) -> None:
    """Refuses a checkpoint, with tensors of these names, that quantizes more than its layers'
    projections; see ``check_left_out``."""
    ours = expected_tensors(config) | optional_tensors(config)
    plain = [name for name in ours if not (name.startswith("layers.") and "_proj." in name)]
    check_left_out(plain, {tensor_name(name) for name in found})


def check_dtypes(config: DrafterConfig, found: Mapping[str, str]) -> None:
    """Refuses tensors (a checkpoint's names to safetensors dtypes) that are no floats, and a
    ``d2t`` that is no whole numbers.

    Raises:
        DrafterConfigError: names them.
    """
    named = {tensor_name(name): dtype for name, dtype in found.items()}
    packed = "layers." if config.quantization_config is not None else "-"
    ours = expected_tensors(config) | optional_tensors(config)
    floats = [
        name
        for name in ours
        if name != "d2t" and not (name.startswith(packed) and "_proj." in name)
    ]
    bad = [
        f"{n} is {named[n]} and should be BF16, F16 or F32"
        for n in sorted(floats)
        if n in named and named[n] not in _FLOATS
    ]
    bad += [
        f"{n} is {d}, which no drafter is stored as"
        for n, d in sorted(named.items())
        if d not in READABLE and n not in floats
    ]
    if named.get("d2t", "I64") not in _WHOLE:
        bad.append(f"d2t is {named['d2t']} and should be I64")
    if bad:
        raise DrafterConfigError(
            f"tensors of a dtype that a drafter has not: {some(bad)}", CAME_WITH
        )


def check_draft_vocabulary(config: DrafterConfig, folder: str | Path) -> None:
    """Refuses a draft vocabulary that is unusable; the table is read.

    Raises:
        DrafterConfigError: says what is wrong with it.
    """
    if config.draft_vocab_size is None:
        return
    for path in weight_files(folder):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if tensor_name(name) == "d2t":
                    target_ids(file.get_tensor(name), config.vocab_size)


def check_shapes(config: DrafterConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors (a checkpoint's names to shapes) that are not those of a drafter of
    ``config``.

    Quantized weights are stored under other names and in other shapes, which vLLM's quantized
    layers check.

    Raises:
        DrafterConfigError: names each missing, unexpected or misshaped tensor, and the remedy.
    """
    named = {tensor_name(name): shape for name, shape in found.items()}
    if len(named) != len(found):
        twice = sorted(
            name for name in found if tensor_name(name) != name and tensor_name(name) in found
        )
        raise DrafterConfigError(
            f"the weights hold tensors under two names: {some(twice)} without the prefix too",
            CAME_WITH,
        )
    named = {name: shape for name, shape in named.items() if name not in IGNORED_TENSORS}
    expected, optional = expected_tensors(config), optional_tensors(config)
    if config.quantization_config is not None:
        # Layers may be packed, a head is not.
        stems = tuple(
            name.removesuffix("weight")
            for name in expected
            if name.startswith("layers.") and name.endswith("_proj.weight")
        )
        absent = sorted(
            f"{stem}*" for stem in stems if not any(name.startswith(stem) for name in named)
        )
        expected = {
            name: shape for name, shape in expected.items() if not name.startswith(stems)
        } | dict.fromkeys(absent, ())
        named = {name: shape for name, shape in named.items() if not name.startswith(stems)}
    missing, unexpected = (
        expected.keys() - named.keys(),
        named.keys() - expected.keys() - optional.keys(),
    )
    problems = [f"missing: {some(sorted(missing))}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {some(sorted(unexpected))}")
    shapes = optional | expected
    misshaped = [
        f"{n} is {list(named[n])} and should be {list(shapes[n])}"
        for n in sorted(shapes.keys() & named.keys())
        if named[n] != shapes[n]
    ]
    if misshaped:
        problems.append(f"of another shape: {some(misshaped)}")
    if problems:
        raise DrafterConfigError(
            "the weights are not those of the drafter that config.json describes;"
            f" {'; '.join(problems)}",
            f"use config.json and weights of the same checkpoint, in {config.format}'s format",
        )
