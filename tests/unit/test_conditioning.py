"""What a kind of conditioning serves is what its plain PyTorch reference computes; the documented example of a third kind too.

Tests: ``pytest tests/unit/test_conditioning.py``.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import vllm_dflash.config
from pairs import random_drafter_config
from vllm_dflash.conditioning import kind_of
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.rotary import rotary_angles

DOCUMENT = Path(__file__).parents[2] / "docs" / "conditioning.md"


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> str:
    """The example kind of docs/conditioning.md, as if it were a file of the package."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    module = ModuleType("vllm_dflash.conditioning.documented")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_dflash.config, "CONDITIONINGS", (*vllm_dflash.config.CONDITIONINGS, "documented"))
    monkeypatch.setattr("vllm_dflash.conditioning.CONDITIONINGS", vllm_dflash.config.CONDITIONINGS)
    return "documented"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers ask which rank they are on."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('rank') / 'store'}", 0, "gloo")
        initialize_model_parallel()
        yield
        cleanup_dist_env_and_memory()


def compare(kind: str, **changes: object) -> None:
    config = random_drafter_config(conditioning=kind, **changes).with_()
    torch.manual_seed(0)
    reference = new_drafter(config)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    features = torch.randn(6, config.num_features * config.hidden_size)
    with torch.inference_mode():
        served = kind_of(config).Served(config, config.num_key_value_heads, torch.float32, None, "conditioning")
        # In no order, as they may come.
        for name, tensor in sorted(reference.state_dict().items(), key=lambda item: item[0][::-1]):
            served.load(name, tensor)
        for module in served.modules():  # as vLLM's loader does; on a CPU it packs the weights
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        context = served.combine(features)
        assert context.shape == (6, kind_of(config).context_width(config))
        keys, values = served.project(context)
    positions = torch.zeros(6, dtype=torch.long)  # at position 0 rotary changes nothing
    cos, sin = rotary_angles(config, positions)
    c = reference.context(features)
    for i, layer in enumerate(reference.layers):
        key, value = reference.layer_key_value(i, c, cos, sin)
        torch.testing.assert_close(layer.self_attn.k_norm(keys[:, i]), key, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(values[:, i], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dflash", "dflare"])
def test_served_is_the_reference(kind: str, bias: bool) -> None:
    compare(kind, attention_bias=bias)


def test_the_documented_example_works(documented: str) -> None:
    compare(documented)
