"""What a checkpoint is, and everything that is wrong with it.

    vllm-dflash inspect examples/embedded_pair/dflash

Reads every tensor once, on the CPU; needs neither vLLM nor the target. A ``quantization_config`` is
read by vLLM where it is installed. Tests: ``pytest tests/unit/test_tools.py``.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.checks import said_of_unknown_keys
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import CONFIG_FILE, IGNORED_TENSORS, read_raw, tensor_name
from vllm_dflash.hub import drafter_folder, no_drafter_at
from vllm_dflash.kinds import kind_of
from vllm_dflash.progress import Progress
from vllm_dflash.tools.describe import as_text
from vllm_dflash.tools.repair import config_problems
from vllm_dflash.weights import READABLE, tensor_problems
from vllm_dflash.weights.headers import weight_files
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING_FILE
from vllm_dflash.weights.messages import FETCH_AGAIN, some
from vllm_dflash.weights.reading import open_weights, read_header
from vllm_dflash.weights.values import check_finite, is_finite, is_zero


@dataclass
class Inspection:
    """A checkpoint's description; ``problems`` is empty where it can be served."""

    folder: Path
    config: DrafterConfig | None = None
    headers: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Per tensor, by the file's name for it: safetensors dtype and shape."""
    files: dict[str, int] = field(default_factory=dict)
    """Config, weights, index and mask embedding: name and bytes."""
    fusion: list[list[float]] | None = None
    """DFlare: per draft layer, the share of each target layer in its context."""
    errors: list[DrafterConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What does not keep it from being served, but may make it of no use."""
    is_there: bool = True
    """Whether there is a folder that this user may look into."""

    @property
    def problems(self) -> list[str]:
        return [str(error) for error in self.errors]

    @property
    def sound(self) -> bool:
        return not self.errors

    @property
    def drafter_tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Those that serving needs, by our names."""
        named = {tensor_name(name): header for name, header in self.headers.items()}
        return {name: header for name, header in named.items() if name not in IGNORED_TENSORS}

    @property
    def parameters(self) -> int:
        return sum(
            math.prod(shape) for name, (_, shape) in self.drafter_tensors.items() if name != "d2t"
        )

    @property
    def stored_dtypes(self) -> list[str]:
        """As safetensors names them, without that of the draft vocabulary's table."""
        return sorted({dtype for name, (dtype, _) in self.drafter_tensors.items() if name != "d2t"})

    @property
    def own_tables(self) -> list[str]:
        found = [
            name
            for name in ("embed_tokens.weight", "lm_head.weight", "d2t")
            if name in self.drafter_tensors
        ]
        return found + ([MASK_EMBEDDING_FILE] if MASK_EMBEDDING_FILE in self.files else [])


def inspect_checkpoint(
    path: str | Path, *, dtype: str | None = None, progress: bool = False
) -> Inspection:
    """Describes the checkpoint in a folder (or of a hub id that is downloaded) and looks for
    everything that is wrong with it.

    ``dtype`` is that in which it will serve; None: config.json's.
    """
    try:
        folder = drafter_folder(str(path), None)
    except DrafterConfigError as error:
        return Inspection(Path(path), is_there=False, errors=[error])
    if folder is None:
        return Inspection(Path(path), is_there=False, errors=[no_drafter_at(str(path))])
    found = Inspection(folder)
    found.config = _read_config(found)
    served = None if found.config is None else getattr(torch, dtype or found.config.dtype)
    found.errors += tensor_problems(found.config, folder, served)
    if found.config is not None and found.config.unknown_keys:
        found.warnings.append(said_of_unknown_keys(found.config))
    paths = _read_headers(found)
    for name in (
        CONFIG_FILE,
        MASK_EMBEDDING_FILE,
        *(p.name for p in paths),
        *(p.name for p in folder.glob("*.safetensors.index.json")),
    ):
        if (folder / name).is_file():
            found.files[name] = (folder / name).stat().st_size
    _read_tensors(found, paths, served or torch.float32, progress)
    return found


@contextmanager
def _noting(found: Inspection) -> Iterator[None]:
    """A refusal becomes one of the problems."""
    try:
        yield
    except DrafterConfigError as error:
        found.errors.append(error)


def _read_config(found: Inspection) -> DrafterConfig | None:
    try:
        raw = read_raw(found.folder)
    except DrafterConfigError as error:
        found.errors.append(error)
        return None
    problems = config_problems(raw)
    found.errors += [problem.at(found.folder / CONFIG_FILE) for problem in problems]
    return None if problems else DrafterConfig.from_dict(raw)


def _read_headers(found: Inspection) -> list[Path]:
    """Fills in ``headers``; returns the weight files that can be read."""
    try:
        paths = weight_files(found.folder)
    except DrafterConfigError:
        paths = sorted(found.folder.glob("*.safetensors"))
    readable = []
    for path in paths:
        try:
            found.headers |= read_header(path)
        except DrafterConfigError:
            continue  # ``tensor_problems`` has said so
        readable.append(path)
    return readable


def _read_tensors(found: Inspection, paths: list[Path], dtype: torch.dtype, progress: bool) -> None:
    """Looks at the values: numbers that do not serve, the shares of target layers."""
    shares = None if found.config is None else kind_of(found.config).context.shares
    bar = Progress(
        total=sum(p.stat().st_size for p in paths),
        desc="reading",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    bad: dict[str, torch.Tensor] = {}
    zeros: list[str] = []
    with bar:
        for path in paths:
            with open_weights(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    ours = tensor_name(name)
                    if ours in IGNORED_TENSORS or found.headers[name][0] not in READABLE:
                        continue
                    tensor = file.get_tensor(name)
                    bar.update(tensor.numel() * tensor.element_size())
                    stem, _, kind = name.rpartition(".")
                    weight = f"{stem}.weight"
                    pair = {name: tensor}
                    if (
                        kind != "weight"
                        and weight in file.keys()  # noqa: SIM118
                        and found.headers[weight][0] in READABLE
                    ):
                        pair[weight] = file.get_tensor(
                            weight
                        )  # a scale is judged with what it scales
                    try:
                        check_finite(pair, dtype)
                    except DrafterConfigError:
                        bad |= pair
                    if kind == "weight" and ours != shares and is_zero(tensor):
                        zeros.append(ours)
                    if ours == shares and tensor.is_floating_point() and tensor.ndim == 2:
                        found.fusion = tensor.float().softmax(dim=1).tolist()
    if zeros:
        found.warnings.append(
            f"the weights are zero in all of {some(zeros)}: not trained, or not written whole."
            f" Unless the drafter is meant so, {FETCH_AGAIN}"
        )
    with _noting(found):
        check_finite(bad, dtype)
    sound = {name: tensor for name, tensor in bad.items() if is_finite(tensor)}
    if sound and len(sound) < len(bad):
        with _noting(found):
            check_finite(sound, dtype)


def as_dict(found: Inspection) -> dict[str, Any]:
    """The same for scripts: plain values under stable names."""
    config = found.config
    described: dict[str, Any] = (
        {}
        if config is None
        else {
            "format": config.format,
            "kind": config.kind,
            "head": dict(config.head),
            "conv_kernel_size": config.conv_kernel_size,
            "conv_group_size": config.conv_group_size,
            "block_size": config.block_size,
            "max_speculative_tokens": config.max_speculative_tokens,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "sliding_windows": list(config.windows),
            "sliding_causal": config.sliding_causal,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "attention_bias": config.attention_bias,
            "rope_theta": config.rope_theta,
            "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "target_layer_ids": list(config.target_layer_ids),
            "vllm_layer_ids": [i + 1 for i in config.target_layer_ids],
            "num_target_layers": config.num_target_layers,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": config.draft_vocab_size,
            "mask_token_id": config.mask_token_id,
            "dtype": config.dtype,
            "quantization_config": (
                None if config.quantization_config is None else dict(config.quantization_config)
            ),
        }
    )
    return {
        "path": str(found.folder),
        "sound": found.sound,
        "problems": found.problems,
        "warnings": found.warnings,
        **described,
        "own_tables": found.own_tables,
        "stored_dtypes": found.stored_dtypes,
        "parameters": found.parameters,
        "tensors": len(found.drafter_tensors),
        "bytes": sum(found.files.values()),
        "files": found.files,
        "fusion": found.fusion,
    }


def run(args: argparse.Namespace) -> int:
    """``vllm-dflash inspect``: prints, and ends with 0 where the checkpoint is sound."""
    found = inspect_checkpoint(args.path, progress=True)
    if not found.is_there and not args.json:
        print("\n".join(found.problems))
    else:
        print(json.dumps(as_dict(found), indent=2) if args.json else as_text(found))
    return 0 if found.sound else 1
