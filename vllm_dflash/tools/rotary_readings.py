"""A drafter whose config.json says that a part of each head has rotary positions. Some were trained
so; others' files only repeat the target's value. The doctor drafts by both readings, in plain
PyTorch, and says which one the target accepts.

    pytest tests/unit/test_rotary_readings.py tests/engine/test_doctor.py
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.fields import is_number
from vllm_dflash.kinds import kind_of
from vllm_dflash.progress import Progress
from vllm_dflash.reference.decoding import generate
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.tools.pair_checks import Check
from vllm_dflash.tools.pair_runs import Gain, Pair, accepted, gained, load_pair, stride_of

FACTOR = "partial_rotary_factor"
_OF_TEXT_TOO = ("mrope_section", "mrope_interleaved")
"""Of positions in images: without any they change nothing."""


@dataclass(frozen=True)
class Unread:
    """A refused config.json, without the factor that it is refused for."""

    config: DrafterConfig
    size: int
    """Elements of each head that have rotary positions by that factor."""


def without_factor(raw: Any) -> Unread | None:
    """What the contents of a config.json say besides a rotary factor; None where there is none, or
    where that is not all that is wrong with them."""
    raw, factors = copy.deepcopy(raw), list[Any]()
    _take_out(raw, factors)
    found = {float(factor) for factor in factors if is_number(factor) and 0 < factor < 1}
    if len(found) != 1:
        return None
    try:
        config = DrafterConfig.from_dict(raw)
    except DrafterConfigError:
        return None
    size = int(config.head_dim * found.pop())
    if config.rope_scaling is not None or size < 2 or size % 2:
        return None  # what would be scaled is not said
    return Unread(config, size)


def _take_out(place: Any, factors: list[Any]) -> None:
    """Takes the factors out of ``place`` and what is in it."""
    if isinstance(place, dict):
        if FACTOR in place:
            factors.append(place.pop(FACTOR))
        for name in _OF_TEXT_TOO:
            place.pop(name, None)
        for value in place.values():
            _take_out(value, factors)


def rotate_part(drafter: Drafter, size: int) -> None:
    """Has ``drafter`` rotate the first ``size`` elements of each head, element i with i + size / 2,
    and leave the others as they are.

    A head's elements change places, so that each pair is half a head apart as in a whole rotation,
    and those without positions have a frequency of 0: scores stay what they were.
    """
    config, half = drafter.config, size // 2
    rest = (config.head_dim - size) // 2
    order = [
        *range(half),
        *range(size, size + rest),
        *range(half, size),
        *range(size + rest, config.head_dim),
    ]
    own = kind_of(config).context.own_projections
    keys = {"k_proj", *(name for name, block_own in own.items() if block_own == "k_proj")}
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            module = name.split(".")[-2:-1]
            if module in [["q_norm"], ["k_norm"]]:
                weight.copy_(weight[order])
            elif module == ["q_proj"] or (module and module[0] in keys):
                heads = weight.view(-1, config.head_dim, *weight.shape[1:])
                weight.copy_(heads[:, order].reshape(weight.shape))

    def angles(config: DrafterConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        frequencies = torch.cat([config.rope_theta**-steps, steps.new_zeros(rest)])
        each = positions.float()[..., None, None] * frequencies
        each = torch.cat([each, each], dim=-1)
        return each.cos(), each.sin()

    drafter.angles = angles


@dataclass(frozen=True)
class Readings:
    """What was accepted, in drafted tokens a draft."""

    whole: float
    """With rotary positions in whole heads."""
    part: float
    """In the part that the file says."""
    of_part: Gain
    """Of the part over the whole."""
    of_whole: Gain
    """The other way round."""


def ask(pair: Pair, config: DrafterConfig, size: int, progress: bool) -> Readings:
    """Decodes each prompt in plain PyTorch, and drafts along it by both readings.

    Raises:
        DrafterConfigError: the drafter's weights, or a target that plain PyTorch does not run.
    """
    target, whole = load_pair(pair, config)
    part = copy.deepcopy(whole)
    rotate_part(part, size)
    sequences = []
    with Progress(
        total=2 * len(pair.prompts), desc="both readings", unit=" prompts", disable=not progress
    ) as bar:
        for prompt in pair.prompts:
            done = generate(
                target,
                whole,
                prompt,
                pair.max_tokens,
                pair.num_speculative_tokens,
                pair.eos_token_id,
                pair.max_model_len,
            )
            sequences.append([*prompt, *done.tokens])
            bar.update()
        starts = list(map(len, pair.prompts))
        stride = stride_of(sequences, starts)
        counts: list[tuple[list[int], list[int]]] = []
        for sequence, start in zip(sequences, starts, strict=True):
            anchors = range(start, len(sequence) - 1, stride)
            one, other = (
                accepted(target, drafter, sequence, anchors, pair.num_speculative_tokens)
                for drafter in (whole, part)
            )
            counts.append((one, other))
            bar.update()
    total = max(1, sum(len(one) for one, _ in counts))
    return Readings(
        sum(sum(one) for one, _ in counts) / total,
        sum(sum(other) for _, other in counts) / total,
        gained([[b - a for a, b in zip(*each, strict=True)] for each in counts]),
        gained([[a - b for a, b in zip(*each, strict=True)] for each in counts]),
    )


def readings_check(readings: Readings, size: int, head_dim: int) -> Check:
    """Which reading of the file is right."""
    found = (
        f"with rotary positions in whole heads {readings.whole:.2f} drafted tokens a draft are"
        f" accepted, in {size} of {head_dim} elements, as config.json says, {readings.part:.2f}"
    )
    if readings.of_whole.clear:
        state, remedy = (
            "warning",
            f"remove {FACTOR} from config.json: it was trained with whole heads",
        )
    elif readings.of_part.clear:
        state, remedy = (
            "error",
            "it was trained as its file says, which is not served here: use another checkpoint",
        )
    else:
        state, remedy = (
            "warning",
            "no clear answer: give more prompts (--num-prompts, --max-tokens), or use another"
            " checkpoint",
        )
    return Check("rotary readings", state, found, remedy)


def is_of_factor(error: DrafterConfigError) -> bool:
    """Whether a refusal is for what ``without_factor`` takes out."""
    return error.field.rpartition(".")[2] in (FACTOR, *_OF_TEXT_TOO)
