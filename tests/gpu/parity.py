"""Whether an engine drafts what plain PyTorch does: shared by ``right_drafts`` and
``second_start``."""

import functools
import json
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpu.methods import shared
from gpu.shapes import EMBEDDED, TARGETS, Pair
from gpu.starting import Engines, Spec

if TYPE_CHECKING:
    from gpu.common import Run

AT_LEAST, NEAR_REFERENCE = 0.99, 0.01
"""Share of tokens that have to be the float32 reference's outright, unless plain PyTorch in
bfloat16 stays below that itself: then no more than so much less than it."""
LARGEST_GRAPH = 256
GRAPHS = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, LARGEST_GRAPH]}
"""Tokens that the target verifies. Few, so that engines start sooner and 40 requests' drafts are
past them: the draft has graphs for the request counts for which the target has."""
NEAR_END = 20
"""Positions before ``max_model_len`` that are looked at apart."""
ORACLE = Spec("oracle", {}, script="oracle.py")


def max_model_len(run: "Run") -> int:
    """Of all engines that are compared, in tokens."""
    return 256 if run.args.tiny else 512


def arguments(run: "Run") -> dict[str, Any]:
    """Of all engines that are compared."""
    return shared(
        run.args.tiny,
        max_model_len=max_model_len(run),
        max_num_seqs=64,
        cache_bytes=4 << 30,
        compilation_config=GRAPHS,
        max_num_batched_tokens=2048,
    )


def accepted(k: int) -> dict[str, Any]:
    """Keys of a random pair's ``speculative_config``: its drafts are accepted in all lengths."""
    rates = [0.6 ** (i + 1) for i in range(k)]
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def prompts_for(run: "Run", pair: Pair) -> list[list[int]]:
    """Of a pair: 40, or with --tiny few."""
    count, length = 4 if run.args.tiny else 40, max_model_len(run)
    if pair.target.is_relative_to(EMBEDDED):
        return embedded_prompts(count, length)
    return random_prompts(count, TARGETS["tiny" if run.args.tiny else "wide"]["vocab_size"], length)


@functools.lru_cache
def embedded_prompts(count: int, max_model_len: int) -> list[list[int]]:
    """Held-out prompts of the embedded pair; every fourth goes on in the next ones until 40 tokens
    before the end."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "target" / "tokenizer.json"))
    lines = (EMBEDDED / "prompts.jsonl").read_text().splitlines()[:count]
    own = [tokenizer.encode(json.loads(line)["prompt"]).ids for line in lines]
    room = max_model_len - 40
    found = []
    for i, ids in enumerate(own):
        if i % 4 == 3:
            later = iter(own[i + 1 :] + own)
            while len(ids) < room:
                ids = ids + next(later)
        found.append(ids[:room])
    return found


@functools.lru_cache
def random_prompts(count: int, vocab: int, max_model_len: int) -> list[list[int]]:
    """Token ids by chance, of 2 to 400 tokens; every fourth ends 40 tokens before the end."""
    draw = random.Random(1)
    room = max_model_len - 40
    lengths = [room if i % 4 == 3 else draw.randint(2, min(400, room)) for i in range(count)]
    return [[draw.randrange(2, vocab - 1) for _ in range(length)] for length in lengths]


def drafted(
    run: "Run", engines: Engines, name: str, prompts: Sequence[Sequence[int]], requests: int
) -> dict[str, Any]:
    """What an engine drafts with ``requests`` in flight; answers are of many lengths, and those
    near the end go up to it."""
    tokens = 16 if run.args.tiny else 64
    return engines.do(
        name,
        {
            "do": "drafts",
            "prompts": prompts,
            "max_tokens": [
                tokens if i % 4 == 3 else tokens - (7 * i) % (tokens // 2)
                for i in range(len(prompts))
            ],
            "requests": requests,
        },
    )


def sequences(prompts: Sequence[Sequence[int]], made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each request its committed tokens, and the drafts whose anchor is one of them."""
    found = [
        {"tokens": [*prompt, *output], "drafts": []}
        for prompt, output in zip(prompts, made["outputs"], strict=True)
    ]
    for index, anchor, token, draft in made["drafts"]:
        if anchor < len(found[index]["tokens"]):
            found[index]["drafts"].append([anchor, token, draft])
    return found


def compared(
    run: "Run",
    engines: Engines,
    pair: Pair,
    k: int,
    prompts: Sequence[Sequence[int]],
    made: Mapping[str, Any],
) -> dict[str, Any]:
    """The figure of one engine's drafts beside the reference's."""
    job = {
        "target": str(pair.target),
        "drafter": str(pair.drafter),
        "k": k,
        "dtype": run.dtype,
        "most": 60 if run.args.tiny else 600,
        "near_end": NEAR_END + k,
        "max_model_len": max_model_len(run),
        "sequences": sequences(prompts, made),
    }
    found = engines.do("oracle", job)
    every, end = found["counts"]["all"], found["counts"]["near the end"]
    total = [a + b for a, b in zip(every, end, strict=True)]
    if not total[0]:
        raise RuntimeError("no drafted token could be compared: nothing is shown")
    same, beyond, reference = (n / total[0] for n in total[1:])
    bound = min(AT_LEAST, reference - NEAR_REFERENCE) if run.dtype != "float32" else 1.0
    figure = {
        "drafts": found["drafts"],
        "tokens": total[0],
        "same": same,
        "same_or_rounding": beyond,
        "reference_in_dtype_same": reference,
        "near_end_tokens": end[0],
        "near_end_same": end[1] / end[0] if end[0] else None,
        "tau": made["tau"],
        "modes": made["modes"],
        "anchors_wrong": found["anchors_wrong"],
    }
    return figure | {
        "bound": bound,
        "passed": found["anchors_wrong"] == 0
        and same >= bound
        and (not end[0] or end[1] / end[0] >= bound - 0.01),
    }


def shows_graphs(run: "Run", found: Mapping[str, Any], requests: int, k: int) -> bool:
    """Whether the drafts of a figure came out of CUDA graphs, where so many requests have some."""
    has_graph = not run.args.tiny and requests * (k + 1) <= LARGEST_GRAPH
    return not has_graph or found["modes"].get("draft FULL", 0) > 0


def against(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    share: float,
    tau: float | None,
) -> dict[str, Any]:
    """Two engines' drafts at the anchors that both had after the same tokens.

    Args:
        share: of tokens that have to be equal.
        tau: how far, relatively, tau may differ; None where it says nothing.
    """
    found = [
        {
            (i, draft[0]): (tuple(each["tokens"][: draft[0] + 1]), draft[2])
            for i, each in enumerate(sequences(prompts, made))
            for draft in each["drafts"]
        }
        for made in (one, other)
    ]
    both = [
        (found[0][key][1], found[1][key][1])
        for key in found[0].keys() & found[1].keys()
        if found[0][key][0] == found[1][key][0]
    ]
    tokens = [a == b for first, second in both for a, b in zip(first, second, strict=True)]
    if not tokens:
        raise RuntimeError("the two engines have no anchor in common: nothing is shown")
    figure: dict[str, Any] = {
        "drafts": len(both),
        "same": sum(tokens) / len(tokens),
        "outputs_equal": sum(a == b for a, b in zip(one["outputs"], other["outputs"], strict=True)),
        "outputs": len(prompts),
        "tau": [one["tau"], other["tau"]],
    }
    passed = figure["same"] >= share
    if tau is not None:
        passed = passed and abs(one["tau"] / other["tau"] - 1) <= tau
    return figure | {"passed": passed}
