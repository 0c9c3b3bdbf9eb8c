"""What tells a target's folder from the same folder with other weights in it: what was made with a
target is not gone on with by another one.

    pytest tests/unit/test_contents.py
"""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from vllm_dflash.regular import expanded

_KINDS = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf")
"""What a config, weights, a tokenizer and a chat template are kept in; a README is none of it."""
_SAMPLES = 32
_SAMPLE_BYTES = 1 << 16
_WHOLE_BYTES = _SAMPLES * _SAMPLE_BYTES


def of_folder(target: str) -> str | None:
    """Sixteen hexadecimal digits of what a target's folder holds; None where ``target`` is no
    folder of this machine, for a hub id's revisions do not change.

    Names, sizes and contents; of a file above 2 MiB 32 pieces of 64 KiB, its first and its last
    among them: training changes every piece, so weights of terabytes are told apart in no time. An
    edit of single values between the pieces is not seen. A file that cannot be read counts by its
    name: whatever loads it says why.
    """
    folder, digest = expanded(target), hashlib.sha256()
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(_KINDS))
    except OSError:
        return None
    for name in names:
        digest.update(f"{name}\0".encode(errors="surrogateescape"))
        with contextlib.suppress(OSError):
            _add(digest, folder / name)
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return
    size = status.st_size
    digest.update(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read(_WHOLE_BYTES))
            return
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
