"""Checks a drafter against its target when vLLM's configuration is made, before any process starts or weight is loaded.

pytest tests/unit/test_checks.py
"""

from pathlib import Path
from typing import Any

from vllm_dflash.config import DrafterConfig, TargetShape, check_pair


def check_speculative_config(speculative: Any) -> None:
    """Refuses a drafter that does not fit: ``speculative`` is vLLM's ``SpeculativeConfig`` for one of our drafters.

    Raises:
        DrafterConfigError: the first thing that is wrong, with its remedy.
    """
    target = speculative.target_model_config
    folder = _folder(speculative.model, speculative.revision)
    if folder is not None:
        drafter = DrafterConfig.from_pretrained(folder)
    else:
        hf_config = speculative.draft_model_config.hf_config
        drafter = DrafterConfig.from_dict(getattr(hf_config, "model", hf_config).to_dict())
    check_pair(drafter, TargetShape.from_hf(target.hf_config), speculative.num_speculative_tokens, target.max_model_len)
    if folder is not None and (Path(speculative.model).is_dir() or any(folder.glob("*.safetensors"))):
        from vllm_dflash.weights import check_tensors

        check_tensors(drafter, folder)


def _folder(model: str, revision: str | None) -> Path | None:
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
