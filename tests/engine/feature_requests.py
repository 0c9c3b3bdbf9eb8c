"""What ``test_features.py`` asks its engines: fields of requests, and the prompts that get them."""

import json
from typing import Any

import pytest

from engine.harness import DRAFTER, PROMPTS, TARGET, held_out_prompts
from engine.sampling_harness import Answer, Ask, Engine, run

COUNT, MAX_MODEL_LEN, EOS = 8, 256, 0
TEXTS = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:COUNT]]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.8, "max_tokens": 24, "ignore_eos": True}
SAMPLED: list[dict[str, Any]] = [
    {"seed": i, "temperature": (0.5, 2.0)[i % 2], "top_k": (0, 5)[i // 2 % 2]} for i in range(COUNT)
]
PENALTIES = {"presence_penalty": 1.0, "frequency_penalty": 0.6, "repetition_penalty": 1.2}
BAD_WORDS = ["self", "return", " = ", "assert", "(self"]
ALLOWED = [t for t in range(4096) if t % 3]
SCHEMA = {
    "type": "object",
    "required": ["name", "kind"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["class", "function", "module"]},
    },
}
REGEX, CHOICES = (
    r"def [a-z]{3,8}_[a-z]{3,8}\(self\):\n    return (None|True|False)",
    ["self.assertEqual(result, expected)", "return self.value", "raise ValueError(message)"],
)
STRUCTURED = {"json": {"json": SCHEMA}, "regex": {"regex": REGEX}, "choice": {"choice": CHOICES}}
REPETITION = {"max_pattern_size": 8, "min_pattern_size": 1, "min_count": 2}
BACKENDS = ["guidance", "outlines"]  # beside xgrammar, which vLLM takes by itself
STOPS = ["return", "):\n", "self."]


def greedy(**fields: Any) -> dict[str, Any]:
    return GREEDY | fields


def up_to_the_limit() -> list[list[int]]:
    """Prompts that leave 1 to 20 positions before ``MAX_MODEL_LEN``."""
    text = [token for prompt in held_out_prompts(40) for token in prompt]
    return [
        text[i : i + MAX_MODEL_LEN - left]
        for i, left in enumerate((1, 2, 3, 5, 7, 8, 9, 10, 15, 16, 17, 20))
    ]


def structured(name: str) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": 64, "structured_outputs": STRUCTURED[name]}


def asks() -> dict[str, Ask]:
    """What both engines are asked. vLLM loses log probabilities of those who run beside a request
    with ``logprob_token_ids``."""
    every_one = [greedy(**{name: value}) for name, value in PENALTIES.items()] + [
        greedy(bad_words=BAD_WORDS),
        greedy(allowed_token_ids=ALLOWED),
        greedy(stop=STOPS),
        SEEDED | {"seed": 3},
        structured("regex"),
    ]
    found = {
        "plain": Ask(TEXTS, GREEDY),
        **{name: Ask(TEXTS, greedy(**{name: value})) for name, value in PENALTIES.items()},
        "logit_bias": Ask(TEXTS[:1], greedy(logit_bias={"5": 2.0})),
        "min_p": Ask(TEXTS[:1], {"temperature": 1.0, "min_p": 0.1, "max_tokens": 8}),
        "bad_words": Ask(TEXTS, greedy(bad_words=BAD_WORDS)),
        "allowed_token_ids": Ask(TEXTS, greedy(allowed_token_ids=ALLOWED)),
        "logprobs": Ask(TEXTS, greedy(logprobs=5)),
        "prompt_logprobs": Ask(TEXTS, greedy(prompt_logprobs=3)),
        "logprobs of all tokens": Ask(TEXTS[:2], greedy(logprobs=-1, max_tokens=12)),
        "logprobs, seeded": Ask(
            TEXTS, [SEEDED | {"seed": 3 + i, "logprobs": i % 3} for i in range(COUNT)]
        ),
        "logprob_token_ids": Ask(
            TEXTS,
            [greedy(logprob_token_ids=[5, 200 + i]) if i % 2 else GREEDY for i in range(COUNT)],
            alone=True,
        ),
        "logprob_token_ids, seeded": Ask(
            TEXTS,
            [SEEDED | row | {"logprob_token_ids": [5, 200 + i]} for i, row in enumerate(SAMPLED)],
            alone=True,
        ),
        "repetition_detection": Ask(TEXTS, greedy(max_tokens=128, repetition_detection=REPETITION)),
        "stop": Ask(TEXTS, greedy(stop=STOPS)),
        "include_stop_str_in_output": Ask(
            TEXTS, greedy(stop=STOPS, include_stop_str_in_output=True)
        ),
        "eos": Ask(TEXTS, greedy(ignore_eos=False, allowed_token_ids=[EOS, *range(200, 208)])),
        "ignore_eos": Ask(TEXTS, greedy(allowed_token_ids=[EOS, *range(200, 208)])),
        "max_model_len": Ask(up_to_the_limit(), greedy()),
        **{name: Ask(TEXTS, structured(name)) for name in STRUCTURED},
        "all at once": Ask(TEXTS, every_one),
        "top_k, one at a time": Ask(TEXTS[:1], SEEDED | {"top_k": 5}),
        "seed": Ask(TEXTS, [SEEDED | {"seed": 11 + i} for i in range(COUNT)]),
        "seed, one at a time": Ask(TEXTS[:1], SEEDED | {"seed": 11}),
        "other seed": Ask(TEXTS, [SEEDED | {"seed": 111 + i} for i in range(COUNT)]),
        "n": Ask(TEXTS[:2], SEEDED | {"n": 3, "seed": 11}),
        "n, each alone": Ask([TEXTS[0]] * 3, [SEEDED | {"seed": 11 + i} for i in range(3)]),
        "after all": Ask(TEXTS, GREEDY),
    }
    return found


@pytest.fixture(scope="module")
def stop_token(request: pytest.FixtureRequest) -> int:
    """The token id of a newline, which the target's text is full of."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TARGET)("\n")["input_ids"][0]


@pytest.fixture(scope="module")
def answers(stop_token: int) -> dict[str, dict[str, Answer]]:
    """By engine (plain, ours, chunked, ...) and by the name of what was asked."""
    common = asks() | {
        "stop_token_ids": Ask(TEXTS, greedy(stop_token_ids=[stop_token])),
        "min_tokens": Ask(TEXTS, greedy(stop_token_ids=[stop_token], min_tokens=20)),
    }
    chunked = {name: common[name] for name in ("plain", "seed", "all at once")}
    args = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 4096, "max_logprobs": -1}
    names = {"plain": common, "ours": common, "chunked": chunked}
    names |= {
        f"{engine}{name}": {"regex": common["regex"]}
        for name in BACKENDS
        for engine in ("", "plain ")
    }
    sampled = {name: common[name] for name in ("seed", "logprobs, seeded", "all at once")}
    names["fp64"] = names["plain fp64"] = sampled
    names["logits processor"] = {"plain": common["plain"]}
    changes: dict[str, dict[str, Any]] = {
        "chunked": {"max_num_batched_tokens": 80, "enable_prefix_caching": False},
        "fp64": {"use_fp64_gumbel": True},
        "plain fp64": {"use_fp64_gumbel": True},
        "logits processor": {"logits_processors": ["a_module:AProcessor"]},
    }
    for name in BACKENDS:
        changes[name] = changes[f"plain {name}"] = {"structured_outputs_config": {"backend": name}}
    engines = [
        Engine(
            TARGET,
            None if name.startswith("plain") else DRAFTER,
            list(asked.values()),
            args=args | changes.get(name, {}),
            together=name.startswith("plain"),
        )
        for name, asked in names.items()
    ]
    return {
        name: dict(zip(names[name], found, strict=True))
        for name, found in zip(names, run(engines), strict=True)
    }
