"""The pairs that are fuzzed: target, drafter, and what to ask them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine.harness import DFLARE, DRAFTER, PROMPTS, TARGET
from fuzzing.draw import Corpus


class Pair(NamedTuple):
    target: Path
    drafter: Path
    corpus: Corpus
    overrides: dict[str, dict[str, Any]]
    """By name, vLLM's ``hf_overrides`` with which the target runs too."""
    left_out: tuple[str, ...] = ()
    """Fields of ``draw.ORDINARY`` with which vLLM's own engine ends."""


_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
}


def _window(layers: int) -> dict[str, Any]:
    """Every layer sees 32 positions."""
    return {
        "sliding_window": 32,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * layers,
    }


def _tokenizer() -> "object":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TARGET)


def _embedded(drafter: Path) -> Pair:
    tokenizer = _tokenizer()
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    return Pair(
        TARGET,
        drafter,
        Corpus([tokenizer(text)["input_ids"] for text in texts], texts, len(tokenizer)),
        {"yarn": _YARN, "window": _window(8)},
    )


def _random_pair(family: str, kind: str, folder: Path) -> Pair:
    """A random target of another family, with the embedded pair's tokenizer, and a drafter trained
    for a moment on its text."""
    import torch
    from transformers import AutoModelForCausalLM

    from pairs import random_drafter_config
    from targets import FAMILIES
    from trained import continued, train_briefly

    tokenizer = _tokenizer()
    vocab = len(tokenizer)
    layers = (0, 2, 4) if kind == "dflash" else (0, 1, 2, 3, 4)
    target = FAMILIES[family].make(
        folder / "target", scale=0.25, vocab_size=vocab, eos_token_id=0, spoken=vocab
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TARGET / name, target / name)
    rng = random.Random(0)
    prompts = [[rng.randrange(2, vocab) for _ in range(4)] for _ in range(24)]
    config = random_drafter_config(
        vocab_size=vocab, kind=kind, target_layer_ids=layers, num_target_layers=None
    )
    drafter = train_briefly(target, folder / "drafter", config, prompts, 40, steps=60)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    known = continued(model, prompts, 40).tolist()
    # Most prompts are beginnings of what the drafter knows: there its drafts are accepted.
    beginnings = [text[: rng.randint(4, 12)] for text in known for _ in range(3)]
    corpus = Corpus(known + beginnings, [tokenizer.decode(p) for p in known], vocab)
    # vLLM's LoRA of experts takes Triton's kernels, which a CPU has not.
    left_out = ("enable_lora",) if "moe" in family else ()
    return Pair(target, drafter, corpus, {"yarn": _YARN}, left_out)


PAIRS: dict[str, Callable[[Path], Pair]] = {
    "embedded": lambda _: _embedded(DRAFTER),
    "dflare": lambda _: _embedded(DFLARE),
    "llama": lambda folder: _random_pair("llama", "dflash", folder),
    "llama-dflare": lambda folder: _random_pair("llama", "dflare", folder),
    "qwen2": lambda folder: _random_pair("qwen2", "dflash", folder),
    "moe": lambda folder: _random_pair("qwen3 moe", "dflash", folder),
}
"""By name, what makes a pair, in a folder where it is not there already."""
