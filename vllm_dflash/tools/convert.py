r"""Writes a checkpoint in another format, every tensor bit for bit.

    vllm-dflash convert examples/embedded_pair/dflash /tmp/speculators \
        --to speculators --verifier Qwen/Qwen3-8B

Files keep their split. Tensors that only training needs (``IGNORED_TENSORS``) stay behind, but for
t2d, which is made anew from d2t. Limits: settings that no drafter reads (a transformers version,
remote code) are not carried over.

    pytest tests/unit/test_tools.py
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import CONFIG_FILE, IGNORED_TENSORS, parse, read_raw, tensor_name, write
from vllm_dflash.formats.speculators import SPECULATORS
from vllm_dflash.hub import drafter_folder, no_drafter_at
from vllm_dflash.progress import Progress
from vllm_dflash.regular import check_readable, names_in
from vllm_dflash.weights import check_tensors
from vllm_dflash.weights.headers import INDEX_FILE, SINGLE_FILE, read_headers, weight_files
from vllm_dflash.weights.reading import open_weights
from vllm_dflash.weights.values import target_ids


def convert(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    verifier: str = "",
    progress: bool = False,
) -> list[str]:
    """Writes the checkpoint ``source`` (a folder, or a hub id that is downloaded) to the folder
    ``target``.

    What is written is read back and compared before it gets its name, so ``target`` is whole or not
    there.

    Returns:
        The names of the tensors that stayed behind.

    Raises:
        DrafterConfigError: the source is unsound, the format cannot hold it, or ``target`` is not
            empty.
        OSError, SafetensorError: ``target`` cannot be written.
    """
    folder, target = drafter_folder(str(source), None), Path(target)
    if folder is None:
        raise no_drafter_at(str(source))
    config = DrafterConfig.from_pretrained(folder)
    raw = write(config, format, verifier=verifier or _verifier(folder))
    if parse(raw) != config:
        raise DrafterConfigError(
            f"{format} cannot hold this drafter",
            "parts of its settings would be lost; write it in the format that it has",
        )
    check_tensors(config, folder)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise DrafterConfigError(
            f"{target} is there and {'not empty' if target.is_dir() else 'no folder'}",
            "give a new folder, or remove it first",
        )
    # A link to an empty folder stays, and the folder is what is written.
    target = target.resolve()
    if target.is_relative_to(folder.resolve()):
        raise DrafterConfigError(
            f"{target} is in the folder that is converted", "give a folder beside it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converted-") as temporary:
        new = Path(temporary) / "checkpoint"
        new.mkdir()
        (new / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
        paths = weight_files(folder)
        total = 2 * sum(path.stat().st_size for path in paths)
        with Progress(
            total=total, desc="converting", unit="B", unit_scale=True, disable=not progress
        ) as bar:
            left_behind = _write_weights(config, format, paths, new, bar)
            _compare(paths, new, bar)
        _copy_others(folder, new)
        if target.is_dir():
            target.rmdir()
        new.rename(target)
    return left_behind


def _verifier(folder: Path) -> str:
    """The target's name in a checkpoint of speculators' format; empty where there is none."""
    raw = read_raw(folder)
    for name in ("speculators_config", "verifier", "name_or_path"):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw if isinstance(raw, str) else ""


def _tensors(path: Path, bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a file by its name there."""
    with open_weights(path) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            # A copy: what safetensors gives is a view of the file, and would be read only when it
            # is saved.
            tensor = file.get_tensor(name).clone().contiguous()
            bar.update(tensor.numel() * tensor.element_size())
            yield name, tensor


def _write_weights(
    config: DrafterConfig, format: str, paths: list[Path], new: Path, bar: Any
) -> list[str]:
    """Writes each file's tensors under our names, one file in memory at a time; returns what stayed
    behind."""
    left_behind: list[str] = []
    places: dict[str, str] = {}
    size = 0
    for path in paths:
        name_there = path.name if len(paths) > 1 else SINGLE_FILE
        tensors = {}
        for name, tensor in _tensors(path, bar):
            if tensor_name(name) in IGNORED_TENSORS:
                left_behind.append(name)
            else:
                tensors[tensor_name(name)] = tensor
        if format == "speculators" and "d2t" in tensors:
            tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
            tensors["t2d"][target_ids(tensors["d2t"], config.vocab_size)] = True
        save_file(tensors, new / name_there, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        (new / name_there).chmod((new / CONFIG_FILE).stat().st_mode)
        places |= dict.fromkeys(tensors, name_there)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(paths) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (new / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return [name for name in left_behind if not (tensor_name(name) == "t2d" and "t2d" in places)]


def _compare(paths: list[Path], new: Path, bar: Any) -> None:
    """Reads both back; a difference is a broken disk or a broken library, never the user's
    doing."""
    written = {path.name: path for path in weight_files(new)}
    for path in paths:
        with open_weights(written[path.name if len(paths) > 1 else SINGLE_FILE]) as file:
            for name, tensor in _tensors(path, bar):
                if tensor_name(name) in IGNORED_TENSORS:
                    continue
                copy = file.get_tensor(tensor_name(name))
                same = copy.dtype == tensor.dtype and copy.shape == tensor.shape
                if not same or not torch.equal(_bytes(copy), _bytes(tensor)):
                    raise DrafterConfigError(
                        f"{name} was not written as it was read", "check the disk and try again"
                    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _copy_others(folder: Path, new: Path) -> None:
    """Mask embedding, tokenizer, licence: all but weights, config and the code that transformers
    would run."""
    for path in [folder / name for name in names_in(folder)]:
        weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        if (
            path.is_file()
            and not weights
            and path.suffix != ".py"
            and path.name != CONFIG_FILE
            and not path.name.startswith(".")
        ):
            check_readable(path)
            shutil.copyfile(path, new / path.name)


def run(args: argparse.Namespace) -> int:
    """``vllm-dflash convert``: 0 when it is written, 1 when it is refused, 2 on wrong usage."""
    if args.verifier and args.to != SPECULATORS:
        print(
            f"vllm-dflash convert: {args.to} has no place for a target's name: leave out"
            f" --verifier, or write it --to {SPECULATORS}",
            file=sys.stderr,
        )
        return 2
    try:
        left_behind = convert(
            args.source, args.destination, args.to, verifier=args.verifier or "", progress=True
        )
    except DrafterConfigError as error:
        print(f"vllm-dflash convert: {error}", file=sys.stderr)
        return 1
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file or a link is where its folder should be"
        print(
            f"vllm-dflash convert: {args.destination} cannot be written ({reason}): give a new"
            " folder where this user may write, on a disk with room",
            file=sys.stderr,
        )
        return 1
    headers = read_headers(args.destination)
    print(
        f"{args.destination}: {len(headers)} tensors, {args.to} format, equal to the source's bit"
        " for bit"
    )
    if left_behind:
        print(f"left behind, for only training needs them: {', '.join(left_behind)}")
    if args.to == "speculators" and not _verifier(Path(args.destination)):
        print(
            "no target is named in it, so `vllm serve` needs one beside this folder: --verifier"
            " NAME writes it in"
        )
    return 0
