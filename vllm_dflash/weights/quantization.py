"""Whether vLLM can read a drafter's ``quantization_config``, and whether the weights are packed as
it says.

vLLM's own class for the method reads it where vLLM is there; what that class cannot do without is
known here too, so that it is named as well where vLLM is not.

    pytest tests/unit/test_quantization.py
"""

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from vllm_dflash import fields
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.weights.messages import CAME_WITH, some

_FIELD = "quantization_config"
_GPTQ = (("bits",), ("group_size",), ("desc_act",))
_AWQ = (("w_bit", "bits"), ("q_group_size", "group_size"), ("zero_point",))
NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gptq": _GPTQ,
    "auto_gptq": _GPTQ,
    "gptq_marlin": _GPTQ,
    "awq": _AWQ,
    "auto_awq": _AWQ,
    "awq_marlin": _AWQ,
    "fp8": (("activation_scheme",),),
    "fbgemm_fp8": (("modules_to_not_convert",), ("activation_scale_ub",)),
    "modelopt": (("quant_algo", "quantization"),),
    "modelopt_fp4": (("quant_algo", "quantization"),),
    "quark": (("export",),),
}
"""Per method, the keys that its class in vLLM asks for; of several any one."""
_OBJECTS = ("config_groups", "quantization", "export")
_WHOLE = ("bits", "w_bit", "group_size", "q_group_size")
_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_PACKED = NEEDS.keys() | {"compressed-tensors"}
"""Methods that leave no plain weights to a layer that they quantize, and give it scales."""
_QUANTIZED = re.compile("scale|packed|qweight|qzeros|zero_point|g_idx|amax|weight_shape")
"""In the last part of the names that methods give to what stands beside or for a weight."""
_LEFT_OUT = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude")
"""Where methods list the layers that they leave as they are."""


def check_quantization(config: DrafterConfig, dtype: Any = None) -> None:
    """Refuses a ``quantization_config`` that vLLM could not make layers of.

    Args:
        dtype: torch's, that in which the drafter will serve; None: not known.

    Raises:
        DrafterConfigError: names the key, or says what vLLM says of it.
    """
    raw = config.quantization_config
    if raw is None:
        return
    method = raw["quant_method"]
    for names in NEEDS.get(method, ()):
        if all(raw.get(name) is None for name in names):
            raise _bad(names[-1], "is missing", f"{method} needs {' or '.join(names)}")
    for name in _OBJECTS:
        if raw.get(name) is not None and not isinstance(raw[name], Mapping):
            raise _bad(name, f"is {fields.shown(raw[name])}", "it should be an object")
    for name in _WHOLE:
        if raw.get(name) is not None and not fields.is_int(raw[name]):
            raise _bad(name, f"is {fields.shown(raw[name])}", "it should be a whole number")
    _check_by_vllm(method, copy.deepcopy(dict(raw)), dtype)


def _check_by_vllm(method: str, raw: dict[str, Any], dtype: Any) -> None:
    """Has vLLM's class read it, as the load will; does nothing where vLLM is not installed."""
    try:
        from vllm.model_executor.layers.quantization import get_quantization_config
    except ImportError:
        return
    try:
        if method.startswith("modelopt"):
            # One name in the file stands for all of ModelOpt's; the file's algorithm tells them
            # apart.
            for name in ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"):
                found = get_quantization_config(name).override_quantization_method(raw, None)
                if found is not None:
                    method = found
                    break
            if method == "modelopt_mixed" and "quantized_layers" not in raw:
                return  # in a file of its own
        read = get_quantization_config(method).from_config(raw)
        computes_in = read.get_supported_act_dtypes()
    except Exception as error:  # whatever it trips over: the load would trip too
        said = (str(error).strip().splitlines() or [repr(error)])[0]
        raise DrafterConfigError(
            f"{_FIELD} is {fields.shown(raw)}, and vLLM's {method} cannot read it"
            f" ({type(error).__name__}: {said})",
            "install what it asks for, or use another checkpoint"
            if isinstance(error, ImportError)
            else fields.CAME_WITH,
            field=_FIELD,
        ) from None
    if dtype is not None and dtype not in computes_in:
        names = [str(each).removeprefix("torch.") for each in computes_in]
        raise DrafterConfigError(
            f"{_FIELD}.quant_method is {method}, whose layers compute in {' or '.join(names)}, not"
            f" in {str(dtype).removeprefix('torch.')}",
            f"serve with --dtype {names[0]}, or use another checkpoint",
            field=f"{_FIELD}.quant_method",
        )


def check_left_out(plain: Collection[str], found: Collection[str]) -> None:
    """Refuses weights that are quantized beside the layers' projections, such as ``fc`` and
    ``lm_head``: nothing here unpacks them.

    Args:
        plain: names of weights that have to be as they are, ours.
        found: our names of what there is.

    Raises:
        DrafterConfigError: names them.
    """
    modules = {name.removesuffix(".weight") for name in plain if name.endswith(".weight")}
    packed = [
        name
        for name in sorted(set(found) - set(plain))
        if name.rpartition(".")[0] in modules and _QUANTIZED.search(name.rpartition(".")[2])
    ]
    if not packed:
        return
    names = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in packed))
    raise DrafterConfigError(
        f"{names} of the checkpoint are quantized ({some(packed)}), and of a drafter only the"
        " projections of its layers are served so",
        f"use a checkpoint whose quantization leaves out {names}, as its {_FIELD} lists them under"
        " ignore or modules_to_not_convert",
        field=_FIELD,
    )


def check_packed(config: DrafterConfig, found: Mapping[str, str]) -> None:
    """Refuses plain weights under a ``quantization_config``, and 8-bit floats without their scale:
    vLLM would serve numbers that nobody wrote.

    Args:
        found: safetensors dtypes by our names. Layers that the method leaves out by name are not
            judged.

    Raises:
        DrafterConfigError: names the projections.
    """
    raw = config.quantization_config
    if raw is None or raw["quant_method"] not in _PACKED or _leaves_out(raw):
        return
    weights = {
        name: dtype
        for name, dtype in found.items()
        if name.startswith("layers.") and name.endswith("_proj.weight")
    }
    plain = sorted(name for name, dtype in weights.items() if dtype in _PLAIN)
    if plain:
        dtypes = " and ".join(sorted({weights[name] for name in plain}))
        raise DrafterConfigError(
            f"{_FIELD} says {raw['quant_method']}, and the weights hold plain {dtypes} in place of"
            f" quantized tensors: {some(plain)}",
            f"{CAME_WITH}, or remove {_FIELD} where none are quantized",
            field=_FIELD,
        )
    bare = sorted(
        name
        for name, dtype in weights.items()
        if dtype.startswith("F8_")
        and not any(
            other.startswith(name.removesuffix("weight")) and "scale" in other for other in found
        )
    )
    if bare:
        raise DrafterConfigError(
            f"the weights hold no scale of the quantized {some(bare)}", CAME_WITH, field=_FIELD
        )


def _leaves_out(raw: Mapping[str, Any]) -> bool:
    """Whether some of a drafter's layers are not quantized; its head never is."""
    places = [raw, raw.get("quantization")]
    return any(
        entry != "lm_head"
        for place in places
        if isinstance(place, Mapping)
        for name in _LEFT_OUT
        if isinstance(place.get(name), list)
        for entry in place[name]
    )


def _bad(name: str, problem: str, wanted: str) -> DrafterConfigError:
    place = f"{_FIELD}.{name}"
    return DrafterConfigError(f"{place} {problem}: {wanted}", fields.CAME_WITH, field=place)
