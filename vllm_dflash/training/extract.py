"""Features by vLLM's own hidden-state extraction, in an engine process: the states that the target
really has when it is served.

It takes the place of transformers in the stage features, for targets that vLLM runs better or alone
(quantized, tensor parallel). Limits: an engine's worth of memory while it runs. Tests: ``pytest
tests/engine/test_train_extract.py``.

    vllm-dflash train ... --cache --extract-with vllm
"""

from collections.abc import Sequence
from pathlib import Path

from vllm_dflash.files import remove
from vllm_dflash.training.engines import run_engines
from vllm_dflash.training.generate import engine_args
from vllm_dflash.training.sequences import Shard
from vllm_dflash.training.settings import Settings

_ROOM = 2
"""Tokens past a sequence: the one that vLLM must sample to end a request, and the draft of it that
extraction makes."""


def extract(
    settings: Settings,
    folder: Path,
    target_layer_ids: Sequence[int],
    dtype: str,
    bytes_a_token: int,
    todo: Sequence[tuple[Path, Shard]],
) -> None:
    """Writes the feature shards at these paths, which lie in ``folder``, for these token shards.

    Raises:
        TrainingError: as ``run_engines``.
    """
    _sweep(folder)
    if not todo:
        return
    longest = max(int((shard.starts[1:] - shard.starts[:-1]).max()) for _, shard in todo)
    jobs = [
        {
            "path": str(path),
            "sequences": str(shard.path),
            "count": len(shard),
            "bytes_a_token": bytes_a_token,
            "dtype": dtype,
            "target_layer_ids": list(target_layer_ids),
            "batch": settings.features.features_batch,
        }
        for path, shard in todo
    ]
    args = engine_args(settings, dtype, longest + _ROOM) | extraction(target_layer_ids, folder)
    try:
        run_engines("extract", args, jobs, settings.generate.engines)
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Removes the engines' folders of files that are handed over, also those of an engine that was
    killed."""
    for left in folder.glob("extracted-*.part"):
        remove(left)


def extraction(target_layer_ids: Sequence[int], folder: Path) -> dict[str, object]:
    """Arguments of ``LLM`` that have it write these layers' outputs, in ascending order, to files
    in ``folder``."""
    # vLLM counts what goes into layers, so layer i's output is its i + 1.
    layers = sorted({i + 1 for i in target_layer_ids})
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        },
        "kv_transfer_config": {
            "kv_connector": "HiddenStates",
            "kv_connector_module_path": "vllm_dflash.training.hidden_states",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
    }
