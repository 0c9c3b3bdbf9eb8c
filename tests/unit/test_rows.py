"""Each row of logits as a request of its own: what plain decoding would do after the drafts before
it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from vllm_dflash.cpu.rows import Rows, ThinkingBudgets, min_tokens_by_row

pytestmark = pytest.mark.vllm

VOCABULARY, START, END = 12, [1], [2, 3]
REASONING: Any = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)


def test_rows_of_three_requests() -> None:
    rows = Rows([2, 0, 1], [7, 8, 9])
    assert rows.owners == [0, 0, 0, 1, 2, 2]
    assert [list(rows.of(i)) for i in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert rows.outputs(0, [5]) == [[5], [5, 7], [5, 7, 8]]
    assert rows.outputs(1, [5]) == [[5]]


def test_min_tokens_hold_as_far_as_the_drafts_do_not_reach_them() -> None:
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    processor.min_toks = {0: (3, [5], {4}, False), 2: (2, [5], {6, 7}, False)}
    logits = min_tokens_by_row(processor, Rows([2, 0, 1], [7, 8, 9])).apply(
        torch.zeros(6, VOCABULARY)
    )
    assert torch.isneginf(logits).nonzero().tolist() == [[0, 4], [1, 4], [4, 6], [4, 7]]


def forced(logits: torch.Tensor) -> list[int | None]:
    """The token that each row is forced to."""
    return [int(row.argmax()) if row.max() > 0 else None for row in logits]


def plain(prompt: list[int], output: list[int], budget: int) -> list[int | None]:
    """What vLLM forces in each step of plain decoding that comes to ``output``, and in the step
    after."""
    holder = ThinkingBudgetStateHolder(REASONING, 4, 0, torch.device("cpu"), False)
    holder._state = {0: holder._init_state_entry(prompt, budget)}
    found = []
    for length in range(len(output) + 1):
        holder.update_state([output[:length]], None)
        found += forced(holder.apply_to_logits(torch.zeros(1, VOCABULARY), False, None))
    return found


@pytest.mark.parametrize("prompt", [[9, 1, 9], [9, 9], [1, 2, 3, 9]])
@pytest.mark.parametrize("budget", range(7))
def test_the_end_of_thinking_is_forced_where_plain_decoding_forces_it(
    prompt: list[int], budget: int
) -> None:
    """Drafts of 0 to 5 tokens, accepted to any length: row by row what plain decoding forces after
    the same output.

    vLLM forces the rest of the end in the last row of a step, wherever the budget runs out among
    the drafts, and counts rows of requests without a budget wrong: up to three tokens too many, and
    the end in a neighbour's output (its issue 39573).
    """
    generator = torch.Generator().manual_seed(budget)
    wanted: list[int] = torch.randint(1, VOCABULARY, (60,), generator=generator).tolist()
    budgets, output = ThinkingBudgets(REASONING, 16), [4]
    neighbour = SimpleNamespace(
        sampling_params=SimpleNamespace(thinking_token_budget=None),
        prompt_token_ids=[1],
        output_token_ids=output,
    )
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(thinking_token_budget=budget),
        prompt_token_ids=prompt,
        output_token_ids=[],
    )
    while len(request.output_token_ids) < 40:
        done = request.output_token_ids
        count, accepted = (int(torch.randint(0, 6, (1,), generator=generator)) for _ in range(2))
        expected, drafts = plain(prompt, done, budget)[-1:], []
        for at in range(count):
            token = expected[-1] or wanted[len(done) + at]
            drafts.append(token if at < accepted else VOCABULARY - 1)
            expected.append(plain(prompt, done + drafts, budget)[-1])
        if not torch.randint(0, 5, (1,), generator=generator):
            budgets = ThinkingBudgets(REASONING, 16)  # a request whose output came from elsewhere
        logits = torch.zeros(4 + count, VOCABULARY)
        budgets.force(
            logits,
            Rows([2, count], [1, 9, *drafts]),
            ["neighbour", "a"],
            {"neighbour": neighbour, "a": request},
        )
        assert forced(logits) == [None] * 3 + expected
        kept = min(count, accepted)
        done += [*drafts[:kept], expected[kept] or wanted[len(done) + kept]]
    assert set(budgets._known) == {"a"}
    budgets.force(
        torch.zeros(3, VOCABULARY), Rows([2], [1, 9]), ["neighbour"], {"neighbour": neighbour}
    )
    assert not budgets._known
