"""Random engines and random requests, as JSON: what the differential fuzzer asks. Pure; one seed
draws the same again."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

MAX_MODEL_LEN = 512
REFUSED = ("min_p", "logit_bias")
"""Fields that vLLM refuses with any speculative method (docs/features.md): the request alone fails,
and its neighbours go on."""
ORDINARY: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",
    "structured_outputs_config": {"backend": "auto"},
    "enable_lora": False,
    "max_loras": 1,
    "enable_prompt_embeds": False,
    "reasoning": "none",
    "override": "none",
}
"""Settings of both engines where nothing is drawn. ``reasoning``: whether grammars wait for a
reasoning parser's end, and if so whether they hold in the reasoning too. ``override``: one of the
pair's."""
WINDOW_GROUPS = 4
"""Groups of layers with pages of their own where the target's layers have a window and the
drafter's have none: of three layers each, as the embedded pair's drafters have, and the target has
eight."""
ADAPTERS = 3
"""LoRA adapters, 1 to this."""
KNOWN = ("thinking_token_budget",)
"""Fields that vLLM itself answers wrongly, without a drafter or with any (docs/features.md); drawn
only where asked for by name."""
_SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    },
    {"type": "array", "items": {"enum": ["a", "bc", "self"]}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    },
]
_REGEXES = [
    r"def [a-z]{3,8}_[a-z]{3,8}\(self\):\n    return (None|True|False)",
    r"[0-9]{2,6}",
    r"(self\.|return )[a-z]+",
]
_CHOICES = [
    ["self.assertEqual(result, expected)", "return self.value", "raise ValueError(message)"],
    ["a", "ab", "abc"],
]
_TEMPERATURES = [9e-6, 1e-3, 0.01, 0.015, 0.02, 0.3, 0.3, 0.7, 0.7, 1.0, 1.0, 1.3, 2.0]
"""vLLM makes 0.01 of what is below it and above 0."""
_GRAMMARS = [
    'start: "self" ("." NAME)+ "\\n"\nNAME: /[a-z]{1,6}/\n',
    'start: "x" | "(" start ")"\n',
]
_TAG = (
    '{"structures": [{"begin": "def", "schema": {"type": "string"}, "end": "end"}], "triggers":'
    ' ["def"]}'
)


@dataclass(frozen=True)
class Corpus:
    """What a pair's prompts, stop strings and token ids are drawn from."""

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    """The same, as text."""
    vocab: int


def draw_common(rng: random.Random, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of both engines: those that change what a request is answered. ``overrides``: names
    of the pair's, of which one may be drawn."""
    embeds = rng.random() < 0.15
    return {
        "logprobs_mode": rng.choice(
            ["raw_logprobs"] * 5 + ["processed_logprobs", "raw_logits", "processed_logits"]
        ),
        "structured_outputs_config": _draw_backend(rng, embeds),
        "enable_lora": rng.random() < 0.12,
        "max_loras": rng.choice([1, ADAPTERS]),
        "enable_prompt_embeds": embeds,
        "reasoning": rng.choice(["none"] * 6 + ["outside", "inside"]),
        "override": rng.choice([*overrides, "none"]) if rng.random() < 0.3 else "none",
    }


def _draw_backend(rng: random.Random, embeds: bool) -> dict[str, Any]:
    # For prompt embeddings vLLM adds a token to the tokenizer, and guidance takes none that has
    # more tokens than the target: each such request is refused.
    guidance = [] if embeds else ["guidance"]
    backend = rng.choice(["auto", "auto", "xgrammar", "outlines", *guidance])
    found: dict[str, Any] = {"backend": backend}
    if backend in ("guidance", "xgrammar") and rng.random() < 0.4:
        found["disable_any_whitespace"] = True
    if backend == "guidance" and rng.random() < 0.4:
        found["disable_additional_properties"] = True
    return found


def without(requests: Sequence[dict[str, Any]], names: Collection[str]) -> list[dict[str, Any]]:
    """The requests without these fields, their own and those of their sampling parameters."""
    return [
        {k: v for k, v in r.items() if k not in names}
        | {"params": {k: v for k, v in r["params"].items() if k not in names}}
        for r in requests
    ]


def ordinary(common: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Settings of both engines, those of these names as where nothing is drawn."""
    return {k: ORDINARY[k] if k in names else v for k, v in common.items()}


def draw_settings(rng: random.Random, override: str = "none") -> dict[str, Any]:
    """Settings of the engine that drafts, which may change nothing: ``args`` for vLLM, and how it
    is driven. ``override``: the one that ``draw_common`` drew."""
    block_size = rng.choice([None, None, 32, 64])
    pages = -(-MAX_MODEL_LEN // (block_size or 128))
    groups = WINDOW_GROUPS if override == "window" else 1
    # vLLM starts no engine with fewer: a whole request's of each group, one more where a window
    # slides, and one that stays empty.
    least = groups * (pages + 1) + 1
    max_num_seqs = rng.choice([1, 2, 4, 8, 16, 16])
    # No fewer than requests (vLLM's own rule), and room for a draft beside a block: fewer are
    # refused.
    budget = rng.choice([64, 80, 128, 256, 1024, max(max_num_seqs, rng.randint(9, 20))])
    args: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": budget,
        "enable_prefix_caching": rng.random() < 0.7,
        "num_gpu_blocks_override": rng.choice(
            [least, least + 1, 2 * groups * pages, 16 * groups * pages]
        ),
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority"]),
        "stream_interval": rng.choice([1, 1, 3]),
    }
    if block_size:
        args["block_size"] = block_size
    if rng.random() < 0.2:
        args["long_prefill_token_threshold"] = rng.choice([16, 40])
    plan = rng.choice(["whole", "adaptive", "random", "random"])
    return {
        "args": args,
        "num_speculative_tokens": rng.choice([1, 2, 3, 5, 7, 7, 7]),
        "draft_sample_method": rng.choice(["greedy"] * 6 + ["probabilistic"]),
        "plan": plan,
        "plan_seed": rng.randrange(1 << 30),
        "asynchronous": rng.random() < 0.2,
        "own_process": rng.random() < 0.15,
        "resets": sorted(rng.sample(range(60), rng.choice([0, 0, 0, 1, 5]))),
    }


def draw_round(
    rng: random.Random, corpus: Corpus, settings: dict[str, Any], include: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The requests that one engine gets at a time, 1 to 24; ``settings``: its own and those that it
    shares with the other."""
    size = rng.choice([1, 4, 16, 24, 24])
    shared = [list(rng.choice(corpus.prompts)) + list(rng.choice(corpus.prompts)) for _ in range(2)]
    requests = [_draw_request(rng, corpus, shared, i, settings, include) for i in range(size)]
    if settings.get("enable_lora") and rng.random() < 0.8:
        # All or none: on a CPU vLLM gives the last adapter to those without one that are in a step
        # with it, with a drafter as without.
        requests = [request | {"lora": rng.randint(1, ADAPTERS)} for request in requests]
    # Beside a request with ids, vLLM loses log probabilities that are asked for by number.
    other = rng.choice(["logprobs", *["logprob_token_ids"] * 3])
    for request in requests:
        request["params"].pop(other, None)
    return requests


def _draw_request(
    rng: random.Random,
    corpus: Corpus,
    shared: list[list[int]],
    number: int,
    settings: dict[str, Any],
    include: Sequence[str],
) -> dict[str, Any]:
    prompt = _draw_prompt(rng, corpus, shared)
    params: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 3, 5, 8, 9, 16, 24, 24, 40, 64])}
    if rng.random() < 0.05:
        prompt = (prompt * MAX_MODEL_LEN)[: MAX_MODEL_LEN - rng.randint(1, 20)]
        params["max_tokens"] = rng.choice([4, 40, None])
    _draw_sampling(rng, params, settings["draft_sample_method"] == "greedy")
    for name, (chance, draw) in _FIELDS.items():
        wanted = name not in KNOWN or name in include
        if wanted and rng.random() < (0.15 if name in include else chance):
            value = draw(rng, corpus, params, prompt)
            if value is not None:
                params[name] = value
    _leave_out(params, settings)
    request: dict[str, Any] = {
        "id": number,
        "prompt": prompt,
        "params": params,
        "arrives": rng.choice([0, 0, rng.randint(0, 40)]),
    }
    request["stream"] = rng.choice(["final", "final", "cumulative", "delta"])
    if rng.random() < 0.08:
        request |= {"aborted_after": rng.randint(0, 25), "stream": "cumulative"}
    if rng.random() < 0.3:
        request["priority"] = rng.randint(-2, 2)
    if rng.random() < 0.05 and len(prompt) < MAX_MODEL_LEN // 2:
        request["text"] = rng.choice(corpus.texts)
        request["truncate_prompt_tokens"] = rng.randint(1, 40)
    if rng.random() < 0.1:
        request["cache_salt"] = rng.choice(["a", "b"])
    if settings.get("enable_prompt_embeds") and "text" not in request and rng.random() < 0.5:
        request["embeds"] = _draw_embeds(rng, len(prompt))
        # vLLM has no log-probabilities of a prompt that is not tokens.
        params.pop("prompt_logprobs", None)
        if request["embeds"] == [0, len(prompt)]:
            # Of a prompt without tokens vLLM penalizes those that a request before it left in its
            # row, in any engine.
            params.pop("repetition_penalty", None)
    return request


def _draw_embeds(rng: random.Random, length: int) -> list[int]:
    """The part of a prompt, from a position to before another, that comes as embeddings."""
    start = rng.choice([0, 0, rng.randrange(length)])
    return [start, rng.choice([length, rng.randint(start + 1, length)])]


def _draw_prompt(rng: random.Random, corpus: Corpus, shared: list[list[int]]) -> list[int]:
    kind = rng.random()
    if kind < 0.08:
        return [rng.randrange(2, corpus.vocab) for _ in range(rng.choice([1, 1, 2, 3, 20]))]
    start = rng.choice(shared)[: rng.randint(1, 300)] if kind < 0.45 else []
    own = list(rng.choice(corpus.prompts))[: rng.choice([rng.randint(1, 120), 400])]
    return [
        *start,
        *own,
        *[rng.randrange(2, corpus.vocab) for _ in range(rng.choice([0, 0, 0, rng.randint(1, 6)]))],
    ][:400]


def _draw_sampling(rng: random.Random, params: dict[str, Any], seeds_hold: bool) -> None:
    """Greedy, sampled with a seed, or sampled without: the last is compared with nothing, and so
    are seeds that fix no output."""
    kind = rng.choices(
        ["greedy", "seeded", "free"], [0.5, 0.4, 0.1] if seeds_hold else [0.7, 0.1, 0.2]
    )[0]
    params["temperature"] = 0.0 if kind == "greedy" else rng.choice(_TEMPERATURES)
    if kind != "greedy":
        params |= {
            "top_p": rng.choice([1.0, 1.0, 0.9, 0.5, 0.01]),
            "top_k": rng.choice([0, 0, -1, 1, 5, 50]),
        }
    if kind == "seeded":
        params |= {
            "seed": rng.choice([0, 1, 7, 2**31, 2**62, -5, -1, rng.randrange(1 << 20)]),
            "n": rng.choice([1, 1, 1, 2, 3]),
        }


def _structured(rng: random.Random, *_: Any) -> dict[str, Any]:
    kind: dict[str, Any] = rng.choice(
        [
            {"json": rng.choice(_SCHEMAS)},
            {"json": rng.choice(_SCHEMAS)},
            {"regex": rng.choice(_REGEXES)},
            {"choice": rng.choice(_CHOICES)},
            {"grammar": rng.choice(_GRAMMARS)},
            {"json_object": True},
            {"structural_tag": _TAG},
        ]
    )
    found = dict(kind)
    for name, value in (
        ("disable_any_whitespace", True),
        ("disable_additional_properties", True),
        ("whitespace_pattern", "[ \n]?"),
    ):
        if rng.random() < 0.1:
            found[name] = value
    return found


def _tokens(rng: random.Random, corpus: Corpus, least: int, most: int) -> list[int]:
    """Token ids that the pair's texts are made of, and so are likely to come."""
    return sorted({rng.choice(rng.choice(corpus.prompts)) for _ in range(rng.randint(least, most))})


def _part(rng: random.Random, corpus: Corpus, most: int) -> str:
    """A few characters of the pair's texts."""
    text = rng.choice(corpus.texts)
    start = rng.randrange(len(text))
    return text[start : start + rng.randint(1, most)]


def _logprobs(rng: random.Random, _: Corpus, params: dict[str, Any], __: list[int]) -> int:
    # All of the vocabulary's only for a few tokens.
    return rng.choice([0, 1, 3, 20, -1] if (params["max_tokens"] or 99) <= 3 else [0, 1, 3, 20])


Draw = Callable[[random.Random, Corpus, dict[str, Any], list[int]], Any]


def _extra_args(rng: random.Random, *_: Any) -> dict[str, Any]:
    """Those of others, which say nothing to us, and limits of drafts that any K allows."""
    said = rng.choice([{"draft": False}, {"draft": True}, {"max_draft": rng.randint(0, 1)}])
    return rng.choice([{"anything": [1, "two"]}, {"dflash": said}, {"dflash": json.dumps(said)}])


_FIELDS: dict[str, tuple[float, Draw]] = {
    "presence_penalty": (0.12, lambda r, *_: r.choice([-2.0, -0.4, 0.3, 2.0])),
    "frequency_penalty": (0.12, lambda r, *_: r.choice([-1.0, 0.2, 1.5])),
    "repetition_penalty": (0.12, lambda r, *_: r.choice([0.7, 1.05, 1.3, 3.0])),
    "stop": (0.15, lambda r, c, *_: [_part(r, c, 5) for _ in range(r.randint(1, 3))]),
    "include_stop_str_in_output": (0.08, lambda *_: True),
    "stop_token_ids": (0.12, lambda r, c, *_: _tokens(r, c, 1, 20)),
    "ignore_eos": (0.5, lambda *_: True),
    "min_tokens": (0.15, lambda r, _, p, __: r.randint(0, min(p["max_tokens"] or 30, 30))),
    "logprobs": (0.2, _logprobs),
    "flat_logprobs": (0.05, lambda *_: True),
    "prompt_logprobs": (0.06, lambda r, *_: r.choice([0, 1, 5])),
    "allowed_token_ids": (0.06, lambda r, c, *_: _tokens(r, c, 2, 60)),
    "bad_words": (
        0.1,
        lambda r, c, *_: [w for w in (_part(r, c, 6) for _ in range(4)) if w.strip()] or None,
    ),
    "structured_outputs": (0.15, _structured),
    "detokenize": (0.04, lambda *_: False),
    "skip_special_tokens": (0.08, lambda *_: False),
    "spaces_between_special_tokens": (0.05, lambda *_: False),
    "repetition_detection": (
        0.06,
        lambda r, *_: {"max_pattern_size": r.choice([1, 3, 8]), "min_count": r.choice([2, 3])},
    ),
    "extra_args": (0.12, _extra_args),
    "skip_reading_prefix_cache": (0.05, lambda r, *_: r.random() < 0.5),
    "stream_interval": (0.05, lambda r, *_: r.randint(1, 4)),
    "min_p": (0.005, lambda *_: 0.1),
    "logit_bias": (0.005, lambda r, c, *_: {str(r.randrange(c.vocab)): 3.0}),
    "logprob_token_ids": (0.3, lambda r, c, *_: _tokens(r, c, 1, 5)),
    "thinking_token_budget": (0.0, lambda r, *_: r.choice([0, 1, 3, 8])),
}


def _leave_out(params: dict[str, Any], settings: dict[str, Any]) -> None:
    """Takes out what vLLM refuses in any engine, for it would be the same refusal again and again,
    and what ends any of its engines."""
    if settings["structured_outputs_config"]["backend"] == "outlines":
        structured = params.get("structured_outputs", {})
        if structured.keys() & {"json_object", "grammar", "structural_tag"}:
            del params["structured_outputs"]
    if settings["logprobs_mode"].startswith("processed") and 0 < params["temperature"] < 0.02:
        # Divided by so little, float32's noise is more than log-probabilities may differ by.
        params.pop("logprobs", None)
        params.pop("logprob_token_ids", None)
    if settings["enable_lora"]:
        # On a CPU vLLM's adapter of the logits counts a step's requests, and prompt positions are
        # more or fewer: an error.
        params.pop("prompt_logprobs", None)
    if "prompt_logprobs" in params and params.get("skip_reading_prefix_cache") is False:
        # vLLM fills in no log-probabilities of a prompt's cached part: memory as it was, in any
        # engine, and ids that no tokenizer takes.
        del params["skip_reading_prefix_cache"]
    if params.get("stop") and params.get("detokenize") is False:
        del params["detokenize"]
    if params["temperature"] == 0:
        params.pop("min_p", None)


def is_compared(request: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a request has but one right answer."""
    params = request["params"]
    # A seed of -1 is none for vLLM.
    return params["temperature"] == 0 or (
        params.get("seed", -1) != -1 and settings["draft_sample_method"] == "greedy"
    )
