"""A quantization_config is read before the load, by what vLLM's own classes ask for.

compressed-tensors with ``config_groups: 3``, gptq without ``bits`` and plain weights under either
were called sound by inspect, and ended the server's start in an AttributeError.

    pytest tests/unit/test_quantization.py
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from broken import edit, edit_config
from pairs import make_random_drafter, random_drafter_config
from quantized import QUANTIZATION, quantize, quantize_target
from unit.test_checks import configure
from vllm_dflash import hub
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.tools.pair_checks import checkpoint_checks
from vllm_dflash.weights import check_dtypes, check_tables, expected_tensors
from vllm_dflash.weights.quantization import NEEDS, check_packed, check_quantization

pytestmark = pytest.mark.vllm  # whose classes read it

SOUND: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"bits": 4, "group_size": 128, "zero_point": True},
    "fp8": {"activation_scheme": "dynamic"},
    "fbgemm_fp8": {"modules_to_not_convert": [], "activation_scale_ub": 1200.0},
    "modelopt": {"quant_algo": "FP8"},
    "compressed-tensors": QUANTIZATION,
}
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": 3},
        "quantization_config.config_groups is 3: it should be an object",
    ),
    "gptq": ({"quant_method": "gptq"}, "quantization_config.bits is missing"),
    "gptq bits": (
        {"quant_method": "gptq", "bits": "4", "group_size": 1, "desc_act": False},
        "quantization_config.bits is '4'",
    ),
    "modelopt": ({"quant_method": "modelopt"}, "needs quant_algo or quantization"),
    "fp8": ({"quant_method": "fp8"}, "quantization_config.activation_scheme is missing"),
}
"""Judged without vLLM too."""
MALFORMED_TO_VLLM: dict[str, tuple[dict[str, Any], str]] = {
    "awq": (
        {"quant_method": "awq", "bits": 3, "group_size": 128, "zero_point": True},
        "vLLM's awq cannot read it (ValueError: Unsupported num_bits = 3",
    ),
    "groups": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": 3}},
        "vLLM's compressed-tensors cannot read it",
    ),
    "online": ({"quant_method": "fp8_per_tensor"}, "vLLM's fp8_per_tensor cannot read it"),
}


def _drafter(folder: Path, quantization: dict[str, Any]) -> DrafterConfig:
    make_random_drafter(folder)
    edit_config(folder, quantization_config=quantization)
    return DrafterConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", MALFORMED)
def test_what_no_vllm_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    quantization, words = MALFORMED[name]
    with pytest.raises(DrafterConfigError, match="Use the config") as error:
        check_quantization(_drafter(tmp_path / "d", quantization))
    assert words in str(error.value)
    assert error.value.field.startswith("quantization_config.")


@pytest.mark.vllm
@pytest.mark.parametrize("name", [*MALFORMED, *MALFORMED_TO_VLLM])
def test_inspect_doctor_and_start_say_the_same(
    random_target: Path, tmp_path: Path, name: str
) -> None:
    quantization, words = (MALFORMED | MALFORMED_TO_VLLM)[name]
    _drafter(tmp_path / "d", quantization)
    found = inspect_checkpoint(tmp_path / "d")
    (error,) = [e for e in found.errors if words in str(e)]
    assert error.remedy in [check.remedy for check in checkpoint_checks(found)]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the message is compared)
        configure(random_target, tmp_path / "d")
    assert str(error) in str(refusal.value)


@pytest.mark.vllm
@pytest.mark.parametrize("method", SOUND)
def test_the_table_is_vllms(tmp_path: Path, method: str) -> None:
    """A sound one passes, and vLLM's class refuses it too without a key that the table asks for."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    sound = SOUND[method] | {"quant_method": method}
    check_quantization(_drafter(tmp_path / "d", sound), torch.bfloat16)
    for names in NEEDS.get(method, ()):
        without = {name: value for name, value in sound.items() if name not in names}
        with pytest.raises((ValueError, KeyError)):
            get_quantization_config(method).from_config(without)


@pytest.mark.vllm
def test_a_dtype_that_the_method_does_not_compute_in(tmp_path: Path) -> None:
    drafter = _drafter(tmp_path / "d", SOUND["fp8"] | {"quant_method": "fp8"})
    check_quantization(drafter, torch.bfloat16)
    with pytest.raises(DrafterConfigError, match=r"not in float32: serve with --dtype bfloat16"):
        check_quantization(drafter, torch.float32)


@pytest.mark.parametrize("method", SOUND)
def test_plain_weights_under_a_quantization_config(tmp_path: Path, method: str) -> None:
    """vLLM casts plain weights to a method's 8-bit floats, and takes whatever lies in memory for
    their scales."""
    _drafter(tmp_path / "d", SOUND[method] | {"quant_method": method})
    words = f"says {method}, and the weights hold plain"
    (error,) = [e for e in inspect_checkpoint(tmp_path / "d").errors if words in str(e)]
    assert "layers.0.mlp.down_proj.weight" in error.problem
    assert "remove quantization_config" in error.remedy


def test_layers_that_a_method_leaves_out(tmp_path: Path) -> None:
    kept = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    drafter = _drafter(tmp_path / "d", kept | {"ignored_layers": ["layers.0.mlp.down_proj"]})
    check_packed(drafter, {"layers.0.mlp.down_proj.weight": "BF16"})


def test_packed_weights_are_sound_and_eight_bits_have_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantized.GROUP", 16)
    make_random_drafter(tmp_path / "d")
    quantize(tmp_path / "d", tmp_path / "packed", tmp_path / "plain")
    assert inspect_checkpoint(tmp_path / "packed").problems == []

    def to_eight_bits(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.ones(1)
        del tensors["layers.0.mlp.up_proj.weight_scale"]

    edit(tmp_path / "d", to_eight_bits)
    edit_config(
        tmp_path / "d", dtype="bfloat16", quantization_config=SOUND["fp8"] | {"quant_method": "fp8"}
    )
    assert inspect_checkpoint(tmp_path / "d").problems == [
        "the weights hold no scale of the quantized layers.0.mlp.up_proj.weight: use the weights"
        " that the config.json came with"
    ]


def test_a_heads_projections_stay_plain() -> None:
    """DFly's head has projections too, and quantization is of the layers': a sound checkpoint was
    refused, and a head in 8 bits was not."""
    config = random_drafter_config(kind="dfly").with_(
        quantization_config=SOUND["fp8"] | {"quant_method": "fp8"}
    )
    found = dict.fromkeys(expected_tensors(config), "BF16")
    for name in [name for name in found if name.startswith("layers.") and "_proj." in name]:
        found |= {name: "F8_E4M3", f"{name}_scale": "F32"}
    check_packed(config, found)
    check_dtypes(config, found)
    head = "hidden_correction.up_proj.weight"
    with pytest.raises(DrafterConfigError, match=f"{head} is F8_E4M3 and should be BF16"):
        check_dtypes(config, found | {head: "F8_E4M3"})


QUANTIZED_TABLES = {
    "fc": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
    "lm_head": {"weight_packed": torch.int32, "weight_scale": torch.float32},
    "hidden_norm": {"weight_scale": torch.float32},
}


@pytest.mark.parametrize("quantized", [True, False], ids=["with a config", "without"])
@pytest.mark.parametrize("name", QUANTIZED_TABLES)
def test_own_tables_in_few_bits_are_refused_by_name(
    tmp_path: Path, name: str, quantized: bool
) -> None:
    """They were "unexpected tensors", or of a dtype that they should not have. ModelOpt keeps its
    settings in a file of its own, so there may be no quantization_config."""
    make_random_drafter(tmp_path / "d", tables=("lm_head.weight",))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        plain = tensors[f"{name}.weight"]
        if "weight_packed" in QUANTIZED_TABLES[name]:
            del tensors[f"{name}.weight"]
        for part, dtype in QUANTIZED_TABLES[name].items():
            shape = (1,) if "scale" in part else plain.shape
            tensors[f"{name}.{part}"] = torch.ones(shape).to(dtype)

    edit(tmp_path / "d", spoil)
    if quantized:
        edit_config(tmp_path / "d", quantization_config=QUANTIZATION)
    said = [str(error) for error in inspect_checkpoint(tmp_path / "d").errors]
    [refused] = [
        problem for problem in said if f"{name} of the checkpoint are quantized" in problem
    ]
    assert f"{name}.weight_scale" in refused
    assert f"whose quantization leaves out {name}" in refused
    assert not any("unexpected" in problem or "of a dtype" in problem for problem in said)


def test_names_beside_plain_weights_are_no_quantization(tmp_path: Path) -> None:
    config = random_drafter_config(kind="dfly")
    check_tables(config, expected_tensors(config))
    check_tables(config, ["fc.bias", "fc.weight_v", "extra.weight_scale"])


def test_a_quantized_target_in_plain_pytorch(random_target: Path, tmp_path: Path) -> None:
    """Its layers alone are passed through, as for a drafter's features; only a pass through the
    whole model wrote compressed-tensors' weights out."""
    quantize_target(random_target, tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    ids = torch.arange(12)[None]
    model = hub.load_model(str(tmp_path / "int8"), "float32", "cpu")
    with torch.inference_mode():
        hidden = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(input_ids=ids).logits)
    name = "model.layers.0.self_attn.q_proj.weight"
    written_out = stored[name].float() * stored[f"{name}_scale"]
    found = model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(found.detach(), written_out)
    assert not found.is_inference()
