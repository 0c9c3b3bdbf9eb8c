"""The safetensors files of a checkpoint and what their headers say; no tensor is read.

pytest tests/unit/test_weights.py tests/unit/test_broken_weights.py
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_dflash.config import DrafterConfigError
from vllm_dflash.json_text import loads
from vllm_dflash.regular import check_readable, names_in, read_regular, size_of_regular
from vllm_dflash.weights.messages import FETCH_AGAIN, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 27


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint, as vLLM reads it: the shards that its index names, or
    the single file.

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
    """Name, safetensors dtype (such as BF16) and shape of every tensor in the folder's safetensors
    files.

    Raises:
        DrafterConfigError: a file is absent, truncated or no safetensors file, or two hold the same
            tensor.
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


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of one file."""
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


def read_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files; raises as
    ``read_headers``."""
    return {name: shape for name, (_, shape) in read_headers(folder).items()}
