"""A target's config.json that cannot be used is refused by name, by every command that reads one.

pytest tests/unit/test_target_configs.py
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.hub import TargetError, eos_token_id, load_config
from vllm_dflash.pairing import TargetShape, embedding_scale

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "examples" / "embedded_pair"
WHOLE: dict[str, Any] = json.loads((PAIR / "target" / "config.json").read_text())
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "vocab_size": 4096,
}
ODD: dict[str, tuple[Any, str]] = {
    "a number": (7, "its config.json holds a number, not an object"),
    "a list": ([], "its config.json holds a list, not an object"),
    "null": (None, "its config.json holds null, not an object"),
    "model_type": (WHOLE | {"model_type": ["qwen3"]}, r"its model_type is \['qwen3'\]"),
    "a text": (WHOLE | {"hidden_size": "256"}, "hidden_size"),
    "hidden_size null": (WHOLE | {"hidden_size": None}, "hidden_size"),
    "layers null": (WHOLE | {"num_hidden_layers": None}, "num_hidden_layers"),
    "no layers": (WHOLE | {"num_hidden_layers": 0}, "num_hidden_layers"),
    "a fraction": (WHOLE | {"vocab_size": 4096.5}, "vocab_size"),
    "positions null": (WHOLE | {"max_position_embeddings": None}, "max_position_embeddings"),
    "negative": (WHOLE | {"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    "eos empty": (WHOLE | {"eos_token_id": []}, r"eos_token_id is \[\]"),
    "eos text": (WHOLE | {"eos_token_id": ["x"]}, "eos_token_id"),
    "mamba": (MAMBA, r"\(mamba\) gives no max_position_embeddings: it has no attention layers"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_target_that_cannot_be_used_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """doctor ended in a TypeError, an IndexError, an AttributeError or one of transformers' own, or
    advised --max-tokens -17."""
    raw, said = ODD[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(TargetError, match=said) as error:
        load_config(str(tmp_path))
    assert error.value.remedy
    assert str(tmp_path) in error.value.problem


@pytest.mark.parametrize(("given", "first"), [(3, 3), ([5, 6], 5), (None, None)])
def test_tokens_that_end_a_text(tmp_path: Path, given: Any, first: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WHOLE | {"eos_token_id": given}))
    assert eos_token_id(load_config(str(tmp_path))) == first


@pytest.mark.parametrize("value", [None, "256", 0, -1, True, 4096.5])
def test_a_size_that_is_none_is_refused_at_the_start(value: Any) -> None:
    """There vLLM's own config is at hand, which is not always transformers'."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 4096}
    for name in sizes:
        with pytest.raises(DrafterConfigError) as error:
            TargetShape.from_hf(SimpleNamespace(**sizes | {name: value}))
        assert error.value.field == name


@pytest.mark.parametrize("command", ["doctor", "bench", "train"])
def test_every_command_refuses_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    from vllm_dflash.cli import main

    target = tmp_path / "t"
    target.mkdir()
    (target / "config.json").write_text("7")
    draft, run = str(PAIR / "dflash"), str(tmp_path / "run")
    arguments = {
        "doctor": ["--draft", draft, "--skip-vllm"],
        "bench": ["--draft", draft, "--out", run, "--prompts", str(PAIR / "prompts.jsonl")],
        "train": ["--out", run, "--prompts", str(PAIR / "prompts.jsonl")],
    }[command]
    assert main([command, "--target", str(target), *arguments]) != 0
    said = "".join(capfd.readouterr())
    assert "its config.json holds a number, not an object of settings" in said, said


_SMALL: dict[str, Any] = dict(
    vocab_size=32,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 32}),
        ("qwen3", {}),
        ("llama", {}),
        ("granite", {"embedding_multiplier": 12.0}),
    ],
)
def test_the_factor_that_is_part_of_an_embedding(name: str, more: dict[str, Any]) -> None:
    """As transformers' model embeds, which drafters are trained with."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **_SMALL, **more)
    embedding = AutoModelForCausalLM.from_config(config).get_input_embeddings()
    ids = torch.arange(1, 32)
    with torch.no_grad():
        expected = embedding.weight[ids] * embedding_scale(config)
        torch.testing.assert_close(embedding(ids), expected)


@pytest.mark.parametrize(
    ("kind", "given", "state", "found"),
    [
        ("dflash", None, "warning", "rows times the target's 8: config.json does not say"),
        ("dflash", 1.0, "ok", "rows times 1; the target's times 8"),
        ("dflash2", None, "ok", "rows times 1; the target's times 8"),
    ],
)
def test_the_doctor_tells_what_a_drafters_rows_are_multiplied_by(
    kind: str, given: float | None, state: str, found: str
) -> None:
    from transformers import AutoConfig

    from pairs import random_drafter_config
    from vllm_dflash.tools.pair_checks import Settings, shape_checks

    drafter = random_drafter_config(kind=kind, input_embedding_scale=given)

    def lines(name: str) -> list[tuple[str, str]]:
        target = AutoConfig.for_model(name, **_SMALL | {"hidden_size": 64})
        checks = shape_checks(drafter, target, Settings())
        return [(check.state, check.found) for check in checks if check.name == "embedding"]

    assert lines("gemma3_text") == [(state, found)]
    assert lines("qwen3") == []
