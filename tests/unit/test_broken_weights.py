"""Broken weights, generated: each checkpoint is refused with a DrafterConfigError that names the
tensor or file and a remedy.

Tensors are dropped, renamed, reshaped, poisoned and mistyped; files are cut, emptied and replaced.

    pytest tests/unit/test_broken_weights.py
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from broken import REMEDY, edit, edit_config, refused, shard
from engine import forks
from engine.harness import engine_env, wait_until_gone
from pairs import make_random_drafter, random_drafter_config
from unit.test_checks import configure
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.tools.inspect import inspect_checkpoint
from vllm_dflash.tools.pair_checks import checkpoint_checks
from vllm_dflash.weights.values import check_finite

# A checkpoint is a kind and a format; each breakage is applied to all four.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "z-lab": {},
    "AngelSlim": {"config": {"kind": "dflare"}},
    "speculators dflash": {
        "config": {"draft_vocab_size": 200},
        "format": "speculators",
        "mask_embedding": True,
    },
    "speculators dflare": {
        "config": {"kind": "dflare", "draft_vocab_size": 200},
        "format": "speculators",
        "mask_embedding": True,
    },
}


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = dict(CHECKPOINTS[request.param])
    return make_random_drafter(
        tmp_path / "drafter", config=random_drafter_config(**made.pop("config", {})), **made
    )


def test_these_checkpoints_are_sound(folder: Path) -> None:
    """And so are they in shards."""
    assert inspect_checkpoint(folder).problems == []
    load_drafter(folder, torch.float32)
    shard(folder)
    assert inspect_checkpoint(folder).problems == []
    load_drafter(folder, torch.float32)


def test_tensors_dropped_renamed_reshaped(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    needed = [name for name in whole if name.startswith("layers.1.") or "layers." not in name]
    for name in needed:
        save_file({n: t for n, t in whole.items() if n != name}, folder / "model.safetensors")
        # lm_head alone may be absent, but not beside a d2t.
        refused(folder, "missing", name)
    for name in needed[:4]:
        save_file(
            {(n if n != name else f"old.{n}"): t for n, t in whole.items()},
            folder / "model.safetensors",
        )
        refused(folder, f"missing: {name}", f"unexpected: old.{name}")
    for name in needed:
        save_file(
            {n: t if n != name else t[: len(t) // 2].clone() for n, t in whole.items()},
            folder / "model.safetensors",
        )
        refused(folder, f"{name} is [", "should be")


def test_a_tensor_under_two_names(folder: Path) -> None:
    """A prefix is taken off when names are read; which of the two won was chance."""
    edit(
        folder,
        lambda tensors: tensors.update({"model.norm.weight": tensors["norm.weight"].clone()}),
    )
    refused(folder, "two names", "model.norm.weight")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["norm.weight", "layers.2.mlp.down_proj.weight"])
def test_a_value_that_is_no_number(folder: Path, name: str, value: float) -> None:
    edit(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(folder, name, "NaN or infinity")


def test_a_tensor_of_another_dtype(folder: Path) -> None:
    edit(
        folder,
        lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].to(torch.int64)}),
    )
    refused(folder, "norm.weight is I64")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        None,
        9,
    ],
)
def test_a_weight_file_that_is_none(folder: Path, content: bytes | int | None) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        whole[:-1] if content is None else whole[:content] if isinstance(content, int) else content
    )
    refused(folder, "model.safetensors cannot be read")


def test_no_weights_or_too_many(folder: Path) -> None:
    """vLLM reads every safetensors file of the folder: a second one overwrote tensors of the first
    in silence."""
    stray = folder / "old.safetensors"
    save_file({"norm.weight": torch.ones(64)}, stray)
    refused(folder, "old.safetensors", "beside model.safetensors")
    stray.unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "holds neither model.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"norm.weight": 5}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"norm.weight": "../model.safetensors"}}',
        '{"weight_map": {"norm.weight": "nowhere.safetensors"}}',
    ],
)
def test_a_bad_index(folder: Path, content: str) -> None:
    shard(folder).write_text(content)
    refused(folder, "model.safetensors.index.json")


def test_an_index_without_shards(folder: Path) -> None:
    """It was said to name shards that are not there, and none followed."""
    shard(folder).write_text('{"weight_map": {}}')
    refused(folder, "model.safetensors.index.json names no shards: fetch")


def test_weights_that_are_zero_are_told(folder: Path) -> None:
    """Nothing was said of a matrix that a cut write or no training at all left at zero. Biases and
    a fusion that weighs all layers alike are zero by right."""
    assert inspect_checkpoint(folder).warnings == []

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight")]
        tensors[name].zero_()
        for other in tensors:
            if other.endswith(".bias"):
                tensors[other].zero_()

    edit(folder, empty)
    found = inspect_checkpoint(folder)
    assert found.sound
    (warning,) = found.warnings
    assert warning.startswith("the weights are zero in all of layers.1.mlp.up_proj.weight: not")
    (check, _) = checkpoint_checks(found)
    assert (check.name, check.state, check.found) == ("weights", "warning", warning)


def test_shards_that_are_absent_cut_or_overlap(folder: Path) -> None:
    index = shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    first = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(
        load_file(second) | {"norm.weight": torch.ones(64)} | dict(list(first.items())[:1]), second
    )
    refused(folder, next(iter(first)), "another file")
    second.write_bytes(whole[:100])
    refused(folder, second.name, "cannot be read")
    second.unlink()
    refused(folder, second.name, "not there")
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps(
            {"weight_map": {name: file for name, file in places.items() if file != second.name}}
        )
    )
    refused(folder, "missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids + 600,
        lambda ids: ids - 600,
        lambda ids: -torch.arange(len(ids)),
        lambda ids: ids.float(),
        lambda ids: ids.bool(),
        lambda ids: ids * 0.5,
    ],
    ids=["beyond", "negative", "not distinct", "float", "bool", "half"],
)
def test_a_bad_draft_vocabulary(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = make_random_drafter(
        tmp_path / "d", config=random_drafter_config(draft_vocab_size=200), format="speculators"
    )
    edit(folder, lambda tensors: tensors.update(d2t=change(tensors["d2t"])))
    refused(folder, "d2t")


class _Pickled:
    """An object of no library; loading it would run code."""


def _embedding(**changes: Any) -> dict[str, Any]:
    return {"embedding": torch.ones(64), "mask_token_id": 1} | changes


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (_embedding(embedding=torch.ones(32)), "64 elements"),
        (_embedding(embedding=torch.full((64,), math.nan)), "finite"),
        (_embedding(embedding=torch.ones(64, dtype=torch.int64)), "64 elements"),
        (_embedding(embedding=[1.0] * 64), "64 elements"),
        ({"mask_token_id": 1}, "64 elements"),
        (_embedding(mask_token_id=2), "mask_token_id 2"),
        (_embedding(mask_token_id="1"), "mask_token_id 1"),
        (_embedding(mask_token_id=torch.ones(2)), "mask_token_id"),
        (torch.ones(2, 64), "64 elements"),
        ([torch.ones(64)], "64 elements"),
        (None, "64 elements"),
        (_Pickled(), "cannot be read as tensors"),
        (b"", "cannot be read as tensors (torch.save writes no such file)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "(torch.save writes no such file)"),
        (b"embedding", "cannot be read as tensors (torch.save writes no such file)"),
        (b"PK\x03\x04 a zip that is none", "cannot be read as tensors"),
        (b"\x80\x02c__builtin__\neval\n.", "cannot be read as tensors"),
        (bytes(range(256)), "cannot be read as tensors"),
    ],
    ids=lambda value: str(type(value).__name__) if not isinstance(value, str) else "",
)
def test_a_bad_mask_embedding(tmp_path: Path, state: Any, words: str) -> None:
    folder = make_random_drafter(tmp_path / "d", mask_embedding=True)
    path = folder / "mask_embedding.pt"
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    refused(folder, "mask_embedding.pt", words)


def test_eight_bit_floats_are_looked_at() -> None:
    """torch has no isfinite for them, so a quantized drafter ended in NotImplementedError."""
    tensor = torch.ones(4).to(torch.float8_e4m3fn)
    check_finite({"a": tensor}, torch.float16)
    tensor.view(torch.uint8)[0] = 0x7F
    with pytest.raises(DrafterConfigError, match="NaN or infinity in a"):
        check_finite({"a": tensor}, torch.float16)


_THROUGH_VLLM: dict[str, tuple[dict[str, Any], Callable[[Path], object], list[str]]] = {
    "poisoned mask embedding": (
        {"mask_embedding": True},
        lambda f: torch.save(
            _embedding(embedding=torch.full((64,), math.nan)), f / "mask_embedding.pt"
        ),
        ["mask_embedding.pt", "finite"],
    ),
    "d2t out of range": (
        {"config": random_drafter_config(draft_vocab_size=200), "format": "speculators"},
        lambda f: edit(f, lambda t: t.update(d2t=t["d2t"] + 600)),
        ["d2t", "came with"],
    ),
    "integer weights": (
        {},
        lambda f: edit(f, lambda t: t.update({"norm.weight": t["norm.weight"].long()})),
        ["norm.weight is I64"],
    ),
    "a stray file": (
        {},
        lambda f: save_file({"norm.weight": torch.ones(64)}, f / "old.safetensors"),
        ["old.safetensors", "remove"],
    ),
    "a layer twice": (
        {},
        lambda f: edit_config(f, dflash_config={"mask_token_id": 1, "target_layer_ids": [1, 2, 2]}),
        ["target_layer_ids", "each layer once"],
    ),
    "a block size that is a text": (
        {},
        lambda f: edit_config(f, block_size="8"),
        ["block_size is '8'", "came with"],
    ),
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", _THROUGH_VLLM)
def test_through_vllms_configuration(random_target: Path, tmp_path: Path, name: str) -> None:
    """The user of ``vllm serve`` reads the same, before any process starts."""
    made, spoil, words = _THROUGH_VLLM[name]
    folder = make_random_drafter(tmp_path / "d", **made)
    configure(random_target, folder)
    spoil(folder)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked below)
        configure(random_target, folder)
    assert all(word in str(error.value) for word in words), error.value
    assert REMEDY.search(str(error.value))


_OVERFLOWS = {torch.float16: 1e5, torch.bfloat16: 3.4e38, torch.float32: 1e300}


@pytest.mark.parametrize("dtype", _OVERFLOWS, ids=str)
@pytest.mark.parametrize(
    "name", ["norm.weight", "layers.1.mlp.up_proj.weight", "mask_embedding.pt"]
)
def test_a_number_that_the_serving_dtype_has_not(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    """1e300 in float64 is finite, and infinite once it is loaded: called sound, it served at tau
    1.00 in place of 3.93."""
    folder = make_random_drafter(
        tmp_path / "d", config=random_drafter_config(dtype=str(dtype).removeprefix("torch."))
    )
    huge = torch.full((64,), _OVERFLOWS[dtype], dtype=torch.float64)
    if name == "mask_embedding.pt":
        torch.save(_embedding(embedding=huge), folder / name)
    else:
        edit(
            folder,
            lambda tensors: tensors.update(
                {name: tensors[name].double().index_fill_(0, torch.tensor([1]), huge[0].item())}
            ),
        )
    words = [name, "would become infinite", str(dtype).removeprefix("torch.")]
    with pytest.raises(DrafterConfigError) as error:
        load_drafter(folder, dtype)
    assert all(word in str(error.value) for word in words), error.value
    assert any(
        all(word in problem for word in words) for problem in inspect_checkpoint(folder).problems
    )
    wider = {torch.float16: "bfloat16", torch.bfloat16: None, torch.float32: None}[dtype]
    if wider is not None:
        assert inspect_checkpoint(folder, dtype=wider).problems == []
        load_drafter(folder, torch.bfloat16)


def test_quantized_weights_are_judged_with_their_scales() -> None:
    """A scale is kept in float32, but weight times scale is what is multiplied with, in the serving
    dtype."""
    weight = torch.full((4, 4), 448.0).to(torch.float8_e4m3fn)
    sound = {"a.q_proj.weight": weight, "a.q_proj.weight_scale": torch.tensor([100.0])}
    check_finite(sound, torch.float16)
    large = sound | {"a.q_proj.weight_scale": torch.tensor([1000.0])}
    check_finite(large, torch.bfloat16)
    with pytest.raises(DrafterConfigError, match=r"a\.q_proj\.weight_scale: numbers beyond"):
        check_finite(large, torch.float16)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "C64", "ZZ"])
@pytest.mark.parametrize("name", ["norm.weight", "layers.0.mlp.up_proj.weight", "t2d"])
def test_a_dtype_that_torch_has_no_arithmetic_for(tmp_path: Path, dtype: str, name: str) -> None:
    """safetensors knows F4 and F6: reading them ended in its own error, and a t2d of them in
    none."""
    folder = make_random_drafter(tmp_path / "d")
    if name == "t2d":
        edit(folder, lambda tensors: tensors.update(t2d=torch.ones(64)))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name] |= {"dtype": dtype}
    bits = {"F4": 4, "C64": 64, "ZZ": 32}.get(dtype, 6)
    header[name]["shape"] = [
        (header[name]["data_offsets"][1] - header[name]["data_offsets"][0]) * 8 // bits
    ]
    packed = json.dumps(header).encode()
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + size :])
    refused(
        folder,
        (
            "cannot be read"
            if dtype == "ZZ" or (dtype.startswith("F6") and _left_over(header[name], bits))
            else f"{name} is {dtype}"
        ),
    )


def _left_over(entry: dict[str, Any], bits: int) -> bool:
    return (entry["data_offsets"][1] - entry["data_offsets"][0]) * 8 % bits != 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.ones(64, device="meta"), "a meta tensor without elements"),
        (lambda: torch.ones(64).to_sparse(), "a sparse tensor"),
        (lambda: torch.ones(8, 8).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(32), torch.ones(32)]), "a nested tensor"),
        (
            lambda: torch.nested.nested_tensor(
                [torch.ones(32), torch.ones(32)], layout=torch.jagged
            ),
            "a nested tensor",
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8),
            "a quantized tensor",
        ),
        (lambda: torch.ones(64, dtype=torch.complex64), "a tensor of complex64"),
        (lambda: torch.ones(1).expand(10**12), "64 elements"),
    ],
    ids=["meta", "sparse", "csr", "nested", "jagged", "quantized", "complex", "expanded"],
)
def test_a_mask_embedding_of_another_kind(
    tmp_path: Path, make: Callable[[], torch.Tensor], words: str
) -> None:
    """torch saves and loads them all; looking at one ended in NotImplementedError, a meta tensor
    served what was in memory."""
    folder = make_random_drafter(tmp_path / "d", mask_embedding=True)
    for state in (make(), _embedding(embedding=make()), _embedding(mask_token_id=make())):
        torch.save(state, folder / "mask_embedding.pt")
        refused(
            folder,
            "mask_embedding.pt",
            (
                words
                if not isinstance(state, dict) or isinstance(state["mask_token_id"], int)
                else "mask_token_id"
            ),
        )


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_poisoned_weight_ends_the_server(random_target: Path, tmp_path: Path) -> None:
    """Headers do not show NaN, so this one is found while weights are loaded, in the engine's
    process; all of them end."""
    folder = make_random_drafter(tmp_path / "d")
    edit(folder, lambda tensors: tensors["layers.1.mlp.up_proj.weight"][0].fill_(math.nan))
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(random_target),
        "--skip-tokenizer-init",
        "--max-model-len",
        "128",
    ]
    speculative = json.dumps(
        {"method": "dflash", "model": str(folder), "num_speculative_tokens": 5}
    )
    flags = [
        "--port",
        "0",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(1 << 26),
        "--speculative-config",
        speculative,
    ]
    log = tmp_path / "log"
    server = forks.start(
        [*command, *flags],
        engine_env({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        {0: Path(os.devnull), 1: log},
    )
    assert server.wait(280) != 0
    assert (
        "the weights hold NaN or infinity in layers.1.mlp.up_proj.weight: fetch the checkpoint"
        " again" in log.read_text()
    )
    wait_until_gone(server.pid)
