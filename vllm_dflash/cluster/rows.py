"""One row of a batch run: what is asked, and what is written of the answer. Pure, but for vLLM's
own checks of the sampling parameters.

pytest tests/unit/test_cluster_sampling.py tests/engine/test_cluster_batch.py
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_dflash.cluster.settings import ClusterError
from vllm_dflash.prompts import PromptError, token_ids

SAMPLING = "sampling_params"
"""The field of a row with sampling parameters of its own; they win over the run's."""
_UNWRITTEN = ("logprobs", "prompt_logprobs", "logprob_token_ids")
"""Parameters whose result has no field in what is written."""


def prompt_of(row: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """The row's prompt, messages or prompt_token_ids as token ids.

    Raises:
        PromptError: it has none of them, or one that cannot be used.
    """
    return token_ids(
        {name: value for name, value in row.items() if value is not None},
        "this row",
        tokenizer,
        vocab_size,
    )


def sampling_of(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The row's sampling parameters over the run's.

    Raises:
        PromptError: they are no object.
    """
    own = row.get(SAMPLING)
    if own is None:
        own = {}
    if not isinstance(own, Mapping):
        raise PromptError(f"{SAMPLING} is {own!r}: give an object such as {{'temperature': 0.7}}")
    # Parquet gives every row all the fields that any row has.
    return {**defaults, **{name: value for name, value in own.items() if value is not None}}


def params_of(given: Mapping[str, Any]) -> Any:
    """vLLM's ``SamplingParams`` of values as JSON and Parquet have them, for one completion.

    vLLM's constructor takes any type. Its engine core takes those of the fields alone: it reads
    requests in a thread that ends of another type, and then waits for requests for ever.

    Raises:
        PromptError: a name, type or value that vLLM does not take; the field is named.
    """
    import msgspec
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    _check_names("", given, {*SamplingParams.__struct_fields__} - {"output_kind"})
    for name, value in given.items():
        try:
            msgspec.msgpack.encode(value)  # as requests travel to the engine core
        except Exception as error:  # half of a surrogate pair, a number beyond 64 bits
            raise PromptError(f"{SAMPLING}: {name} cannot be sent to the engine: {error}") from None
    try:
        # JSON's keys are text, those of logit_bias numbers.
        params = msgspec.convert(
            {**given, "output_kind": RequestOutputKind.FINAL_ONLY.value},
            SamplingParams,
            str_keys=True,
        )
    except Exception as error:  # whatever vLLM's own checks raise
        raise PromptError(f"{SAMPLING}: {error}") from None
    for name, value in given.items():
        made = getattr(params, name)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(made):
            # msgspec passes over names that a dataclass does not have.
            taken = {each.name for each in dataclasses.fields(made) if each.init}
            _check_names(f"{name}.", value, taken)
    unwritten = [n for n in _UNWRITTEN if getattr(params, n) is not None]
    unwritten += [] if params.detokenize else ["detokenize=false"]
    if unwritten:
        raise PromptError(
            f"{SAMPLING}: nothing is written of {', '.join(unwritten)}: leave it out; a server or"
            " `LLM` gives it"
        )
    if params.n != 1:
        raise PromptError(f"{SAMPLING}: n is {params.n}: a row has one completion; repeat the row")
    return params


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Refuses a run's sampling parameters as ``params_of`` does a row's: all its rows would fail.

    Raises:
        ClusterError: the field is named.
        ImportError: there is no vLLM here.
    """
    try:
        params_of(sampling)
    except PromptError as error:
        raise ClusterError(
            f"the run's sampling parameters, of --sampling, --temperature and --max-tokens: {error}"
        ) from None


def _check_names(where: str, given: Mapping[str, Any], taken: set[str]) -> None:
    """Those with an underscore are for vLLM alone to set."""
    for name in given:
        if name not in taken or name.startswith("_"):
            raise PromptError(
                f"{SAMPLING}: {where}{name} is no sampling parameter of vLLM's that can be set"
                " here: leave it out, or mend its name"
            )


def answered(output: Any) -> dict[str, Any]:
    """What is written of a finished request: vLLM's ``RequestOutput``.

    ``drafts``, ``draft_tokens`` and ``accepted_tokens`` are None without a drafter, and where vLLM
    gives none: a request that ended at a stop string.
    """
    done = output.outputs[0]
    counts = {"drafts": None, "draft_tokens": None, "accepted_tokens": None}
    if done.spec_decode_metrics is not None:
        given = done.spec_decode_metrics.to_dict()
        counts = {
            "drafts": given["num_spec_steps"],
            "draft_tokens": given["num_draft_tokens"],
            "accepted_tokens": given["num_accepted_draft_tokens"],
        }
    return {
        "completion": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(done.token_ids),
        **counts,
        "error": None,
    }


def failed(error: str) -> dict[str, Any]:
    """What is written of a row that could not be answered."""
    return {
        "completion": None,
        "finish_reason": None,
        "prompt_tokens": None,
        "completion_tokens": None,
        "drafts": None,
        "draft_tokens": None,
        "accepted_tokens": None,
        "error": error,
    }
