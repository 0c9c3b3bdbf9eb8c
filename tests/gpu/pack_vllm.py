"""Packs vLLM 0.32.0 (CUDA) and this package for a Linux x86-64 machine that has a Hopper GPU,
Python 3.12, PyTorch 2.11.0+cu130 and Triton 3.6, but no vLLM and no network.

    make wheel
    python tests/gpu/pack_vllm.py PACKED --wheel dist/vllm_dflash-*.whl    # about 2 minutes

Needs pip and a package index. Leaves two archives of less than 62 MiB each in PACKED: part1.tar.xz
has the compiled operators, part2.tar.xz the Python code, FlashAttention 3, the small packages that
vLLM imports and this package. On the GPU's machine:

    mkdir -p /tmp/v && tar -xJf part1.tar.xz -C /tmp/v && tar -xJf part2.tar.xz -C /tmp/v
    export PYTHONPATH=/tmp/v

Left out: FlashAttention 2, the operators of mixtures of experts, FlashInfer, and vLLM's front end
in Rust. Without a GPU it was seen that the three libraries load under torch 2.11.0+cu130 and that
both runners import.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

VLLM = "vllm==0.32.0"
SMALL = """
annotated-types apache-tvm-ffi astor blake3 cachetools cbor2 cloudpickle compressed-tensors==0.17.0
depyf==0.20.0 dill distro dnspython docstring-parser email-validator fastapi==0.136.3 gguf
googleapis-common-protos httpcore2 httpx2 ijson interegular jiter jsonschema
jsonschema-specifications lark==1.2.2 llguidance==1.7.6 lm-format-enforcer==0.11.3 loguru
model-hosting-container-standards msgspec openai==3.54.0 opentelemetry-api
opentelemetry-exporter-http-transport opentelemetry-exporter-otlp
opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common
opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http opentelemetry-proto
opentelemetry-sdk opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai
oss-harmony==0.0.11 outlines_core==0.2.14 partial-json-parser prometheus-fastapi-instrumentator
py-cpuinfo pybase64 pydantic==2.14.3 pydantic-core==2.50.4 pydantic-extra-types pydantic-settings
python-dotenv python-json-logger python-multipart pyzmq referencing rpds-py setproctitle sniffio
starlette==1.10.0 truststore typing-inspection uvicorn watchfiles websockets xgrammar==0.2.8
""".split()  # noqa: SIM905
"""What vLLM imports, without what comes with PyTorch's usual companions (transformers, numpy,
prometheus-client, rich, safetensors, tqdm and their like): those have to be there."""
GLIBC = (5, 12, 17, 24, 27, 28, 31, 34, 35)
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in GLIBC),
    *(f"manylinux{year}_x86_64" for year in (1, 2010, 2014)),
)
OPERATORS = "vllm/_C_stable_libtorch.abi3.so"
LIBRARIES = {OPERATORS, "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"}
DROPPED = ("vllm/vllm-rs", "vllm/third_party/deep_gemm", "vllm/third_party/fmha_sm100")
MOST_MIB = 62


def download(to: Path, name: str) -> None:
    """One wheel for the GPU's machine."""
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    tags = ["--python-version", "3.12", "--implementation", "cp"]
    tags += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, *tags, *platforms, "-d", str(to), name], check=True)


def unpack(tree: Path, wheels: list[Path]) -> None:
    """All wheels into one folder, without the libraries that are left out."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(tree)
    for library in tree.glob("vllm/**/*.so"):
        if str(library.relative_to(tree)) not in LIBRARIES:
            library.unlink()
    for name in DROPPED:
        dropped = tree / name
        if dropped.is_dir():
            shutil.rmtree(dropped)
        else:
            dropped.unlink(missing_ok=True)


def pack(tree: Path, archive: Path, chosen: Callable[[str], bool]) -> None:
    """Some of a folder's files as one archive.

    Raises:
        SystemExit: it is too large to be carried.
    """
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path in sorted(path for path in tree.rglob("*") if path.is_file()):
            name = str(path.relative_to(tree))
            if chosen(name):
                tar.add(path, name)
    size = archive.stat().st_size / 2**20
    print(f"{archive} {size:.1f} MiB")
    if size > MOST_MIB:
        raise SystemExit(f"{archive} has more than {MOST_MIB} MiB: drop more of the tree")


def main(argv: list[str] | None = None) -> int:
    """Packs; 0 where both archives are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the archives")
    parser.add_argument(
        "--wheel", type=Path, required=True, help="this package's: `make wheel` leaves it in dist/"
    )
    args = parser.parse_args(argv)
    if not args.wheel.is_file():
        raise SystemExit(f"no wheel {args.wheel}: make wheel")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree, wheels = Path(folder, "tree"), Path(folder, "wheels")
        download(wheels, VLLM)
        for name in SMALL:
            try:
                download(wheels, name)
            except subprocess.CalledProcessError:
                print(f"no wheel of {name}: left out", file=sys.stderr)
        unpack(tree, [*sorted(wheels.glob("*.whl")), args.wheel])
        pack(tree, args.out / "part1.tar.xz", lambda name: name == OPERATORS)
        pack(tree, args.out / "part2.tar.xz", lambda name: name != OPERATORS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
