"""Reads and checks a drafter when vLLM's configuration is made, before any process starts or weight is loaded.

pytest tests/unit/test_checks.py
"""

import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_dflash.config import DrafterConfig, DrafterConfigError, TargetShape, check_pair
from vllm_dflash.formats import CONFIG_FILE, FORMAT_OF, claims, write

SETTLED = "vllm_dflash"
"""Attribute of vLLM's draft config that holds the drafter's settings in its published format, for all processes."""


def check_speculative_config(speculative: Any) -> None:
    """Refuses a drafter that does not fit: ``speculative`` is vLLM's ``SpeculativeConfig`` for one of our drafters.

    What fits is written into vLLM's draft config, so that every format reads the same from there on.

    Raises:
        DrafterConfigError: the first thing that is wrong, with its remedy.
    """
    target, hf_config = speculative.target_model_config, speculative.draft_model_config.hf_config
    folder = drafter_folder(speculative.model, speculative.revision)
    if folder is not None:
        drafter = DrafterConfig.from_pretrained(folder)
    else:
        drafter = DrafterConfig.from_dict(getattr(hf_config, "model", hf_config).to_dict())
    check_target(target, speculative.target_parallel_config.pipeline_parallel_size)
    check_pair(drafter, TargetShape.from_hf(target.hf_config), speculative.num_speculative_tokens, target.max_model_len)
    if folder is not None and (Path(speculative.model).is_dir() or any(folder.glob("*.safetensors"))):
        from vllm_dflash.weights import check_tensors

        check_tensors(drafter, folder)
    _settle(hf_config, drafter)
    # EAGLE's K/V of a position depend on the token after it, so vLLM takes back the last page of every prefix-cache hit. Ours
    # depend on the target's hidden state at that position alone: hits are as long as without speculation.
    speculative.disable_eagle_block_drop = True


def check_target(target: Any, pipeline_parallel_size: int) -> None:
    """Refuses a target that no drafter of ours can be conditioned on: ``target`` is vLLM's ``ModelConfig``.

    Raises:
        DrafterConfigError: its hidden states cannot be captured, or its recurrent state does not survive speculation on this platform.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.platforms import current_platform

    if pipeline_parallel_size > 1:
        raise DrafterConfigError(
            f"pipeline_parallel_size is {pipeline_parallel_size}, but the drafter shares the target's embedding, which another stage "
            "would hold: set pipeline_parallel_size to 1, and tensor_parallel_size to the number of devices"
        )
    model_class, architecture = target.registry.resolve_model_cls(target.architectures, target)
    if not supports_eagle3(model_class):
        raise DrafterConfigError(
            f"vLLM's model of {architecture} cannot hand out the hidden states of its layers (it lacks SupportsEagle3), and a drafter "
            "needs them: serve this target without a DFlash drafter, or on a vLLM whose model has that interface"
        )
    if target.is_hybrid and current_platform.is_cpu():
        # Not the drafter's doing: n-gram speculation changes the output too (tests/engine/test_targets.py).
        raise DrafterConfigError(
            f"{architecture} has recurrent layers, whose state vLLM's CPU build does not keep right under speculation, with any drafter: "
            "it would write another text than without one. Serve this target on a GPU, or without a drafter"
        )


def check_logits_processors() -> None:
    """Refuses logits processors that are installed as plug-ins, for vLLM's V1 runner: beside drafts it leaves them out without a word.

    Raises:
        DrafterConfigError: there are some; those that the user names are refused by vLLM itself.
    """
    names = sorted({f"{found.name} ({found.value})" for found in entry_points(group="vllm.logits_processors")})
    if names:
        raise DrafterConfigError(
            f"logits processors are installed as plug-ins, {', '.join(names)}: vLLM's V1 model runner applies them without a drafter only, "
            "so the output would be another than without one. Uninstall them, serve without a drafter, or on a GPU start with "
            "VLLM_USE_V2_MODEL_RUNNER=1"
        )


def settled(hf_config: Any) -> DrafterConfig:
    """The drafter of a draft config that ``check_speculative_config`` has passed."""
    raw: Mapping[str, Any] = getattr(hf_config, SETTLED)
    return DrafterConfig.from_dict(raw)


def read_early(model: str, revision: str | None) -> DrafterConfig | None:
    """The drafter at hand before vLLM has read it; None where it is not there yet or is none of ours.

    Raises:
        DrafterConfigError: its config.json is unusable. Later, transformers would refuse some of that without a remedy.
    """
    folder = drafter_folder(model, revision)
    try:
        ours = folder is not None and claims(json.loads((folder / CONFIG_FILE).read_text()))
    except (OSError, ValueError, RecursionError):
        return None  # vLLM says what is wrong with the file
    return DrafterConfig.from_pretrained(folder) if ours and folder is not None else None


def drafter_folder(model: str, revision: str | None) -> Path | None:
    """The drafter's folder: the path itself, or the downloaded snapshot of a hub id; None where neither is there."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no hub id: another kind of address, which vLLM has read
        return None
    return Path(found).parent if isinstance(found, str) else None


def _settle(hf_config: Any, drafter: DrafterConfig) -> None:
    """Writes what vLLM's own code reads of a draft config: it knows one spelling of each, and not all formats have it."""
    raw = write(drafter, FORMAT_OF[drafter.conditioning])
    setattr(hf_config, SETTLED, raw)
    for name in ("dflash_config", "block_size", "layer_types", "sliding_window"):
        setattr(hf_config, name, raw[name])
    if len(set(drafter.windows)) > 1:
        # vLLM's own V1 proposer cannot serve mixed layers, and its config refuses them for any drafter; ours can.
        hf_config.layer_types = None
    hf_config.eagle_aux_hidden_state_layer_ids = [i + 1 for i in drafter.target_layer_ids]
