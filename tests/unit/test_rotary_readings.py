"""A rotary factor that a config.json may only repeat: what is left of the file without it, a
rotation of part of each head, and what the doctor says.

pytest tests/unit/test_rotary_readings.py
"""

import copy
import math
from typing import Any

import pytest
import torch

from pairs import random_drafter_config
from published import QWEN3_8B
from vllm_dflash.config import DrafterConfig
from vllm_dflash.formats import write
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.drafter import apply_rotary
from vllm_dflash.tools.pair_runs import Gain
from vllm_dflash.tools.rotary_readings import Readings, readings_check, rotate_part, without_factor

ROPE = {"rope_type": "default", "rope_theta": QWEN3_8B["rope_theta"]}
MORE, LESS, NONE = Gain(1.0, 0.1, 1.0), Gain(-1.0, 0.1, 0.0), Gain(0.1, 0.1, 0.6)


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [8, 4, 4]}},
        {"rope_scaling": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"full_attention": ROPE | {"partial_rotary_factor": 0.25}}},
    ],
)
def test_a_file_without_its_factor(changes: dict[str, Any]) -> None:
    raw = QWEN3_8B | changes
    before = copy.deepcopy(raw)
    unread = without_factor(raw)
    assert unread is not None
    assert unread.size == 32
    assert unread.config == DrafterConfig.from_dict(QWEN3_8B)
    assert raw == before


def test_a_factor_in_the_librarys_format() -> None:
    raw = write(DrafterConfig.from_dict(QWEN3_8B), "speculators")
    raw["transformer_layer_config"]["partial_rotary_factor"] = 0.5
    unread = without_factor(raw)
    assert unread is not None
    assert unread.size == 64


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"partial_rotary_factor": 1},
        {"partial_rotary_factor": "a quarter"},
        {"partial_rotary_factor": 0.25, "rope_scaling": {"partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.25, "hidden_act": "gelu"},
        {"partial_rotary_factor": 0.01},
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "partial_rotary_factor": 0.25,
            }
        },
    ],
)
def test_files_of_which_nothing_is_asked(changes: dict[str, Any]) -> None:
    assert without_factor(QWEN3_8B | changes) is None


def partly_rotated(x: list[float], position: int, size: int, theta: float) -> list[float]:
    """One head by hand: element i of its first ``size`` turns with element i + size / 2."""
    out, half = list(x), size // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / size)
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("kind", ["dflash", "dflare"])
@pytest.mark.parametrize("size", [8, 24])
def test_scores_of_heads_that_are_partly_rotated(kind: str, size: int) -> None:
    """Queries against keys of the block and of the context, by hand in float64."""
    torch.manual_seed(0)
    config = random_drafter_config(kind=kind, attention_bias=True)
    plain = new_drafter(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    part = copy.deepcopy(plain)
    rotate_part(part, size)
    x, positions = torch.randn(1, 5, config.hidden_size), torch.tensor([[0, 1, 7, 30, 200]])
    c = torch.randn(1, 5, config.hidden_size)
    if kind == "dflare":
        c = c[:, :, None].expand(-1, -1, config.num_hidden_layers, -1)
    cos, sin = part.angles(config, positions)
    still, idle = torch.ones_like(cos), torch.zeros_like(sin)
    groups = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(zip(part.layers, plain.layers, strict=True)):
            heads = (1, 5, config.num_attention_heads, config.head_dim)
            ours, theirs = ours.self_attn, theirs.self_attn
            query = apply_rotary(ours.q_norm(ours.q_proj(x).view(heads)), cos, sin)
            before = theirs.q_norm(theirs.q_proj(x).view(heads))
            for key, unrotated in (
                (ours.key_value(x, cos, sin)[0], theirs.key_value(x, still, idle)[0]),
                (
                    part.layer_key_value(i, c, cos, sin)[0],
                    plain.layer_key_value(i, c, still, idle)[0],
                ),
            ):
                for head, a, b in ((0, 3, 4), (3, 2, 1), (2, 4, 0)):
                    by_hand = sum(
                        u * v
                        for u, v in zip(
                            *(
                                partly_rotated(
                                    t.tolist(), int(positions[0, n]), size, config.rope_theta
                                )
                                for t, n in (
                                    (before[0, a, head], a),
                                    (unrotated[0, b, head // groups], b),
                                )
                            ),
                            strict=True,
                        )
                    )
                    score = float(query[0, a, head] @ key[0, b, head // groups])
                    assert score == pytest.approx(by_hand, rel=1e-3, abs=1e-2)


@pytest.mark.parametrize(
    ("of_part", "of_whole", "state", "remedy"),
    [
        (LESS, MORE, "warning", "remove partial_rotary_factor from config.json"),
        (MORE, LESS, "error", "trained as its file says, which is not served here"),
        (NONE, LESS, "warning", "no clear answer: give more prompts"),
    ],
)
def test_what_the_doctor_says(of_part: Gain, of_whole: Gain, state: str, remedy: str) -> None:
    check = readings_check(Readings(2.5, 1.25, of_part, of_whole), 32, 128)
    assert check.state == state
    assert remedy in check.remedy
    assert "whole heads 2.50 drafted tokens a draft are accepted, in 32 of 128" in check.found
    assert check.found.endswith("1.25")
