"""Sampled output follows the target's distribution, drafter or not: chi-square tests on real
engines, and the rule broken on purpose.

The target is tiny, so that its distribution over whole continuations is known exactly, from plain
PyTorch. Samples, seeds and so p-values are fixed; a test passes at p > 0.001, and with the rule
broken p is below 1e-6.

    pytest -s tests/engine/test_sampling.py
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chi_square import p_of_fit, p_of_same, survival
from engine.sampling_harness import Answer, Ask, Engine, run
from pairs import make_random_drafter, make_random_target, random_drafter_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
VOCAB, PROMPT, LENGTH, K = 16, [5, 6, 7], 3, 3
TEMPERATURES = (0.7, 1.0)
SAMPLES, FEWER, PER_REQUEST = 20_480, 1_536, 64
BROKEN_WITHOUT_PROBABILITIES = (
    "accept every draft",
    "draw the rejected from the target",
    "one temperature for all",
)
BROKEN_WITH_PROBABILITIES = (
    "accept every draft",
    "draw the rejected from the target",
    "accept by the target alone",
    "probabilities of another position",
)
# Drafts of neighbouring positions have much the same probabilities, so this takes more samples to
# see; still fewer than the test itself has.
SUBTLE = {"probabilities of another position": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_k": {"temperature": 1.0, "top_k": 4},
    "top_p and top_k": {"temperature": 0.7, "top_p": 0.9, "top_k": 6},
    "repetition_penalty": {"temperature": 1.0, "repetition_penalty": 1.5},
    "presence and frequency": {
        "temperature": 1.0,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.7,
    },
}


def temperatures(count: int, **fields: Any) -> Ask:
    """``count`` continuations at each temperature and some greedy ones, all in the same batches:
    each row has settings of its own."""
    common = {"max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
    one_round = [
        {"temperature": t, "n": PER_REQUEST if t else 1} | common for t in (*TEMPERATURES, 0.0)
    ]
    rounds = count // PER_REQUEST
    return Ask([PROMPT] * len(one_round) * rounds, one_round * rounds, **fields)


def settings() -> Ask:
    common = {"n": FEWER, "max_tokens": LENGTH, "ignore_eos": True, "detokenize": False}
    return Ask([PROMPT] * len(SETTINGS), [s | common for s in SETTINGS.values()])


def seeds() -> Ask:
    """64 requests, each with a seed of its own."""
    return Ask(
        [PROMPT] * 64,
        [
            {
                "temperature": 1.0,
                "max_tokens": 16,
                "ignore_eos": True,
                "detokenize": False,
                "seed": i,
            }
            for i in range(64)
        ],
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    target = make_random_target(
        folder / "target",
        seed=1,
        scale=0.25,
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        eos_token_id=VOCAB - 1,
    )
    config = random_drafter_config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_target_layers=2,
        target_layer_ids=(0, 1),
        num_hidden_layers=1,
        block_size=K + 1,
    )
    return target, make_random_drafter(
        folder / "drafter", config=config, seed=9
    )  # of 24 random ones the one that is accepted most


@pytest.fixture(scope="module")
def answers(pair: tuple[Path, Path]) -> dict[str, dict[str, Answer]]:
    """By engine (plain, greedy and probabilistic drafts) and by what was asked: ``lossless``,
    ``settings``, or the rule broken."""
    target, drafter = pair
    args = {
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 1024,
        "max_num_batched_tokens": 8192,
    }
    asked = {
        "plain": {"lossless": temperatures(SAMPLES), "settings": settings()},
        "greedy": (
            {
                "lossless": temperatures(SAMPLES),
                "settings": settings(),
                "seeds": seeds(),
                "seeds again": seeds(),
            }
            | {rule: temperatures(FEWER, broken=rule) for rule in BROKEN_WITHOUT_PROBABILITIES}
        ),
        "probabilistic": (
            {
                "lossless": temperatures(SAMPLES, draft_probs=True),
                "settings": settings(),
                "seeds": seeds(),
                "seeds again": seeds(),
            }
            | {
                rule: temperatures(FEWER * SUBTLE.get(rule, 1), broken=rule)
                for rule in BROKEN_WITH_PROBABILITIES
            }
        ),
    }
    engines = [Engine(target, None, list(asked["plain"].values()), args=args)]
    for mode in ("greedy", "probabilistic"):
        speculative = {"draft_sample_method": mode}
        engines.append(
            Engine(
                target,
                drafter,
                list(asked[mode].values()),
                num_speculative_tokens=K,
                speculative=speculative,
                args=args,
            )
        )
    return {
        name: dict(zip(asked[name], found, strict=True))
        for name, found in zip(asked, run(engines), strict=True)
    }


@pytest.fixture(scope="module")
def distributions(pair: tuple[Path, Path]) -> dict[float, dict[tuple[int, ...], float]]:
    """By temperature, the probability of every continuation of ``LENGTH`` tokens, from plain
    PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    prompts = torch.tensor(PROMPT).expand(len(sequences), -1)
    with torch.inference_mode():
        logits = (
            model(torch.cat([prompts, sequences[:, :-1]], 1)).logits[:, len(PROMPT) - 1 :].double()
        )
    found = {}
    for t in TEMPERATURES:
        steps = (logits / t).log_softmax(-1).gather(-1, sequences[..., None])[..., 0]
        found[t] = dict(
            zip(map(tuple, sequences.tolist()), steps.sum(1).exp().tolist(), strict=True)
        )
    return found


def samples(answer: Answer, temperature: float) -> list[tuple[int, ...]]:
    """The continuations drawn at one of ``TEMPERATURES``, or the greedy ones."""
    assert answer.error is None, answer.error
    settings = (*TEMPERATURES, 0.0)
    return [
        tuple(tokens)
        for request in answer.tokens[settings.index(temperature) :: len(settings)]
        for tokens in request
    ]


@pytest.mark.parametrize("mode", ["greedy", "probabilistic"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sampled_output_follows_the_target(
    answers: dict[str, dict[str, Answer]],
    distributions: dict[float, dict[tuple[int, ...], float]],
    mode: str,
    temperature: float,
) -> None:
    """On a CPU, stock vLLM verified sampled drafts at whatever temperature the memory held (its
    issue 55005).

    The stand-in for its ``expand_kernel`` wrote into an int64 copy of a float buffer and dropped
    the copy. First tokens, which come with the prompt, were right and all others were not: token 0
    in up to 99 of 100 places, in one batch and not in the next. Greedy requests in the same batches
    were hit too. ``patches/v1_cpu_expand.py`` has the cure.
    """
    answer, plain = answers[mode]["lossless"], answers["plain"]["lossless"]
    ours = samples(answer, temperature)
    assert len(ours) == SAMPLES
    exact, same = (
        p_of_fit(ours, distributions[temperature]),
        p_of_same(ours, samples(plain, temperature)),
    )
    control = p_of_fit(samples(plain, temperature), distributions[temperature])
    print(
        f"{mode} drafts, temperature {temperature}: p {exact:.3f} against the target's"
        f" distribution, {same:.3f} against plain sampling (plain against the distribution:"
        f" {control:.3f}); {answer.accepted_share:.2f} accepted a draft"
    )
    assert control > 0.001
    assert exact > 0.001
    assert same > 0.001
    assert answer.accepted_share > 0.15


@pytest.mark.parametrize("mode", ["greedy", "probabilistic"])
def test_a_greedy_request_among_sampled_ones_stays_greedy(
    answers: dict[str, dict[str, Answer]], mode: str
) -> None:
    greedy = {engine: set(samples(answers[engine]["lossless"], 0.0)) for engine in (mode, "plain")}
    assert greedy[mode] == greedy["plain"]
    assert len(greedy[mode]) == 1


@pytest.mark.parametrize(
    ("mode", "rule"),
    [("greedy", rule) for rule in BROKEN_WITHOUT_PROBABILITIES]
    + [("probabilistic", rule) for rule in BROKEN_WITH_PROBABILITIES],
)
def test_the_tests_see_a_broken_rule(
    answers: dict[str, dict[str, Answer]],
    distributions: dict[float, dict[tuple[int, ...], float]],
    mode: str,
    rule: str,
) -> None:
    """At a small part of the samples."""
    p = {t: p_of_fit(samples(answers[mode][rule], t), distributions[t]) for t in TEMPERATURES}
    print(f"{mode} drafts, {rule}: p {p}")
    assert min(p.values()) < 1e-6


@pytest.mark.parametrize("mode", ["greedy", "probabilistic"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_sample_the_same_with_drafts(
    answers: dict[str, dict[str, Answer]], mode: str, name: str
) -> None:
    """Top-p, top-k and penalties, of which penalties depend on the draft tokens before: against
    plain sampling."""
    row = list(SETTINGS).index(name)
    ours, plain = (
        [tuple(t) for t in answers[engine]["settings"].tokens[row]] for engine in (mode, "plain")
    )
    p = p_of_same(ours, plain)
    print(f"{mode} drafts, {name}: p {p:.3f}")
    assert p > 0.001
    assert answers[mode]["settings"].counters["accepted"] > 0


def test_draft_probabilities_are_those_of_the_drafted_tokens(
    answers: dict[str, dict[str, Answer]],
) -> None:
    """Per position, how often each token was drafted is what the proposer's probabilities add up
    to."""
    sums = answers["probabilistic"]["lossless"].draft_probs
    assert sums is not None
    seen, expected, variance = (
        torch.tensor(sums[name], dtype=torch.float64) for name in ("seen", "expected", "variance")
    )
    assert seen.shape == (K, VOCAB)
    for k in range(K):
        full = variance[k] > 10
        # The variances leave out how one token's count takes from another's, so this is a little on
        # the strict side.
        p = survival(
            ((seen[k] - expected[k])[full] ** 2 / variance[k][full]).sum().item(), int(full.sum())
        )
        print(f"position {k}: p {p:.3f} over {int(full.sum())} tokens")
        assert p > 0.001


def test_a_seed_fixes_the_output_with_greedy_drafts(answers: dict[str, dict[str, Answer]]) -> None:
    assert answers["greedy"]["seeds"].tokens == answers["greedy"]["seeds again"].tokens
    assert answers["greedy"]["seeds"].counters["accepted"] > 0


def test_a_seed_does_not_reach_probabilistic_drafts(answers: dict[str, dict[str, Answer]]) -> None:
    """A limit of vLLM's V1 runner, with any drafter: drafts are drawn without the request's
    generator. If this fails, it is gone: say so in docs/features.md. The first token comes with the
    prompt, before any draft.
    """
    first, again = (answers["probabilistic"][name].tokens for name in ("seeds", "seeds again"))
    assert [t[0] for (t,) in first] == [t[0] for (t,) in again]
    assert first != again
