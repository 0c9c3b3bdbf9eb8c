"""DFlash2's convolution over a block's rows: in plain PyTorch by hand, and served.

Tests: ``pytest tests/unit/test_convolution.py``.
"""

from typing import Any

import pytest
import torch

from pairs import random_drafter_config
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.reference.checkpoint import new_drafter
from vllm_dflash.reference.convolution import BlockConvolution

TAPS, GROUP, BLOCK, HIDDEN = 3, 4, 8, 16
CONFIG = random_drafter_config(
    kind="dflash2", hidden_size=HIDDEN, conv_kernel_size=TAPS, conv_group_size=GROUP
)


def random_convolution() -> BlockConvolution:
    torch.manual_seed(0)
    made = BlockConvolution(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


@torch.no_grad()
def by_hand(made: BlockConvolution, x: torch.Tensor, kernels_of: torch.Tensor, side: int):
    """``x`` [rows, H] of one block, number by number; the kernels come from ``kernels_of``."""
    out = torch.zeros_like(x)
    own = (kernels_of @ made.kernel_projection.weight.T).view(-1, 2, TAPS, HIDDEN // GROUP)
    for t in range(len(x)):
        for channel in range(HIDDEN):
            for tap in range(min(TAPS, t + 1)):
                kernel = made.base_kernel[side, tap, channel] + own[t, side, tap, channel // GROUP]
                out[t, channel] += kernel * x[t - tap, channel]
    return out


@torch.no_grad()
def test_it_is_the_sum_over_the_rows_before_in_the_block() -> None:
    made, x, y = random_convolution(), torch.randn(2, 2 * BLOCK, HIDDEN), torch.randn(2, 16, HIDDEN)
    into, kernels = made.before(x, BLOCK)
    out = made.after(y, kernels, BLOCK)
    for row in range(2):
        for start in (0, BLOCK):
            rows = row, slice(start, start + BLOCK)
            torch.testing.assert_close(into[rows], by_hand(made, x[rows], x[rows], 0))
            torch.testing.assert_close(out[rows], by_hand(made, y[rows], x[rows], 1))
    # A block that is cut, as at max_model_len.
    torch.testing.assert_close(made.before(x[:, :5], None)[0], into[:, :5])


@torch.no_grad()
def test_a_new_one_changes_nothing() -> None:
    torch.manual_seed(0)
    with_it, without = new_drafter(CONFIG), new_drafter(random_drafter_config(hidden_size=HIDDEN))
    without.load_state_dict(with_it.state_dict(), strict=False)
    embeds, positions = torch.randn(1, BLOCK, HIDDEN), torch.arange(BLOCK)[None]
    context = without.context_kv(torch.randn(1, 4, HIDDEN), torch.arange(4)[None])
    torch.testing.assert_close(
        with_it(embeds, positions, context), without(embeds, positions, context)
    )


def served_as(made: BlockConvolution) -> Any:
    """The same convolution, as vLLM runs it."""
    from vllm_dflash.models import convolution

    served = convolution.BlockConvolution.__new__(convolution.BlockConvolution)
    torch.nn.Module.__init__(served)
    served.taps, served.shape = TAPS, (TAPS, HIDDEN // GROUP, GROUP)
    served.base_kernel = made.base_kernel
    served.kernel_projection = made.kernel_projection
    return served


@pytest.mark.vllm
@torch.inference_mode()
def test_served_is_the_reference_where_a_block_was_moved_too() -> None:
    """Three blocks; of the second only five rows exist, at the end of its rows."""
    from vllm_dflash.models import convolution

    made = random_convolution()
    x, y = torch.randn(3 * BLOCK, HIDDEN), torch.randn(3 * BLOCK, HIDDEN)
    positions = torch.cat([torch.arange(4, 12), torch.tensor([11] * 3 + [11, 12, 13, 14, 15])])
    # The third goes on where the second ends.
    positions = torch.cat([positions, torch.arange(16, 24)])
    reach = convolution.rows_in_reach(positions, BLOCK, TAPS)
    served = served_as(made)
    into, kernels = served.before(x, reach)
    out = served.after(y, kernels, reach)
    # A kernel of the row alone; it has nothing to reach.
    assert convolution.rows_in_reach(positions, BLOCK, 1).all()
    # On a GPU a graph records it: it asks the device for nothing.
    assert convolution.rows_in_reach(positions.to("meta"), BLOCK, TAPS).shape == reach.shape
    for rows in (slice(BLOCK), slice(BLOCK + 3, 2 * BLOCK), slice(2 * BLOCK, None)):
        expected, own = made.before(x[None, rows], None)
        torch.testing.assert_close(into[rows], expected[0])
        torch.testing.assert_close(out[rows], made.after(y[None, rows], own, None)[0])


@pytest.mark.vllm
@torch.inference_mode()
def test_rows_that_stand_for_nothing_reach_no_block() -> None:
    """What attention leaves in rows that only fill a batch up is any number, NaN too: the last ones
    came in front of the first block, times zero, and its first rows were NaN."""
    from vllm_dflash.models import convolution

    made = random_convolution()
    served, x, positions = served_as(made), torch.randn(3 * BLOCK, HIDDEN), torch.arange(3 * BLOCK)
    x[BLOCK:] = torch.nan
    reach = convolution.rows_in_reach(positions, BLOCK, TAPS)
    into, kernels = served.before(x, reach)
    expected, own = made.before(x[None, :BLOCK], None)
    torch.testing.assert_close(into[:BLOCK], expected[0])
    out = served.after(x, kernels, reach)
    torch.testing.assert_close(out[:BLOCK], made.after(x[None, :BLOCK], own, None)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "dflash", "conv_kernel_size": 2}, "a DFlash drafter has no convolution"),
        ({"kind": "dflash2", "conv_kernel_size": 9, "conv_group_size": 4}, "1 to block_size 8"),
        ({"kind": "dflash2", "conv_group_size": 4}, "conv_kernel_size is 0"),
        ({"kind": "dflash2", "conv_kernel_size": 2}, "conv_group_size is 0: a divisor of"),
        ({"kind": "dflash2", "conv_kernel_size": 2, "conv_group_size": 7}, "conv_group_size is 7"),
    ],
)
def test_shapes_that_no_convolution_can_have_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(DrafterConfigError, match=said):
        random_drafter_config(**changes).with_()
