"""A target whose embedding and lm_head have more rows than its tokenizer, and a drafter without
those rows: served right.

Such a pair (MiMo: 152,576 rows against 152,064, vLLM 46435) was refused as one of another target.

    pytest tests/engine/test_padded_vocabulary.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from broken import edit
from engine.harness import DRAFTER, TARGET, Batch, Job, held_out_prompts, run_engines
from pairs import make_random_drafter, random_drafter_config
from unit.test_checks import configure
from vllm_dflash.checks import check_padding
from vllm_dflash.errors import DrafterConfigError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROWS, PADDED = 4096, 4608


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded target with rows of noise behind its vocabulary; those of the lm_head are never
    the best."""
    folder = Path(shutil.copytree(TARGET, tmp_path_factory.mktemp("padded") / "target"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.shape[0] == ROWS and ("embed_tokens" in name or "lm_head" in name):
            noise = torch.randn(
                PADDED - ROWS, tensor.shape[1], generator=torch.Generator().manual_seed(0)
            )
            tensors[name] = torch.cat(
                [tensor, (noise * tensor.float().std() * 0.05).to(tensor.dtype)]
            )
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": PADDED}))
    return folder


@pytest.fixture(scope="module")
def batches(padded: Path) -> dict[str, Batch]:
    prompts = held_out_prompts(6)
    jobs = {
        "plain": Job(padded, None, prompts, max_tokens=48),
        "drafts": Job(padded, DRAFTER, prompts, max_tokens=48),
        "unpadded": Job(TARGET, DRAFTER, prompts, max_tokens=48),
    }
    return dict(zip(jobs, (each[0] for each in run_engines(list(jobs.values()))), strict=True))


def test_the_output_is_plain_decodings(batches: dict[str, Batch]) -> None:
    assert batches["drafts"].tokens == batches["plain"].tokens


def test_as_much_is_accepted_as_without_padding(batches: dict[str, Batch]) -> None:
    """Embedding and lm_head come from the padded target; vLLM's own V2 runner once shared neither,
    and nothing was accepted."""
    assert batches["unpadded"].tokens == batches["drafts"].tokens, (
        "the noise was never the best token"
    )
    assert batches["drafts"].tau == pytest.approx(batches["unpadded"].tau, abs=0.01)
    assert batches["drafts"].tau > 2


def test_ids_of_the_padding_are_drafted_after(padded: Path, tmp_path: Path) -> None:
    """A target may be made to write them, and the tables of a drafter's head have no rows for them:
    the engine ended with an IndexError."""
    config = random_drafter_config(
        kind="dspark", hidden_size=256, vocab_size=ROWS, num_target_layers=8
    )
    drafter = make_random_drafter(tmp_path / "dspark", config=config)
    prompts, sampling = held_out_prompts(2), {"allowed_token_ids": [PADDED - 2, PADDED - 1]}
    plain, drafted = (
        batches[0]
        for batches in run_engines(
            [Job(padded, d, prompts, max_tokens=12, sampling=sampling) for d in (None, drafter)]
        )
    )
    assert min(map(min, plain.tokens)) >= ROWS
    assert drafted.tokens == plain.tokens


def test_what_does_not_go_with_padding(padded: Path, tmp_path: Path) -> None:
    """Ids of the padding would end an engine whose drafter embeds by a shorter table of its own."""
    own = Path(shutil.copytree(DRAFTER, tmp_path / "own"))
    edit(own, lambda tensors: tensors.update({"embed_tokens.weight": torch.zeros(ROWS, 256)}))
    configure(TARGET, own)
    with pytest.raises(ValueError, match="an embedding of its own, shorter than the target's"):
        configure(padded, own)
    with pytest.raises(DrafterConfigError, match="leave draft_sample_method out"):
        check_padding(DRAFTER, "probabilistic")


def test_without_a_tokenizer_it_is_not_known_to_fit(padded: Path, tmp_path: Path) -> None:
    configure(padded, DRAFTER)
    bare = Path(
        shutil.copytree(
            padded,
            tmp_path / "bare",
            ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"),
        )
    )
    with pytest.raises(ValueError, match=r"vocab_size is 4608, the drafter's is 4096"):
        configure(bare, DRAFTER)
