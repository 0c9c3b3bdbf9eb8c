"""Features by vLLM's own hidden-state extraction are those of transformers, to rounding, and train
the same drafter."""

from pathlib import Path

import pytest
import torch

from training_runs import answer_held_out, answered_prompts, held_out_file, make_target, settings
from vllm_dflash.files import RunError
from vllm_dflash.training import drafter, features, generate, target
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.settings import Settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

LAYERS = (3, 0, 4)
"""Not in ascending order, as vLLM gives them, and with the last."""


def read(chosen: Settings) -> list[torch.Tensor]:
    """Every sequence's features, as training reads them."""
    found = target.find_target(chosen)
    config, data = drafter.plan(chosen, found)[0], generate.sequences(chosen)
    reader = features.Features(
        chosen, data, config, found, target.load_target(found, chosen, "cpu")
    )
    rows = [data[i].tokens for i in range(len(data))]
    return [reader([i], features.padded([row]))[0] for i, row in enumerate(rows)]


def test_they_agree_with_transformers(tmp_path: Path) -> None:
    """Several shards and batches; a shard that was there already is kept."""
    model = make_target(tmp_path / "target")
    held_out, ids = held_out_file(tmp_path / "held-out.jsonl")
    prompts = answered_prompts(model, tmp_path / "prompts.jsonl", 20, 12)
    runs = {}
    for how in ("transformers", "vllm"):
        chosen = settings(
            model,
            prompts,
            tmp_path / how,
            held_out_prompts=str(held_out),
            target_layer_ids=LAYERS,
            extract_with=how,
        )
        answer_held_out(chosen, ids)
        runs[how] = chosen
    run_stages(runs["transformers"], ("generate", "features"))
    run_stages(runs["vllm"], ("generate", "features"))
    folder = features.folder_of(runs["vllm"])
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert not list(folder.glob("*.part"))
    for ours, theirs in zip(read(runs["vllm"]), read(runs["transformers"]), strict=True):
        assert ours.shape[1] == len(LAYERS) * 64
        assert torch.allclose(ours, theirs, atol=1e-4)
    with pytest.raises(RunError, match=r"extract_with 'vllm' \(now 'transformers'\)"):
        run_stages(
            settings(
                model,
                prompts,
                tmp_path / "vllm",
                held_out_prompts=str(held_out),
                target_layer_ids=LAYERS,
            ),
            ("features",),
        )
