"""V1 runner on a CPU: where a step's drafts are, without a tensor operator."""

from typing import Any

from vllm_dflash.patch import Patch


def _replace(original: Any, runner: Any, max_num_reqs: int) -> Any:
    from vllm_dflash.cpu.draft_metadata import DraftMetadata

    return DraftMetadata(runner.input_ids.np, max_num_reqs)


_METHOD = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._calc_spec_decode_metadata"

PATCH = Patch(
    target=_METHOD,
    scope="instance",
    needs="optional",
    fingerprints={
        _METHOD: "a4898c222c1726ab",
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "2a9fd2c519c76bcc",
    },
    why=(
        "vLLM's takes a dozen small operators a step, made for a GPU; on a CPU each costs more than"
        " it computes. No hook stands between the runner and its metadata"
    ),
    until="vLLM makes it by numpy on a CPU",
    replace=_replace,
)
