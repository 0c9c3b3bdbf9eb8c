"""The target's hidden states for training: computed in every step, or once, kept in shards on disk.

A shard's features [tokens, T * H] follow its token shard's sequences; it is written and read a few
sequences at a time, so that no more than ``bytes_in_memory`` of features are ever held. Past
``max_disk_gb`` sequences are not cached, and computed in every step. What is cached is computed by
transformers here, or by vLLM's own extraction (``extract``).

    pytest tests/unit/test_train_features.py
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_dflash import contents, smollm2
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import claim, whole_file, write_record
from vllm_dflash.progress import Progress
from vllm_dflash.reference.decoding import target_features
from vllm_dflash.training.generate import sequences
from vllm_dflash.training.sequences import Sequences, Shard, check, header, is_finished, shard_path
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.target import Target

_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def folder_of(settings: Settings) -> Path:
    """Where the stage keeps its shards."""
    return Path(settings.run.out) / "features"


def bytes_a_token(config: DrafterConfig, dtype: str) -> int:
    """Bytes of one token's features."""
    return config.num_features * config.hidden_size * getattr(torch, dtype).itemsize


def bytes_in_memory(config: DrafterConfig, dtype: str, batch: int, longest: int) -> int:
    """The most bytes of features that caching or training holds: a forward's, once as they come and
    once more as they are joined."""
    return 2 * batch * longest * bytes_a_token(config, dtype)


def cached_shards(settings: Settings, data: Sequences, config: DrafterConfig, dtype: str) -> int:
    """How many shards, from the first, fit on the disk that is allowed."""
    sizes = np.cumsum([len(s.tokens) * bytes_a_token(config, dtype) for s in data.shards])
    return int(np.searchsorted(sizes, settings.features.max_disk_gb * 1e9, "right"))


def inputs(settings: Settings, config: DrafterConfig, target: Target) -> dict[str, Any]:
    """What a cache depends on beside the answers."""
    with_ = settings.features.extract_with
    return {
        "target": smollm2.exact(target.name),
        "target_files": contents.of_folder(target.name),
        "dtype": target.dtype,
        "target_layer_ids": list(config.target_layer_ids),
        "extract_with": with_,
    }


def cache(settings: Settings, config: DrafterConfig, target: Target, model: Any) -> None:
    """Runs the stage, or the rest of it; raises RunError as ``files`` and ``extract``.

    Args:
        model: the target, for ``extract_with`` transformers.
    """
    data, folder = sequences(settings), folder_of(settings)
    claim(folder, "features", inputs(settings, config, target))
    count = cached_shards(settings, data, config, target.dtype)
    todo = [i for i in range(count) if not is_finished(shard_path(folder, i))]
    if settings.features.extract_with == "vllm":
        from vllm_dflash.training.extract import extract

        shards = [(shard_path(folder, i), data.shards[i]) for i in todo]
        extract(
            settings,
            folder,
            config.target_layer_ids,
            target.dtype,
            bytes_a_token(config, target.dtype),
            shards,
        )
    else:
        total = sum(len(data.shards[i]) for i in todo)
        with Progress(total=total, desc="features", unit=" answers") as bar:
            for index in todo:
                rows = _by_transformers(
                    data.shards[index], config, model, settings.features.features_batch, bar
                )
                write_shard(
                    shard_path(folder, index),
                    len(data.shards[index].tokens),
                    bytes_a_token(config, target.dtype),
                    target.dtype,
                    rows,
                )
    if count < len(data.shards):
        print(
            f"features of {count} of {len(data.shards)} shards fit in max_disk_gb"
            f" {settings.features.max_disk_gb:g}; the rest is computed in every step"
        )


def _by_transformers(
    shard: Shard, config: DrafterConfig, model: Any, batch: int, bar: Any
) -> Iterator[Tensor]:
    """Each sequence's features [S, T * H]."""
    for at in range(0, len(shard), batch):
        rows = [shard[i].tokens for i in range(at, min(at + batch, len(shard)))]
        with torch.inference_mode():
            found = target_features(
                model, config.target_layer_ids, padded(rows).to(model.device), use_cache=False
            )[0]
        for row, tokens in zip(found, rows, strict=True):
            yield row[: len(tokens)].cpu()
        bar.update(len(rows))


def write_shard(path: Path, tokens: int, each: int, dtype: str, rows: Iterable[Tensor]) -> None:
    """Streams one shard to the disk; its size is known before its contents, so the header can go
    first.

    Args:
        tokens: of all its sequences; ``each`` is the bytes of one's features in ``dtype``.
        rows: each sequence's features [S, T * H].
    """
    size, width = tokens * each, each // getattr(torch, dtype).itemsize
    described = {
        "features": {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": [tokens, width],
            "data_offsets": [0, size],
        }
    }
    head = json.dumps(described).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with whole_file(path) as file:

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        put(len(head).to_bytes(8, "little") + head)
        for row in rows:
            put(row.contiguous().view(torch.uint8).numpy().tobytes())
    write_record(
        path.with_suffix(".json"),
        {"bytes": path.stat().st_size, "sha256": digest.hexdigest(), "tokens": tokens},
    )


def padded(rows: Sequence[np.ndarray], multiple: int = 1) -> Tensor:
    """Token ids int64 [B, S], filled up with 0: positions after a sequence's end are seen by
    nothing that counts."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    out = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in zip(out, rows, strict=True):
        row[: len(tokens)] = torch.from_numpy(np.asarray(tokens, np.int64))
    return out


class Features:
    """Features of training sequences by number: from the cache where they are in it, else from the
    target."""

    def __init__(
        self, settings: Settings, data: Sequences, config: DrafterConfig, target: Target, model: Any
    ) -> None:
        self.data, self.config, self.dtype, self.model = (
            data,
            config,
            getattr(torch, target.dtype),
            model,
        )
        count = (
            cached_shards(settings, data, config, target.dtype) if settings.features.cache else 0
        )
        self.paths = [shard_path(folder_of(settings), i) for i in range(count)]
        for path in Progress(self.paths, desc="checking features", disable=count <= 1):
            check(path)

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int], tokens: Tensor) -> Tensor:
        """Features [B, S, T * H] of the sequences ``numbers``, whose ids are ``tokens`` [B, S],
        padded; zeros in the padding of cached ones."""
        device = self.model.device
        places = [self.data.place(n) for n in numbers]
        if any(shard >= len(self.paths) for shard, _ in places):
            return target_features(
                self.model, self.config.target_layer_ids, tokens.to(device), use_cache=False
            )[0]
        width = self.config.num_features * self.config.hidden_size
        out = torch.zeros(*tokens.shape, width, dtype=self.dtype)
        for row, (shard, index) in zip(out, places, strict=True):
            start, end = map(int, self.data.shards[shard].starts[index : index + 2])
            row[: end - start] = self._read(shard, start, end, width)
        return out.to(device)

    def _read(self, shard: int, start: int, end: int, width: int) -> Tensor:
        """Rows of one shard's tensor, by reading and not by mapping: pages that are mapped stay in
        memory for as long as there is some."""
        _, base = header(self.paths[shard])
        size = width * self.dtype.itemsize
        raw = np.fromfile(
            self.paths[shard], np.uint8, (end - start) * size, offset=base + start * size
        )
        return torch.from_numpy(raw).view(self.dtype).view(end - start, width)
