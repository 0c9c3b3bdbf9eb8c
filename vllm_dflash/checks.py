"""Reads and checks a drafter when vLLM's configuration is made, before any process starts or weight
is loaded.

pytest tests/unit/test_checks.py
"""

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError, printable
from vllm_dflash.fields import shown
from vllm_dflash.formats import (
    CONFIG_FILE,
    METHOD,
    is_foreign,
    is_ours,
    kind_named,
    published_format,
    read_raw,
    write,
)
from vllm_dflash.formats.angelspec import MODEL_TYPE
from vllm_dflash.hub import count_tokens, drafter_folder, load_tokenizer
from vllm_dflash.kinds import kind_of
from vllm_dflash.log import logger
from vllm_dflash.pairing import TargetShape, check_pair

_ADVISED = "_VLLM_DFLASH_EAGER_ADVISED"
"""Inherited by the processes that vLLM starts, each of which makes the configuration again."""
_NESTED = ("mask_token_id", "target_layer_ids", "causal")
"""What vLLM reads of ``dflash_config``."""
_CONFIG = "vllm_dflash"
"""Attribute of vLLM's draft config that holds the drafter's settings in its published format, for
all processes."""


def check_speculative_config(speculative: Any) -> dict[str, Any]:
    """Refuses a drafter that does not fit: ``speculative`` is vLLM's ``SpeculativeConfig`` for one
    of our drafters.

    Returns:
        The attributes that vLLM's draft config gets, so that every format reads the same from there
        on.

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
    check_pair(
        drafter,
        target_shape(target, drafter),
        speculative.num_speculative_tokens,
        target.max_model_len,
    )
    check_sampling(
        drafter,
        speculative.draft_sample_method,
        speculative.enable_adaptive_verification,
        speculative.use_local_argmax_reduction,
    )
    if folder is not None and (Path(speculative.model).is_dir() or _has_weights(folder)):
        from vllm_dflash.weights import check_tensors

        check_tensors(drafter, folder, target.dtype)
        if drafter.vocab_size < TargetShape.from_hf(target.hf_config).vocab_size:
            check_padding(folder, speculative.draft_sample_method)
    if drafter.unknown_keys:
        logger.warning("%s", said_of_unknown_keys(drafter))
    return _attributes(drafter)


def _has_weights(folder: Path) -> bool:
    """Whether a folder of the hub's cache holds more than config.json."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model.bin"))


def advise_eager(vllm_config: Any) -> None:
    """Logs, once for all processes, that our drafter serves better without compilation on a CPU;
    ``vllm_config`` is vLLM's ``VllmConfig``."""
    if not is_ours(vllm_config.speculative_config):
        return
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if vllm_config.compilation_config.mode == CompilationMode.NONE or os.environ.get(_ADVISED):
        return
    os.environ[_ADVISED] = "1"
    logger.warning(
        "On a CPU a drafter serves better with --enforce-eager (enforce_eager=True): compilation"
        " takes a minute at the start, and keeps the layers of target and drafter from running"
        " kernel by kernel"
    )


def check_room(vllm_config: Any) -> None:
    """Refuses an engine whose steps have no room to verify a draft: it would draft in each for
    nothing; ``vllm_config`` is vLLM's ``VllmConfig``.

    Raises:
        DrafterConfigError: names the setting.
    """
    speculative, scheduler = vllm_config.speculative_config, vllm_config.scheduler_config
    if not is_ours(speculative):
        return
    slots, k = speculative.max_num_new_slots_for_drafting, speculative.num_speculative_tokens
    for name, taken in (("max_num_batched_tokens", slots), ("max_num_scheduled_tokens", 0)):
        given = getattr(scheduler, name)
        if given is not None and given - taken < 2:
            blocks = f" of which the drafter's block takes {taken}," if taken else ""
            raise DrafterConfigError(
                f"{name} is {given},{blocks} so a step has no room to verify a draft",
                f"set {name} to {taken + 1 + k} or more for each request that runs at a time",
            )


def check_sampling(
    drafter: DrafterConfig,
    draft_sample_method: str,
    adaptive_verification: bool = False,
    local_argmax: bool = False,
) -> None:
    """Refuses what vLLM does with a drafter's logits where the kind's head is not the best token of
    each row: to draw drafts by them, to cut drafts by what it makes of them, or to do without them.

    Raises:
        DrafterConfigError: names the setting.
    """
    kind = kind_of(drafter)
    if kind.head.is_argmax:
        return
    if adaptive_verification:
        raise DrafterConfigError(
            f"enable_adaptive_verification is true, and a {kind.label} drafter's tokens are not the"
            " best of the logits that vLLM would judge them by",
            "leave enable_adaptive_verification out of the speculative config",
        )
    if local_argmax:
        raise DrafterConfigError(
            f"use_local_argmax_reduction is true, and a {kind.label} drafter's tokens are not the"
            " best of each row's logits",
            "leave use_local_argmax_reduction out of the speculative config",
        )
    if draft_sample_method == "probabilistic":
        raise DrafterConfigError(
            f"draft_sample_method is probabilistic, and a {kind.label} drafter's tokens depend on"
            " each other",
            "leave draft_sample_method out of the speculative config",
        )


def check_padding(folder: Path, draft_sample_method: str) -> None:
    """Refuses what does not go with a target whose embedding has rows that the drafter has not.

    Raises:
        DrafterConfigError: the drafter embeds by a table of its own, or its probabilities are asked
            for.
    """
    from vllm_dflash.weights.headers import read_shapes

    if any(name.removeprefix("model.") == "embed_tokens.weight" for name in read_shapes(folder)):
        raise DrafterConfigError(
            "the drafter has an embedding of its own, shorter than the target's, and a prompt may"
            " hold ids beyond it",
            "serve it with the target that its model card names",
            field="vocab_size",
        )
    if draft_sample_method == "probabilistic":
        raise DrafterConfigError(
            "draft_sample_method is probabilistic, and the drafter's probabilities are of fewer"
            " tokens than the target's",
            "leave draft_sample_method out of the speculative config",
            field="vocab_size",
        )


def said_of_unknown_keys(drafter: DrafterConfig) -> str:
    """What inspect, doctor and the server's log say of keys that nothing here reads."""
    names = printable(", ".join(drafter.unknown_keys[:20]))
    return (
        f"config.json has keys that are not known here: {names}. Should one change what the drafter"
        " computes, tau will be low"
    )


def target_shape(target: Any, drafter: DrafterConfig) -> TargetShape:
    """The shape of ``target``, vLLM's ``ModelConfig``; its tokenizer is read only where the two
    vocabularies differ in length."""
    shape = TargetShape.from_hf(target.hf_config)
    if shape.vocab_size <= drafter.vocab_size:
        return shape
    tokenizer = load_tokenizer(target.tokenizer or target.model, revision=target.tokenizer_revision)
    return TargetShape.from_hf(target.hf_config, count_tokens(tokenizer))


def check_target(target: Any, pipeline_parallel_size: int) -> None:
    """Refuses a target that no drafter of ours can be conditioned on: ``target`` is vLLM's
    ``ModelConfig``.

    Raises:
        DrafterConfigError: its hidden states cannot be captured, or its recurrent state does not
            survive speculation on this platform.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.platforms import current_platform

    if pipeline_parallel_size > 1:
        raise DrafterConfigError(
            f"pipeline_parallel_size is {pipeline_parallel_size}, but the drafter shares the"
            " target's embedding, which another stage would hold",
            "set pipeline_parallel_size to 1, and tensor_parallel_size to the number of devices",
        )
    model_class, architecture = target.registry.resolve_model_cls(target.architectures, target)
    if not supports_eagle3(model_class):
        raise DrafterConfigError(
            f"vLLM's model of {architecture} cannot hand out the hidden states of its layers (it"
            " lacks SupportsEagle3), and a drafter needs them",
            "serve this target without a DFlash drafter, or on a vLLM whose model has that"
            " interface",
        )
    if target.is_hybrid and current_platform.is_cpu():
        # Not the drafter's doing: n-gram speculation changes the output too
        # (tests/engine/test_targets.py).
        raise DrafterConfigError(
            f"{architecture} has recurrent layers, whose state vLLM's CPU build does not keep right"
            " under speculation, with any drafter: it would write another text than without one",
            "serve this target on a GPU, or without a drafter",
        )


def check_logits_processors() -> None:
    """Refuses logits processors that are installed as plug-ins, for vLLM's V1 runner: beside drafts
    it leaves them out without a word.

    Raises:
        DrafterConfigError: there are some; those that the user names are refused by vLLM itself.
    """
    names = sorted(
        {f"{found.name} ({found.value})" for found in entry_points(group="vllm.logits_processors")}
    )
    if names:
        raise DrafterConfigError(
            f"logits processors are installed as plug-ins, {', '.join(names)}: vLLM's V1 model"
            " runner applies them without a drafter only, so the output would be another than"
            " without one. Uninstall them, serve without a drafter, or on a GPU start with"
            " VLLM_USE_V2_MODEL_RUNNER=1"
        )


def drafter_config(hf_config: Any) -> DrafterConfig:
    """The drafter of a draft config that ``check_speculative_config`` has passed."""
    raw: Mapping[str, Any] = getattr(hf_config, _CONFIG)
    return DrafterConfig.from_dict(raw)


def method_of(model: str, revision: str | None, method: str | None) -> str | None:
    """The method of a speculative config: ours where it says none and ``model`` is a drafter of
    ours at hand, else what it says.

    vLLM tells other drafters by their config where no method is said, and dflash's by the word in
    their path alone: another would be served as a whole model of its own.

    Raises:
        DrafterConfigError: it says a method that cannot serve the drafter.
    """
    try:
        folder = drafter_folder(model, revision)
        kind = None if folder is None else kind_named(read_raw(folder))
    except (DrafterConfigError, OSError, ValueError):  # vLLM's to judge, by a method of its own
        return method
    if kind is None or (kind.own_method is not None and method in (None, kind.own_method)):
        return method
    check_method(kind, method, model)
    return METHOD


def check_method(kind: kinds.Kind, method: str | None, model: str) -> None:
    """Refuses another method than ours for a drafter of ours.

    Raises:
        DrafterConfigError: names both, and the remedy.
    """
    if method in (None, METHOD):
        return
    raise DrafterConfigError(
        f"method is {method!r} in the speculative config, and {model} is a {kind.label} drafter",
        f'set "method": "{METHOD}", or point "model" at a drafter of that method',
    )


def read_early(
    model: str, revision: str | None, num_speculative_tokens: int | None
) -> DrafterConfig | None:
    """The drafter at hand before vLLM has read it; None where it is not there yet or is none of
    ours.

    Raises:
        DrafterConfigError: its config.json is unusable, or of another kind that needs K. Later,
            transformers or vLLM would refuse some of that without a remedy.
    """
    folder = drafter_folder(model, revision)
    if folder is None:
        return None
    raw = read_raw(folder)
    if is_foreign(raw):
        kind = raw.get("speculators_model_type")
        if kind and num_speculative_tokens is None:
            raise DrafterConfigError(
                f"speculators_model_type is {shown(kind)}, not one of {', '.join(kinds.names())},"
                " and num_speculative_tokens is not given",
                "serve it with vLLM itself, with num_speculative_tokens and the method of its kind,"
                " or point 'model' at another drafter",
                field="speculators_model_type",
                where=str(folder / CONFIG_FILE),
            )
        return None
    drafter = DrafterConfig.from_pretrained(folder)
    check_model_type(raw, drafter, folder)
    if drafter.quantization_config is not None:
        from vllm_dflash.weights.quantization import check_quantization

        try:
            check_quantization(drafter)
        except DrafterConfigError as error:
            raise error.at(folder / CONFIG_FILE) from None
    return drafter


def check_model_type(raw: Any, drafter: DrafterConfig, folder: Path) -> None:
    """Refuses a config.json, of contents ``raw``, that every tool reads and vLLM does not.

    Raises:
        DrafterConfigError: says how it is written anew.
    """
    if raw.get("model_type") == MODEL_TYPE:
        raise DrafterConfigError(
            f"model_type is {shown(MODEL_TYPE)}, by which vLLM cannot read a config.json",
            f"write it anew: vllm-dflash convert {folder} FOLDER --to {published_format(drafter)}",
            field="model_type",
            where=str(folder / CONFIG_FILE),
        )


def _attributes(drafter: DrafterConfig) -> dict[str, Any]:
    """What vLLM's own code reads of a draft config: it knows one spelling of each, and not all
    formats have it."""
    raw = write(drafter, published_format(drafter))
    read = dict(raw)
    read.setdefault("dflash_config", {name: raw[name] for name in _NESTED if name in raw})
    attributes = {
        _CONFIG: raw,
        # By another name than the published one, which vLLM may treat in a way of its own.
        "architectures": [kind_of(drafter).served_architecture],
    } | {
        name: read[name]
        for name in ("dflash_config", "block_size", "layer_types", "sliding_window")
    }
    if len(set(drafter.windows)) > 1:
        # vLLM's own V1 proposer cannot serve mixed layers, and its config refuses them for any
        # drafter; ours can.
        attributes["layer_types"] = None
    return attributes | {
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in drafter.target_layer_ids]
    }
