"""Plain PyTorch beside an engine, in a process of its own: what the reference drafts at the anchors
where the engine did.

Calls none of the code that it checks (``vllm_dflash.reference``). On a GPU the reference runs in
float32 and in bfloat16: how often rounding alone changes a draft depends on the weights, so an
engine in bfloat16 is compared with what plain PyTorch in bfloat16 comes to.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_dflash.engines.child import Parent, serve  # noqa: E402

ROUNDING = 2 * 2.0**-8
"""Two steps of a bfloat16 logit, relative to it: below, which of two logits is larger is
rounding."""


class Oracle:
    """The reference's models, by folder and dtype, kept from job to job."""

    def __init__(self) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._models: dict[tuple[str, str, str], tuple[Any, Any]] = {}

    def do(self, job: dict[str, Any], parent: Parent) -> dict[str, Any]:
        """How an engine's drafts agree with the reference's.

        ``sequences``: of each its ``tokens`` and its ``drafts``, rows of anchor, anchor's token and
        drafted tokens; ``most`` of the drafts are compared, drawn at random, those within
        ``near_end`` positions of ``max_model_len`` before all others.
        """
        totals = {"drafts": 0, "anchors_wrong": 0}
        kinds = {"all": [0, 0, 0, 0], "near the end": [0, 0, 0, 0]}
        for sequence in _drawn(job["sequences"], job["most"], self._end(job)):
            tokens, drafts = sequence["tokens"], sequence["drafts"]
            anchors = [anchor for anchor, _, _ in drafts]
            totals["drafts"] += len(drafts)
            totals["anchors_wrong"] += sum(tokens[n] != token for n, token, _ in drafts)
            exact, rounded = (
                self._replay(job, dtype, tokens, anchors) for dtype in ("float32", job["dtype"])
            )
            for (anchor, _, served), best, again in zip(drafts, exact, rounded, strict=True):
                counts = kinds["near the end" if anchor >= self._end(job) else "all"]
                for token, right, gap, top, other in zip(
                    served, best.tokens, best.gaps, best.tops, again.tokens, strict=False
                ):
                    counts[0] += 1
                    counts[1] += token == right
                    counts[2] += token == right or gap <= ROUNDING * abs(top)
                    counts[3] += other == right
        return totals | {"counts": kinds}

    @staticmethod
    def _end(job: dict[str, Any]) -> int:
        return int(job["max_model_len"] - job["near_end"])

    def _replay(
        self, job: dict[str, Any], dtype: str, tokens: list[int], anchors: list[int]
    ) -> list[Any]:
        from vllm_dflash.reference.decoding import replay_drafts

        target, drafter = self._pair(job["target"], job["drafter"], dtype)
        return replay_drafts(target, drafter, tokens, anchors, job["k"], job["max_model_len"])

    def _pair(self, target: str, drafter: str, dtype: str) -> tuple[Any, Any]:
        key = (target, drafter, dtype)
        if key not in self._models:
            import torch
            from transformers import AutoModelForCausalLM

            from vllm_dflash.reference.checkpoint import load_drafter

            kind = getattr(torch, dtype)
            loaded = AutoModelForCausalLM.from_pretrained(target, dtype=kind).to(self.device)
            own = load_drafter(drafter, kind).to(self.device)
            own.own = own.own.on(next(own.parameters()))
            self._models[key] = loaded.eval(), own
        return self._models[key]


def _drawn(sequences: list[dict[str, Any]], most: int, end: int) -> list[dict[str, Any]]:
    """The sequences with ``most`` of all their drafts."""
    places = [
        (draft[0] < end, random.Random(f"{i} {draft[0]}").random(), i, j)
        for i, sequence in enumerate(sequences)
        for j, draft in enumerate(sequence["drafts"])
    ]
    kept: dict[int, list[int]] = {}
    for _, _, i, j in sorted(places)[:most]:
        kept.setdefault(i, []).append(j)
    return [
        {
            "tokens": sequences[i]["tokens"],
            "drafts": [sequences[i]["drafts"][j] for j in sorted(js)],
        }
        for i, js in sorted(kept.items())
    ]


def begin(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Nothing is loaded before it is asked for."""
    import torch

    oracle = Oracle()
    return oracle.do, {
        "seconds": time.perf_counter() - BEGAN, "device": oracle.device, "torch": torch.__version__
    }  # fmt: skip


if __name__ == "__main__":
    serve(begin)
