"""Changes weights in engines that run, by every way that there is, and reports what they write and
draft after each. Driven by ``reloads.run``.

Each job names an engine and its steps; a step changes weights, or nothing, and then the prompts are
generated, greedy. In an environment with ``RUNNER=v2`` the engines are of vLLM's V2 runner, by
Triton's interpreter.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

if os.environ.get("RUNNER") == "v2":
    from v2_interpreter import use_interpreter

    use_interpreter()

import torch
from engines import answer_jobs, model_runner, record_drafts, start
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


def read(step: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A step's tensors: those of its folder, less what it leaves ``out``, and some that are
    spoilt."""
    tensors = load_file(f"{step['path']}/model.safetensors")
    mask = f"{step['path']}/mask_embedding.pt"
    if step.get("mask") and os.path.exists(mask):
        tensors["mask_embedding"] = torch.load(mask)["embedding"]
    for name, how in step.get("spoil", {}).items():
        tensors[name] = {
            "nan": lambda t: t * torch.nan,
            "shape": lambda t: t[:-1],
            "new": lambda t: torch.zeros(3),
        }[how](tensors.get(name))
    for name, tensor in tensors.items():
        if name not in step.get("out", ()) and re.search(step.get("only", ""), name):
            yield name, tensor


class FromFiles(WeightTransferEngine):
    """What vLLM's engines for NCCL and CUDA IPC do, with tensors from a file in place of a
    trainer's."""

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)

    def init_transfer_engine(self, init_info: Any) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One tensor at a time, in a buffer that the next one overwrites where it fits."""
        for name, tensor in read(update_info):
            buffer = tensor.clone()
            self.model.load_weights([(name, buffer)])
            if "draft" in update_info:
                buffer.fill_(0 if buffer.dtype == torch.int64 else torch.nan)

    def receive_weights(self, update_info: Any) -> None: ...

    def shutdown(self) -> None: ...


WeightTransferEngineFactory.register_engine("files", FromFiles)


def change(llm: Any, step: dict[str, Any]) -> None:
    """Does what the step says."""
    how, runner = step["how"], model_runner(llm)
    if how == "reload":
        llm.collective_rpc("reload_weights", kwargs={"weights_path": step["path"]})
    elif how == "reload some":
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": read(step)})
    elif how in ("update", "draft update"):
        llm.collective_rpc(
            "start_weight_update" if how == "update" else "start_draft_weight_update"
        )
        llm.collective_rpc(
            "update_weights", args=(step | ({"draft": True} if how == "draft update" else {}),)
        )
        llm.collective_rpc("finish_weight_update")
    elif how == "close":
        llm.collective_rpc("finish_weight_update")
    elif how == "draft load":
        for item in read(step):
            runner.get_draft_model().load_weights([item])
    elif how == "sleep":
        llm.collective_rpc("sleep")
        llm.collective_rpc("wake_up")
    elif how in ("new storage", "new parameter", "in place"):
        model = runner.get_model()
        for name, tensor in read(step):
            put(model, name, tensor, how)
    else:
        assert how == "nothing"


def put(model: torch.nn.Module, name: str, tensor: Tensor, how: str) -> None:
    """Past vLLM's loaders; ``name`` and ``tensor`` as the model has them."""
    module, _, kind = name.rpartition(".")
    layer, _, projection = module.rpartition(".")
    joined, starts = "", {}
    if projection in ("q_proj", "k_proj", "v_proj"):
        attention = model.get_submodule(layer)
        ends = attention.q_size, attention.q_size + attention.kv_size
        joined, starts = "qkv_proj", dict(zip(("q_proj", "k_proj", "v_proj"), (0, *ends)))
    elif projection in ("gate_proj", "up_proj"):
        joined, starts = "gate_up_proj", {"gate_proj": 0, "up_proj": len(tensor)}
    if joined:
        module, start = f"{layer}.{joined}", starts[projection]
        whole = getattr(model.get_submodule(module), kind).data.clone()
        whole[start : start + len(tensor)] = tensor
        tensor = whole
    holder = model.get_submodule(module)
    parameter = getattr(holder, kind)
    if tensor.shape != parameter.shape:  # a vocabulary is padded
        tensor = torch.cat([tensor, parameter.data[len(tensor) :]])
    if how == "new storage":
        parameter.data = tensor.clone()
    elif how == "in place":
        parameter.data.copy_(tensor)
    else:
        new = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        # Its loader: vLLM keeps those of biases nowhere else.
        new.__dict__.update(parameter.__dict__)
        setattr(holder, kind, new)


def record_v2(speculator: Any, drafts: list[dict[str, Any]]) -> None:
    """As ``record_drafts``, for the V2 runner."""
    propose = speculator.propose

    def recording(batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = propose(batch, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            masks = len(speculator.sample_pos) // speculator.max_num_reqs
            for row, request in enumerate(batch.req_ids):
                anchor, token = (
                    int(speculator.sample_pos[row * masks]) - 1,
                    int(speculator.input_buffers.input_ids[row * speculator.num_query_per_req]),
                )
                drafts.append(
                    {
                        "request": int(request.split("-")[0]),
                        "anchor": anchor,
                        "token": token,
                        "draft": tokens[row].tolist(),
                    }
                )
        return tokens

    speculator.propose = recording


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    speculative = {"method": "dflash", "model": job["drafter"], "num_speculative_tokens": 7}
    llm = start(
        job["target"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 25,
        max_model_len=128,
        weight_transfer_config=WeightTransferConfig(backend="files"),
        additional_config={"dflash": {"adaptive": False}},
        **({"speculative_config": speculative} if job["drafter"] else {})
        | job.get("engine_args", {}),
    )
    runner, drafts, reports = model_runner(llm), [], []
    if job["drafter"]:
        is_v2 = hasattr(runner, "speculator")
        record_v2(runner.speculator, drafts) if is_v2 else record_drafts(runner, drafts)
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
    )
    for step in job["steps"]:
        if "reset" in step:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": step["reset"]})
            if not hasattr(runner, "speculator"):
                # What V1's layers prepare in their next forward is then of these weights.
                one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
                llm.generate([{"prompt_token_ids": job["prompts"][0]}], one, use_tqdm=False)
        error, first = None, len(drafts)
        try:
            change(llm, step)
        except Exception as problem:
            if not step["how"].startswith("draft"):
                raise
            error = f"{type(problem).__name__}: {problem}"
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False
        )
        reports.append(
            {
                "error": error,
                "tokens": [list(o.outputs[0].token_ids) for o in outputs],
                "drafts": drafts[first:],
            }
        )
    return reports


if __name__ == "__main__":
    if os.environ.get("RUNNER") == "v2":
        from vllm_dflash.plugin import register

        register()
    answer_jobs(run)
