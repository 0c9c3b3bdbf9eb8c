"""vLLM's Ray executor with a drafter, on logical GPUs (``tests/ray_platform``): the output is one
process's.

Tensor parallel 2 goes through ``vllm-dflash batch``'s own path, with a placement group a replica;
two data-parallel ranks through vLLM's AsyncLLM. Needs ``pip install 'vllm-dflash[ray]'``.

    pytest -s tests/engine/test_cluster_tensor_parallel.py
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cluster_harness import ray_cluster
from engine.harness import DRAFTER, PROMPTS, TARGET, engine_env, held_out_prompts, run_engine
from vllm_dflash.cluster.batch import Job, complete
from vllm_dflash.cluster.settings import EngineSettings

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dflash[ray]'")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
TOKENS = 24
ON_CPU = {"kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(platform=True, num_cpus=2, num_gpus=2):
        yield


@pytest.fixture(scope="module")
def expected() -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [
        tokenizer.decode(tokens)
        for tokens in run_engine(TARGET, None, held_out_prompts(8), max_tokens=TOKENS)[0].tokens
    ]


def test_two_tensor_parallel_ranks(tmp_path: Path, expected: list[str]) -> None:
    import ray

    (tmp_path / "in.jsonl").write_text("\n".join(PROMPTS.read_text().splitlines()[:8]))
    engine = EngineSettings(
        str(TARGET),
        str(DRAFTER),
        "cuda",
        7,
        tensor_parallel_size=2,
        dtype="float32",
        max_model_len=512,
        engine_args=ON_CPU,
    )
    sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    sums = complete(Job([str(tmp_path / "in.jsonl")], tmp_path / "out", engine, sampling, 1, 8))
    rows = [
        json.loads(line) for line in (tmp_path / "out/part-000000.jsonl").read_text().splitlines()
    ]
    assert [row["error"] for row in rows] == [None] * 8
    assert [row["completion"] for row in rows] == expected
    tau = 1 + sums["accepted_tokens"] / sums["drafts"]
    print(f"\ntensor parallel 2 on Ray: {sums['drafts']} drafts, tau {tau:.3f}")
    assert tau > 2
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2:
        assert time.monotonic() < deadline, "a finished batch still holds devices"
        time.sleep(0.5)


def test_two_data_parallel_ranks(tmp_path: Path, expected: list[str]) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    script = Path(__file__).with_name("data_parallel_worker.py")
    env = engine_env(
        {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(TOKENS)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [
        line for line in done.stderr.splitlines() if "leaked" not in line
    ]  # nanobind's, of Triton's bindings
    assert out.is_file(), "\n".join(said[-60:])
    report = json.loads(out.read_text())
    assert report["texts"] == expected
    print(f"\ntwo data-parallel ranks on Ray: tokens by rank {report['tokens_by_rank']}")
    assert report["tokens_by_rank"] == {"0": 4 * TOKENS, "1": 4 * TOKENS}
