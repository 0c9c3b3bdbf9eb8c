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
from vllm_dflash.errors import printable
from vllm_dflash.records import AtLeast, Optional

NOTE = "refresh.json"
"""In the folder of a drafter that ``vllm-dflash refresh`` kept: what it was proved at, and for
which target."""
CARD = "training.json"
"""In the folder of a drafter that ``vllm-dflash train`` exported."""
PUSHED = "weights that were pushed"
"""The name of a drafter that came by vLLM's own update, which says none."""
WEIGHTS = "weights"
"""In both notes: the id of the weights that they speak of."""
_TAU = AtLeast(float, 1)
_OF = Optional((str, None))
_NOTE = {"tau": _TAU, "target_files": Optional((str, None)), WEIGHTS: _OF}
_CARD = {"proof": {"rows": [{"tau": _TAU}]}, WEIGHTS: _OF}
_DIGITS = 12


@dataclass(frozen=True)
class Proof:
    """What a drafter's folder says of itself."""

    tau: float | None = None
    """On held-out prompts: of the traffic that it was refreshed for, or of its training."""
    target_files: str | None = None
    """Stands for the target's folder that it was proved with (``contents.of_folder``); None where
    that is not known."""
    untied: str | None = None
    """Why the folder's tau is not shown, where it says one."""


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
        proof = self.proof
        tau = "no proved tau" if proof.tau is None else f"proved tau {proof.tau:.2f}"
        tau += f": {proof.untied}" if proof.untied else ""
        return f"drafter {self.id} ({printable(self.name)}, {tau})"


def id_of(digests: Mapping[str, bytes]) -> str:
    """The id of a drafter whose tensors, by our names, have these digests."""
    whole = sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0".encode() + digests[name])
    return whole.hexdigest()[:_DIGITS]


def proof_of(folder: Path | None, weights: str) -> Proof:
    """What the folder's notes say of the weights with this id; nothing where there is none, or one
    that cannot be read: a drafter serves without. A tau of other weights, as in a copy of a folder
    that was trained on, is none of these."""
    if folder is None:
        return Proof()
    try:
        name, note = NOTE, records.read(folder / NOTE, _NOTE)
        if note is None:
            name, note = CARD, records.read(folder / CARD, _CARD)
    except records.RecordError:
        return Proof()
    if note is None:
        return Proof()
    rows = note["proof"]["rows"] if name == CARD else [note]
    target = note.get("target_files") if name == NOTE else None
    if not rows:
        return Proof()
    if (of := note.get(WEIGHTS)) != weights:
        said = "does not say of which weights it is" if of is None else f"is of the weights {of}"
        return Proof(None, target, f"{name} {said}")
    return Proof(rows[-1]["tau"], target)
