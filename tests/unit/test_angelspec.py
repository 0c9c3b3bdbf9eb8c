"""AngelSpec's flat format, its names of tensors and its ``pytorch_model.bin``: read as what they
are, written anew in another format, and refused where they leave something open.

Tests: ``pytest tests/unit/test_angelspec.py``.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pairs import make_random_drafter, random_drafter_config
from vllm_dflash.checks import read_early
from vllm_dflash.cli import main
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import SPECULATORS, parse, write
from vllm_dflash.formats.angelspec import ANGELSPEC
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.tools.convert import convert
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.tools.pair_checks import checkpoint_checks
from vllm_dflash.weights import expected_tensors

DFLARE: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "dflash",
    "model_arch": "dflare",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "num_target_layers": 9,
    "target_hidden_size": 4096,
    "target_num_hidden_layers": 36,
    "target_layer_ids": [1, 5, 9, 13, 17, 21, 25, 29, 33],
    "mask_token_id": 151669,
    "tie_word_embeddings": False,
    "draft_vocab_size": 151936,
    "_angelspec_version": "0.1.0",
    "torch_dtype": "bfloat16",
    "block_size": 16,
}
"""AngelSpec's dflare_draft_config.json as it exports it, with a block size, which it leaves out."""
DFLY: dict[str, Any] = {
    name: value
    for name, value in DFLARE.items()
    if name not in ("model_arch", "_angelspec_version", "draft_vocab_size")
} | {
    "architectures": ["Qwen3DFlyModel"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_hidden_layers": 5,
    "num_target_layers": 5,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "enable_hidden_correction": True,
    "hidden_correction_intermediate_size": None,
    "block_size": 8,
}
"""Its dfly_qwen3_8b_draft_config.json likewise."""
NAMES = {
    "fc.weight": "context_proj.weight",
    "hidden_norm.weight": "context_norm.weight",
    "norm.weight": "final_norm.weight",
}


def test_dflare_under_dflashs_architecture_is_read() -> None:
    config = parse(DFLARE)
    assert (config.kind, config.format, config.unknown_keys) == ("dflare", ANGELSPEC, ())
    assert (config.num_target_layers, config.num_features) == (36, 9)
    assert config.draft_vocab_size is None
    plain = parse(DFLARE | {"model_arch": "dflash"})
    assert plain.kind == parse({k: v for k, v in DFLARE.items() if k != "model_arch"}).kind
    assert plain.kind == "dflash"
    assert parse(write(config, "AngelSlim")) == parse(write(config, SPECULATORS)) == config


def test_vllms_name_of_dflare_is_known() -> None:
    """It stands in place of the published one, in the published format."""
    config = random_drafter_config(kind="dflare").with_()
    raw = write(config, "AngelSlim")
    assert parse(raw | {"architectures": ["DFlareQwen3Model"]}) == config


def test_dfly_is_read_and_written() -> None:
    config = parse(DFLY)
    assert (config.kind, config.format, config.unknown_keys) == ("dfly", ANGELSPEC, ())
    assert config.max_speculative_tokens == 7
    assert config.head == {
        "enable_hidden_correction": True,
        "hidden_correction_intermediate_size": 0,
    }
    tensors = expected_tensors(config)
    assert tensors["fc.weight"] == (4096, 5 * 4096)
    assert tensors["layer_fusion_weights"] == (5, 5)
    assert tensors["hidden_correction.gate_proj.weight"] == (4096, 8192)
    ours = write(config, ANGELSPEC)
    for name in ("architectures", "num_target_layers", "target_num_hidden_layers", "block_size"):
        assert ours[name] == DFLY[name]
    assert "dflash_config" not in ours
    assert parse(ours) == parse(write(config, SPECULATORS)) == config
    without = parse(DFLY | {"enable_hidden_correction": False})
    assert not any("hidden_correction" in name for name in expected_tensors(without))


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (DFLARE, {"block_size": None}, "block_size is missing: AngelSpec's trainer does not write"),
        (DFLARE, {"rope_theta": None}, "rope_theta is missing, of which AngelSpec makes 10000"),
        (DFLARE, {"num_target_layers": 36}, "num_target_layers is 36 beside 9 target_layer_ids"),
        (DFLARE, {"model_arch": "dspark"}, "model_arch is 'dspark': one of dflash, dflare"),
        (DFLARE, {"model_arch": 1}, "model_arch is 1: one of dflash, dflare"),
        (DFLARE, {"fusion_type": "gated_sum"}, "fusion_type = 'gated_sum' is not supported"),
        (DFLARE, {"target_layer_ids": None}, "target_layer_ids is missing"),
        (DFLARE, {"mask_token_id": None}, "mask_token_id is None"),
        (
            DFLARE,
            {"target_layer_ids": [1, 5, 9, 13, 17, 21, 25, 29, 40]},
            "outside the target's 36",
        ),
        (DFLARE, {"target_hidden_size": 2048}, "target_hidden_size = 2048 is not hidden_size"),
        (DFLARE, {"markov_rank": 8}, "markov_rank = 8 is not supported"),
        (DFLY, {"hidden_correction_type": "gru"}, "hidden_correction_type = 'gru' is not"),
        (DFLY, {"markov_rank": 8}, "markov_rank = 8 is not supported"),
        (DFLY, {"model_arch": "dflare"}, "model_arch is 'dflare': one of dfly"),
    ],
)
def test_refusals(raw: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DrafterConfigError, match=said):
        parse(raw | changes)


def as_exported(source: Path, folder: Path, model_type: str = "dflash") -> Path:
    """A checkpoint of ours as AngelSpec exports it: flat, with its names, in torch's own file."""
    config = DrafterConfig.from_pretrained(source)
    published = json.loads((source / "config.json").read_text())
    nested = published.pop("dflash_config", {})
    raw = published | nested
    raw |= {
        "architectures": ["DFlashDraftModel"],
        "model_type": model_type,
        "model_arch": config.kind,
        "num_target_layers": config.num_features,
        "target_num_hidden_layers": config.num_target_layers,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    torch.save(
        {NAMES.get(name, name): tensor for name, tensor in tensors.items()},
        folder / "pytorch_model.bin",
    )
    return folder


@pytest.mark.parametrize("kind", ["dflash", "dflare"])
def test_an_export_is_inspected_and_written_anew(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = random_drafter_config(kind=kind).with_()
    source = make_random_drafter(tmp_path / "source", config=config)
    theirs = as_exported(source, tmp_path / "theirs")
    assert main(["inspect", str(theirs)]) == 0
    said = capsys.readouterr().out
    assert f"format            {ANGELSPEC}" in said
    assert "pytorch_model.bin" in said
    ours, again = (load_drafter(f, torch.float32).state_dict() for f in (source, theirs))
    assert ours.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())
    published = "AngelSlim" if kind == "dflare" else "z-lab"
    convert(theirs, tmp_path / "back", published)
    assert DrafterConfig.from_pretrained(tmp_path / "back") == config
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == load_file(source / "model.safetensors").keys()
    assert not (tmp_path / "back" / "pytorch_model.bin").exists()


def test_what_vllm_cannot_read_says_what_to_do(tmp_path: Path) -> None:
    """transformers knows no model_type dflash, and says so of no file."""
    source = make_random_drafter(tmp_path / "s", config=random_drafter_config(kind="dflare"))
    theirs = as_exported(source, tmp_path / "theirs")
    with pytest.raises(DrafterConfigError, match=r"vllm-dflash convert .* --to AngelSlim"):
        read_early(str(theirs), None, 7)
    [check] = checkpoint_checks(inspect_checkpoint(theirs))
    assert (check.name, check.state) == ("model type", "error")
    assert read_early(str(as_exported(source, tmp_path / "qwen", "qwen3")), None, 7) is not None


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"norm.weight": _Code()}, "cannot be read as a file of tensors"),
        ([1, 2], "holds something else than named tensors"),
        ({"norm.weight": 3}, "holds something else than named tensors"),
        ({"norm.weight": torch.eye(2).to_sparse()}, "holds something else than named tensors"),
        ({"norm.weight": torch.empty(2, device="meta")}, "holds something else than named"),
        (b"no pickle", "cannot be read as a file of tensors"),
        (b"\x80\x02.", "cannot be read as a file of tensors"),
        (b"", "cannot be read as a file of tensors"),
    ],
    ids=["code", "a list", "a number", "sparse", "no numbers", "no pickle", "half of one", "empty"],
)
def test_nothing_but_tensors_is_read(
    content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_random_drafter(tmp_path / "s", config=random_drafter_config(kind="dflare"))
    theirs = as_exported(source, tmp_path / "theirs")
    if isinstance(content, bytes):
        (theirs / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, theirs / "pytorch_model.bin")
    found = inspect_checkpoint(theirs)
    assert said in str(found.errors[0])
    with pytest.raises(DrafterConfigError, match=said):
        load_drafter(theirs, torch.float32)
    assert "this must not run" not in capsys.readouterr().out


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = make_random_drafter(tmp_path / "s", config=random_drafter_config(kind="dflare"))
    theirs = as_exported(source, tmp_path / "theirs")
    tensors = torch.load(theirs / "pytorch_model.bin")
    del tensors["layer_fusion_weights"]
    torch.save(tensors, theirs / "pytorch_model.bin")
    [problem] = inspect_checkpoint(theirs).errors
    assert "missing: layer_fusion_weights" in str(problem)
