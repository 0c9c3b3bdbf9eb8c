"""What is put around methods of a single ``Scheduler``: the records' common part, and what of ours
is kept with the scheduler.

pytest tests/patches/test_records.py
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vllm_dflash.patches.place import kept_with

from vllm_dflash.patch import Patch

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
Kept = TypeVar("Kept")


def around(
    name: str,
    signature: str,
    replace: Callable[..., Any],
    *,
    names: Sequence[str],
    why: str,
    until: str,
) -> Patch:
    """The record of one method around which something is run, whatever its body; optional."""
    return Patch(
        target=f"{SCHEDULER}.{name}",
        scope="instance",
        needs="optional",
        signatures={f"{SCHEDULER}.{name}": signature},
        names=names,
        why=why,
        until=until,
        replace=replace,
    )


def attach_once(
    scheduler: Any, patches: Sequence[Patch], kept_as: str, make: Callable[[], Kept], *context: Any
) -> Kept | None:
    """What is kept with a scheduler as an attribute of this name: made, and the records attached
    with ``context`` and it, where they are not yet. None where a record does not fit, which the
    log and ``vllm-dflash status`` say."""
    from vllm_dflash.plugin import patch_set

    if {patch for patch, _ in kept_with(scheduler)}.issuperset(patches):
        kept: Kept = getattr(scheduler, kept_as)
        return kept
    made = make()
    if not patch_set().attach(scheduler, patches, *context, made):
        return None
    setattr(scheduler, kept_as, made)
    return made
