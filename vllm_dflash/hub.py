"""What is loaded by Hugging Face's libraries, each thing in one way: folders, configs, tokenizers,
models and their dtype.

Code that a checkpoint brings runs only where the user says so, and that is said outright: what is
left open transformers asks at the terminal. Limits: transformers is imported when it is needed, for
that takes seconds.

    pytest tests/unit/test_remote_code.py
"""

from pathlib import Path
from typing import Any

from vllm_dflash.config import DrafterConfigError
from vllm_dflash.regular import expanded, is_folder

_SAMPLE = "def area(r):\n    return 3.14159 * r ** 2  # \u00fcber \u4f60\u597d\n"


class TargetError(ValueError):
    """A target cannot be read: ``str`` says which and why, with the ``remedy``."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem, self.remedy = problem, remedy


def drafter_folder(model: str, revision: str | None) -> Path | None:
    """The drafter's folder: the path itself, or the downloaded snapshot of a hub id; None where
    neither is there.

    Raises:
        DrafterConfigError: this user may not look there.
    """
    if is_folder(model):
        return expanded(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no hub id: another kind of address, which vLLM has read
        return None
    return Path(found).parent if isinstance(found, str) else None


def no_drafter_at(model: str) -> DrafterConfigError:
    """What to say where ``drafter_folder`` finds none: a path is no hub id, and cannot be
    fetched."""
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        return DrafterConfigError(
            f"{model} is no folder",
            "give a drafter's folder, or the hub id of one that is downloaded",
        )
    return DrafterConfigError(
        f"{model} is no folder, nor a hub id that is downloaded",
        f"give a drafter's folder, or fetch it with `hf download {model}`",
    )


def load_config(target: str, trust_remote_code: bool = False) -> Any:
    """The target's whole Hugging Face config.

    Raises:
        TargetError: there is none that can be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(
            f"{target} cannot be read ({str(error).splitlines()[0]})", "give its folder or hub id"
        ) from None


def load_model(target: str, dtype: str, device: str, trust_remote_code: bool = False) -> Any:
    """The target in plain PyTorch, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    return model.to(device).eval()


def count_parameters(config: Any, trust_remote_code: bool = False) -> int:
    """How many the model of a text config has; no weight is read."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(
    folder: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """transformers' tokenizer, or None where there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=revision, trust_remote_code=trust_remote_code
        )
        # transformers makes an empty one where a folder has a model's config and no tokenizer.
        return tokenizer if tokenizer(_SAMPLE)["input_ids"] else None
    # A folder without one, or with half of one, ends in many; tokenizers raises Exception itself.
    except Exception:
        return None
    except BaseException as error:
        # A panic of its Rust code, of which its own class is all that says so.
        if type(error).__name__ != "PanicException":
            raise
        return None


def are_equal(ours: Any, theirs: Any) -> bool:
    """Whether two tokenizers have the same tokens, and yield the same of a text."""
    return (
        ours.get_vocab() == theirs.get_vocab()
        and ours(_SAMPLE)["input_ids"] == theirs(_SAMPLE)["input_ids"]
    )


def count_tokens(tokenizer: Any) -> int | None:
    """One more than the largest id that a tokenizer yields; None where that is not known, or there
    is no tokenizer."""
    try:
        return None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    except Exception:  # a class of the checkpoint's own
        return None


def resolved_dtype(text: Any, asked: str) -> str:
    """The dtype that both models run in: what is asked for, or where that is auto the one of a
    target's text config."""
    if asked != "auto":
        return asked
    name = str(getattr(text, "dtype", None) or "bfloat16").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "bfloat16"


def eos_token_id(text: Any) -> int | None:
    """The first that a target's text config names, where it names several."""
    found = text.eos_token_id
    return found[0] if isinstance(found, list) else found
