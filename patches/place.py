"""Where an attribute of a foreign object, module or class is set and put back, if what stands there
is upstream's: this folder is the only place for that.

pytest tests/unit/test_patching.py
"""

import sys
from dataclasses import dataclass
from typing import Any

from vllm_dflash.patch import Patch, PatchError
from vllm_dflash.replaced import described, name_of

_OWN = "vllm_dflash"
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

    @classmethod
    def of_module(cls, patch: Patch, defined_as: tuple[str, str]) -> "Replaced":
        """The replacement of a name in a module or class, not put in place yet.

        Args:
            defined_as: module and name that the source gives the target.

        Raises:
            PatchError: the name is gone, or it is not what the source defines.
        """
        owner: Any = sys.modules[patch.module]
        for part in patch.qualname.split(".")[:-1]:
            owner = vars(owner).get(part)
            if owner is None:
                raise PatchError(f"{patch.target}: no {part} in the imported module")
        if patch.name not in vars(owner):
            raise PatchError(f"{patch.target}: no {patch.name} in the imported module")
        if (problem := patch.replaced()) is not None:
            raise PatchError(problem)
        original = vars(owner)[patch.name]
        if (found := name_of(original)) != defined_as:
            raise PatchError(
                f"{patch.target}: expected {':'.join(defined_as)}, but it is {':'.join(found)}: "
                "another plug-in replaced it; load one of the two"
            )
        assert patch.replace is not None
        return cls(owner, patch.name, True, original, patch.replace(original))

    @classmethod
    def of_object(cls, owner: Any, patch: Patch, context: tuple[Any, ...]) -> "Replaced":
        """The replacement of an object's attribute, not put in place yet.

        Args:
            context: what the record's ``replace`` gets after the original.

        Raises:
            PatchError: it is neither upstream's nor ours. A class of a third package may have its
                own method where a record only runs something around it.
        """
        value = getattr(owner, patch.name)
        found = name_of(
            value if callable(value) and hasattr(value, "__qualname__") else type(value)
        )
        roots = {patch.module.partition(".")[0], _OWN}
        if patch.name not in vars(owner) and patch.target not in patch.fingerprints:
            roots.add(type(owner).__module__.partition(".")[0])
        if found[0].partition(".")[0] not in roots:
            raise PatchError(
                f"{patch.target}: it is {':'.join(found)}: another plug-in replaced it; load one of"
                " the two"
            )
        assert patch.replace is not None
        was_own = patch.name in vars(owner)
        return cls(owner, patch.name, was_own, value, patch.replace(value, *context))

    @property
    def is_in_place(self) -> bool:
        return vars(self.owner).get(self.name) is self.replacement

    def describe(self) -> str:
        """What has replaced our replacement."""
        ours, current = name_of(self.replacement), described(vars(self.owner).get(self.name))
        return f"our {':'.join(ours)} was replaced by {current}: load one of the two plug-ins"

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
