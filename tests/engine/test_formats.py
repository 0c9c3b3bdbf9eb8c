"""Every kind and shape of drafter, in a real V1 engine, against the plain PyTorch reference: draft
parity and lossless output.

Random weights, random norms, GQA, an untied lm_head: whatever is read wrongly from a checkpoint
changes drafts.

    pytest tests/engine/test_formats.py
"""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine import forks
from engine.harness import (
    DRAFTER,
    TARGET,
    Batch,
    Job,
    engine_env,
    held_out_prompts,
    run_engine,
    run_engines,
)
from engine.oracle import BFLOAT16_GAP, compare_drafts
from kinds_of_users import NAMES, install, on_path
from pairs import make_random_drafter, random_drafter_config, random_prompts
from quantized import quantize
from variants import VARIANTS
from vllm_dflash.reference.decoding import generate

LIMIT = 96
SAMPLING = ({}, {"temperature": 0.8, "seed": 7})
"""Of every second prompt: on a CPU a seed gives what it gives without a drafter."""
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: variant.make(folder / name.replace(" ", "-")) for name, variant in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def served(random_target: Path, drafters: dict[str, Path]) -> dict[str, Batch]:
    """Each drafter in an engine of its own, and under ``plain`` the target without one."""
    prompts = random_prompts(16, 512)
    jobs = [
        Job(
            random_target,
            folder,
            prompts,
            num_speculative_tokens=VARIANTS[name].tokens,
            max_tokens=24,
            record=True,
            sampling=SAMPLING,
        )
        for name, folder in drafters.items()
    ]
    plain = Job(random_target, None, prompts, max_tokens=24, sampling=SAMPLING)
    batches = run_engines([*jobs, plain])
    return dict(zip([*drafters, "plain"], (b[0] for b in batches), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_drafts_are_the_references(
    random_target: Path, drafters: dict[str, Path], served: dict[str, Batch], name: str
) -> None:
    agreement = compare_drafts(
        served[name], random_target, drafters[name], torch.float32, VARIANTS[name].tokens
    )
    assert agreement.drafts >= 200
    assert agreement.differences == []
    assert served[name].tokens == served["plain"].tokens


def test_half_of_the_output_is_sampled(random_target: Path, served: dict[str, Batch]) -> None:
    """Else the equality above, with a seed, would say nothing of sampling."""
    model = AutoModelForCausalLM.from_pretrained(random_target, dtype=torch.float32)
    for i, (prompt, tokens) in enumerate(
        zip(served["plain"].prompts, served["plain"].tokens, strict=True)
    ):
        assert (tokens == generate(model, None, prompt, 24, 0).tokens) == (i % 2 == 0)


def test_the_variants_differ(served: dict[str, Batch]) -> None:
    """No two checkpoints draft alike: a setting that changed nothing here would not be tested by
    the parity above."""
    first = [d["draft"] for d in served["dflash"].report["drafts"]]
    same = [
        name
        for name in VARIANTS
        if name != "dflash" and [d["draft"] for d in served[name].report["drafts"]] == first
    ]
    assert same == ["dflash speculators"]


NEAR_THE_END = (
    "dflash sliding causal",
    "dflash mixed",
    "dflare",
    "dflash2 convolution",
    "dspark",
    "lilicorr",
)


@pytest.mark.parametrize("name", NEAR_THE_END)
def test_near_max_model_len(
    random_target: Path, drafters: dict[str, Path], near_the_end: dict[str, Batch], name: str
) -> None:
    """Windows, causal masks and convolutions hold where a block is cut at ``max_model_len`` too:
    its rows are those of its positions."""
    agreement = compare_drafts(
        near_the_end[name], random_target, drafters[name], torch.float32, 7, max_model_len=LIMIT
    )
    assert agreement.drafts >= 100
    assert agreement.differences == []


@pytest.fixture(scope="module")
def near_the_end(random_target: Path, drafters: dict[str, Path]) -> dict[str, Batch]:
    prompts = [prompt[: LIMIT - 16 - i] for i, prompt in enumerate([list(range(2, 2 + LIMIT))] * 8)]
    jobs = [
        Job(
            random_target,
            drafters[name],
            prompts,
            num_speculative_tokens=VARIANTS[name].tokens,
            max_tokens=32,
            max_model_len=LIMIT,
            record=True,
        )
        for name in NEAR_THE_END
    ]
    return dict(zip(NEAR_THE_END, (b[0] for b in run_engines(jobs)), strict=True))


@pytest.fixture(scope="module")
def users_kinds(
    random_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Path], dict[str, Batch]]]:
    """Drafters of the kinds of docs/kinds.md, and what was served with each, and without, where
    they are installed."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "site").mkdir()
    with on_path(install(folder / "site")):
        made = {
            name: make_random_drafter(folder / name, config=random_drafter_config(kind=name))
            for name in NAMES
        }
        weights = load_file(made["norepeat"] / "model.safetensors")
        save_file(
            weights | {"head.penalty": torch.tensor([1.5])},
            made["norepeat"] / "model.safetensors",
            metadata={"format": "pt"},
        )
        jobs = [
            Job(
                random_target,
                made[name],
                random_prompts(8, 512),
                num_speculative_tokens=random_drafter_config(kind=name).max_speculative_tokens,
                max_tokens=16,
                record=True,
            )
            for name in NAMES
        ]
        path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        plain = Job(random_target, None, random_prompts(8, 512), max_tokens=16)
        batches = run_engines([*jobs, plain], env={"PYTHONPATH": path})
        yield made, dict(zip([*made, "plain"], (b[0] for b in batches), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_users_kind(
    random_target: Path, users_kinds: tuple[dict[str, Path], dict[str, Batch]], name: str
) -> None:
    """A kind in one file of another package is served, and drafts what its own reference drafts."""
    drafters, batches = users_kinds
    agreement = compare_drafts(batches[name], random_target, drafters[name], torch.float32, 8)
    assert agreement.drafts >= 80
    assert agreement.differences == []
    assert batches[name].tokens == batches["plain"].tokens
    repeats = sum(
        a == b for _, d in batches[name].drafts for a, b in pairwise([d["token"], *d["draft"]])
    )
    print(f"\n{name}: {agreement.drafts} drafts, {repeats} tokens drafted twice in a row")


@pytest.fixture(scope="module")
def has_kernel(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether vLLM has its kernel for 4-bit weights here."""
    folder = tmp_path_factory.mktemp("kernel")
    script, answer = folder / "look.py", folder / "answer"
    script.write_text(_LOOK)
    command = [str(script), str(answer)]
    looking = forks.start(command, engine_env(), {0: Path(os.devnull), 1: folder / "log"})
    assert looking.wait(120) == 0, (folder / "log").read_text()
    return answer.read_text() == "True"


_LOOK = """
import sys
from pathlib import Path
import torch
from vllm.platforms import current_platform
current_platform.import_kernels()
Path(sys.argv[1]).write_text(str(hasattr(torch.ops._C, "cpu_gemm_wna16")))
"""


@pytest.mark.parametrize("kind", ["dflash", "dflare"])
def test_quantized_weights(
    random_target: Path, tmp_path: Path, has_kernel: bool, kind: str
) -> None:
    """4-bit weights on vLLM's own kernels draft as the same weights written out do, as far as
    bfloat16 tells.

    The kernel rounds elsewhere than plain PyTorch, and random drafters' best logits are close: 94 %
    agree outright, and a checkpoint that is read wrongly agrees in a third of its tokens at most. A
    build without the kernel refuses the drafter at load.
    """
    config = random_drafter_config(kind=kind, intermediate_size=128)
    drafter = make_random_drafter(tmp_path / "drafter", config=config)
    quantize(drafter, tmp_path / "packed", tmp_path / "written-out")
    if not has_kernel:
        with pytest.raises(
            RuntimeError, match=r"4-bit weights.*AVX-512.*serve a drafter with 16-bit weights"
        ):
            run_engine(
                random_target,
                tmp_path / "packed",
                random_prompts(1, 512),
                max_tokens=2,
                dtype="bfloat16",
            )
        return
    batch = run_engine(
        random_target,
        tmp_path / "packed",
        random_prompts(16, 512),
        max_tokens=24,
        dtype="bfloat16",
        record=True,
    )[0]
    agreement = compare_drafts(batch, random_target, tmp_path / "written-out", torch.bfloat16, 7)
    print(f"\n4-bit {kind}: {agreement.share:.4f} of {agreement.tokens} tokens agree")
    assert agreement.drafts >= 200
    assert agreement.share_beyond(BFLOAT16_GAP) >= 0.95


def test_scales_of_logits_reach_drafts_that_are_drawn(tmp_path: Path) -> None:
    """With logits that are all but equal, drafts are drawn evenly from 4,096 tokens. The best token
    is the best whatever they are scaled by."""
    raw, drafters = json.loads((DRAFTER / "config.json").read_text()), [DRAFTER]
    for name, value in (("logit_scale", 1e-4), ("final_logit_softcapping", 1e-3)):
        drafters.append(Path(shutil.copytree(DRAFTER, tmp_path / name)))
        (drafters[-1] / "config.json").write_text(json.dumps(raw | {name: value}))
    prompts = held_out_prompts(4)
    drawn = {
        "sampling": {"temperature": 1.0},
        "speculative_config": {"draft_sample_method": "probabilistic"},
    }
    jobs = [
        Job(TARGET, drafter, prompts, max_tokens=48, **asked)
        for asked in ({}, drawn)
        for drafter in drafters
    ]
    best, *others, plain, scaled, capped = (batches[0] for batches in run_engines(jobs))
    assert [(b.tokens, b.tau) for b in others] == [(best.tokens, best.tau)] * 2
    assert plain.tau > 1.6
    assert max(scaled.tau, capped.tau) < 1.2
