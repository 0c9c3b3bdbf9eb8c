"""Stage four: tau of the trained drafter by the trainer's walk, by the reference loop and by a real
vLLM engine, side by side.

All three decode the same held-out prompts greedily. In float32 they decode the same text, and their
tau must agree outright. In a narrower dtype texts part where the two best tokens are a rounding
apart, and other text has another tau; then the walk is taken over each one's own text as well, and
must agree with it there.

    vllm-dflash train ... --only prove          pytest tests/engine/test_train.py
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dflash.acceptance import Acceptance
from vllm_dflash.files import read_record, write_record
from vllm_dflash.progress import Progress
from vllm_dflash.records import AtLeast
from vllm_dflash.reference.checkpoint import load_drafter
from vllm_dflash.reference.decoding import generate
from vllm_dflash.tools.pair_runs import EngineError, Pair, run_engine
from vllm_dflash.training import learned
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import held_out
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.target import Target, load_target
from vllm_dflash.training.walk import estimate

_ROW = {
    "by": str,
    "tau": AtLeast(float, 1),
    "drafts": AtLeast(int, 0),
    "rates": [AtLeast(float, 0)],
    "walk_tau": AtLeast(float, 1),
    "same_text": AtLeast(int, 0),
    "from_trainer": AtLeast(float, 0),
}
_PROOF = {
    "question": {"trained": {}, "tolerance": AtLeast(float, 0)},
    "agree": bool,
    "trainer_tau": AtLeast(float, 1),
    "prompts": AtLeast(int, 1),
    "rows": [_ROW],
}


@dataclass(frozen=True)
class Proof:
    """One way of decoding: its tau, and the walk's over the text that it decoded."""

    name: str
    acceptance: Acceptance
    walk_tau: float
    same_text: int
    """Prompts whose text is that of the trainer's held-out answers."""

    @property
    def apart(self) -> float:
        """Relative difference between it and the walk."""
        return abs(self.acceptance.tau - self.walk_tau) / self.walk_tau


def path_of(settings: Settings) -> Path:
    """Where the result is noted."""
    return Path(settings.run.out) / "prove.json"


def proof(settings: Settings) -> dict[str, Any] | None:
    """What the stage found; None where it was not run. Raises RunError where its record is
    damaged."""
    return read_record(path_of(settings), _PROOF, "remove it, and the stage prove runs again")


def prove(settings: Settings, target: Target, device: str) -> bool:
    """Runs the stage, unless it was run for these weights; whether the three agree.

    Raises:
        TrainingError: nothing is trained yet, or the engine failed.
    """
    trained = learned.result(settings)
    if trained is None:
        raise TrainingError(
            f"{learned.folder_of(settings)} is not finished: run the stage train first"
        )
    question = {
        "trained": trained,
        "tokens": settings.prove.prove_tokens,
        "tolerance": settings.prove.tolerance,
        "vllm": not settings.prove.skip_vllm,
    }
    found = proof(settings)
    if found is None or found["question"] != question:
        proofs = _run(settings, target, device, trained["prompts"])
        found = {"question": question, **_judge(settings, trained, proofs)}
        write_record(path_of(settings), found)
    print(as_text(found))
    return bool(found["agree"])


def _run(settings: Settings, target: Target, device: str, count: int) -> list[Proof]:
    """Decodes the first ``count`` held-out prompts, those of the trainer's figure."""
    answers = held_out(settings)
    if count > len(answers):
        raise TrainingError(
            f"{learned.result_path(settings)} counts {count} prompts, and {len(answers)} are held"
            " out: remove it, and the stage train ends anew"
        )
    chosen = [answers[i] for i in range(count)]
    prompts = [s.tokens[: s.prompt_length].tolist() for s in chosen]
    texts = [s.tokens[s.prompt_length :].tolist() for s in chosen]
    folder, tokens, eos = (
        learned.trained_folder(settings),
        settings.prove.prove_tokens,
        target.eos_token_id,
    )
    drafter = load_drafter(folder, getattr(torch, target.dtype)).to(device)
    k = drafter.config.max_speculative_tokens
    model = load_target(target, settings, device)
    counted: list[tuple[str, Acceptance, list[list[int]]]] = [
        ("reference loop", *_reference(model, drafter, prompts, tokens, k, eos))
    ]
    if not settings.prove.skip_vllm:
        # Two whole models would not fit beside each other.
        model = None
        gc.collect()
        torch.cuda.empty_cache()
        pair = Pair(target.path, folder, prompts, k, tokens, target.dtype, eos)
        try:
            run = run_engine(pair, progress=True)
        except EngineError as error:
            raise TrainingError(
                f"vLLM did not serve the drafter; the end of its output says why\n{error}"
            ) from None
        counted.append(("vLLM", run.acceptance, run.tokens))
        model = load_target(target, settings, device)
    proofs = []
    for name, acceptance, decoded in counted:
        same = [d == t[: len(d)] for d, t in zip(decoded, texts, strict=True)]
        whole = [
            t if s else _continued(model, [*p, *d], drafter)[len(p) :]
            for p, d, t, s in zip(prompts, decoded, texts, same, strict=True)
        ]
        walked = estimate(
            model,
            drafter,
            [([*p, *w], len(p)) for p, w in zip(prompts, whole, strict=True)],
            tokens,
            eos,
        )
        proofs.append(Proof(name, acceptance, walked.tau, sum(same)))
    return proofs


def _reference(
    model: Any, drafter: Any, prompts: Sequence[list[int]], tokens: int, k: int, eos: int | None
) -> tuple[Acceptance, list[list[int]]]:
    runs = [
        generate(model, drafter, p, tokens, k, eos)
        for p in Progress(prompts, desc="reference loop", unit=" prompts")
    ]
    steps = [step for run in runs for step in run.steps]
    return Acceptance.of((step.accepted for step in steps), k), [run.tokens for run in runs]


def _continued(model: Any, ids: list[int], drafter: Any) -> list[int]:
    """``ids`` and the tokens that its last draft is judged by."""
    return ids + generate(model, None, ids, drafter.config.block_size, 0).tokens


def _judge(settings: Settings, trained: dict[str, Any], proofs: Sequence[Proof]) -> dict[str, Any]:
    count, rows = trained["prompts"], []
    agree = True
    for proof in proofs:
        trainer_apart = abs(proof.acceptance.tau - trained["tau"]) / trained["tau"]
        same = proof.same_text == count
        agree &= proof.apart <= settings.prove.tolerance and (
            not same or trainer_apart <= settings.prove.tolerance
        )
        rows.append(
            {
                "by": proof.name,
                "tau": proof.acceptance.tau,
                "drafts": proof.acceptance.drafts,
                "rates": proof.acceptance.rates,
                "walk_tau": proof.walk_tau,
                "same_text": proof.same_text,
                "from_trainer": trainer_apart,
            }
        )
    return {"agree": agree, "trainer_tau": trained["tau"], "prompts": count, "rows": rows}


def as_text(found: dict[str, Any]) -> str:
    """A table for people, and the verdict."""
    lines = [
        f"{'tau':<18}{'':>8}{'against the trainer':>21}{'walk over its text':>20}{'same text':>16}"
    ]
    lines.append(f"{'  trainer':<18}{found['trainer_tau']:>8.3f}")
    for row in found["rows"]:
        same = f"{row['same_text']} of {found['prompts']}"
        lines.append(
            f"  {row['by']:<16}{row['tau']:>8.3f}{row['from_trainer']:>20.1%}"
            f" {row['walk_tau']:>19.3f}{same:>16}"
        )
    limit = f"{found['question']['tolerance']:.0%}"
    verdict = "they agree within" if found["agree"] else "they DISAGREE by more than"
    lines.append(
        f"{verdict} {limit}"
        + (
            ""
            if found["agree"]
            else (
                ": the drafter is not exported; `vllm-dflash doctor` looks closer, and please"
                " report it"
            )
        )
    )
    return "\n".join(lines)
