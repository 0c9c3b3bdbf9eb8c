"""Definitions that were replaced in the running process, on a throw-away module that stands for
upstream.

What is fingerprinted is the source. Another plug-in that set ``Qwen2MLP.forward`` on vLLM's class
changed no source, and the layers that repeat it would have passed its method by.
"""

import contextlib
import functools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from vllm_dflash.replaced import replaced_by, shadowed

UPSTREAM = """
    import contextlib, dataclasses, functools
    import torch

    @dataclasses.dataclass(frozen=True)
    class Sizes:
        rows: int
        kind: type = int

    class Layer:
        LIMIT = 3
        make = dict

        def forward(self, x): return x

        @torch.inference_mode()
        def sample(self): ...

        @functools.cached_property
        def size(self): return 1

        @property
        def width(self): return 1

        @staticmethod
        def kind(): ...

        @functools.lru_cache
        def table(self): ...

    @contextlib.contextmanager
    def context(): yield

    def helper(): ...

    @functools.wraps(helper)
    def decorated(): return helper()
"""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "upstream.py").write_text(textwrap.dedent(UPSTREAM))
    monkeypatch.syspath_prepend(tmp_path)
    import upstream  # type: ignore[import-not-found]

    yield upstream
    del sys.modules["upstream"]


def theirs(*args: Any) -> None:
    """What another plug-in puts there."""


class Bound:
    """Its method is no function."""

    def method(self, *args: Any) -> None: ...


class Descriptor:
    """It gives a method, and cannot be called itself."""

    def __get__(self, owner: Any, kind: Any = None) -> Any: ...


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """It says that it has the original's module and name."""

    @functools.wraps(original)
    def wrapper(*args: Any) -> Any:
        return original(*args)

    return wrapper


@pytest.mark.parametrize(
    "name", ["Sizes", "Layer", "context", "helper", "decorated", "Layer.sample"]
)
def test_what_the_source_defines_is_not_replaced(upstream: Any, name: str) -> None:
    assert replaced_by(f"upstream:{name}") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward", theirs),
        ("forward", MagicMock()),
        ("forward", functools.partial(theirs)),
        ("forward", contextlib.contextmanager(theirs)),
        ("forward", functools.partialmethod(theirs)),
        ("forward", Bound().method),
        ("forward", Descriptor()),
        ("kind", staticmethod(theirs)),
        ("size", functools.cached_property(theirs)),
        ("width", property(theirs)),
        ("__call__", theirs),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_method_that_was_set_on_a_class_is_named(upstream: Any, name: str, value: Any) -> None:
    setattr(upstream.Layer, name, value)
    found = replaced_by("upstream:Layer")
    assert found is not None
    assert found == replaced_by(f"upstream:Layer.{name}")
    assert found.split(":")[0] in (__name__, "unittest.mock")


@pytest.mark.parametrize("name", ["forward", "sample", "table"])
def test_a_wrapper_that_takes_the_name_over_is_seen(upstream: Any, name: str) -> None:
    setattr(upstream.Layer, name, wrapped(getattr(upstream.Layer, name)))
    assert replaced_by("upstream:Layer") == f"{__name__}:Layer.{name}"


def test_below_a_wrapper_of_ours_it_is_seen_too(upstream: Any) -> None:
    from vllm_dflash.patches.guard import afterwards

    upstream.helper = afterwards(lambda owner: None)(upstream.helper)
    assert replaced_by("upstream:helper") is None
    upstream.helper = afterwards(lambda owner: None)(wrapped(upstream.helper))
    assert replaced_by("upstream:helper") == f"{__name__}:helper"


@pytest.mark.parametrize("value", [torch.ops.aten.add, torch.relu], ids=["operator", "builtin"])
def test_a_kernel_in_the_place_of_a_function_is_named(upstream: Any, value: Any) -> None:
    """torch is trusted around upstream's function, not in its place: a plug-in with a kernel of its
    own was passed by."""
    upstream.helper = value
    assert replaced_by("upstream:helper") is not None


def test_an_object_with_a_method_of_its_own(upstream: Any) -> None:
    layer = upstream.Layer()
    layer.name = "no method"
    assert layer.size == 1  # cached in the object, as its class wants it
    assert shadowed(layer) is None
    layer.forward = theirs
    assert shadowed(layer) == "forward"


def test_a_class_in_the_place_of_another_is_named(upstream: Any) -> None:
    class Theirs(upstream.Layer):  # type: ignore[misc]
        pass

    upstream.Layer = Theirs
    assert replaced_by("upstream:Layer.forward") is None  # inherited
    found = replaced_by("upstream:Layer")
    assert str(found).endswith("Theirs")


def test_what_is_not_imported_or_not_there_is_not_replaced() -> None:
    assert replaced_by("not_imported_at_all:Layer.forward") is None
    assert replaced_by("json:no_such_name.forward") is None
