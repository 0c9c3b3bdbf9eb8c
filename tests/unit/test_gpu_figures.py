"""What the programs of ``tests/gpu`` make their figures of: traces, drafts beside drafts, random
pairs, the engines' arguments, and the archives for a machine without a network.

    pytest tests/unit/test_gpu_figures.py
"""

import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu import kernels, methods, oracle, pack_vllm, parity, shapes

METHODS = ("plain", "native:5", "dflash", "adaptive")
TRACE = {
    "traceEvents": [
        {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 0, "dur": 100},
        {"ph": "X", "cat": "user_annotation", "name": "sample_tokens", "ts": 10, "dur": 60},
        {"ph": "X", "cat": "user_annotation", "name": "propose", "ts": 30, "dur": 20},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 12, "dur": 2,
         "args": {"correlation": 1}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 35, "dur": 2,
         "args": {"correlation": 2}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 60, "dur": 2,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "kernel", "name": "sampler", "ts": 20, "dur": 10,
         "args": {"correlation": 1}},
        {"ph": "X", "cat": "kernel", "name": "attention", "ts": 40, "dur": 20,
         "args": {"correlation": 2}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 55, "dur": 10,
         "args": {"correlation": 2}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 70, "dur": 5,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "kernel", "name": "of nobody", "ts": 90, "dur": 5, "args": {}},
        {"ph": "i", "cat": "cpu_op", "name": "an instant", "ts": 1},
    ]
}  # fmt: skip
"""One step: a kernel of verification, a draft's graph of two, a copy after it, one of unknown
origin."""


def test_sizes_of_the_large_shapes() -> None:
    """Weights of published targets, in billions, and 36 layers of 8 heads of 128 in the cache."""
    assert shapes.bytes_of("qwen3-8b", False) / 2e9 == pytest.approx(8.19, abs=0.02)
    assert shapes.bytes_of("qwen3-4b", False) / 2e9 == pytest.approx(4.02, abs=0.02)
    assert shapes.cache_bytes_a_token("qwen3-8b") == 41 * 2 * 8 * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize("own_tables", [False, True])
def test_a_pair_that_is_made(tmp_path: Path, own_tables: bool) -> None:
    """Plain PyTorch loads both halves; a pair that is there is not made again."""
    folder = tmp_path / "pair"
    made = shapes.make_pair("tiny", folder, dtype="float32", weights=True, own_tables=own_tables)
    reference = oracle.Oracle()
    target, drafter = reference._pair(str(made.target), str(made.drafter), "float32")
    assert target.config.hidden_size == 64
    assert drafter.config.block_size == made.block_size == 16
    assert (drafter.own.lm_head is not None) == own_tables
    assert (drafter.mask_embedding is not None) == own_tables
    norms = [p for name, p in target.named_parameters() if "norm" in name]
    assert all(float(p.min()) >= 0.5 and float(p.max()) <= 1.5 for p in norms)
    (made.target / "config.json").unlink()
    shapes.make_pair("tiny", folder, dtype="float32", weights=True, own_tables=own_tables)
    assert not (made.target / "config.json").exists()


def test_methods_differ_in_what_makes_them() -> None:
    """All on the same runner; nothing of this package in what it is compared with."""
    pair = shapes.embedded()
    made = {name: methods.engine(name, pair, {"x": 1}, tau=4.0) for name in METHODS}
    assert {spec.environment["VLLM_USE_V2_MODEL_RUNNER"] for spec in made.values()} == {"1"}
    switches = {name: spec.environment["VLLM_DFLASH"] for name, spec in made.items()}
    assert switches == {"plain": "0", "native:5": "0", "dflash": "1", "adaptive": "1"}
    assert made["plain"].args.keys() == {"model", "x"}
    config = made["native:5"].args["speculative_config"]
    assert (config["num_speculative_tokens"], config["synthetic_acceptance_length"]) == (5, 4.0)
    assert made["dflash"].args["speculative_config"]["num_speculative_tokens"] == 7
    assert made["adaptive"].args["additional_config"] == {"dflash": {"adaptive": True}}


def test_kernels_by_what_launched_them() -> None:
    """By hand: of ``TRACE``'s step of 100 us the device works 10 + 25 + 5 + 5."""
    found = kernels.summary(kernels.parse(TRACE["traceEvents"]), steps=1)
    assert (found["profiled_step_us"], found["busy_us"], found["idle_us"]) == (100, 45, 55)
    assert found["kernels"] == 5
    parts = found["parts"]
    draft, verification = parts["propose"], parts["sample_tokens"]
    assert (draft["device_us"], draft["kernels"], draft["graphs"]) == (25, 2, 1)
    assert (verification["device_us"], verification["kernels"]) == (15, 2)
    assert verification["launches"] == 2
    assert [k["kernel"] for k in draft["longest"]] == ["attention", "gemm"]
    assert parts[kernels.OUTSIDE]["kernels"] == 1


def test_drafts_that_are_compared() -> None:
    """Those near the end before others, and no more than asked for."""
    sequences = [
        {"tokens": list(range(40)), "drafts": [[n, n, [1]] for n in range(10, 40)]},
        {"tokens": list(range(20)), "drafts": [[n, n, [1]] for n in range(5, 20)]},
    ]
    drawn = oracle._drawn(sequences, most=12, end=30)
    anchors = [draft[0] for sequence in drawn for draft in sequence["drafts"]]
    assert len(anchors) == 12
    assert set(range(30, 40)) <= set(anchors)


def test_two_engines_are_compared_where_their_text_is_the_same() -> None:
    prompts = [[1, 2], [3, 4]]
    one = {"outputs": [[5, 6], [7, 8]], "tau": 2.0,
           "drafts": [[0, 2, 5, [9, 9]], [0, 3, 6, [9, 9]], [1, 2, 7, [9, 9]]]}  # fmt: skip
    other = {"outputs": [[5, 0], [7, 8]], "tau": 2.02,
             "drafts": [[0, 2, 5, [9, 1]], [0, 3, 0, [1, 1]], [1, 2, 7, [9, 9]]]}  # fmt: skip
    found = parity.against(one, other, prompts, share=0.7, tau=0.02)
    assert (found["drafts"], found["same"], found["outputs_equal"]) == (2, 0.75, 1)
    assert found["passed"]
    assert not parity.against(one, other, prompts, share=0.8, tau=0.02)["passed"]
    assert not parity.against(one, other, prompts, share=0.7, tau=0.001)["passed"]


def test_what_makes_a_parity_figure_pass() -> None:
    """99 % of the float32 reference's tokens; or no less than plain PyTorch in bfloat16, less one
    in a hundred; in float32 all; and each anchor is the sequence's token."""

    def figure(same: int, reference: int, dtype: str, wrong: int = 0) -> bool:
        counts = {"all": [1000, same, same, reference], "near the end": [0, 0, 0, 0]}
        found = {"drafts": 1, "anchors_wrong": wrong, "counts": counts}
        engines: Any = SimpleNamespace(do=lambda name, job: found)
        run: Any = SimpleNamespace(dtype=dtype, args=SimpleNamespace(tiny=False))
        made = {"outputs": [[]], "drafts": [], "tau": 1.0, "modes": {}}
        return parity.compared(run, engines, shapes.embedded(), 7, [[1]], made)["passed"]

    assert figure(990, 1000, "bfloat16")
    assert not figure(989, 1000, "bfloat16")
    assert figure(960, 970, "bfloat16")
    assert not figure(959, 970, "bfloat16")
    assert not figure(999, 1000, "float32")
    assert figure(1000, 1000, "float32")
    assert not figure(1000, 1000, "bfloat16", wrong=1)


def test_what_is_packed(tmp_path: Path, monkeypatch: Any) -> None:
    """The operators in one archive, all else in the other; no library that is left out."""

    def download(to: Path, name: str) -> None:
        if name == "gguf":
            raise subprocess.CalledProcessError(1, "pip")
        if name == pack_vllm.VLLM:
            names = [*pack_vllm.LIBRARIES, "vllm/_moe_C.abi3.so", "vllm/vllm-rs", "vllm/a.py"]
            wheel(to / "vllm.whl", *names)

    def wheel(path: Path, *names: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, "x")
        return path

    monkeypatch.setattr(pack_vllm, "download", download)
    ours = wheel(tmp_path / "ours.whl", "vllm_dflash/patches/__init__.py")
    assert pack_vllm.main([str(tmp_path / "out"), "--wheel", str(ours)]) == 0
    packed = []
    for part in ("part1", "part2"):
        with tarfile.open(tmp_path / "out" / f"{part}.tar.xz") as tar:
            packed.append(set(tar.getnames()))
    assert packed[0] == {pack_vllm.OPERATORS}
    assert packed[1] == {
        "vllm/a.py", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm_dflash/patches/__init__.py"
    }  # fmt: skip
    with pytest.raises(SystemExit, match="make wheel"):
        pack_vllm.main([str(tmp_path / "out"), "--wheel", str(tmp_path / "none.whl")])


def test_prompts_near_the_end() -> None:
    """Every fourth ends 40 tokens before it, of either pair."""
    for prompts in (parity.embedded_prompts(8, 256), parity.random_prompts(8, 512, 256)):
        assert [len(prompts[i]) for i in (3, 7)] == [216, 216]
        assert all(0 < len(prompt) <= 216 for prompt in prompts)
