"""What is kept of drafts, and the noise of seeded requests, apart from an engine."""

from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_dflash.cpu.draft_metadata import DraftMetadata
from vllm_dflash.cpu.sampling import SeedDraws
from vllm_dflash.cpu.verification import Verifier, keep_accepted

pytestmark = pytest.mark.vllm


def test_drafts_are_kept_up_to_the_first_that_differs() -> None:
    # Three requests with 3, 0 and 2 drafts; one more row each.
    sampled = [7, 8, 1, 9, 4, 5, 6, 2]
    assert keep_accepted(sampled, [7, 8, 3, 5, 6], [3, 0, 2]) == [
        [7, 8, 1, -1],
        [4, -1, -1, -1],
        [5, 6, 2, -1],
    ]


def test_an_accepted_token_after_a_rejected_one_is_dropped() -> None:
    assert keep_accepted([1, 2, 3], [9, 2], [2]) == [[1, -1, -1]]


def test_draws_are_vllms_whatever_is_asked_for_first() -> None:
    """vLLM draws one number a token; drafts ask for several at once, and for some again after a
    rejection or a preemption."""
    generator = torch.Generator().manual_seed(7)
    expected = [int(torch.randint(0, 2**31, (1,), generator=generator)) for _ in range(6)]
    draws = SeedDraws()
    assert draws.at("a", 7, range(4)) == expected[:4]
    assert draws.at("a", 7, range(2, 6)) == expected[2:]
    assert draws.at("b", 7, range(1, 2)) == expected[1:2]
    assert draws.at("a", 8, range(1)) != expected[:1]
    draws.forget_all_but({"b"})
    assert list(draws._drawn) == ["b"]


def test_a_requests_draws_are_by_the_seed_that_vllm_gave_its_generator() -> None:
    """Not by the request's own, which vLLM might have changed."""
    runner = SimpleNamespace(
        requests={"a": SimpleNamespace(output_token_ids=[1]), "b": None},
        input_batch=SimpleNamespace(req_ids=["b", "a"]),
    )
    generator = torch.Generator().manual_seed(8)
    torch.rand(3, generator=generator)
    sampling = SimpleNamespace(generators={1: generator})
    verifier = Verifier.__new__(Verifier)
    verifier._runner, verifier._draws, verifier._earlier = runner, SeedDraws(), {}
    rows, seeds = verifier._seeded([2, 1], sampling)
    assert (rows, seeds) == ([3, 4], SeedDraws().at("a", 8, range(1, 3)))


def test_a_sessions_draws_go_on_with_its_next_input() -> None:
    """vLLM clears a streaming session's output with each input and keeps its generator: the draws
    began anew. Accepted drafts past an output's end are none of it, and greedy inputs draw none."""
    generator, sampled = torch.Generator().manual_seed(8), SimpleNamespace(temperature=0.7)
    # The output was of 3 tokens; the runner has two more, and vLLM keeps 2.
    session = SimpleNamespace(
        generator=generator,
        sampling_params=sampled,
        num_prompt_tokens=10,
        output_token_ids=[1, 2, 3, 4, 5],
    )
    verifier = Verifier.__new__(Verifier)
    verifier._runner = SimpleNamespace(
        requests={"a": session}, input_batch=SimpleNamespace(req_ids=["a"])
    )
    verifier._draws, verifier._earlier = SeedDraws(), WeakKeyDictionary()
    sampling = SimpleNamespace(generators={0: generator})
    verifier.next_input(session, 12)
    session.output_token_ids, session.num_prompt_tokens = [], 16
    assert verifier._seeded([1], sampling)[1] == SeedDraws().at("a", 8, range(3, 5))
    session.sampling_params = SimpleNamespace(temperature=0.0)
    verifier.next_input(session, 20)
    session.output_token_ids = [6]
    assert verifier._seeded([1], sampling)[1] == SeedDraws().at("a", 8, range(4, 6))
    verifier.next_input(SimpleNamespace(generator=None, sampling_params=sampled), 20)
    del generator, session.generator, sampling
    assert len(verifier._earlier) == 0, "what was kept ends with its request"


@pytest.mark.parametrize(
    ("scheduled", "drafted"),
    [
        ([1, 1, 1], [0, 0, 0]),
        ([5, 1, 20], [0, 0, 0]),
        ([1], [0]),
        ([4, 100, 3, 2, 2], [3, 0, 2, 0, 1]),
        ([8], [7]),
        ([1, 8], [0, 7]),
        ([3, 3], [2, 2]),
    ],
)
def test_metadata_of_drafts_is_vllms(scheduled: list[int], drafted: list[int]) -> None:
    """Of decoding steps and of those with prompts, with drafts and without."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = SimpleNamespace(
        device=torch.device("cpu"), _arange_scratch=np.zeros(128, dtype=np.int32)
    )
    runner.input_ids = SimpleNamespace(gpu=torch.arange(500, 700, dtype=torch.int32))
    runner._get_cumsum_and_arange = GPUModelRunner._get_cumsum_and_arange.__get__(runner)
    runner._arange_np = runner.arange_np = np.arange(128)

    def vllms(*args: np.ndarray) -> object:
        return GPUModelRunner._calc_spec_decode_metadata(runner, *args)

    drafts, ends = np.array(drafted, dtype=np.int32), np.cumsum(scheduled, dtype=np.int32)
    ours, theirs = DraftMetadata(runner.input_ids.gpu.numpy(), 8)(drafts, ends), vllms(drafts, ends)
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(theirs).items():
        own = getattr(ours, name)
        if isinstance(value, torch.Tensor):
            assert own.dtype == value.dtype, name
            own, value = own.tolist(), value.tolist()
        assert own == value, name


def test_metadata_of_like_steps_has_each_steps_own_drafts() -> None:
    """Where the rows are the same as before, the tokens in them are not."""
    tokens = np.arange(100, 120, dtype=np.int32)
    metadata = DraftMetadata(tokens, 8)
    drafts, ends = np.array([2, 1], dtype=np.int32), np.array([3, 5], dtype=np.int32)
    first = metadata(drafts, ends)
    tokens += 50
    second = metadata(drafts, ends)
    assert first.draft_token_ids.tolist() == [101, 102, 104]
    assert second.draft_token_ids.tolist() == [151, 152, 154]
    # As many drafts, and a prompt of four tokens behind them.
    mixed = metadata(np.array([2, 0], dtype=np.int32), np.array([3, 7], dtype=np.int32))
    assert mixed.logits_indices.tolist() == [0, 1, 2, 6]
    assert metadata(drafts, ends).logits_indices.tolist() == [0, 1, 2, 3, 4]
