"""Opens a weight file whatever it is written in: safetensors, or torch's own ``pytorch_model.bin``.

Of the latter nothing but tensors is read (``weights_only``): a pickle may hold code.

    pytest tests/unit/test_angelspec.py
"""

from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.regular import check_readable
from vllm_dflash.weights.messages import FETCH_AGAIN

PICKLED = ".bin"
"""What torch's own files are called by."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""By safetensors' names."""


class Weights(Protocol):
    """An open file."""

    def keys(self) -> "list[str] | KeysView[str]":
        """Names of its tensors."""

    def get_tensor(self, name: str) -> Tensor:
        """One of them."""


class _Pickled:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> KeysView[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """The file's tensors.

    Raises:
        DrafterConfigError: a ``pytorch_model.bin`` holds something else than tensors, or cannot be
            read.
        SafetensorError: as safetensors has it.
    """
    if path.suffix == PICKLED:
        yield _Pickled(_unpickled(path))
        return
    with safe_open(path, framework="pt") as file:
        yield file


def _unpickled(path: Path) -> dict[str, Tensor]:
    check_readable(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except MemoryError:
        raise
    except Exception as e:  # whatever a broken pickle makes torch's reader trip over
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise DrafterConfigError(
            f"{path} cannot be read as a file of tensors ({said[0]})",
            f"nothing else is read of it, for it may hold code; {FETCH_AGAIN}",
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in found.items()
    ):
        raise DrafterConfigError(f"{path} holds something else than named tensors", FETCH_AGAIN)
    return found


def _is_plain(tensor: object) -> bool:
    """Whether it is a tensor with numbers in it that safetensors could hold."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
    )


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, safetensors dtype (such as BF16) and shape of each of a file's tensors.

    Raises:
        DrafterConfigError: it cannot be read.
    """
    if path.suffix == PICKLED:
        return {
            name: (_DTYPES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in _unpickled(path).items()
        }
    check_readable(path)  # safetensors says of a file that it may not read that it is not there
    try:
        with safe_open(path, framework="numpy") as file:
            # The file is no mapping.
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise DrafterConfigError(
            f"{path} cannot be read as safetensors ({error})", FETCH_AGAIN
        ) from None
