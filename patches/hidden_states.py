"""Training on a CPU: vLLM's connector that writes hidden states, where there are no CUDA
streams."""

from vllm_dflash.patch import Patch

_MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
_CONNECTOR = f"{_MODULE}:ExampleHiddenStatesConnector"

PATCH = Patch(
    target=_CONNECTOR,
    scope="ours",
    needs="optional",
    fingerprints={_CONNECTOR: "787d0b0ada094843"},
    why=(
        "vLLM's asks for CUDA streams; ours is named by kv_connector_module_path, vLLM's own place"
        " for one"
    ),
    until="vLLM's connector runs without CUDA",
)
