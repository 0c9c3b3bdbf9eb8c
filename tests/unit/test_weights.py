"""A checkpoint's tensors are checked by header before anything is loaded: what is wrong is named,
with a remedy.

Tests: ``pytest tests/unit/test_weights.py``.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.kinds.dflash.context import Reference as DFlashDrafter
from vllm_dflash.reference.checkpoint import load_drafter, save_drafter
from vllm_dflash.weights import check_tensors, expected_tensors
from vllm_dflash.weights.headers import read_shapes

CONFIG = DrafterConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    block_size=8,
    mask_token_id=63,
    target_layer_ids=(1, 2, 4),
    num_target_layers=6,
    max_position_embeddings=128,
    kind="dflash",
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_drafter(tmp_path, DFlashDrafter(CONFIG))
    return tmp_path


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder) -> str:
    with pytest.raises(DrafterConfigError) as error:
        check_tensors(CONFIG, folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_names_and_shapes_are_z_labs() -> None:
    """Worked out by hand from the published Qwen3-8B drafter's settings, not from our module."""
    config = CONFIG.with_(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=5,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        target_layer_ids=(1, 9, 17, 25, 33),
        num_target_layers=36,
    )
    tensors = expected_tensors(config)
    assert len(tensors) == 3 + 5 * 11
    assert tensors["fc.weight"] == (4096, 20480)
    assert (
        tensors["hidden_norm.weight"]
        == tensors["norm.weight"]
        == tensors["layers.4.post_attention_layernorm.weight"]
        == (4096,)
    )
    assert (
        tensors["layers.0.self_attn.q_proj.weight"]
        == tensors["layers.0.self_attn.o_proj.weight"]
        == (4096, 4096)
    )
    assert (
        tensors["layers.0.self_attn.k_proj.weight"]
        == tensors["layers.0.self_attn.v_proj.weight"]
        == (1024, 4096)
    )
    assert (
        tensors["layers.0.self_attn.q_norm.weight"]
        == tensors["layers.0.self_attn.k_norm.weight"]
        == (128,)
    )
    assert tensors["layers.0.mlp.gate_proj.weight"] == (12288, 4096)
    assert tensors["layers.0.mlp.down_proj.weight"] == (4096, 12288)


def test_the_module_has_exactly_these_tensors() -> None:
    assert {
        name: tuple(t.shape) for name, t in DFlashDrafter(CONFIG).state_dict().items()
    } == expected_tensors(CONFIG)


def test_round_trip(folder) -> None:
    check_tensors(CONFIG, folder)
    model = load_drafter(folder, torch.float32)
    assert model.config == CONFIG.with_(dtype="float32")
    assert not model.training
    torch.manual_seed(0)
    for name, tensor in DFlashDrafter(CONFIG).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["DFlashDraftModel"]
    assert next(load_drafter(folder, torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_missing(folder) -> None:
    rewrite(folder, lambda tensors: tensors.pop("layers.1.self_attn.k_norm.weight"))
    message = refused(folder)
    assert "missing: layers.1.self_attn.k_norm.weight" in message
    assert "same checkpoint" in message


def test_misnamed(folder) -> None:
    """A tensor under another name is one missing and one unexpected: skipped in silence, it serves
    at low acceptance."""
    rewrite(folder, lambda tensors: tensors.update({"fuse.weight": tensors.pop("fc.weight")}))
    message = refused(folder)
    assert "missing: fc.weight" in message
    assert "unexpected: fuse.weight" in message


def test_misshaped(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"fc.weight": torch.zeros(32, 64)}))
    assert "fc.weight is [32, 64] and should be [32, 96]" in refused(folder)


def test_a_long_list_is_cut(folder) -> None:
    rewrite(
        folder,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.startswith("layers.1.")
        ],
    )
    assert "and 3 more" in refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", None],
    ids=["empty", "lfs pointer", "truncated"],
)
def test_corrupt(folder, content: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    message = refused(folder)
    assert "model.safetensors cannot be read" in message
    assert "fetch the checkpoint again" in message


def test_none_at_all(folder) -> None:
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "model.safetensors.index.json" in message
    assert "fetch the checkpoint again" in message


def shard(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_sharded(folder) -> None:
    whole = load_drafter(folder, torch.float32).state_dict()
    shard(folder)
    assert read_shapes(folder) == expected_tensors(CONFIG)
    parts = load_drafter(folder, torch.float32).state_dict()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_a_shard_is_absent(folder) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(folder)


def test_a_broken_index(folder) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "is no safetensors index" in refused(folder)
