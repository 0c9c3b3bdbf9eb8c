"""Which tensors a DFlash checkpoint holds, and a check of a folder against that list before anything is loaded.

Reads safetensors headers only: no torch model and no vLLM import, so the engine, the tools and the tests share it.
A tensor that is missing or of another shape would otherwise show only as low acceptance.

Tests: ``pytest tests/unit/test_weights.py``.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_dflash.config import DrafterConfig, DrafterConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MOST_NAMED = 8
_FETCH_AGAIN = "fetch the checkpoint again (an interrupted download or a Git LFS pointer looks like this)"


def expected_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of z-lab's format for ``config``, by name, with its shape (``[out, in]`` for matrices)."""
    hidden, inter, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inter, hidden),
        "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors = {"fc.weight": (hidden, config.num_features * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return tensors


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
    """Refuses tensors (name to shape) that are not exactly those of ``expected_tensors(config)``.

    Raises:
        DrafterConfigError: names each missing, unexpected or misshaped tensor, and the remedy.
    """
    expected = expected_tensors(config)
    problems = [f"missing: {_some(sorted(expected.keys() - found.keys()))}"] if expected.keys() - found.keys() else []
    if found.keys() - expected.keys():
        problems.append(f"unexpected: {_some(sorted(found.keys() - expected.keys()))}")
    both = sorted(expected.keys() & found.keys())
    misshaped = [f"{n} is {list(found[n])} and should be {list(expected[n])}" for n in both if found[n] != expected[n]]
    if misshaped:
        problems.append(f"of another shape: {_some(misshaped)}")
    if problems:
        raise DrafterConfigError(
            f"the weights are not those of the drafter that config.json describes; {'; '.join(problems)}. "
            "Use config.json and weights of the same checkpoint, in z-lab's DFlash format"
        )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more
