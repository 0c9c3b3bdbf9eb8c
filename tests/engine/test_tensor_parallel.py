"""Two tensor-parallel ranks on a CPU draft what one rank drafts and what plain PyTorch drafts; the
output is plain decoding's, with either model runner.

Drafters with two KV heads (one a rank) and with one (a copy on each rank), DFlash and DFlare, the
last with tables of its own.

    pytest -s tests/engine/test_tensor_parallel.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import forks
from engine.harness import DRAFTER, TARGET, Batch, Job, held_out_prompts, run_worker
from engine.oracle import compare_drafts
from pairs import random_prompts
from targets import FAMILIES
from variants import Variant

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
_ALL_LAYERS: dict[str, Any] = {
    "target_layer_ids": (0, 1, 2, 3, 4),
    "kind": "dflare",
    "attention_bias": True,
}
RANDOM = {
    "dflare": Variant(_ALL_LAYERS, mask_embedding=True),
    "dflare one kv head": Variant(
        _ALL_LAYERS | {"num_key_value_heads": 1, "draft_vocab_size": 300},
        format="speculators",
        tables=("embed_tokens.weight",),
    ),
}
TRAINED = "dflash, the embedded pair"
NAMES = (TRAINED, *RANDOM)
Pairs = dict[str, tuple[Path, Path, list[list[int]]]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Target, drafter and prompts, by name."""
    folder = tmp_path_factory.mktemp("sharded")
    target, prompts = FAMILIES["llama"].make(folder / "target"), random_prompts(8, 512)
    found = {
        name: (target, variant.make(folder / name.replace(" ", "-")), prompts)
        for name, variant in RANDOM.items()
    }
    return found | {TRAINED: (TARGET, DRAFTER, held_out_prompts(8))}


@pytest.fixture(scope="module")
def reports(pairs: Pairs) -> dict[tuple[str, int], dict]:
    """What each engine reports, by name and ranks; with 0 ranks the target on one, without a
    drafter."""
    jobs = {}
    for name, (target, drafter, prompts) in pairs.items():
        jobs[name, 0] = Job(target, None, prompts, max_tokens=24)
        jobs[name, 1] = Job(target, drafter, prompts, max_tokens=24)
        jobs[name, 2] = Job(
            target, drafter, prompts, max_tokens=24, engine_args={"tensor_parallel_size": 2}
        )
    return dict(
        zip(
            jobs,
            run_worker("tensor_parallel_worker.py", [job.to_json() for job in jobs.values()]),
            strict=True,
        )
    )


def batch(report: dict[str, Any], prompts: list[list[int]]) -> Batch:
    return Batch(
        prompts,
        {
            "tokens": report["tokens"],
            "counters": report["counters"],
            "drafts": (report["ranks"] or [[]])[0],
        },
    )


@pytest.mark.parametrize("name", NAMES)
def test_output_and_counters_do_not_depend_on_the_ranks(
    pairs: Pairs, reports: dict[tuple[str, int], dict], name: str
) -> None:
    plain, one, two = (reports[name, ranks] for ranks in range(3))
    assert len(two["ranks"]) == 2
    assert all(module.startswith("vllm_dflash.") for module in two["proposers"])
    assert one["tokens"] == plain["tokens"]
    assert two["tokens"] == plain["tokens"]
    assert two["counters"] == one["counters"]
    tau = batch(two, pairs[name][2]).tau
    print(f"\n{name}: {two['counters']['drafts']:.0f} drafts, tau {tau:.3f} on one rank and on two")
    # Random drafters are hardly ever right: what acceptance does on two ranks is the trained pair's
    # to show.
    assert tau > 2 or name != TRAINED


@pytest.mark.parametrize("name", NAMES)
def test_both_ranks_draft_what_the_reference_drafts(
    pairs: Pairs, reports: dict[tuple[str, int], dict], name: str
) -> None:
    target, drafter, prompts = pairs[name]
    first, second = reports[name, 2]["ranks"]
    assert first == second
    agreement = compare_drafts(batch(reports[name, 2], prompts), target, drafter, torch.float32, 7)
    assert agreement.drafts >= 40
    assert agreement.differences == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_token_without_gathering_logits(
    reports: dict[tuple[str, int], dict], name: str, ranks: int
) -> None:
    """What ``use_local_argmax_reduction`` asks for: vLLM refused it with our drafters."""
    for local, gathered in reports[name, ranks]["top"]:
        # The random target's own lm_head has six tokens that win, all on the first rank.
        assert len(set(gathered)) > (5 if name == "dflare" else 10)
        assert local == gathered


def test_two_ranks_of_the_v2_runner(
    pairs: Pairs, reports: dict[tuple[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    """Through Triton's interpreter, adaptively: both ranks measure the same steps at their warm-up,
    and one keeps the profile. With ``use_local_argmax_reduction`` no rank asks for logits of all
    tokens to draft."""
    target, drafter, prompts = pairs[TRAINED]
    prompts, max_tokens = prompts[:3], 8
    job = Job(
        target,
        drafter,
        prompts,
        max_tokens=max_tokens,
        max_model_len=128,
        adaptive=True,
        engine_args={"tensor_parallel_size": 2, "max_num_batched_tokens": 128, "max_num_seqs": 4},
        speculative_config={"use_local_argmax_reduction": True},
    )
    (report,) = run_worker(
        "tensor_parallel_worker.py",
        [job.to_json()],
        {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CACHE_ROOT": str(tmp_path)},
        kind=forks.INTERPRETER,
    )
    assert len(list(tmp_path.glob("dflash_profiles/*.json"))) == 1
    assert report["proposers"] == ["vllm_dflash.drafting.v2"] * 2
    for ranks in (0, 1):
        expected = [tokens[:max_tokens] for tokens in reports[TRAINED, ranks]["tokens"][:3]]
        assert report["tokens"] == expected
    first, second = report["ranks"]
    assert first == second
    agreement = compare_drafts(batch(report, prompts), target, drafter, torch.float32, 7)
    # The first steps draft whatever was measured; how many more do is the controller's.
    assert agreement.drafts >= 3
    assert agreement.differences == []
    assert all(local == gathered for local, gathered in report["top"])


def test_pipeline_parallelism_is_refused(random_target: Path, random_drafter: Path) -> None:
    """When the configuration is made: the drafter shares the target's embedding, which another
    stage would hold."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    speculative = {"method": "dflash", "model": str(random_drafter), "num_speculative_tokens": 7}
    arguments = EngineArgs(
        str(random_target),
        speculative_config=speculative,
        skip_tokenizer_init=True,
        max_model_len=256,
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
    )
    with pytest.raises(ValueError, match="set pipeline_parallel_size to 1"):
        arguments.create_engine_config()
