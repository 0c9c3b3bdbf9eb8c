"""Tokens drawn from logits: the softmax, row by row, and never what has no probability."""

import pytest
import torch

from chi_square import p_of_fit
from vllm_dflash.cpu.sampling import DrawsInTurn, Seeded, draw_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "vocab",
    [1, 7, 97, 4096, 50257],
    ids=["one token", "prime", "prime and larger", "round", "29 times 1733"],
)
def test_a_row_is_drawn_by_its_softmax(vocab: int) -> None:
    """Rows differ, and beside each other each has its own distribution."""
    torch.manual_seed(vocab)
    draws, logits = 2000, 3 * torch.randn(3, vocab, dtype=torch.float32)
    drawn = draw_tokens(logits.repeat(draws, 1)).view(draws, 3)
    assert drawn.dtype == torch.int64
    for row, sample in zip(logits, drawn.T.tolist(), strict=True):
        probabilities = row.double().softmax(-1).tolist()
        if vocab > 1:
            assert p_of_fit(sample, dict(enumerate(probabilities))) > 1e-4
    assert vocab > 1 or not drawn.any()


def test_rows_are_drawn_independently() -> None:
    """Pairs of neighbours in a batch of one distribution."""
    torch.manual_seed(0)
    drawn = draw_tokens(torch.zeros(20_000, 6)).view(-1, 2).tolist()
    assert p_of_fit(map(tuple, drawn), {(a, b): 1 / 36 for a in range(6) for b in range(6)}) > 1e-4


def test_what_is_forbidden_is_never_drawn() -> None:
    """Neither as a whole part of the vocabulary nor as its last token, where rounding would
    lead."""
    torch.manual_seed(0)
    logits = torch.full((5000, 4096), -torch.inf)
    allowed = torch.tensor([0, 63, 64, 1000, 4030])
    logits[:, allowed] = torch.tensor([0.0, -30.0, 5.0, 5.0, -80.0])
    drawn = draw_tokens(logits)
    assert set(drawn.tolist()) <= set(allowed.tolist())
    assert abs((drawn == 64).sum().item() - 2500) < 250


def test_the_last_place_of_a_distribution_is_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the largest number that the generator gives."""
    monkeypatch.setattr(
        torch, "rand", lambda *shape, dtype: torch.full(shape, 1 - 2**-53, dtype=dtype)
    )
    logits = torch.randn(200, 4096)
    logits[:, 4000:] = -torch.inf
    logits[:, 3990:3999] = -torch.inf
    assert draw_tokens(logits).tolist() == [3999] * 200


def test_a_generators_state_fixes_what_is_drawn() -> None:
    logits, drawn = torch.randn(4, 4096), []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(draw_tokens(logits).tolist())
    assert drawn[0] == drawn[1]


def test_no_numbers_give_a_token_all_the_same() -> None:
    """As vLLM's sampler: what is wrong is its logits' business, and the engine goes on."""
    assert 0 <= draw_tokens(torch.full((1, 4096), torch.nan)).item() < 4096


def by_noise(logits, generators, k, p):
    """As vLLM's native sampler: a whole row of noise a token."""
    noise = torch.empty_like(logits)
    noise.exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1), None


def test_a_seed_draws_in_turn_what_it_draws_token_by_token() -> None:
    """After drafts that were rejected, after a preemption, and where a request was not seen from
    its start; beside a request without a seed and one with another."""
    torch.manual_seed(0)
    logits = torch.randn(8, 64)
    plain = {}
    for seed in (7, 8):
        generator = torch.Generator().manual_seed(seed)
        plain[seed] = [by_noise(row[None], {0: generator}, None, None)[0].item() for row in logits]
    assert plain[7] != plain[8]
    draws = DrawsInTurn(by_noise)

    def drawn(name: str, seed: int, start: int, drafts: int) -> list[int]:
        own = logits[start : start + drafts + 1]
        other = logits[start : start + 1]
        seeded = {1: Seeded(name, seed, start), 2: Seeded(f"beside {name}", 15 - seed, start)}
        found = draws.draw(torch.cat([other, own, other]), [0, drafts, 0], seeded, None, None)
        assert found[-1] == plain[15 - seed][start]
        return found[1:-1].tolist()

    for start, drafts in ((0, 3), (1, 3), (3, 0), (3, 4), (8 - 1, 0), (2, 2)):
        assert drawn("a", 7, start, drafts) == plain[7][start : start + drafts + 1]
    assert drawn("new", 8, 4, 2) == plain[8][4:7]
    assert drawn("a", 8, 0, 1) == plain[8][:2]  # the name again, of another request
    draws.forget_all_but({"a"})
    assert list(draws._states) == ["a"]


def test_rows_draw_in_turn_by_their_own_settings() -> None:
    seen = []

    def sampler(logits, generators, k, p):
        seen.append((logits[:, 0].tolist(), k.tolist(), p))
        return logits[:, 0], None

    logits = torch.arange(5.0)[:, None].expand(5, 4)
    found = DrawsInTurn(sampler).draw(logits, [2, 0, 0], {}, torch.arange(5) + 10, None)
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert seen == [([0, 3, 4], [10, 13, 14], None), ([1], [11], None), ([2], [12], None)]
