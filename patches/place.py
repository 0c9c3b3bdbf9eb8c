"""Where an attribute of a foreign object, module or class is set and put back: this folder is the
only place for that.

pytest tests/unit/test_patching.py
"""

from dataclasses import dataclass
from typing import Any

_KEPT = "_vllm_dflash_replaced"


@dataclass
class Replaced:
    """One attribute, with what was there and what stands in its place."""

    owner: Any
    name: str
    was_own: bool
    """Whether the owner itself had the original, not its class."""
    original: Any
    replacement: Any

    @property
    def is_in_place(self) -> bool:
        return vars(self.owner).get(self.name) is self.replacement

    def put(self) -> None:
        setattr(self.owner, self.name, self.replacement)

    def take_back(self) -> None:
        if self.was_own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)


def kept_with(owner: Any) -> "list[tuple[Any, Replaced]]":
    """The records attached to an object, in order. Kept with it: elsewhere they would keep it
    alive."""
    known: list[tuple[Any, Replaced]] = vars(owner).setdefault(_KEPT, [])
    return known
