"""What of a server's traffic can be trained on: the recorder's judgement, without the server.

Completions and chats with one answer in text are; what cannot be told from the texts again (tools,
images, messages with more than role and content, another chat template, reasoning that the server
took out) is not, nor what the target would not have said by itself (structured outputs, biases,
bans, penalties, a prompt that was cut, an adapter's answer). A request that sets a field which is
not known to leave the answer alone is left out, and so is one for which the server's defaults do.

    pytest tests/unit/test_train_recorder.py
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_HARMLESS = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stream",
        "stream_options",
        "stream_interval",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "return_token_offsets",
        "return_prompt_text",
        "user",
        "metadata",
        "store",
        "request_id",
        "session_id",
        "priority",
        "cache_salt",
        "service_tier",
    }
)
"""Fields of a request that leave the answer to the target, whatever they hold. Others may be left
out, or as in ``_NEUTRAL``."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "echo": (False,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "vllm_xargs": ({},),
}
"""What other fields may hold: values that vLLM takes for nothing."""


@dataclass(frozen=True)
class Serving:
    """What a server does to every request of one kind, and what it serves beside the target."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters where a request sets none: those of generation_config.json and of
    ``--override-generation-config``."""
    template: bool = False
    """Whether chats go through a template that is not the target's own."""
    is_target: Callable[[str], bool] = lambda name: True
    """Whether a model's name is the target's, not an adapter's."""

    @classmethod
    def of(cls, app: Any, chat: bool) -> "Serving":
        """As vLLM's application has it.

        Raises:
            AttributeError: this vLLM keeps it elsewhere.
        """
        state = app.state
        handler = state.openai_serving_chat if chat else state.openai_serving_completion
        return cls(
            handler.default_sampling_params,
            bool(state.args.chat_template),
            state.openai_serving_models.is_base_model,
        )

    def left_out(self, chat: bool) -> str | None:
        """What of this server is not recorded whatever is asked, and why; None where all may
        be."""
        if chat and self.template:
            return "--chat-template is not the target's own template: chats are not recorded"
        found = [f"{n}={v}" for n, v in self.defaults.items() if not _leaves_alone(n, v)]
        return (
            f"the server's default is {', '.join(found)}: answers to requests that do not set it"
            " otherwise are not recorded; --generation-config vllm leaves it out"
            if found
            else None
        )


def answer_text(body: bytes) -> tuple[str, str] | None:
    """The answer's text and finish reason of a response, streamed or whole; None where it is no
    single plain text."""
    if body.lstrip().startswith(b"{"):
        events = [json.loads(body)]
    else:
        # Not splitlines(): U+2028 and its like are text, which JSON may write as they are.
        lines = [line.removesuffix("\r") for line in body.decode().split("\n")]
        data = [line[6:] for line in lines if line.startswith("data: ")]
        if not data or data.pop() != "[DONE]":
            return None  # cut short: the client has gone
        events = [json.loads(line) for line in data]
    text, reason = "", None
    for choice in (choice for event in events for choice in event["choices"]):
        part = choice.get("delta") or choice.get("message") or choice
        if choice["index"] != 0 or any(
            part.get(name)
            for name in ("tool_calls", "function_call", "reasoning", "reasoning_content", "refusal")
        ):
            return None
        text += part.get("content") or part.get("text") or ""
        reason = choice.get("finish_reason") or reason
    return (text, reason) if text and reason in ("stop", "length") else None


def as_line(
    chat: bool, request: dict[str, Any], answer: tuple[str, str] | None, serving: Serving
) -> str | None:
    """A line as ``vllm-dflash train`` reads it; None where the prompt could not be told from it
    again, or the answer is not the target's alone."""
    if answer is None or not _is_plain(request, serving) or (chat and serving.template):
        return None
    prompt = request["messages" if chat else "prompt"]
    if not prompt:
        return None
    if chat:
        if not all(map(_is_text, prompt)):
            return None
        asked: dict[str, Any] = {
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompt]
        }
    elif isinstance(prompt, str):
        asked = {"prompt": prompt}
    elif all(type(i) is int for i in prompt):
        asked = {"prompt_token_ids": prompt}
    else:
        return None
    return json.dumps(
        asked | {"response": answer[0], "finish_reason": answer[1]}, ensure_ascii=False
    )


def _is_text(message: Any) -> bool:
    """Whether a message of a chat is a role and a text, and nothing else that a template may write:
    tool calls, reasoning, a name."""
    return (
        isinstance(message, dict)
        and isinstance(message.get("content"), str)
        and all(value is None for name, value in message.items() if name not in ("role", "content"))
    )


def _is_plain(request: Mapping[str, Any], serving: Serving) -> bool:
    """Whether the target answered, and no field of the request, nor the server's default for it,
    had a say."""
    own = {name: value for name, value in request.items() if value is not None}
    if own.get("model") and not serving.is_target(own["model"]):
        return False
    # vLLM joins the stop tokens of both; of the rest a request's own wins.
    left = [(n, v) for n, v in serving.defaults.items() if n not in own or n == "stop_token_ids"]
    return all(_leaves_alone(name, value) for name, value in [*own.items(), *left])


def _leaves_alone(name: str, value: Any) -> bool:
    """Whether a request's field leaves prompt and answer to the target."""
    return name in _HARMLESS or value is None or value in _NEUTRAL.get(name, ())
