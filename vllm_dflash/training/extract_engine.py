"""One vLLM engine that takes hidden states of sequences and writes feature shards; started by
``extract``, whose end it does not outlive.

pytest tests/engine/test_train_extract.py
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_dflash.engines.child import Parent, RefusedError, Work, generate, serve, start_llm
from vllm_dflash.patches import hidden_states
from vllm_dflash.plugin import patch_set
from vllm_dflash.training.features import write_shard
from vllm_dflash.training.sequences import Shard

_PATIENCE_S = 60


def begin(engine_args: dict[str, Any]) -> tuple[Work, None]:
    """Starts the engine; a job is a shard of sequences."""
    if not patch_set().fits(hidden_states.PATCH):
        raise RefusedError(
            "this vLLM's connector is not the one that ours extends: use --extract-with"
            " transformers"
        )
    transfer = engine_args["kv_transfer_config"]["kv_connector_extra_config"]
    # ``extract`` removes it: an engine may take its time to end, and then be killed.
    transfer["shared_storage_path"] = tempfile.mkdtemp(
        prefix="extracted-", suffix=".part", dir=transfer["shared_storage_path"]
    )
    llm = start_llm(engine_args)

    def extract(job: dict[str, Any], parent: Parent) -> int:
        """Writes the job's shard; how many sequences it has."""
        shard = Shard(Path(job["sequences"]))
        rows = _rows(llm, shard, job["target_layer_ids"], job["batch"], parent)
        write_shard(Path(job["path"]), len(shard.tokens), job["bytes_a_token"], job["dtype"], rows)
        return len(shard)

    return extract, None


def _rows(
    llm: Any, shard: Shard, target_layer_ids: list[int], batch: int, parent: Parent
) -> Iterator[Tensor]:
    """Each sequence's features [S, T * H], a batch's files on the disk at a time."""
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        cleanup_hidden_states,
        load_hidden_states,
    )

    written = sorted(set(target_layer_ids))
    order = [written.index(i) for i in target_layer_ids]
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    for at in range(0, len(shard), batch):
        tokens = [shard[i].tokens.tolist() for i in range(at, min(at + batch, len(shard)))]
        outputs = generate(llm, tokens, one)
        paths = [Path(out.kv_transfer_params["hidden_states_path"]) for out in outputs]
        _finish(llm, paths)
        for ids, path in zip(tokens, paths, strict=True):
            found = load_hidden_states(str(path))
            cleanup_hidden_states(str(path))
            if found["token_ids"].tolist() != ids:
                raise RefusedError(
                    f"vLLM's extraction gave {len(found['token_ids'])} states for a sequence of"
                    f" {len(ids)}: use --extract-with transformers"
                )
            yield found["hidden_states"][:, order].flatten(1)
        parent.done(len(tokens))


def _finish(llm: Any, paths: list[Path]) -> None:
    """Steps the engine until the files are there: they are written in a step after the requests'
    last, which ``generate`` does not take."""
    end = time.monotonic() + _PATIENCE_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > end:
            raise RefusedError(
                f"vLLM's extraction wrote no {paths[0]} within {_PATIENCE_S} s: use --extract-with"
                " transformers"
            )
        llm.llm_engine.step()


if __name__ == "__main__":
    serve(begin)
