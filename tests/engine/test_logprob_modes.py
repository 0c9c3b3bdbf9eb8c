"""Log probabilities in each ``logprobs_mode``, by number and by token ids, of this request and of
its neighbours: equal plain vLLM's, whatever is sampled.

    pytest -s tests/engine/test_logprob_modes.py
"""

import ast
from typing import Any

import pytest

from engine.harness import DRAFTER, TARGET, held_out_prompts
from engine.sampling_harness import Answer, Ask, Engine, run
from vllm_dflash.upstream import Sources

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
COUNT = 10
MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 1},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
]
"""The first two leave no choice: so they have one answer where drafts are sampled too."""
WANTED = {"by token ids": {"logprob_token_ids": [5, 200, 300]}, "by number": {"logprobs": 2}}


def asks() -> dict[str, Ask]:
    """Each way to sample with and without log probabilities of its own, in one batch; and in a
    batch where nobody asks for them."""
    common = [
        {"max_tokens": 12, "ignore_eos": True, "seed": i} | SAMPLED[i // 2] for i in range(COUNT)
    ]
    prompts = held_out_prompts(COUNT)
    return {
        name: Ask(prompts, [each | (wanted if i % 2 else {}) for i, each in enumerate(common)])
        for name, wanted in {**WANTED, "none": {}}.items()
    }


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], dict[str, Answer]]:
    """By mode and engine, what came back for each ``Ask``."""
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (None, {}),
        "ours": (DRAFTER, {}),
        "sampled drafts": (DRAFTER, {"draft_sample_method": "probabilistic"}),
    }
    wanted = [(mode, kind) for mode in MODES for kind in kinds]
    engines = [
        Engine(
            TARGET,
            kinds[kind][0],
            list(asks().values()),
            speculative=kinds[kind][1],
            args={"max_model_len": 256, "logprobs_mode": mode},
        )
        for mode, kind in wanted
    ]
    return {
        key: dict(zip(asks(), found, strict=True))
        for key, found in zip(wanted, run(engines), strict=True)
    }


def test_every_mode_is_asked() -> None:
    written = ast.unparse(Sources().find("vllm.config.model:LogprobsMode").node)
    assert set(ast.literal_eval(written.removeprefix("LogprobsMode = Literal"))) == set(MODES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["ours", "sampled drafts"])
@pytest.mark.parametrize("name", [*WANTED, "none"])
def test_log_probabilities(
    answers: dict[tuple[str, str], dict[str, Answer]], mode: str, kind: str, name: str
) -> None:
    """By token ids the raw ones of a sampled request were read after its temperature and top-k had
    changed them in place; beside sampled drafts the processed ones were dropped."""
    plain, ours = answers[mode, "plain"][name], answers[mode, kind][name]
    assert plain.error is ours.error is None
    assert ours.counters["accepted"] > 0
    rows = range(COUNT if kind == "ours" else 4)
    for row in rows:
        (a,), (b,) = plain.completions[row], ours.completions[row]
        assert a["token_ids"] == b["token_ids"], row
        assert bool(b["logprobs"]) == bool(a["logprobs"]) == (name != "none" and row % 2 == 1)
        for at, (expected, found) in enumerate(
            zip(a["logprobs"] or [], b["logprobs"] or [], strict=True)
        ):
            assert found.keys() == expected.keys(), (row, at)
            for token, (logprob, rank) in expected.items():
                assert found[token] == [pytest.approx(logprob, abs=4e-3), rank], (row, at, token)
