"""Which drafter all replicas of a deployment are to have, and whose turn it is to take it: one
replica after another, so that all but one serve as ever. Pure; times are handed in.

Replicas ask in short intervals. One that comes later, as an autoscaler starts it with the drafter
of the deployment's configuration, is told like the others. One that dies in its turn loses it.
Where a replica refuses the drafter, those that have taken it go back.

    pytest tests/unit/test_swap_rollout.py
"""

from dataclasses import dataclass, field
from typing import Any

from vllm_dflash.swap.turns import Swap

POLL_S = 2.0
"""Between two questions of a replica."""
_GONE_S = 60.0
"""Without a question, after which a replica is taken to be gone."""
_TURN_S = 600.0
"""Of a swap, after which the next replica has its turn."""
Want = tuple[int, str, str]
"""A number that grows, a drafter's folder, and what becomes of the context."""


class UnderWayError(RuntimeError):
    """Another swap is under way."""


@dataclass
class _Replica:
    seen: float
    number: int = 0
    """Of what it has taken; 0 for what it was started with."""


@dataclass
class Rollout:
    """Of one deployment."""

    first: str
    """The drafter of the deployment's configuration."""
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _number: int = 0
    _want: Swap | None = None
    _in_force: tuple[int, Swap] | None = None
    """What all had before, and its number."""
    _turn: tuple[str, float] | None = None
    """Whose it is, and since when."""
    _refused: str | None = None
    """Why the last swap was refused."""
    _answer: dict[str, Any] = field(default_factory=dict)
    """Of the replica that took it last."""

    def want(self, folder: str, context: str, now: float) -> int:
        """All are to take this drafter; returns the number of the swap.

        Raises:
            UnderWayError: not all have taken the one before yet.
        """
        self._forget(now)
        if self._want is not None and self._left():
            raise UnderWayError("another swap is under way: ask again")
        self._in_force = self._number, self._want or Swap(self.first, context)
        self._number += 1
        self._want, self._refused = Swap(folder, context), None
        return self._number

    def greet(self, replica: str, answer: dict[str, Any], now: float) -> None:
        """A replica has started, and says what it serves."""
        self._replicas[replica] = _Replica(now)
        if not self._answer and "refused" not in answer:
            self._answer = answer

    def beat(self, replica: str, now: float) -> None:
        """A replica lives: it is about its swap still."""
        self._replicas.setdefault(replica, _Replica(now)).seen = now

    def turn(self, replica: str, now: float) -> Want | None:
        """What a replica is to take now; None for nothing yet."""
        self.beat(replica, now)
        self._forget(now)
        if self._want is None or self._replicas[replica].number == self._number:
            return None
        if self._turn is not None and self._turn[0] != replica:
            return None
        self._turn = replica, now
        return self._number, self._want.folder, self._want.context

    def done(self, replica: str, number: int, answer: dict[str, Any], now: float) -> None:
        """What a replica's swap came to."""
        if self._turn is not None and self._turn[0] == replica:
            self._turn = None
        known = self._replicas.setdefault(replica, _Replica(now))
        if number != self._number or self._want is None:
            return
        known.seen = now
        if "refused" not in answer:
            known.number, self._answer = number, answer
        elif self._refused is None and self._in_force is not None:
            self._refused = str(answer["refused"])
            before, self._want = self._in_force
            self._number += 1
            # Those that have taken it go back; who still has what was before need not.
            for each in self._replicas.values():
                if each.number == before:
                    each.number = self._number
            self._in_force = self._number, self._want
        else:  # one that cannot even go back: it serves what it has
            known.number = number

    def state(self, now: float) -> dict[str, Any]:
        """How far the last swap is: what serves where it was taken last, ``replicas`` and
        ``left``, and ``refused`` with the reason."""
        self._forget(now)
        found = self._answer | {"replicas": len(self._replicas), "left": self._left()}
        return found | ({} if self._refused is None else {"refused": self._refused})

    def _left(self) -> int:
        return sum(each.number != self._number for each in self._replicas.values())

    def _forget(self, now: float) -> None:
        self._replicas = {n: r for n, r in self._replicas.items() if now - r.seen < _GONE_S}
        if self._turn is not None:
            holder, since = self._turn
            if holder not in self._replicas or now - since > _TURN_S:
                self._turn = None
