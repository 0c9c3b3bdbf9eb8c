"""What heads draft and learn, against computations by hand.

Tests: ``pytest tests/unit/test_heads.py``.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from pairs import random_drafter_config
from vllm_dflash import kinds
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.heads import Ranking
from vllm_dflash.heads.reference import Block, ReferenceHead
from vllm_dflash.kinds import kind_of
from vllm_dflash.models.parameters import within_vocabulary
from vllm_dflash.reference.checkpoint import new_drafter

VOCAB, HIDDEN, K, TOP_K, RANK = 30, 16, 7, 4, 6
PLAIN = random_drafter_config(vocab_size=VOCAB, hidden_size=HIDDEN)
CANDIDATES = random_drafter_config(
    kind="dflash2",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    head={"selector_rank": RANK, "selector_top_k": TOP_K},
)


def head_of(config: DrafterConfig) -> tuple[ReferenceHead, dict[str, torch.Tensor]]:
    """A random head, and its parameters by their names in a checkpoint."""
    torch.manual_seed(1)
    drafter = new_drafter(config)
    with torch.no_grad():
        for parameter in drafter.head.parameters():
            parameter.normal_(0, 1)
    own = kind_of(config).head.own_tensors(config)
    tensors = drafter.state_dict()
    assert own.items() == {n: tuple(tensors[n].shape) for n in own}.items()
    plain = new_drafter(config.with_(kind=kinds.with_head(config.kind, "argmax").name, head={}))
    assert own.keys() == tensors.keys() - plain.state_dict().keys()
    return drafter.head, {n: tensors[n] for n in own}


def random_block(batch: int) -> Block:
    torch.manual_seed(2)
    return Block(torch.randn(batch, K, HIDDEN), 3 * torch.randn(batch, K, VOCAB))


def edge(
    tensors: dict[str, torch.Tensor], block: Block, row: tuple[int, int], before: int, token: int
) -> float:
    """DFlash2's score of one edge, number by number."""
    predecessors, successors, projection = (
        tensors[f"candidate_selector.{name}"]
        for name in ("predecessor_codebook", "successor_codebook", "hidden_projection.weight")
    )
    total = float(block.logits[row][token])
    for r in range(RANK):
        gate = sum(float(projection[r, h]) * float(block.hidden[row][h]) for h in range(HIDDEN))
        total += float(predecessors[before, r]) * gate * float(successors[token, r])
    return total


def best_tokens(block: Block, row: tuple[int, int]) -> list[int]:
    return sorted(range(VOCAB), key=lambda t: -float(block.logits[row][t]))[:TOP_K]


def test_candidates_are_walked_greedily_from_the_anchor() -> None:
    head, tensors = head_of(CANDIDATES)
    block, anchors = random_block(3), torch.tensor([4, 9, 29])
    with torch.no_grad():
        drafted, scores = head.draft(block, anchors)
    for b in range(3):
        before = int(anchors[b])
        for k in range(K):
            at = (b, k)
            by_hand = {t: edge(tensors, block, at, before, t) for t in best_tokens(block, at)}
            before = max(by_hand, key=by_hand.__getitem__)
            assert int(drafted[b, k]) == before
            finite = {t: float(s) for t, s in enumerate(scores[b, k]) if math.isfinite(s)}
            assert finite == pytest.approx(by_hand, rel=1e-4, abs=1e-4)
    assert not torch.equal(drafted, block.logits.argmax(-1))


def test_candidates_learn_among_candidates_with_the_label() -> None:
    """The logits' cross-entropy over the vocabulary, and that of the edges over the candidates; a
    label that is none of them takes the last one's place, and is not drafted."""
    head, tensors = head_of(CANDIDATES)
    block = random_block(2)
    labels, before = torch.randint(VOCAB, (2, K)), torch.randint(VOCAB, (2, K))
    labels[0, 0] = best_tokens(block, (0, 0))[2]
    with torch.no_grad():
        lesson = head.lesson(block, before, labels)
    outside = 0
    for b in range(2):
        for k in range(K):
            label, at = int(labels[b, k]), (b, k)
            found = best_tokens(block, at)
            drafted = max(found, key=lambda t: edge(tensors, block, at, int(before[at]), t))
            outside += label not in found
            among = found if label in found else [*found[:-1], label]
            edges = torch.tensor([edge(tensors, block, at, int(before[at]), t) for t in among])
            assert float(lesson.losses[at]) == pytest.approx(
                float(F.cross_entropy(block.logits[at], labels[at])), rel=1e-4
            )
            assert float(lesson.others[at]) == pytest.approx(
                float(F.cross_entropy(edges, torch.tensor(among.index(label)))), rel=1e-3, abs=1e-3
            )
            if label in found or drafted != found[-1]:
                assert int(lesson.tokens[at]) == drafted
            else:
                assert int(lesson.tokens[at]) != label
    assert 0 < outside < 2 * K


def test_a_drafter_without_a_successors_weight_drafts_as_argmax() -> None:
    head, tensors = head_of(CANDIDATES)
    block = random_block(2)
    with torch.no_grad():
        tensors["candidate_selector.successor_codebook"].zero_()
        drafted, _ = head.draft(block, torch.tensor([1, 2]))
    assert torch.equal(drafted, block.logits.argmax(-1))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"selector_top_k": 1}, "selector_top_k is 1: a whole number from 2 to 256"),
        ({"selector_top_k": 600}, "selector_top_k is 600: a whole number from 2 to 256"),
        ({"selector_rank": "8"}, "selector_rank is '8': a whole number from 1"),
        ({"selector_rank": True}, "selector_rank is True"),
        ({"markov_rank": 8}, "markov_rank is no setting of a DFlash2 drafter's head: known are"),
    ],
)
def test_settings_that_no_head_can_have_are_refused(head: dict, said: str) -> None:
    with pytest.raises(DrafterConfigError, match=said):
        random_drafter_config(kind="dflash2").with_(head=head)


def test_a_head_of_candidates_ranks_the_whole_vocabulary() -> None:
    with pytest.raises(DrafterConfigError, match="leave draft_vocab_size out"):
        random_drafter_config(kind="dflash2").with_(draft_vocab_size=100)


LATTICE = random_drafter_config(kind="lilicorr", vocab_size=VOCAB, hidden_size=HIDDEN)
CORRECTION = random_drafter_config(
    kind="dfly",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    head={"hidden_correction_intermediate_size": RANK},
)
MARKOV = random_drafter_config(
    kind="dspark", vocab_size=VOCAB, hidden_size=HIDDEN, head={"markov_rank": RANK}
)


def test_a_markov_head_adds_what_the_token_before_says() -> None:
    head, tensors = head_of(MARKOV)
    block, anchors = random_block(3), torch.tensor([4, 9, 29])
    w1, w2 = (tensors[f"markov_head.markov_{name}.weight"] for name in ("w1", "w2"))
    with torch.no_grad():
        drafted, scores = head.draft(block, anchors)
    for b in range(3):
        before = int(anchors[b])
        for k in range(K):
            by_hand = [
                float(block.logits[b, k, t])
                + sum(float(w2[t, r]) * float(w1[before, r]) for r in range(RANK))
                for t in range(VOCAB)
            ]
            assert scores[b, k].tolist() == pytest.approx(by_hand, rel=1e-4, abs=1e-4)
            before = max(range(VOCAB), key=by_hand.__getitem__)
            assert int(drafted[b, k]) == before
    assert not torch.equal(drafted, block.logits.argmax(-1))


def test_hidden_states_are_corrected_by_the_token_before() -> None:
    head, tensors = head_of(CORRECTION)
    t = {n.removeprefix("hidden_correction."): x.double() for n, x in tensors.items()}
    block, anchors = random_block(3), torch.tensor([4, 9, 29])
    table, lm_head = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    block = block._replace(embed=lambda ids: table[ids], rank=lambda h: h @ lm_head.T)
    with torch.no_grad():
        drafted, scores = head.draft(block, anchors)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale = math.sqrt(float((x * x).mean()) + CORRECTION.rms_norm_eps)
        return t[f"{name}.weight"] * x / scale

    for b in range(3):
        before = int(anchors[b])
        for k in range(K):
            h = block.hidden[b, k].double()
            x = torch.cat([norm("hidden_norm", h), norm("embed_norm", table[before].double())])
            gate, up = t["gate_proj.weight"] @ x, t["up_proj.weight"] @ x
            h = h + t["down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
            by_hand = lm_head.double() @ h
            assert scores[b, k].tolist() == pytest.approx(by_hand.tolist(), rel=1e-4, abs=1e-4)
            before = int(by_hand.argmax())
            assert int(drafted[b, k]) == before
    assert not torch.equal(drafted, block.rank(block.hidden).argmax(-1))


@pytest.mark.parametrize("with_markov", [True, False])
def test_the_confidence_head_learns_what_is_right_and_changes_nothing_else(
    with_markov: bool,
) -> None:
    config = MARKOV.with_(head=MARKOV.head | {"confidence_head_with_markov": with_markov})
    head, tensors = head_of(config)
    block, labels = random_block(2), torch.randint(VOCAB, (2, K))
    before = torch.randint(VOCAB, (2, K))
    with torch.no_grad():
        labels[0] = head.scores(block, before)[0].argmax(-1)
    hidden = block.hidden.requires_grad_()
    lesson = head.lesson(block._replace(hidden=hidden), before, labels)
    weight, bias = (tensors[f"confidence_head.proj.{name}"] for name in ("weight", "bias"))
    w1 = tensors["markov_head.markov_w1.weight"]
    for at in ((0, 0), (1, 3)):
        x = [*block.hidden[at].tolist(), *(w1[int(before[at])].tolist() if with_markov else [])]
        odds = sum(float(w) * v for w, v in zip(weight[0], x, strict=True)) + float(bias[0])
        right = int(lesson.tokens[at]) == int(labels[at])
        assert right or at[0] == 1
        expected = math.log1p(math.exp(-odds if right else odds))
        assert float(lesson.others[at].detach()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    torch.as_tensor(lesson.others).sum().backward()
    assert hidden.grad is None or not hidden.grad.any()
    assert all(p.grad is None for n, p in head.named_parameters() if "markov_head" in n)
    assert head.confidence_head.proj.weight.grad.any()


@pytest.mark.parametrize("enabled", [True, False])
def test_what_the_controller_gets_is_the_confidence_heads(enabled: bool) -> None:
    """Its probability, in place of the softmax of the token that was chosen."""
    config = MARKOV.with_(head=MARKOV.head | {"enable_confidence_head": enabled})
    head, tensors = head_of(config)
    served = kind_of(config).head_part("Served")(config, torch.float32)
    for name, tensor in tensors.items():
        served.load(name, tensor)
    block, anchors = random_block(2), torch.tensor([4, 9])
    ranking = Ranking(
        lambda hidden: block.logits.flatten(0, 1),
        lambda scores: scores.argmax(-1),
        lambda hidden: block.logits.flatten(0, 1).argmax(-1),
        confident=True,
    )
    with torch.no_grad():
        tokens, confidences = served.draft(block.hidden.flatten(0, 1), anchors, K, ranking)
        drafted, scores = head.draft(block, anchors)
        before = torch.cat([anchors[:, None], drafted[:, :-1]], 1)
        expected = head.confidences(block, before)
    assert torch.equal(tokens, drafted)
    assert (expected is None) != enabled
    expected = scores.softmax(-1).amax(-1) if expected is None else expected.sigmoid()
    torch.testing.assert_close(confidences, expected)


@pytest.mark.parametrize("config", [CANDIDATES, MARKOV], ids=["walk", "markov"])
def test_an_anchor_beyond_the_vocabulary_is_drafted_after(config: DrafterConfig) -> None:
    """A target with a padded embedding may be made to write ids that the drafter's tables have no
    rows for: the engine ended with an IndexError."""
    _, tensors = head_of(config)
    served, block = kind_of(config).head_part("Served")(config, torch.float32), random_block(2)
    for name, tensor in tensors.items():
        served.load(name, tensor)
    ranking = Ranking(
        lambda hidden: block.logits.flatten(0, 1),
        lambda scores: scores.argmax(-1),
        lambda hidden: block.logits.flatten(0, 1).argmax(-1),
        confident=False,
    )
    draft = within_vocabulary(served.draft, VOCAB)
    with torch.no_grad():
        tokens, last = (
            draft(block.hidden.flatten(0, 1), torch.tensor([4, anchor]), K, ranking)[0]
            for anchor in (VOCAB + 5, VOCAB - 1)
        )
    assert torch.equal(tokens, last)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize(
    "config",
    [PLAIN, CANDIDATES, MARKOV, LATTICE, CORRECTION],
    ids=["argmax", "walk", "markov", "lattice", "correction"],
)
def test_a_served_head_asks_the_device_for_nothing(config: DrafterConfig, confident: bool) -> None:
    """On a GPU a graph records it, and a question would wait: torch's meta device has no answer."""
    with torch.device("meta"):
        served = kind_of(config).head_part("Served")(config, torch.bfloat16)
        lm_head, hidden = (
            torch.empty(rows, HIDDEN, dtype=torch.bfloat16) for rows in (VOCAB, 3 * K)
        )
        anchors, before = (
            torch.empty(3, dtype=torch.int32),
            torch.empty(3, HIDDEN, dtype=torch.bfloat16),
        )
    ranking = Ranking(
        lambda rows: rows @ lm_head.T,
        lambda scores: scores.argmax(-1),
        lambda rows: (rows @ lm_head.T).argmax(-1),
        confident,
        lambda ids: lm_head[ids],
        before,
    )
    tokens, confidences = served.draft(hidden, anchors, K, ranking)
    assert (tokens.shape, tokens.dtype) == ((3, K), torch.int64)
    assert (confidences is not None) == confident
    assert confidences is None or confidences.shape == (3, K)


def test_confidences_are_of_the_logits_that_are_likely() -> None:
    """The best token is ranked by logits as they are: capped ones may be equal."""
    served = kind_of(PLAIN).head_part("Served")(PLAIN, torch.float32)
    logits = 100 * torch.randn(3 * K, VOCAB)
    ranking = Ranking(
        lambda rows: logits,
        lambda scores: scores.argmax(-1),
        lambda rows: logits.argmax(-1),
        confident=True,
        likely=lambda scores: 3 * torch.tanh(0.5 * scores / 3),
    )
    tokens, confidences = served.draft(torch.empty(3 * K, HIDDEN), torch.arange(3), K, ranking)
    assert torch.equal(tokens.flatten(), logits.argmax(-1))
    for row, confidence in zip(logits.double(), confidences.flatten(), strict=True):
        capped = [3 * math.tanh(0.5 * float(x) / 3) for x in row]
        share = math.exp(max(capped)) / sum(map(math.exp, capped))
        assert float(confidence) == pytest.approx(share, rel=1e-4)
