"""The weight files of a checkpoint and what their headers say; no tensor is read.

pytest tests/unit/test_weights.py tests/unit/test_broken_weights.py
"""

from pathlib import Path

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.json_text import loads
from vllm_dflash.regular import names_in, read_regular, size_of_regular
from vllm_dflash.weights.messages import FETCH_AGAIN, some
from vllm_dflash.weights.reading import read_header

PICKLED_FILE = "pytorch_model.bin"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 27


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint, as vLLM reads it: the shards that its index names, the
    single file, or, where there is no safetensors file at all, ``pytorch_model.bin``.

    Raises:
        DrafterConfigError: there is no weight file, the index is unusable, a shard is absent, or
            there are more files than that.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    data = read_regular(index, _LARGEST_INDEX)
    if data is not None:
        return _shards(folder, index, data)
    found = [name for name in names_in(folder) if name.endswith(".safetensors")]
    if not found and size_of_regular(folder / PICKLED_FILE) is not None:
        return [folder / PICKLED_FILE]
    if SINGLE_FILE not in found:
        raise DrafterConfigError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"point at the drafter's folder, or {FETCH_AGAIN}",
        )
    if len(found) > 1:
        found.remove(SINGLE_FILE)
        raise DrafterConfigError(
            f"{folder} holds {some(found)} beside {SINGLE_FILE}, and vLLM reads every safetensors"
            " file",
            "remove what is not the drafter's",
        )
    size_of_regular(folder / SINGLE_FILE)
    return [folder / SINGLE_FILE]


def _shards(folder: Path, index: Path, data: bytes) -> list[Path]:
    try:
        names = sorted(set(loads(data)["weight_map"].values()))
        paths = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DrafterConfigError(
            f"{index} is no safetensors index ({error!r})", FETCH_AGAIN
        ) from None
    bad = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if bad:
        raise DrafterConfigError(
            f"{index} names shards that are not files of this folder: {some(bad)}", FETCH_AGAIN
        )
    absent = [path.name for path in paths if size_of_regular(path) is None]
    if not names:
        raise DrafterConfigError(f"{index} names no shards", FETCH_AGAIN)
    if absent:
        raise DrafterConfigError(
            f"{index} names shards that are not there: {some(absent)}", FETCH_AGAIN
        )
    return paths


def read_headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name, safetensors dtype (such as BF16) and shape of every tensor in the folder's weight
    files.

    Raises:
        DrafterConfigError: a file is absent, truncated or not what its name says, or two hold the
            same tensor.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in weight_files(folder):
        header = read_header(path)
        twice = sorted(found.keys() & header.keys())
        if twice:
            raise DrafterConfigError(
                f"{path} holds {some(twice)}, which another file of the checkpoint holds too",
                FETCH_AGAIN,
            )
        found |= header
    return found


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's weight files; raises as
    ``read_headers``."""
    return {name: shape for name, (_, shape) in read_headers(folder).items()}
