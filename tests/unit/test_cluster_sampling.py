"""The sampling parameters of a batch run's rows, and of the whole run, before an engine sees them.

pytest tests/unit/test_cluster_sampling.py
"""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dflash.cluster.batch import Job, complete
from vllm_dflash.cluster.completer import Completer
from vllm_dflash.cluster.rows import params_of
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.prompts import PromptError

pytestmark = pytest.mark.vllm

WRONG = [
    ({"max_tokens": 3.0}, r"Expected `int \| null`, got `float` - at `\$.max_tokens`"),
    ({"max_tokens": True}, r"got `bool` - at `\$.max_tokens`"),
    ({"seed": 2.0}, r"got `float` - at `\$.seed`"),
    ({"extra_args": [1]}, r"got `array` - at `\$.extra_args`"),
    ({"ignore_eos": 1}, r"got `int` - at `\$.ignore_eos`"),
    ({"detokenize": None}, r"got `null` - at `\$.detokenize`"),
    ({"temperature": "0"}, r"got `str` - at `\$.temperature`"),
    ({"stop": [1]}, r"got `int` - at `\$.stop\[0\]`"),
    ({"allowed_token_ids": "ab"}, r"got `str` - at `\$.allowed_token_ids`"),
    ({"prompt_logprob_token_ids": [[1]]}, r"at `\$.prompt_logprob_token_ids`"),
    ({"logit_bias": {"x": 1}}, r"at `key` in `\$.logit_bias`"),
    ({"structured_outputs": {"regex": 3}}, r"at `\$.structured_outputs.regex`"),
    ({"structured_outputs": {"regex": "a", "jsn": {}}}, r"structured_outputs.jsn is no"),
    ({"structured_outputs": {"regex": "a", "_backend": "x"}}, r"structured_outputs._backend is no"),
    ({"structured_outputs": {}}, r"must use one kind of structured outputs"),
    ({"repetition_detection": {"min_count": 2.0}}, r"at `\$.repetition_detection.min_count`"),
    ({"heat": 1}, r"heat is no sampling parameter"),
    ({"output_kind": 1}, r"output_kind is no"),
    ({"_all_stop_token_ids": [1]}, r"_all_stop_token_ids is no"),
    ({"logprobs": 0}, r"nothing is written of logprobs: leave it out"),
    ({"prompt_logprobs": 2}, r"nothing is written of prompt_logprobs"),
    ({"detokenize": False}, r"nothing is written of detokenize=false"),
    ({"n": 2, "temperature": 1}, r"n is 2: a row has one completion"),
    ({"temperature": -1}, r"temperature must be non-negative"),
    ({"min_tokens": 9, "max_tokens": 4}, r"min_tokens must be less than or equal"),
    ({"seed": 2**64}, r"seed cannot be sent to the engine: .*2\*\*64"),
    ({"stop_token_ids": [-(2**70)]}, r"stop_token_ids cannot be sent"),
    ({"structured_outputs": {"json": {"maximum": 2**70}}}, r"structured_outputs cannot be sent"),
    ({"stop": "\ud83d"}, r"stop cannot be sent to the engine: .*surrogates"),
    ({"extra_args": {"\ud83d": 1}}, r"extra_args cannot be sent"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_vllm_does_not_take_is_refused_with_its_field(given: Any, message: str) -> None:
    """The types passed ``SamplingParams(**given)``, and ended the engine core's thread that reads
    requests: the rows after that one were waited for for ever."""
    with pytest.raises(PromptError, match="sampling_params: .*" + message):
        params_of(given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0, "max_tokens": None, "stop": "x", "seed": 2**64 - 1, "ignore_eos": True},
        {"structured_outputs": {"json": {"type": "object"}, "disable_any_whitespace": True}},
        {"structured_outputs": {"regex": "a+"}, "logit_bias": {"3": 1}, "extra_args": {"a": [1]}},
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 2}, "bad_words": ["x"]},
    ],
)
def test_what_it_takes_is_read_by_the_engine_core(given: Any) -> None:
    """By what it reads requests with. ``structured_outputs`` stayed a dict, and its rows failed."""
    params = params_of(given)
    assert params.output_kind == RequestOutputKind.FINAL_ONLY
    read = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    assert read == params
    if "structured_outputs" in given:
        assert isinstance(params.structured_outputs, StructuredOutputsParams)
        for name, value in given["structured_outputs"].items():
            assert getattr(params.structured_outputs, name) == value
        assert params.structured_outputs._backend is None
    if "logit_bias" in given:
        assert params.logit_bias == {3: 1.0}


class Engine:
    """Reads requests as the engine core does, and once it could not never answers another."""

    vllm_config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 10))
    errored = reading_ended = False

    def get_tokenizer(self) -> None: ...

    async def generate(self, prompt: Any, params: SamplingParams, name: str) -> Any:
        try:
            MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
        except Exception:
            self.reading_ended = True
        if self.reading_ended:
            await asyncio.sleep(3600)
        completion = SimpleNamespace(
            text="x", finish_reason="stop", token_ids=[1], spec_decode_metrics=None
        )
        yield SimpleNamespace(outputs=[completion], prompt_token_ids=[1])


def test_a_row_of_another_type_costs_itself_alone(tmp_path: Path) -> None:
    completer = Completer({}, {"max_tokens": 4}, str(tmp_path))
    completer._engine = Engine()
    good = {"prompt_token_ids": [1]}
    rows = [good, good | {"sampling_params": {"max_tokens": 3.0}}, good]

    async def answer() -> list[dict[str, Any]]:
        asked = asyncio.gather(*(completer._row(row, None) for row in rows))
        return await asyncio.wait_for(asked, 20)

    errors = [row["error"] for row in asyncio.run(answer())]
    assert errors[0] is errors[2] is None
    assert "`$.max_tokens`" in errors[1]


def never(*args: Any) -> None:
    raise AssertionError("it has begun")


def test_the_runs_parameters_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the output is claimed, too: the mended command may write there."""
    monkeypatch.setattr("vllm_dflash.cluster.batch._answer", never)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
    engine = EngineSettings("org/target", device="cpu")
    job = Job([str(tmp_path / "in.jsonl")], tmp_path / "out", engine, {"max_tokens": 3.0})
    with pytest.raises(ClusterError, match=r"of --sampling, .*`float` - at `\$.max_tokens`"):
        complete(job)
    assert not list((tmp_path / "out" / "_batch").glob("*.json"))


def test_and_by_a_replica_before_its_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Completer, "_start", never)
    with pytest.raises(ClusterError, match=r"of --sampling, .*heat is no sampling parameter"):
        asyncio.run(anext(Completer({}, {"heat": 1}, str(tmp_path))({})))
