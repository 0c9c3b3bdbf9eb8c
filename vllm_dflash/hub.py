"""What is loaded by Hugging Face's libraries, each thing in one way: folders, configs, tokenizers,
models and their dtype.

Code that a checkpoint brings runs only where the user says so, and that is said outright: what is
left open transformers asks at the terminal. Limits: transformers is imported when it is needed, for
that takes seconds.

    pytest tests/unit/test_remote_code.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dflash import fields
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.json_text import loads
from vllm_dflash.pairing import TargetShape, target_size
from vllm_dflash.regular import expanded, is_folder, read_regular

_LARGEST_CONFIG = 1 << 24
_CAME_WITH = "use the config.json that the target came with"
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


def is_path(model: str) -> bool:
    """Whether it can be no hub id."""
    return model.count("/") > 1 or model.startswith((".", "/", "~"))


def no_drafter_at(model: str) -> DrafterConfigError:
    """What to say where ``drafter_folder`` finds none: a path is no hub id, and cannot be
    fetched."""
    if is_path(model):
        return DrafterConfigError(
            f"{model} is no folder",
            "give a drafter's folder, or the hub id of one that is downloaded",
        )
    return DrafterConfigError(
        f"{model} is no folder, nor a hub id that is downloaded",
        f"give a drafter's folder, or fetch it with `hf download {model}`",
    )


def load_config(
    target: str, trust_remote_code: bool = False, *, needs_positions: bool = True
) -> Any:
    """The target's whole Hugging Face config, of which the text part gives the target's sizes, its
    positions and the tokens that end a text.

    Args:
        needs_positions: False where a server, or the user's overrides, decide on them.

    Raises:
        TargetError: there is none that can be read, or it lacks one of these.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
    except Exception as error:  # a config.json may hold anything, and brings its class's own errors
        raise _unreadable(target, error) from None
    try:
        TargetShape.from_hf(text)
        if needs_positions:
            _check_positions(text)
        _check_eos(text)
    except DrafterConfigError as error:
        raise TargetError(f"{target} cannot be served: {error.problem}", error.remedy) from None
    return config


def _unreadable(target: str, error: Exception) -> TargetError:
    """Why transformers could not read the config, by the key where it is known."""
    try:
        raw = loads((read_regular(Path(target) / "config.json", _LARGEST_CONFIG) or b"{}").decode())
    except (DrafterConfigError, OSError, ValueError):
        raw = {}
    if not isinstance(raw, Mapping):
        problem = f"its config.json holds {fields.json_type(raw)}, not an object of settings"
    elif not isinstance(raw.get("model_type", ""), str):
        problem = f"its model_type is {fields.shown(raw['model_type'])}, not a name"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # The check of a field's type says in a line of its own what is wrong with it.
        strict = type(error).__name__.startswith("StrictDataclass")
        problem = " ".join(" ".join(lines).split()) if strict else lines[0]
        if raw and not isinstance(error, (OSError, ValueError, KeyError)) and not strict:
            problem = f"transformers ends in {type(error).__name__}: {problem}"
    remedy = _CAME_WITH if raw != {} else "give its folder or hub id"
    return TargetError(f"{target} cannot be read ({problem})", remedy)


def _check_positions(text: Any) -> None:
    name = "max_position_embeddings"
    if getattr(text, name, None) is None:
        raise DrafterConfigError(
            f"its config ({getattr(text, 'model_type', 'of no type')}) gives no {name}: it has no"
            " attention layers, or counts positions in a way that no drafter does",
            "give another target, or write them into its config.json if it has them",
            field=name,
        )
    target_size(text, name)


def _check_eos(text: Any) -> None:
    found = getattr(text, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    if found is None or (ids and all(fields.is_int(each) and each >= 0 for each in ids)):
        return
    raise DrafterConfigError(
        f"the target's eos_token_id is {fields.shown(found)}",
        "give the token's id, a list of them, or null",
        field="eos_token_id",
    )


def load_model(target: str, dtype: str, device: str, trust_remote_code: bool = False) -> Any:
    """The target in plain PyTorch, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    model = model.to(device).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        # compressed-tensors writes its weights out in the first pass through the model itself, not
        # in one through its layers alone.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    return model


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
