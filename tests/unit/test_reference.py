"""The plain PyTorch loop against Hugging Face's own greedy decoding, and the trainer's forward
against the loop's.

Everything in float32 on a tiny random pair, so that equality of tokens is exact.

Tests: ``pytest tests/unit/test_reference.py``.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from pairs import random_drafter_config
from vllm_dflash.config import DrafterConfig
from vllm_dflash.kinds.dflash.context import Reference as DFlashDrafter
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.decoding import (
    captured_features,
    generate,
    replay_drafts,
    target_features,
)
from vllm_dflash.reference.drafter import OwnTables
from vllm_dflash.reference.masks import block_positions, context_mask, training_mask

K = 7
PROMPTS = ([5, 9, 33], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [60])


@pytest.fixture(scope="module")
def target() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=5,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def drafter(target: Qwen3ForCausalLM) -> DFlashDrafter:
    """Trained for a moment on the target's own text: a random drafter would be right once in 64
    tokens, by chance."""
    torch.manual_seed(1)
    config = DrafterConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        block_size=8,
        mask_token_id=63,
        target_layer_ids=(1, 4),
        num_target_layers=5,
        max_position_embeddings=128,
        rope_theta=10000.0,
        kind="dflash",
    )
    model = DFlashDrafter(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = torch.tensor([PROMPTS[0] + generate(target, None, PROMPTS[0], 60, 0).tokens])
    features = target_features(target, config.target_layer_ids, tokens)[0].detach()
    anchors = torch.arange(3, 40)[None]
    labels = tokens[0][block_positions(anchors, 8)]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        hidden = trainer_hidden(target, model, tokens, features, anchors, split=True)
        torch.nn.functional.cross_entropy(target.lm_head(hidden)[0], labels[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trainer_hidden(target, drafter, tokens, features, anchors, split: bool) -> torch.Tensor:
    """The training forward over anchors [1, N]: with the context mask and a block size, or the full
    mask."""
    c, size, length = drafter.config, drafter.config.block_size, tokens.shape[1]
    ids = torch.full((*anchors.shape, size), c.mask_token_id)
    ids[..., 0] = tokens.gather(1, anchors)
    context = drafter.context_kv(drafter.context(features), torch.arange(length)[None])
    embeds, positions = (
        target.get_input_embeddings()(ids.flatten(1)).detach(),
        block_positions(anchors, size),
    )
    if split:
        return drafter(embeds, positions, context, context_mask(anchors, size, length), size)
    return drafter(embeds, positions, context, training_mask(anchors, size, length))


def hf_greedy(target, prompt: list[int], new_tokens: int) -> list[int]:
    limits = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    out = target.generate(torch.tensor([prompt]), do_sample=False, **limits)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("num_speculative_tokens", [1, 3, K])
def test_output_is_the_targets_own(target, drafter, prompt, num_speculative_tokens) -> None:
    result = generate(target, drafter, prompt, 40, num_speculative_tokens)
    assert result.tokens == hf_greedy(target, prompt, 40)
    assert all(len(step.draft.tokens) == num_speculative_tokens for step in result.steps)


def test_some_drafts_are_accepted(target, drafter) -> None:
    """Without acceptance the tests of this file would not see the cache being cut after a rejected
    tail."""
    result = generate(target, drafter, PROMPTS[0], 60, K)
    accepted = {step.accepted for step in result.steps}
    assert len(accepted) >= 3, accepted
    assert 1.2 < result.tau < 7
    assert 60 <= 1 + sum(step.accepted + 1 for step in result.steps) < 60 + K + 1


def test_baseline_is_the_same_loop(target) -> None:
    result = generate(target, None, PROMPTS[1], 20, K)
    assert result.tokens == hf_greedy(target, PROMPTS[1], 20)
    assert result.tau == 1
    assert len(result.steps) == 19


@pytest.mark.parametrize("max_model_len", [len(PROMPTS[1]) + n for n in (1, 2, 9, 23)])
def test_length_bound(target, drafter, max_model_len) -> None:
    """No query lies at or beyond max_model_len, and the last tokens are still the target's own."""
    result = generate(target, drafter, PROMPTS[1], 100, K, max_model_len=max_model_len)
    assert result.tokens == hf_greedy(target, PROMPTS[1], max_model_len - len(PROMPTS[1]))
    assert all(step.draft.anchor + len(step.draft.tokens) < max_model_len for step in result.steps)


def test_stops_at_the_end_token(target, drafter) -> None:
    plain = hf_greedy(target, PROMPTS[0], 40)
    end = plain[10]
    assert (
        generate(target, drafter, PROMPTS[0], 40, K, eos_token_id=end).tokens
        == plain[: plain.index(end) + 1]
    )


def test_features_are_the_residual_stream(target) -> None:
    """Hugging Face's last ``hidden_states`` is after the final norm: a drafter that captures the
    last layer and was trained on the one and served on the other has an acceptance of almost
    nothing, and no error is seen.
    """
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad(), captured_features(target, (1, 4)) as features:
        states = target(ids, output_hidden_states=True).hidden_states
    assert torch.equal(features[0], states[2])
    assert not torch.allclose(features[1], states[5])
    torch.testing.assert_close(target.model.norm(features[1]), states[5])


@pytest.mark.parametrize("split", [True, False])
def test_trainer_and_loop_agree(target, drafter, split) -> None:
    """The training forward, whose blocks share one context under a mask, drafts what the loop
    drafts."""
    result = generate(target, drafter, PROMPTS[2], 60, K)
    tokens = torch.tensor([PROMPTS[2] + result.tokens])
    steps = [step for step in result.steps if step.draft.anchor + 8 <= tokens.shape[1]]
    anchors = torch.tensor([[step.draft.anchor for step in steps]])
    with torch.no_grad():
        features = target_features(target, drafter.config.target_layer_ids, tokens)[0]
        hidden = trainer_hidden(target, drafter, tokens, features, anchors, split)
        predicted = target.lm_head(hidden).argmax(-1).view(-1, 8)[:, 1:].tolist()
    assert predicted == [step.draft.tokens for step in steps]


@pytest.mark.parametrize("num_speculative_tokens", [3, K])
def test_replay_equals_the_loop(target, drafter, num_speculative_tokens) -> None:
    bound = len(PROMPTS[0]) + 50
    result = generate(target, drafter, PROMPTS[0], 50, num_speculative_tokens, max_model_len=bound)
    steps = [step for step in result.steps if step.draft.tokens]
    replayed = replay_drafts(
        target,
        drafter,
        PROMPTS[0] + result.tokens,
        [s.draft.anchor for s in steps],
        num_speculative_tokens,
        bound,
    )
    assert [d.tokens for d in replayed] == [s.draft.tokens for s in steps]
    for one, other in zip(replayed, steps, strict=True):
        assert one.gaps == pytest.approx(other.draft.gaps, abs=1e-3)
        assert min(one.gaps) >= 0


def test_future_tokens_do_not_matter(target, drafter) -> None:
    """A draft at n sees the target's features at 0..n-1 and the token at n; what follows must not
    change it."""
    tokens = PROMPTS[1] + generate(target, None, PROMPTS[1], 20, 0).tokens
    changed = tokens[:16] + [(t + 1) % 60 for t in tokens[16:]]
    assert (
        replay_drafts(target, drafter, tokens, [15], K)[0].tokens
        == replay_drafts(target, drafter, changed, [15], K)[0].tokens
    )


def test_scores_depend_only_on_the_product_of_the_norms(target, drafter) -> None:
    """k_norm scaled per layer and q_norm by the inverse leave every draft as it was: a property of
    the formula that fails where one of the norms is skipped, or where context and queries do not
    share k_norm."""
    tokens = PROMPTS[0] + generate(target, None, PROMPTS[0], 40, 0).tokens
    before = replay_drafts(target, drafter, tokens, range(3, 40), K)
    state = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    with torch.no_grad():
        for i, layer in enumerate(drafter.layers):
            layer.self_attn.k_norm.weight *= 2.0 ** (i + 1)
            layer.self_attn.q_norm.weight *= 0.5 ** (i + 1)
    after = replay_drafts(target, drafter, tokens, range(3, 40), K)
    drafter.load_state_dict(state)
    assert [d.tokens for d in after] == [d.tokens for d in before]


def test_an_empty_prompt_is_refused(target, drafter) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(target, drafter, [], 5, K)


@pytest.mark.parametrize("own", [False, True])
def test_rows_of_blocks_are_ranked_in_one_product(own: bool) -> None:
    """The trainer's walk ranks blocks without their anchors' rows. That slice is not contiguous, so
    torch multiplied it block by block, with a copy of the table for each: two thirds of a
    measurement in bfloat16, and 3.6 GB of copies for a vocabulary of 49,152."""

    names = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    config = random_drafter_config()
    drafter, head = new_drafter(config), torch.nn.Linear(config.hidden_size, 512, bias=False)
    if own:
        drafter.own = OwnTables(lm_head=head.weight[:9].detach(), d2t=torch.zeros(9).long())
    hidden = torch.randn(5, 8, config.hidden_size)[:, 1:]
    with torch.no_grad(), Recorded():
        logits = drafter.draft_logits(head, hidden)
    assert "mm" in names
    assert "bmm" not in names
    expected = torch.stack([row @ head.weight[: 9 if own else None].T for row in hidden])
    torch.testing.assert_close(logits, expected.detach())


@pytest.mark.parametrize(
    ("kind", "given", "factor"),
    [
        ("dflash", None, 4.0),
        ("dflash", 1.0, 1.0),
        ("dflash", 2.5, 2.5),
        ("dflash2", None, 1.0),
        ("dflash2", 2.5, 2.5),
    ],
)
def test_rows_of_a_target_whose_embedding_ends_in_a_factor(
    kind: str, given: float | None, factor: float
) -> None:
    """DFlash2's published code, and vLLM's, read bare rows where a file says nothing; DFlash's
    drafters for Gemma are trained on what the target's embedding gives."""

    class Scaled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 4.0

    config = random_drafter_config(kind=kind, input_embedding_scale=given)
    drafter, target = new_drafter(config), Scaled(config.vocab_size, config.hidden_size)
    ids = torch.tensor([[5, config.mask_token_id]])
    with torch.no_grad():
        assert torch.equal(drafter.embed(target, ids), target.weight[ids] * factor)
        own = torch.nn.Parameter(torch.randn(config.hidden_size))
        drafter.mask_embedding = own
        expected = torch.stack([target.weight[5] * factor, own * (given or 1.0)])
        assert torch.equal(drafter.embed(target, ids)[0], expected)
