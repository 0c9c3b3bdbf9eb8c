"""Which tensors a drafter's checkpoint holds, and a check of a folder against that list before
anything is loaded.

Reads safetensors headers and two small tables only, so the engine, the tools and the tests share
it. A tensor that is missing or of another shape would otherwise show only as low acceptance. Tests:
``pytest tests/unit/test_weights.py tests/unit/test_broken_weights.py``.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from vllm_dflash.config import DrafterConfig, DrafterConfigError
from vllm_dflash.formats import IGNORED_TENSORS, tensor_name
from vllm_dflash.kinds import own_tensors
from vllm_dflash.regular import read_regular, size_of_regular

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MASK_EMBEDDING_FILE = "mask_embedding.pt"
_MOST_NAMED = 8
_FETCH_AGAIN = (
    "fetch the checkpoint again (an interrupted download or a Git LFS pointer looks like this)"
)
_CAME_WITH = "use the weights that the config.json came with"
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
_LARGEST_INDEX, _LARGEST_EMBEDDING = 1 << 27, 1 << 26
_LARGEST_PACKED_LEVEL = 128


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
    """Tensors that a checkpoint may hold in place of the target's."""
    hidden = config.hidden_size
    return {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.draft_vocab_size or config.vocab_size, hidden),
    }


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, as vLLM reads it: the shards that its index names, or
    the single file.

    Raises:
        DrafterConfigError: there is no weight file, the index is unusable, a shard is absent, or
            there are more files than that.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    data = read_regular(index, _LARGEST_INDEX)
    if data is not None:
        return _shards(folder, index, data)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE_FILE not in found:
        raise DrafterConfigError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"point at the drafter's folder, or {_FETCH_AGAIN}",
        )
    if len(found) > 1:
        found.remove(SINGLE_FILE)
        raise DrafterConfigError(
            f"{folder} holds {_some(found)} beside {SINGLE_FILE}, and vLLM reads every safetensors"
            " file",
            "remove what is not the drafter's",
        )
    size_of_regular(folder / SINGLE_FILE)
    return [folder / SINGLE_FILE]


def _shards(folder: Path, index: Path, data: bytes) -> list[Path]:
    try:
        names = sorted(set(json.loads(data)["weight_map"].values()))
        paths = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DrafterConfigError(
            f"{index} is no safetensors index ({error!r})", _FETCH_AGAIN
        ) from None
    bad = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if bad:
        raise DrafterConfigError(
            f"{index} names shards that are not files of this folder: {_some(bad)}", _FETCH_AGAIN
        )
    absent = [path.name for path in paths if size_of_regular(path) is None]
    if absent or not names:
        raise DrafterConfigError(
            f"{index} names shards that are not there: {_some(absent)}", _FETCH_AGAIN
        )
    return paths


def read_headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, safetensors dtype (such as BF16) and shape of every tensor in the folder's safetensors
    files.

    Raises:
        DrafterConfigError: a file is absent, truncated or no safetensors file, or two hold the same
            tensor.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in weight_files(folder):
        header = read_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise DrafterConfigError(
                f"{path} holds {_some(twice)}, which another file of the checkpoint holds too",
                _FETCH_AGAIN,
            )
        found |= header
    return found


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of one file."""
    size_of_regular(path)
    try:
        with safe_open(path, framework="numpy") as file:
            # The file is no mapping.
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise DrafterConfigError(
            f"{path} cannot be read as safetensors ({error})", _FETCH_AGAIN
        ) from None


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files; raises as
    ``read_headers``."""
    return {name: shape for name, (_, shape) in read_headers(folder).items()}


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
    checks: list[Callable[[], object]] = [lambda: read_mask_embedding(folder, config, dtype)]
    if found is not None:
        checks = [
            lambda: check_dtypes(config, dtypes),
            lambda: check_shapes(config, shapes),
            *checks,
            lambda: check_draft_vocabulary(config, folder),
        ]
    for check in checks:
        try:
            check()
        except DrafterConfigError as error:
            yield error


def check_dtypes(config: DrafterConfig, found: Mapping[str, str]) -> None:
    """Refuses tensors (a checkpoint's names to safetensors dtypes) that are no floats, and a
    ``d2t`` that is no whole numbers.

    Raises:
        DrafterConfigError: names them.
    """
    named = {tensor_name(name): dtype for name, dtype in found.items()}
    packed = config.quantization_config is not None
    ours = expected_tensors(config) | optional_tensors(config)
    floats = [name for name in ours if name != "d2t" and not (packed and "_proj." in name)]
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
            f"tensors of a dtype that a drafter has not: {_some(bad)}", _CAME_WITH
        )


def check_draft_vocabulary(config: DrafterConfig, folder: str | Path) -> None:
    """Refuses a draft vocabulary that is unusable; the table is read.

    Raises:
        DrafterConfigError: says what is wrong with it.
    """
    if config.draft_vocab_size is None:
        return
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
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
            f"the weights hold tensors under two names: {_some(twice)} without the prefix too",
            _CAME_WITH,
        )
    named = {name: shape for name, shape in named.items() if name not in IGNORED_TENSORS}
    expected, optional = expected_tensors(config), optional_tensors(config)
    if config.quantization_config is not None:
        stems = tuple(
            name.removesuffix("weight") for name in expected if name.endswith("_proj.weight")
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
    problems = [f"missing: {_some(sorted(missing))}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {_some(sorted(unexpected))}")
    shapes = optional | expected
    misshaped = [
        f"{n} is {list(named[n])} and should be {list(shapes[n])}"
        for n in sorted(shapes.keys() & named.keys())
        if named[n] != shapes[n]
    ]
    if misshaped:
        problems.append(f"of another shape: {_some(misshaped)}")
    if problems:
        raise DrafterConfigError(
            "the weights are not those of the drafter that config.json describes;"
            f" {'; '.join(problems)}",
            f"use config.json and weights of the same checkpoint, in {config.format}'s format",
        )


def check_finite(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses tensors (by name) that hold NaN or infinity, or numbers that ``dtype``, in which they
    serve, has not.

    Raises:
        DrafterConfigError: names them.
    """
    bad = sorted(name for name, tensor in tensors.items() if not is_finite(tensor))
    if bad:
        raise DrafterConfigError(
            f"the weights hold NaN or infinity in {_some(bad)}",
            f"{_FETCH_AGAIN}, or train again from a sound checkpoint",
        )
    bad = sorted(
        name for name, tensor in tensors.items() if not _fits(name, tensor, tensors, dtype)
    )
    if bad:
        raise _overflow(_some(bad), dtype)


def _overflow(what: str, dtype: torch.dtype) -> DrafterConfigError:
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    remedy = "serve with --dtype bfloat16, or " if dtype == torch.float16 else ""
    return DrafterConfigError(
        f"{what}: numbers beyond {most:.4g}, the largest of {name}, would become infinite when the"
        " drafter is loaded in it",
        f"{remedy}{_FETCH_AGAIN}",
    )


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite, nor becomes so in ``dtype``; whole numbers never
    are."""
    if not tensor.is_floating_point():
        return True
    # torch has no isfinite for 8-bit floats, the dtype of some quantized checkpoints.
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool((wide if dtype is None else wide.to(dtype)).isfinite().all())


def _fits(
    name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bool:
    """Whether the tensor stays finite where it serves: quantized weights are multiplied with their
    scales first."""
    stem, _, kind = name.rpartition(".")
    if "_proj" not in stem or kind in ("weight", "bias"):
        return tensor.element_size() == 1 or is_finite(tensor, dtype)
    if (
        kind not in ("weight_scale", "weight_scale_inv", "scales")
        or not tensor.is_floating_point()
        or not tensor.numel()
    ):
        return True
    weight = tensors.get(f"{stem}.weight")
    stored_as_float = weight is not None and weight.is_floating_point() and weight.numel()
    level = (
        weight.float().abs().max().item()
        if weight is not None and stored_as_float
        else _LARGEST_PACKED_LEVEL
    )
    return tensor.float().abs().max().item() * level <= torch.finfo(dtype).max


def read_mask_embedding(
    folder: str | Path, config: DrafterConfig, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """The trained mask embedding [H] of ``mask_embedding.pt``, where the folder has that file;
    ``dtype``: that in which it serves.

    Raises:
        DrafterConfigError: the file is unusable, or for another mask token or size.
    """
    path = Path(folder) / MASK_EMBEDDING_FILE
    data = read_regular(path, _LARGEST_EMBEDDING)
    return None if data is None else load_mask_embedding(data, config, str(path), dtype)


def load_mask_embedding(
    data: bytes, config: DrafterConfig, path: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The mask embedding [H] in the bytes of a ``mask_embedding.pt``; ``path`` is for messages,
    ``dtype`` that in which it serves.

    Raises:
        DrafterConfigError: they are not tensors saved by torch, or as ``mask_embedding``.
    """
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (
        Exception
    ) as error:  # whatever the unpickler and torch's tensors end in: the file is not ours
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise DrafterConfigError(
            f"{path} cannot be read as tensors ({first})", _FETCH_AGAIN
        ) from None
    return mask_embedding(state, config, path, dtype or getattr(torch, config.dtype))


def mask_embedding(
    state: object, config: DrafterConfig, path: str, dtype: torch.dtype
) -> torch.Tensor:
    """The embedding [H] in the contents of ``mask_embedding.pt``: a tensor, or a mapping with
    ``embedding``.

    Raises:
        DrafterConfigError: it is neither, for another mask token or size, or not finite in
            ``dtype``.
    """
    if isinstance(state, dict):
        token = state.get("mask_token_id", config.mask_token_id)
        whole = _is_plain(token) and token.numel() == 1 and not token.is_floating_point()
        token = token.item() if whole and isinstance(token, torch.Tensor) else token
        if not isinstance(token, int) or token != config.mask_token_id:
            shown = "a tensor" if isinstance(token, torch.Tensor) else f"{token}"
            raise DrafterConfigError(
                f"{path} is for mask_token_id {shown}, config.json says {config.mask_token_id}",
                "use files of one checkpoint",
            )
        state = state.get("embedding")
    if not isinstance(state, torch.Tensor) or not _is_plain(state) or not state.is_floating_point():
        what = (
            "no finite embedding"
            if not isinstance(state, torch.Tensor)
            else f"{_kind(state)}, no finite embedding"
        )
    elif state.numel() != config.hidden_size or not is_finite(state):
        what = "no finite embedding"
    elif not is_finite(state, dtype):
        raise _overflow(path, dtype)
    else:
        return state.detach().reshape(-1)
    raise DrafterConfigError(
        f"{path} holds {what} of {config.hidden_size} elements", "fetch the checkpoint again"
    )


def _is_plain(tensor: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor whose elements are in memory one by one, none of torch's other
    kinds."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not (tensor.is_nested or tensor.is_quantized)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return "a nested tensor"
    if tensor.device.type != "cpu":
        return f"a {tensor.device.type} tensor without elements"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    return (
        "a quantized tensor"
        if tensor.is_quantized
        else f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    )


def target_ids(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The target's token ids [draft vocabulary] int64 of the offsets ``d2t``.

    Raises:
        DrafterConfigError: an id is outside the vocabulary, or two draft tokens have the same.
    """
    if d2t.is_floating_point() or d2t.dtype == torch.bool or d2t.ndim != 1:
        raise DrafterConfigError(
            f"d2t is {d2t.dtype} {list(d2t.shape)}",
            f"it should be a list of int64 offsets; {_CAME_WITH}",
        )
    ids = torch.arange(len(d2t)) + d2t.long().cpu()
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) != len(ids):
        raise DrafterConfigError(
            f"d2t does not map the draft vocabulary to distinct tokens of 0 to {vocab_size - 1}",
            _CAME_WITH,
        )
    return ids


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more
