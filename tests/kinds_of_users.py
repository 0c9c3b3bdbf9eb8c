"""The kinds of docs/kinds.md, each as one file of a package of its own that is installed beside
this one."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_dflash import kinds

DOCUMENT = Path(__file__).parents[1] / "docs" / "kinds.md"
NAMES = ("onelayer", "norepeat", "fromanchor")
"""A context, a head, and a first row of their own."""


def install(folder: Path) -> Path:
    """Writes the packages, as an installer would; ``folder`` is then to be on the path."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for name, code in zip(NAMES, blocks, strict=True):
        write_package(folder, name, code)
    return folder


def write_package(folder: Path, name: str, code: str) -> None:
    """One module, whose ``KIND`` its distribution declares."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{kinds.GROUP}]\n{name} = {name}:KIND\n")


def forget_kinds() -> None:
    kinds.own.cache_clear()
    kinds.every.cache_clear()
    kinds.architectures.cache_clear()


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """This process with ``folder`` on its path, and without it afterwards."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    forget_kinds()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for path in folder.glob("*.py"):
            sys.modules.pop(path.stem, None)
        forget_kinds()
