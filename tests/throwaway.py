"""Two throw-away modules that stand for upstream, and patches of them."""

import functools
from collections.abc import Callable
from typing import Any

from releases import OLDEST
from vllm_dflash.patch import Patch

VERSION = f"{OLDEST}.0"


UPSTREAM = """
    from upstream_parts import Part, helper as aliased

    def build():
        "docstring"
        return Part().name()

    class Runner:
        def load(self):
            self.part = Part()

        def fits(self, n):
            # a comment
            return n < 10

        @staticmethod
        def kind():
            return "upstream"

    def use():
        return aliased()
"""


PARTS = """
    class Part:
        def name(self):
            return "part"

    def helper():
        return "helper"
"""


def patch(
    target: str, replace: Callable[..., Any] | None = None, fingerprints: Any = (), **fields: Any
) -> Patch:
    return Patch(
        target=target,
        replace=replace,
        fingerprints=dict(fingerprints),
        why="why",
        until="until",
        **fields,
    )


def fits_any(original: Any) -> Any:
    return lambda self, n: True


def other_part(original: type) -> type:
    return type("OtherPart", (original,), {"name": lambda self: "ours over " + original.name(self)})


def around(original: Callable[..., Any], text: str = "ours") -> Callable[..., Any]:
    return functools.wraps(original)(lambda *args: f"{text} around {original(*args)}")


def of_runner(**fields: Any) -> Patch:
    return patch("upstream:Runner.fits", around, scope="instance", **fields)
