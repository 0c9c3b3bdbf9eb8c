"""What a run holds of a cluster, and how it gives that back: its actors and placement groups.

Ray Data lets its actors go by dropping its handles. Ray then ends an actor only once it has done
what was asked of it, and one that waits for room only once it has had some; a handle that an error
or a debugger keeps holds it for good. So each actor has a name here, by which it is ended.

    pytest tests/engine/test_cluster_room.py
"""

import time
import uuid
from collections.abc import Callable
from typing import Any

RETRIES = 5
"""A task whose process ends is given to another one so often, and then fails: what ends each
process that it comes to would be tried for ever. Ray does not count a node that is taken away."""
_CALM_S = 5.0
"""Actors that are done may take to end by themselves, which is kinder to what they hold."""


class Room:
    """The actors and placement groups of one run."""

    def __init__(self, bundles: list[dict[str, float]] | None = None) -> None:
        """``bundles``: of a placement group for each actor, which runs in the first of them."""
        self._bundles = bundles
        self._run = uuid.uuid4().hex[:12]
        self._names: list[str] = []
        self._groups: list[Any] = []

    def options(self) -> dict[str, Any]:
        """Ray's options of one more actor, as Ray Data's ``ray_remote_args_fn`` has to return."""
        self._names.append(f"vllm-dflash {self._run} {len(self._names)}")
        options: dict[str, Any] = {"name": self._names[-1], "max_task_retries": RETRIES}
        if self._bundles is not None:
            from ray.util.placement_group import placement_group
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            self._groups.append(placement_group(self._bundles, strategy="PACK"))
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._groups[-1], 0, placement_group_capture_child_tasks=True
            )
        return options

    def give_back(self, calm: bool = False) -> None:
        """Ends the actors and removes the groups; with ``calm`` actors are first given a few
        seconds to end by themselves. Nothing is raised: a cluster that is gone holds nothing."""
        import ray
        from ray.util.placement_group import remove_placement_group

        until = time.monotonic() + (_CALM_S if calm else 0)
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.1)
        for actor in left:
            _try(ray.kill, actor)
        for group in self._groups:
            _try(remove_placement_group, group)
        self._names, self._groups = [], []

    def _left(self) -> list[Any]:
        """Weak handles of the actors that have not ended."""
        import ray

        found = (_try(ray.get_actor, name) for name in self._names)
        return [actor for actor in found if actor is not None]


def _try(call: Callable[[Any], Any], given: Any) -> Any:
    """None where it fails: Ray says by a ValueError that there is no such actor any more, and in
    many ways that there is no cluster."""
    try:
        return call(given)
    except Exception:
        return None
