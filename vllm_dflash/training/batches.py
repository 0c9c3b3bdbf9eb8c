"""Which sequences and anchors a step trains on: a function of the seed and the step alone, so that
resuming needs no state. Pure.

pytest tests/unit/test_train_batches.py
"""

from dataclasses import dataclass

import numpy as np

from vllm_dflash.config import DrafterConfig

_LOGITS = 1 << 28
"""Of a forward by default: a gigabyte in float32, and another for their gradients."""


@dataclass(frozen=True)
class Batch:
    """One step's rows over all workers: sequence numbers [B], anchors int64 [B, N] in ascending
    order, and which exist, bool [B, N]."""

    rows: np.ndarray
    anchors: np.ndarray
    exists: np.ndarray

    def part(self, start: int, size: int) -> "Batch":
        """A forward's rows."""
        return Batch(
            self.rows[start : start + size],
            self.anchors[start : start + size],
            self.exists[start : start + size],
        )


class Plan:
    """The batches of a run. Sequences come in a new order each epoch; anchors are places of the
    response, drawn anew each time."""

    def __init__(
        self,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        batch_size: int,
        anchors: int,
        seed: int,
    ) -> None:
        # An anchor is an answer's token that at least one follows.
        self.usable = np.flatnonzero(lengths - prompt_lengths >= 2)
        if not len(self.usable):
            raise ValueError("no sequence has an answer of two tokens")
        self.lengths, self.prompt_lengths = lengths, prompt_lengths
        # More would only be padding.
        self.anchors = min(anchors, int((lengths - prompt_lengths)[self.usable].max()) - 1)
        self.batch_size, self.seed = batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None

    def steps(self, epochs: float) -> int:
        """Steps that go through the sequences so many times."""
        return max(1, round(epochs * len(self.usable) / self.batch_size))

    def epoch(self, step: int) -> float:
        """How often the sequences have been gone through before ``step``."""
        return step * self.batch_size / len(self.usable)

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, counted from 0."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        rows = np.array([self._row(p) for p in places])
        rng = np.random.default_rng([self.seed, 1, step])
        anchors = np.zeros((len(rows), self.anchors), np.int64)
        exists = np.zeros((len(rows), self.anchors), bool)
        for i, row in enumerate(rows):
            first, last = int(self.prompt_lengths[row]), int(self.lengths[row]) - 2
            count = min(self.anchors, last - first + 1)
            anchors[i] = first
            anchors[i, :count] = np.sort(rng.choice(last - first + 1, count, replace=False)) + first
            exists[i, :count] = True
        return Batch(rows, anchors, exists)

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, len(self.usable))
        if self._order is None or self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng([self.seed, 0, epoch]).permutation(self.usable),
            )
        return int(self._order[1][index])


def forward_size(share: int, anchors: int, config: DrafterConfig) -> int:
    """Sequences of one forward where ``micro_batch`` says nothing: as many of a worker's ``share``
    of a step, in equal parts, as have no more logits than a gigabyte holds; ``anchors`` blocks
    each."""
    logits = anchors * config.max_speculative_tokens * config.draft_tokens
    most = max(_LOGITS // logits, 1)
    return max(n for n in range(1, min(share, most) + 1) if share % n == 0)
