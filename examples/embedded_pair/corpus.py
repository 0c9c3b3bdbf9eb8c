"""The text that the embedded pair is trained on: the source of CPython's own standard library.

The corpus is read from the running interpreter (no download), in sorted order, and split by *file*
with a hash of its relative path, so that no prompt is ever taken from a file that either training
has seen. CPython's source is under the PSF licence, which allows this use. Limits: the exact bytes
depend on the interpreter's version; a distribution that ships no ``test`` packages gives a smaller
corpus.

    python examples/embedded_pair/corpus.py            # prints what the corpus holds
"""

import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_PERCENT = 4
"""Share of the files that neither training sees, in percent."""

_SKIP = {
    "site-packages",
    "__pycache__",
    "lib2to3",
    "idlelib",
    "encodings",
    "bad_coding",
    "pydoc_data",
}
_MAX_BYTES = 400_000


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Whether the file ``name`` (relative, with ``/``) belongs to the held-out split."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT_PERCENT


def read_files(held_out: bool) -> list[tuple[str, str]]:
    """All ``(relative name, text)`` of one split, sorted by name; files that are not UTF-8 are left
    out."""
    root = stdlib_root()
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if (
            _SKIP & set(path.parts)
            or path.stat().st_size > _MAX_BYTES
            or is_held_out(name) != held_out
        ):
            continue
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200 and text.isascii():
            files.append((name, text))
    if not files:
        raise FileNotFoundError(
            f"no Python source under {root}: this interpreter ships without its standard library's"
            " source"
        )
    return files


if __name__ == "__main__":
    for split in (False, True):
        found = read_files(split)
        print(
            f"held out: {split!s:5}  files: {len(found):5}  characters:"
            f" {sum(len(t) for _, t in found):,}"
        )
