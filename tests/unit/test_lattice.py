"""LiLiCorr's lattice, number by number, and its checkpoints as they were published.

Tests: ``pytest tests/unit/test_lattice.py``.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pairs import make_random_drafter, random_drafter_config
from unit.test_head_formats import LAYERS
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import SPECULATORS, parse, published_format, write
from vllm_dflash.heads.reference import Block, ReferenceHead
from vllm_dflash.kinds import kind_of
from vllm_dflash.reference.checkpoint import load_drafter, new_drafter
from vllm_dflash.tools.convert import convert
from vllm_dflash.weights import check_tensors, expected_tensors

VOCAB, HIDDEN, K, TOP_K = 30, 16, 7, 4
SETTINGS = {
    "lilicorr_candidate_topk": TOP_K,
    "lilicorr_hidden_size": 12,
    "lilicorr_num_layers": 2,
    "lilicorr_num_heads": 3,
    "lilicorr_mlp_ratio": 1.5,
    "lilicorr_factor_dim": 5,
    "lilicorr_vector_eps": 1e-6,
    "lilicorr_logit_scale": 8.0,
}
SMALL = random_drafter_config(kind="lilicorr", vocab_size=VOCAB, hidden_size=HIDDEN, head=SETTINGS)
PUBLISHED: dict[str, Any] = LAYERS | {
    "architectures": ["LiLiCorrDraftModel"],
    "block_size": 16,
    "num_target_layers": 64,
    "dflash_config": {
        "mask_token_id": 248070,
        "target_layer_ids": [1, 16, 31, 46, 61],
        "causal": False,
        "projector_type": "lilicorr",
        "lilicorr_enabled": True,
        "lilicorr_candidate_topk": 8,
        "lilicorr_hidden_size": 1024,
        "lilicorr_num_layers": 2,
        "lilicorr_num_heads": 8,
        "lilicorr_mlp_ratio": 2.0,
        "lilicorr_factor_dim": 128,
        "lilicorr_vector_eps": 1e-6,
        "lilicorr_logit_scale": 10.0,
    },
}
"""As NVIDIA's Model-Optimizer writes it."""


def head_of(config: DrafterConfig) -> tuple[ReferenceHead, dict[str, np.ndarray]]:
    """A random head, and its tensors by their names in it."""
    torch.manual_seed(1)
    drafter = new_drafter(config)
    with torch.no_grad():
        for parameter in drafter.head.parameters():
            parameter.normal_(0, 0.5)
    own, tensors = kind_of(config).head.own_tensors(config), drafter.state_dict()
    assert own.items() == {n: tuple(tensors[n].shape) for n in own}.items()
    assert {n for n in tensors if n.startswith("lilicorr.")} == set(own)
    return drafter.head, {n.removeprefix("lilicorr."): tensors[n].double().numpy() for n in own}


def random_block(batch: int) -> tuple[Block, torch.Tensor]:
    torch.manual_seed(2)
    table = torch.randn(VOCAB, HIDDEN)
    block = Block(
        torch.randn(batch, K, HIDDEN),
        3 * torch.randn(batch, K, VOCAB),
        lambda ids: table[ids],
        before=torch.randn(batch, HIDDEN),
    )
    return block, table


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def edges_by_hand(
    config: DrafterConfig, t: dict[str, np.ndarray], block: Block, table: torch.Tensor, b: int
) -> tuple[list[list[int]], np.ndarray]:
    """Candidates of each row of block ``b``, and edges [K, k, k]: one candidate after the other,
    in double precision, as the paper has it."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return t[f"{name}.weight"] @ x + t[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return t[f"{name}.weight"] * x / math.sqrt((x * x).mean() + config.rms_norm_eps)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / math.sqrt((x * x).sum())

    assert block.before is not None
    settings, logits = config.head, block.logits[b].double().numpy()
    inner = settings["lilicorr_hidden_size"] or HIDDEN
    heads, states, found = settings["lilicorr_num_heads"], [], []
    for k in range(K):
        best = sorted(range(VOCAB), key=lambda token: -logits[k, token])[:TOP_K]
        found.append(best)
        total = math.log(np.exp(logits[k]).sum())
        for rank, token in enumerate(best):
            probable = logits[k, token] - total
            features = np.array(
                [
                    probable,
                    math.exp(probable),
                    logits[k, token] - logits[k, best[0]],
                    rank / (TOP_K - 1),
                    rank == 0,
                ]
            )
            features = (features - features.mean()) / math.sqrt(features.var() + 1e-5)
            features = features * t["feature_norm.weight"] + t["feature_norm.bias"]
            state = table[token].double().numpy()
            if inner != HIDDEN:
                state = linear("token_proj", state)
            state = state + linear("pass_hidden_proj", block.hidden[b, k].double().numpy())
            state = state + linear(
                "feature_mlp.down_proj", silu(linear("feature_mlp.up_proj", features))
            )
            states.append(
                state + t["slot_embedding"][0, 0, k, 0] + t["rank_embedding"][0, 0, 0, rank]
            )
    for i in range(settings["lilicorr_num_layers"]):
        layer, size = f"layers.{i}", inner // heads
        qkv = [
            t[f"{layer}.attn.in_proj_weight"] @ norm(f"{layer}.attn_norm", x)
            + t[f"{layer}.attn.in_proj_bias"]
            for x in states
        ]
        out = [np.zeros(inner) for _ in states]
        for h in range(heads):
            q, key, v = (
                [x[part * inner + h * size : part * inner + (h + 1) * size] for x in qkv]
                for part in range(3)
            )
            for row in range(len(states)):
                scores = np.array(
                    [
                        q[row] @ key[other] / math.sqrt(size)
                        + t["relative_slot_bias"][
                            h, row // TOP_K - other // TOP_K + config.block_size - 1
                        ]
                        + (row // TOP_K == other // TOP_K) * t["same_slot_bias"][h]
                        for other in range(len(states))
                    ]
                )
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                out[row][h * size : (h + 1) * size] = sum(
                    share * x for share, x in zip(shares, v, strict=True)
                )
        states = [x + linear(f"{layer}.attn.out_proj", o) for x, o in zip(states, out, strict=True)]
        states = [
            x
            + linear(
                f"{layer}.mlp.down_proj",
                silu(linear(f"{layer}.mlp.up_proj", norm(f"{layer}.mlp_norm", x))),
            )
            for x in states
        ]
    anchor = norm("anchor_norm", linear("context_proj", block.before[b].double().numpy()))
    outs, ins = [], []
    for x in states:
        x = norm("output_norm", x)
        factors = silu(linear("factor_input_proj", np.concatenate([x, anchor, x * anchor])))
        outs.append(unit(linear("out_head", factors)))
        ins.append(unit(linear("in_head", factors)))
    start = unit(linear("anchor_out_head", anchor))
    edges = np.zeros((K, TOP_K, TOP_K))
    for k in range(K):
        for i in range(TOP_K):
            came_from = outs[(k - 1) * TOP_K + i] if k else start
            for j in range(TOP_K):
                edges[k, i, j] = settings["lilicorr_logit_scale"] * (came_from @ ins[k * TOP_K + j])
    return found, edges


@pytest.mark.parametrize("inner", [12, 0], ids=["narrower", "as the drafter"])
def test_the_lattice_is_walked_greedily_from_the_anchor(inner: int) -> None:
    heads = 3 if inner else 4
    config = SMALL.with_(
        head=SETTINGS | {"lilicorr_hidden_size": inner, "lilicorr_num_heads": heads}
    )
    head, tensors = head_of(config)
    block, table = random_block(2)
    with torch.no_grad():
        drafted, scores = head.draft(block, torch.tensor([4, 9]))
    for b in range(2):
        found, edges = edges_by_hand(config, tensors, block, table, b)
        at = 0
        for k in range(K):
            by_hand = dict(zip(found[k], edges[k, at], strict=True))
            finite = {t: float(s) for t, s in enumerate(scores[b, k]) if math.isfinite(s)}
            assert finite == pytest.approx(by_hand, rel=1e-4, abs=1e-4)
            at = int(edges[k, at].argmax())
            assert int(drafted[b, k]) == found[k][at]
    assert not torch.equal(drafted, block.logits.argmax(-1))


def test_edges_learn_as_far_as_all_labels_are_candidates() -> None:
    """The logits' cross-entropy everywhere, and a quarter of the edges' among candidates up to the
    first label that is none of them."""
    head, tensors = head_of(SMALL)
    block, table = random_block(2)
    labels = torch.randint(VOCAB, (2, K))
    best = block.logits.topk(TOP_K).indices
    labels[0] = best[0].gather(1, torch.arange(K)[:, None] % TOP_K)[:, 0]
    labels[1, :3] = best[1, :3, 2]
    labels[1, 3] = block.logits[1, 3].argmin()
    labels[1, 4:] = best[1, 4:, 0]
    before = torch.cat([torch.tensor([[5], [6]]), labels[:, :-1]], dim=1)
    with torch.no_grad():
        lesson = head.lesson(block, before, labels)
    others = torch.as_tensor(lesson.others)
    for b, end in ((0, K), (1, 3)):
        found, edges = edges_by_hand(SMALL, tensors, block, table, b)
        at = 0
        for k in range(K):
            label = int(labels[b, k])
            assert float(lesson.losses[b, k]) == pytest.approx(
                float(F.cross_entropy(block.logits[b, k], labels[b, k])), rel=1e-4
            )
            if k >= end:
                assert others[b, k] == 0
                continue
            line = torch.tensor(edges[k, at])
            at = found[k].index(label)
            loss = F.cross_entropy(line, torch.tensor(at))
            assert float(others[b, k]) == pytest.approx(float(loss) / 4, rel=1e-3, abs=1e-4)
            assert int(lesson.tokens[b, k]) == found[k][int(line.argmax())]


def test_the_head_teaches_the_layers_too() -> None:
    head, _ = head_of(SMALL)
    block, _ = random_block(1)
    hidden = block.hidden.requires_grad_()
    labels = block.logits.argmax(-1)
    lesson = head.lesson(block._replace(hidden=hidden), labels, labels)
    torch.as_tensor(lesson.others).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_a_published_config_is_read() -> None:
    config = parse(PUBLISHED)
    assert (config.kind, config.max_speculative_tokens) == ("lilicorr", 15)
    assert config.unknown_keys == ()
    assert config.head == {
        name: value
        for name, value in PUBLISHED["dflash_config"].items()
        if name.startswith("lilicorr") and name != "lilicorr_enabled"
    }
    tensors = expected_tensors(config)
    assert tensors["lilicorr.slot_embedding"] == (1, 1, 15, 1, 1024)
    assert tensors["lilicorr.relative_slot_bias"] == (8, 31)
    assert tensors["lilicorr.token_proj.weight"] == (1024, 5120)
    assert tensors["lilicorr.layers.1.mlp.up_proj.weight"] == (2048, 1024)
    ours = write(config, published_format(config))
    assert ours["architectures"] == ["LiLiCorrDraftModel"]
    assert parse(ours) == parse(write(config, SPECULATORS)) == config
    convolved = PUBLISHED["dflash_config"] | {"conv_kernel_size": 2, "conv_group_size": 16}
    assert parse(PUBLISHED | {"dflash_config": convolved}).conv_kernel_size == 2


def test_a_width_of_0_is_the_drafters_own() -> None:
    nested = PUBLISHED["dflash_config"] | {"lilicorr_hidden_size": 0}
    tensors = expected_tensors(parse(PUBLISHED | {"dflash_config": nested}))
    assert "lilicorr.token_proj.weight" not in tensors
    assert tensors["lilicorr.output_norm.weight"] == (5120,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lilicorr_logit_scale": None}, "dflash_config.lilicorr_logit_scale is missing"),
        ({"lilicorr_vector_eps": None}, "dflash_config.lilicorr_vector_eps is missing"),
        ({"lilicorr_vector_eps": 0.7}, "lilicorr_vector_eps is 0.7: a number above 0, at most 0.5"),
        ({"lilicorr_logit_scale": 0}, "dflash_config.lilicorr_logit_scale is 0"),
        ({"lilicorr_hidden_size": None}, "dflash_config.lilicorr_hidden_size is missing"),
        ({"lilicorr_hidden_size": False}, "dflash_config.lilicorr_hidden_size is False"),
        ({"lilicorr_candidate_topk": 32}, "lilicorr_candidate_topk is 32"),
        ({"lilicorr_num_heads": 7}, "lilicorr_num_heads is 7: a divisor of the 1024"),
        ({"lilicorr_mlp_ratio": 1e-4}, "lilicorr_mlp_ratio is 0.0001: 1 / 1024 or more"),
        ({"lilicorr_enabled": False}, "lilicorr_enabled = False is not supported"),
        ({"projector_type": "domino"}, "projector_type = 'domino' is not supported"),
        ({"selector_rank": 8}, "dflash_config.selector_rank"),
        ({"lilicorr_new": 8}, "dflash_config.lilicorr_new = 8 is not known here"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DrafterConfigError, match=said):
        parse(PUBLISHED | {"dflash_config": PUBLISHED["dflash_config"] | changes})


def test_a_plain_drafter_that_says_another_projector_is_refused() -> None:
    """The head's tensors were what ended it, by their names."""
    nested = {
        name: PUBLISHED["dflash_config"][name] for name in ("mask_token_id", "target_layer_ids")
    }
    raw = PUBLISHED | {"architectures": ["DFlashDraftModel"]}
    parse(raw | {"dflash_config": nested})
    with pytest.raises(DrafterConfigError, match="projector_type = 'lilicorr' is not"):
        parse(raw | {"dflash_config": nested | {"projector_type": "lilicorr"}})


def test_weights_by_the_first_exports_names(tmp_path: Path) -> None:
    """There MLPs are sequences, whose parts have numbers; what is converted has the names that
    vLLM reads."""
    config = random_drafter_config(kind="lilicorr", head=SETTINGS)
    ours = make_random_drafter(tmp_path / "ours", config=config)
    theirs = make_random_drafter(tmp_path / "theirs", config=config)
    tensors = load_file(ours / "model.safetensors")
    first = {
        name.replace("feature_norm.", "feature_mlp.0.")
        .replace("feature_mlp.up_proj.", "feature_mlp.1.")
        .replace("feature_mlp.down_proj.", "feature_mlp.3.")
        .replace("1.mlp.up_proj.", "1.mlp.0.")
        .replace("1.mlp.down_proj.", "1.mlp.2.")
        if name.startswith("lilicorr.")
        else name: tensor
        for name, tensor in tensors.items()
    }
    assert len(first.keys() - tensors.keys()) == 10
    save_file(first, theirs / "model.safetensors", metadata={"format": "pt"})
    check_tensors(config, theirs)
    state = load_drafter(ours, torch.float32).state_dict()
    again = load_drafter(theirs, torch.float32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    convert(theirs, tmp_path / "back", published_format(config))
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()


def test_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    """Candidates are embedded by the target's, in vLLM too, whatever the block is embedded by."""
    config = random_drafter_config(kind="lilicorr", head=SETTINGS)
    folder = make_random_drafter(tmp_path / "d", config=config, tables=("lm_head.weight",))
    check_tensors(config, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = torch.ones(config.vocab_size, config.hidden_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DrafterConfigError, match=r"unexpected: embed_tokens\.weight"):
        check_tensors(config, folder)
