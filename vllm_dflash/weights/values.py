"""What is judged by a tensor's values, once they are read: finiteness, and the draft vocabulary's
table.

    pytest tests/unit/test_broken_weights.py
"""

from collections.abc import Mapping

import torch

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.weights.messages import CAME_WITH, FETCH_AGAIN, some

_LARGEST_PACKED_LEVEL = 128


def check_finite(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuses tensors (by name) that hold NaN or infinity, or numbers that ``dtype``, in which they
    serve, has not.

    Raises:
        DrafterConfigError: names them.
    """
    bad = sorted(name for name, tensor in tensors.items() if not is_finite(tensor))
    if bad:
        raise DrafterConfigError(
            f"the weights hold NaN or infinity in {some(bad)}",
            f"{FETCH_AGAIN}, or train again from a sound checkpoint",
        )
    bad = sorted(
        name for name, tensor in tensors.items() if not _fits(name, tensor, tensors, dtype)
    )
    if bad:
        raise overflow(some(bad), dtype)


def overflow(what: str, dtype: torch.dtype) -> DrafterConfigError:
    """The refusal of ``what``, whose numbers ``dtype`` has not."""
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    remedy = "serve with --dtype bfloat16, or " if dtype == torch.float16 else ""
    return DrafterConfigError(
        f"{what}: numbers beyond {most:.4g}, the largest of {name}, would become infinite when the"
        " drafter is loaded in it",
        f"{remedy}{FETCH_AGAIN}",
    )


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite, nor becomes so in ``dtype``; whole numbers never
    are."""
    if not tensor.is_floating_point():
        return True
    # torch has no isfinite for 8-bit floats, the dtype of some quantized checkpoints.
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool((wide if dtype is None else wide.to(dtype)).isfinite().all())


def is_zero(tensor: torch.Tensor) -> bool:
    """Whether it holds floats, and all of them are zero."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return not bool(wide.any())


def _fits(
    name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> bool:
    """Whether the tensor stays finite where it serves: quantized weights are multiplied with their
    scales first."""
    stem, _, kind = name.rpartition(".")
    if "_proj" not in stem or kind in ("weight", "bias"):
        return tensor.element_size() == 1 or is_finite(tensor, dtype)
    if (
        kind not in ("weight_scale", "weight_scale_inv", "scales")
        or not tensor.is_floating_point()
        or not tensor.numel()
    ):
        return True
    weight = tensors.get(f"{stem}.weight")
    stored_as_float = weight is not None and weight.is_floating_point() and weight.numel()
    level = (
        weight.float().abs().max().item()
        if weight is not None and stored_as_float
        else _LARGEST_PACKED_LEVEL
    )
    return tensor.float().abs().max().item() * level <= torch.finfo(dtype).max


def target_ids(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The target's token ids [draft vocabulary] int64 of the offsets ``d2t``.

    Raises:
        DrafterConfigError: an id is outside the vocabulary, or two draft tokens have the same.
    """
    if d2t.is_floating_point() or d2t.dtype == torch.bool or d2t.ndim != 1:
        raise DrafterConfigError(
            f"d2t is {d2t.dtype} {list(d2t.shape)}",
            f"it should be a list of int64 offsets; {CAME_WITH}",
        )
    ids = torch.arange(len(d2t)) + d2t.long().cpu()
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) != len(ids):
        raise DrafterConfigError(
            f"d2t does not map the draft vocabulary to distinct tokens of 0 to {vocab_size - 1}",
            CAME_WITH,
        )
    return ids
