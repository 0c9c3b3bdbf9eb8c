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

from vllm_dflash.replaced import replaced_by

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
        ("kind", staticmethod(theirs)),
        ("size", functools.cached_property(theirs)),
        ("width", property(theirs)),
        ("__call__", theirs),
    ],
    ids=repr,
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
