"""Which drafter an engine serves with: its name, the id of its weights, what it was proved at, and
since when. Pure.

The id is of the tensors that came into the engine, not of a file's name: two folders with the same
weights have one id, and a mixture of two drafters would have none that anybody knows.

    pytest tests/unit/test_follow_identity.py
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_dflash import records
from vllm_dflash.records import AtLeast, Optional

NOTE = "refresh.json"
"""In the folder of a drafter that ``vllm-dflash refresh`` kept: what it was proved at, and for
which target."""
CARD = "training.json"
"""In the folder of a drafter that ``vllm-dflash train`` exported."""
PUSHED = "weights that were pushed"
"""The name of a drafter that came by vLLM's own update, which says none."""
_TAU = AtLeast(float, 1)
_NOTE = {"tau": _TAU, "target_files": Optional((str, None))}
_CARD = {"proof": {"rows": [{"tau": _TAU}]}}
_DIGITS = 12


@dataclass(frozen=True)
class Proof:
    """What a drafter's folder says of itself."""

    tau: float | None = None
    """On held-out prompts: of the traffic that it was refreshed for, or of its training."""
    target_files: str | None = None
    """Stands for the target's folder that it was proved with (``contents.of_folder``); None where
    that is not known."""


@dataclass
class ServingDrafter:
    """Of one engine's worker."""

    name: str
    """The folder or hub id that the weights came from."""
    id: str = ""
    """Twelve hexadecimal digits; empty before weights are loaded."""
    since: float = 0.0
    """Unix time."""
    proof: Proof = Proof()
    swapped: int = 0
    """Times that other weights took the place of those in force."""
    refused: int = 0
    """Swaps that were refused."""

    def put(self, name: str, weights: str, proof: Proof) -> None:
        """Weights with this id are in force from now on."""
        self.swapped += bool(self.id)
        self.name, self.id, self.proof, self.since = name, weights, proof, time.time()

    def call(self, name: str, proof: Proof) -> None:
        """The weights that were put in force last came from there."""
        self.name, self.proof = name, proof

    def count_refusal(self) -> None:
        """A swap was refused."""
        self.refused += 1

    def as_dict(self) -> dict[str, Any]:
        """As the endpoint answers. An answer with ``refused`` is a refusal, so no figure has that
        name."""
        return {
            "drafter": self.name,
            "id": self.id,
            "proved_tau": self.proof.tau,
            "since": self.since,
            "swaps": self.swapped,
            "refusals": self.refused,
        }

    def __str__(self) -> str:
        tau = "no proved tau" if self.proof.tau is None else f"proved tau {self.proof.tau:.2f}"
        return f"drafter {self.id} ({self.name}, {tau})"


def id_of(digests: Mapping[str, bytes]) -> str:
    """The id of a drafter whose tensors, by our names, have these digests."""
    whole = sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0".encode() + digests[name])
    return whole.hexdigest()[:_DIGITS]


def proof_of(folder: Path | None) -> Proof:
    """What the folder's notes say; nothing where there is none, or one that cannot be read: a
    drafter serves without."""
    if folder is None:
        return Proof()
    try:
        note = records.read(folder / NOTE, _NOTE)
        if note is not None:
            return Proof(note["tau"], note.get("target_files"))
        card = records.read(folder / CARD, _CARD)
    except records.RecordError:
        return Proof()
    rows = card["proof"]["rows"] if card else []
    return Proof(rows[-1]["tau"]) if rows else Proof()
