"""Which tensors a drafter's checkpoint holds, and a check of a folder against that list before anything is loaded.

Reads safetensors headers only, so the engine, the tools and the tests share it. A tensor that is missing or of another
shape would otherwise show only as low acceptance. Tests: ``pytest tests/unit/test_weights.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_dflash.conditioning import own_tensors
from vllm_dflash.config import DrafterConfig, DrafterConfigError
from vllm_dflash.formats import IGNORED_TENSORS, tensor_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MASK_EMBEDDING_FILE = "mask_embedding.pt"
_MOST_NAMED = 8
_FETCH_AGAIN = "fetch the checkpoint again (an interrupted download or a Git LFS pointer looks like this)"


def expected_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a drafter of ``config`` must have, by our name, with its shape (``[out, in]`` for matrices)."""
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
        layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", q_size), ("k", kv_size), ("v", kv_size), ("o", hidden))}
    tensors: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)} | own_tensors(config)
    for i in range(config.num_hidden_layers):
        tensors |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    if config.draft_vocab_size is not None:
        tensors |= {"lm_head.weight": (config.draft_vocab_size, hidden), "d2t": (config.draft_vocab_size,)}
    return tensors


def optional_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint may hold in place of the target's."""
    hidden = config.hidden_size
    return {"embed_tokens.weight": (config.vocab_size, hidden), "lm_head.weight": (config.draft_vocab_size or config.vocab_size, hidden)}


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single file, or the shards that its index names.

    Raises:
        DrafterConfigError: there is no weight file, the index is unusable, or a shard is absent.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not index.is_file():
        raise DrafterConfigError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: point at the drafter's folder, or {_FETCH_AGAIN}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DrafterConfigError(f"{index} is no safetensors index ({error!r}): {_FETCH_AGAIN}") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise DrafterConfigError(f"{index} names shards that are not there: {absent}. {_FETCH_AGAIN.capitalize()}")
    return [folder / name for name in names]


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files, from their headers.

    Raises:
        DrafterConfigError: a file is absent, truncated or no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise DrafterConfigError(f"{path} cannot be read as safetensors ({error}): {_FETCH_AGAIN}") from None
    return shapes


def check_tensors(config: DrafterConfig, folder: str | Path) -> None:
    """``check_shapes`` for the weight files of a folder; errors name the folder."""
    found = read_shapes(folder)
    try:
        check_shapes(config, found)
    except DrafterConfigError as error:
        raise DrafterConfigError(f"{folder}: {error}") from None


def check_shapes(config: DrafterConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors (a checkpoint's names to shapes) that are not those of a drafter of ``config``.

    Quantized weights are stored under other names and in other shapes, which vLLM's quantized layers check.

    Raises:
        DrafterConfigError: names each missing, unexpected or misshaped tensor, and the remedy.
    """
    named = {tensor_name(name): shape for name, shape in found.items()}
    named = {name: shape for name, shape in named.items() if name not in IGNORED_TENSORS}
    expected, optional = expected_tensors(config), optional_tensors(config)
    if config.quantization_config is not None:
        stems = tuple(name.removesuffix("weight") for name in expected if name.endswith("_proj.weight"))
        absent = sorted(f"{stem}*" for stem in stems if not any(name.startswith(stem) for name in named))
        expected = {name: shape for name, shape in expected.items() if not name.startswith(stems)} | dict.fromkeys(absent, ())
        named = {name: shape for name, shape in named.items() if not name.startswith(stems)}
    missing, unexpected = expected.keys() - named.keys(), named.keys() - expected.keys() - optional.keys()
    problems = [f"missing: {_some(sorted(missing))}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {_some(sorted(unexpected))}")
    shapes = optional | expected
    misshaped = [
        f"{n} is {list(named[n])} and should be {list(shapes[n])}" for n in sorted(shapes.keys() & named.keys()) if named[n] != shapes[n]
    ]
    if misshaped:
        problems.append(f"of another shape: {_some(misshaped)}")
    if problems:
        raise DrafterConfigError(
            f"the weights are not those of the drafter that config.json describes; {'; '.join(problems)}. "
            f"Use config.json and weights of the same checkpoint, in {config.format}'s format"
        )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors (by name) that hold NaN or infinity.

    Raises:
        DrafterConfigError: names them.
    """
    bad = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    if bad:
        raise DrafterConfigError(
            f"the weights hold NaN or infinity in {_some(bad)}: {_FETCH_AGAIN}, or train again from a sound checkpoint"
        )


def mask_embedding(state: object, config: DrafterConfig, path: str) -> torch.Tensor:
    """The embedding [H] in the contents of ``mask_embedding.pt``: a tensor, or a mapping with ``embedding``.

    Raises:
        DrafterConfigError: it is neither, or for another mask token or size.
    """
    if isinstance(state, dict):
        token = state.get("mask_token_id", config.mask_token_id)
        if token != config.mask_token_id:
            raise DrafterConfigError(
                f"{path} is for mask_token_id {token}, config.json says {config.mask_token_id}: use files of one checkpoint"
            )
        state = state.get("embedding")
    if not isinstance(state, torch.Tensor) or state.numel() != config.hidden_size or not state.isfinite().all():
        raise DrafterConfigError(f"{path} holds no finite embedding of {config.hidden_size} elements: fetch the checkpoint again")
    return state.reshape(-1)


def target_ids(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The target's token ids [draft vocabulary] int64 of the offsets ``d2t``.

    Raises:
        DrafterConfigError: an id is outside the vocabulary, or two draft tokens have the same.
    """
    ids = torch.arange(len(d2t)) + d2t.long().cpu()
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) != len(ids):
        raise DrafterConfigError(
            f"d2t does not map the draft vocabulary to distinct tokens of 0 to {vocab_size - 1}: use the weights that the config.json came with"
        )
    return ids


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more
