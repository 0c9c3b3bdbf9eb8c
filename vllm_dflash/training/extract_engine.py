"""One vLLM engine that takes hidden states of sequences and writes feature shards; started by ``extract``, whose end it does not outlive.

python -m vllm_dflash.training.extract_engine ORDER.json       with its standard input left open
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_dflash.patches import hidden_states
from vllm_dflash.plugin import patch_set
from vllm_dflash.training.features import write_shard
from vllm_dflash.training.files import TrainingError
from vllm_dflash.training.generate_engine import run_as_child, start
from vllm_dflash.training.sequences import Shard

_PATIENCE_S = 60


def main(order: dict[str, Any]) -> None:
    """Writes each job's shard, and prints ``done N`` for its N sequences."""
    transfer = order["engine_args"]["kv_transfer_config"]["kv_connector_extra_config"]
    with tempfile.TemporaryDirectory(prefix="extracted-", suffix=".part", dir=transfer["shared_storage_path"]) as scratch:
        transfer["shared_storage_path"] = scratch
        if not patch_set().fits(hidden_states.PATCH):
            raise TrainingError("this vLLM's connector is not the one that ours extends: use --extract-with transformers")
        llm = start(order["engine_args"])
        for job in order["jobs"]:
            shard = Shard(Path(job["sequences"]))
            rows = _rows(llm, shard, job["target_layer_ids"], job["batch"])
            write_shard(Path(job["path"]), len(shard.tokens), job["bytes_a_token"], job["dtype"], rows)
            print(f"done {len(shard)}", flush=True)


def _rows(llm: Any, shard: Shard, target_layer_ids: list[int], batch: int) -> Iterator[Tensor]:
    """Each sequence's features [S, T * H], a batch's files on the disk at a time."""
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import cleanup_hidden_states, load_hidden_states

    written = sorted(set(target_layer_ids))
    order = [written.index(i) for i in target_layer_ids]
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    for at in range(0, len(shard), batch):
        tokens = [shard[i].tokens.tolist() for i in range(at, min(at + batch, len(shard)))]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in tokens], one, use_tqdm=False)
        paths = [Path(out.kv_transfer_params["hidden_states_path"]) for out in outputs]
        _finish(llm, paths)
        for ids, path in zip(tokens, paths, strict=True):
            found = load_hidden_states(str(path))
            cleanup_hidden_states(str(path))
            if found["token_ids"].tolist() != ids:
                raise TrainingError(
                    f"vLLM's extraction gave {len(found['token_ids'])} states for a sequence of {len(ids)}: use --extract-with transformers"
                )
            yield found["hidden_states"][:, order].flatten(1)


def _finish(llm: Any, paths: list[Path]) -> None:
    """Steps the engine until the files are there: they are written in a step after the requests' last, which ``generate`` does not take."""
    end = time.monotonic() + _PATIENCE_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > end:
            raise TrainingError(f"vLLM's extraction wrote no {paths[0]} within {_PATIENCE_S} s: use --extract-with transformers")
        llm.llm_engine.step()


if __name__ == "__main__":
    run_as_child(main)
