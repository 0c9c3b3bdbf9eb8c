"""A drafter that ranks only what the target says most: which tokens, what it learns, what is
written, and going on from it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pairs import random_drafter_config
from training_runs import answer_held_out, answered_prompts, held_out_file, make_target, settings
from vllm_dflash.config import DrafterConfig
from vllm_dflash.reference.checkpoint import load_drafter, new_drafter
from vllm_dflash.reference.drafter import OwnTables
from vllm_dflash.training import draft_vocab, learned
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import held_out, sequences
from vllm_dflash.training.objective import Objective
from vllm_dflash.training.pipeline import run_stages
from vllm_dflash.training.sequences import Sequences, shard_path, write_sequences
from vllm_dflash.training.tables import Train

STAGES = ("generate", "features", "train")
VOCAB, SIZE = 512, 4


def test_the_answers_most_frequent_tokens(tmp_path: Path) -> None:
    """Prompts do not count; of tokens that come as often the first are taken; over shards."""
    write_sequences(shard_path(tmp_path, 0), [([9, 9, 9, 5, 7, 7], 3), ([9, 3], 1)])
    write_sequences(shard_path(tmp_path, 1), [([1, 7, 8], 1)])
    data = Sequences(tmp_path, 2)
    assert draft_vocab.counts(data, 10).tolist() == [0, 0, 0, 1, 0, 1, 0, 3, 1, 0]
    assert draft_vocab.most_frequent(data, 3, 10).tolist() == [3, 5, 7]
    assert draft_vocab.most_frequent(data, 5, 10).tolist() == [0, 3, 5, 7, 8]
    assert draft_vocab.covered(data, torch.tensor([5, 7]), 10) == pytest.approx(4 / 6)


def test_what_comes_after_an_end_does_not_count(tmp_path: Path) -> None:
    """Held-out answers go on past their end token, in text that no decoding writes; an end token in
    a prompt ends nothing."""
    write_sequences(shard_path(tmp_path, 0), [([2, 9, 5, 2, 7, 2, 8], 2), ([9, 3], 1)])
    write_sequences(shard_path(tmp_path, 1), [([2, 2], 1), ([1, 7, 8], 1)])
    data = Sequences(tmp_path, 2)
    assert draft_vocab.counts(data, 10, 2).tolist() == [0, 0, 2, 1, 0, 1, 0, 1, 1, 0]
    assert draft_vocab.covered(data, torch.tensor([2, 7]), 10, 2) == pytest.approx(3 / 6)


@pytest.mark.parametrize("weighting", ["decay", "dpace"])
def test_the_loss_is_that_of_the_tokens_it_has(weighting: str) -> None:
    """The sum and the gradient are those of logits over all tokens, with minus infinity for those
    that the draft vocabulary lacks, over the labels that it has: nothing is accepted past one."""
    torch.manual_seed(0)
    drafter = new_drafter(random_drafter_config())
    ids = torch.arange(0, VOCAB, 3)
    head = torch.nn.Linear(64, VOCAB, bias=False).requires_grad_(False)
    drafter.own = OwnTables(lm_head=head.weight[ids], d2t=ids - torch.arange(len(ids)))
    run = Objective(_Frozen(head), drafter, Train(weighting=weighting))
    hidden = torch.randn(6, 7, 64, requires_grad=True)
    labels = torch.randint(0, VOCAB // 3, (6, 7)) * 3
    labels[1, 3], labels[4, 0] = 100, 200  # not among them
    valid, weights = torch.ones(6, 7, dtype=torch.bool), torch.rand(7)
    loss, accepted = run._ranked(head, hidden, labels, labels, valid, weights)
    (ours,) = torch.autograd.grad(loss, hidden)

    logits = torch.full((6, 7, VOCAB), float("-inf"))
    logits[..., ids] = hidden @ head.weight[ids].T
    known = torch.isin(labels, ids)
    losses = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].where(known, 0)
    if weighting == "dpace":
        chance = (0.5 * torch.exp(-losses.detach()) + 0.5).cumprod(-1)
        chance *= known.long().cumprod(-1)
        weights = torch.stack([chance[:, j:].sum(-1) for j in range(7)], -1)
        expected = (losses * weights * known).sum()
    else:
        expected = (losses * weights).sum()
    (theirs,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, theirs)
    right = (logits.argmax(-1) == labels).float()
    assert accepted == right.cumprod(-1).sum()
    assert (known.sum(), int(right[4, 0])) == (40, 0)


class _Frozen:
    def __init__(self, head: torch.nn.Linear) -> None:
        self.lm_head = head

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.lm_head


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, its file has the target's rows for the tokens that the answers hold most often,
    plain PyTorch drafts no other; another run goes on from it, with the same tokens."""
    target = make_target(tmp_path / "target")
    prompts = answered_prompts(target, tmp_path / "prompts.jsonl", 16)
    asked, ids = held_out_file(tmp_path / "held-out.jsonl")
    flags = dict(held_out_prompts=str(asked), draft_vocab_size=SIZE, steps=16)
    chosen = settings(target, prompts, tmp_path / "run", **flags)
    answer_held_out(chosen, ids)
    run_stages(chosen, STAGES)
    said = re.search(
        rf"draft vocabulary: {SIZE} of {VOCAB} tokens, ([\d.]+)% of the answers', ([\d.]+)% of the"
        " held-out answers'",
        capsys.readouterr().out,
    )
    assert said is not None
    folder = learned.trained_folder(chosen)
    config, tensors = DrafterConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    assert config.draft_vocab_size == SIZE
    answered = np.concatenate([s.tokens[s.prompt_length :] for s in _all(chosen)])
    found, times = np.unique(answered, return_counts=True)
    best = np.sort(found[np.argsort(-times, kind="stable")[:SIZE]])
    unseen = np.concatenate([s.tokens[s.prompt_length :] for s in _all(chosen, held_out)])
    for share, tokens in zip(said.groups(), (answered, unseen), strict=True):
        assert float(share) == pytest.approx(100 * np.isin(tokens, best).mean(), abs=0.01)
    assert (tensors["d2t"] + torch.arange(SIZE)).tolist() == best.tolist()
    table = load_file(target / "model.safetensors")
    head = table.get("lm_head.weight", table.get("model.embed_tokens.weight"))
    assert torch.equal(tensors["lm_head.weight"], head[torch.from_numpy(best)])
    drafter = load_drafter(folder, torch.float32)
    logits = drafter.logits(torch.nn.Identity(), torch.randn(3, config.hidden_size))
    assert set(logits.isfinite().any(0).nonzero().flatten().tolist()) == set(best.tolist())
    assert learned.result(chosen)["tau"] > 1.2

    more = settings(
        target, prompts, tmp_path / "more", **flags | dict(init=str(folder), layers=None, steps=2)
    )
    answer_held_out(more, ids)
    run_stages(more, STAGES)
    again = load_file(learned.trained_folder(more) / "model.safetensors")
    assert torch.equal(again["d2t"], tensors["d2t"])
    assert torch.equal(again["lm_head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(again["norm.weight"], tensors["norm.weight"])
    other = settings(
        target,
        prompts,
        tmp_path / "other",
        **flags | dict(init=str(folder), layers=None, draft_vocab_size=8),
    )
    with pytest.raises(
        TrainingError, match=r"draft_vocab_size is 8, but the drafter of init has 4"
    ):
        run_stages(other, STAGES)


def test_refusals(tmp_path: Path) -> None:
    """As many tokens as the target has are no draft vocabulary."""
    target = make_target(tmp_path / "target")
    chosen = settings(target, tmp_path / "p", tmp_path / "run", draft_vocab_size=VOCAB)
    with pytest.raises(TrainingError, match="draft_vocab_size 512 is not between"):
        run_stages(replace(chosen), ("train",))


def _all(chosen, which=sequences):
    data = which(chosen)
    return [data[i] for i in range(len(data))]


def test_cross_entropy_knows_no_ignored_place() -> None:
    """Labels of other tokens stand at place 0, so that no infinite loss is multiplied by zero."""
    drafter = new_drafter(random_drafter_config())
    drafter.own = OwnTables(d2t=torch.tensor([2, 4, 6]), lm_head=torch.zeros(3, 64))
    places, known = drafter.draft_labels(torch.tensor([2, 5, 8, 1]))
    assert (places.tolist(), known.tolist()) == ([0, 1, 2, 0], [True, True, True, False])
    assert F.cross_entropy(torch.zeros(4, 3), places, reduction="none").isfinite().all()
