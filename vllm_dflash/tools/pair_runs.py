"""The doctor's runs: the pair in plain PyTorch, and in a vLLM engine in a process of its own, over
the same prompts, greedy.

pytest tests/engine/test_doctor.py
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.acceptance import Acceptance
from vllm_dflash.config import DrafterConfig
from vllm_dflash.engines.process import QUIET, EngineFailedError, EngineProcess
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.hub import load_model
from vllm_dflash.progress import Progress
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import generate, replay_drafts, target_features
from vllm_dflash.reference.drafter import Drafter
from vllm_dflash.tools.break_even import BreakEven

SHIFTS = (-1, 1)
_REPLAYED_ANCHORS = 400


class EngineError(RuntimeError):
    """The engine did not get to the end; the message is the end of its output."""


@dataclass(frozen=True)
class CostSettings:
    """What decides how long contexts may be when steps are measured."""

    positions: int
    """As the pair will be served, at most."""
    position_bytes: int
    """Of a position's keys and values in the target, at most."""
    max_model_len: int | None
    """Where the user gives one."""


@dataclass(frozen=True)
class Pair:
    """What runs: folders (or a hub id for the target), prompts as token ids, and settings that are
    all given."""

    target: str
    draft: Path
    prompts: Sequence[Sequence[int]]
    num_speculative_tokens: int
    max_tokens: int
    dtype: str
    eos_token_id: int | None
    costs: CostSettings | None = None
    """To have the engine measure what its steps cost; None: it does not."""

    @property
    def max_model_len(self) -> int:
        """Needed: room for the longest prompt, its output and one more block. Near the
        limit drafts get shorter, which is not the question."""
        return max(map(len, self.prompts)) + self.max_tokens + self.num_speculative_tokens + 1


@dataclass(frozen=True)
class Gain:
    """What another reading of a drafter, as with other target layers, would give: ``gain`` accepted
    tokens a draft more, its standard error, and how many prompts gain."""

    gain: float
    error: float
    better_prompts: float

    @property
    def clear(self) -> bool:
        return self.gain > 3 * self.error and self.gain > 0.02 and self.better_prompts > 0.5


@dataclass(frozen=True)
class ReferenceRun:
    """Plain PyTorch's outcome."""

    tokens: list[list[int]]
    leads: list[list[float]]
    """Per generated token, the target's best logit less the second, relative to the best: where
    small, rounding decides."""
    acceptance: Acceptance
    shifts: dict[int, Gain]


@dataclass(frozen=True)
class EngineRun:
    """vLLM's outcome."""

    tokens: list[list[int]]
    acceptance: Acceptance
    break_even: BreakEven | None = None
    """None where the engine did not, or could not, measure its steps."""


def run_reference(pair: Pair, progress: bool) -> ReferenceRun:
    """Decodes each prompt in plain PyTorch on the first device there is; then drafts again with
    neighbouring target layers.

    Always, not only where tau is low: the layers of a target resemble their neighbours, so ids that
    are off by one cost little enough to be missed (the embedded pair: tau 3.59, with ids one higher
    3.21, one lower 3.42).

    Raises:
        DrafterConfigError: quantized weights, or a target whose layers the reference does not know.
    """
    target, drafter = load_pair(pair)
    k = pair.num_speculative_tokens
    tokens, leads, steps = [], [], []
    with Progress(
        total=2 * len(pair.prompts), desc="plain PyTorch", unit=" prompts", disable=not progress
    ) as bar:
        for prompt in pair.prompts:
            done = generate(
                target, drafter, prompt, pair.max_tokens, k, pair.eos_token_id, pair.max_model_len
            )
            tokens.append(done.tokens)
            steps += [step for step in done.steps if step.draft.tokens]
            leads.append(_leads(target, prompt, done.tokens))
            bar.update()
        shifts = _shifts(
            target,
            drafter,
            [[*p, *t] for p, t in zip(pair.prompts, tokens, strict=True)],
            list(map(len, pair.prompts)),
            k,
            bar,
        )
    return ReferenceRun(tokens, leads, Acceptance.of((step.accepted for step in steps), k), shifts)


def load_pair(pair: Pair, config: DrafterConfig | None = None) -> tuple[Any, Drafter]:
    """Target and drafter in plain PyTorch; ``config`` in place of what the drafter's file says.

    Raises:
        DrafterConfigError: quantized weights, or a target whose layers the reference does not know.
    """
    dtype, device = getattr(torch, pair.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    drafter = load_drafter(pair.draft, dtype, config).to(device)
    target = load_model(pair.target, pair.dtype, device)
    if not hasattr(getattr(target, "model", None), "layers"):
        raise DrafterConfigError(
            f"{type(target).__name__} has no model.layers, where the reference looks for the"
            " target's layers; vLLM alone is asked"
        )
    return target, drafter


@torch.inference_mode()
def _leads(target: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
    ids = torch.tensor([[*prompt, *tokens]], device=target.device)
    _, hidden = target_features(target, (), ids, use_cache=False)
    best, second = target.lm_head(hidden[0, len(prompt) - 1 : -1]).float().topk(2).values.unbind(-1)
    return ((best - second) / best.abs().clamp(min=1e-9)).tolist()


def _shifts(
    target: Any, drafter: Drafter, sequences: list[list[int]], starts: list[int], k: int, bar: Any
) -> dict[int, Gain]:
    """Accepted tokens a draft with every target layer id one lower and one higher, against the ids
    as they are, anchor by anchor."""
    config, depth = drafter.config, len(target.model.layers)
    stride = stride_of(sequences, starts)
    possible = [
        s
        for s in SHIFTS
        if min(config.target_layer_ids) + s >= 0 and max(config.target_layer_ids) + s < depth
    ]
    differences: dict[int, list[list[int]]] = {shift: [] for shift in possible}
    for sequence, start in zip(sequences, starts, strict=True):
        anchors = range(start, len(sequence) - 1, stride)
        counts = {}
        for shift in (0, *possible):
            drafter.config = _shifted(config, shift)
            counts[shift] = accepted(target, drafter, sequence, anchors, k)
        for shift in possible:
            differences[shift].append(
                [b - a for a, b in zip(counts[0], counts[shift], strict=True)]
            )
        bar.update()
    drafter.config = config
    return {shift: gained(each) for shift, each in differences.items()}


def stride_of(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> int:
    """How far apart anchors are from ``starts`` on, so that they are some hundreds in all."""
    total = sum(len(s) - n for s, n in zip(sequences, starts, strict=True))
    return max(1, total // _REPLAYED_ANCHORS)


def accepted(
    target: Any, drafter: Drafter, sequence: Sequence[int], anchors: Sequence[int], k: int
) -> list[int]:
    """Of a draft at each of ``anchors`` how many tokens go on as ``sequence`` does."""
    drafts = replay_drafts(target, drafter, sequence, anchors, k) if anchors else []
    return [_common(d.tokens, sequence[n + 1 :]) for d, n in zip(drafts, anchors, strict=True)]


def _shifted(config: DrafterConfig, shift: int) -> DrafterConfig:
    return config.with_(target_layer_ids=tuple(i + shift for i in config.target_layer_ids))


def _common(draft: Sequence[int], truth: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(draft, truth, strict=False)) if a != b),
        min(len(draft), len(truth)),
    )


def gained(differences: list[list[int]]) -> Gain:
    """Of differences in accepted tokens, by prompt and anchor."""
    every = torch.tensor([d for each in differences for d in each], dtype=torch.float32)
    if len(every) < 2:
        return Gain(0.0, 0.0, 0.0)
    better = sum(sum(each) > 0 for each in differences) / len(differences)
    return Gain(every.mean().item(), (every.std() / len(every) ** 0.5).item(), better)


def run_engine(pair: Pair, progress: bool) -> EngineRun:
    """The same in vLLM, as it is installed here, in a process of its own.

    Raises:
        EngineError: it did not start, or died.
    """
    settings = {
        "target": pair.target,
        "draft": str(pair.draft),
        "max_tokens": pair.max_tokens,
        "dtype": pair.dtype,
        "num_speculative_tokens": pair.num_speculative_tokens,
        "eos_token_id": pair.eos_token_id,
        "max_model_len": pair.max_model_len,
        "costs": pair.costs and asdict(pair.costs),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(
            total=len(pair.prompts), desc="vLLM", unit=" prompts", disable=not progress
        ) as bar,
    ):
        try:
            with EngineProcess(
                "vllm_dflash.tools.engine_run", settings, Path(folder, "log"), QUIET
            ) as engine:
                ready = engine.wait_until_ready()
                result = engine.do({"prompts": [list(p) for p in pair.prompts]}, bar.update)
        except EngineFailedError as error:
            raise EngineError(error.tail or str(error)) from None
    acceptance = Acceptance(result["drafts"], result["per_position"])
    return EngineRun(result["tokens"], acceptance, ready and BreakEven(**ready))
