"""``examples/cluster/simulate.py`` against what can be said with a pencil."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "cluster" / "simulate.py"


@pytest.fixture(scope="module")
def simulate() -> Any:
    spec = importlib.util.spec_from_file_location("simulate", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["simulate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results() -> dict[str, Any]:
    """A step of 10 ms at one request and 20 ms at ten; drafted ones take 1.5 times as long and
    commit 3 tokens a request."""
    points = [
        {
            "prompt_set": "a",
            "prompt_tokens": None,
            "temperature": t,
            "concurrency": c,
            "num_prompts": 16,
        }
        for t in (0, 1)
        for c in (1, 10)
    ]
    rows = []
    for index, point in enumerate(points):
        step = {1: 10.0, 10: 20.0}[point["concurrency"]] * (1 + point["temperature"])
        for method, times, tokens in (
            ("plain", 1.0, 1.0),
            ("dflash:3", 1.2, 2.0),
            ("dflash:7", 1.5, 3.0),
        ):
            rows.append(
                {
                    "point": index,
                    "method": method,
                    "step_ms": {"median": step * times},
                    "committed_per_request_step": {"median": tokens},
                    "ttft_p50_ms": {"median": 15.0},
                }
            )
    return {"points": points, "rows": rows}


def test_what_is_read(simulate: Any) -> None:
    steps, prompt = simulate.read(results())
    assert prompt == pytest.approx(0.005)
    assert steps["on"].sizes == [1, 10]
    assert steps["on"].seconds == [0.015, 0.030]
    assert simulate.chosen(steps, "off", 5.5) == pytest.approx((0.015, 1.0))
    assert simulate.chosen(steps, "adaptive", 10) == pytest.approx((0.030, 3.0))


@pytest.mark.parametrize(("method", "step", "committed"), [("off", 0.010, 1), ("on", 0.015, 3)])
def test_alone_a_request_takes_its_prompt_and_its_steps(
    simulate: Any, method: str, step: float, committed: int
) -> None:
    steps, prompt = simulate.read(results())
    done = simulate.simulate(steps, prompt, method, 4, rate=0.01, tokens=1, requests=50, seed=0)
    assert done["p50"] == pytest.approx(prompt + step)
    long = simulate.simulate(
        steps, prompt, method, 4, rate=0.001, tokens=300, requests=2000, seed=0
    )
    # The median of a geometric distribution of mean 300 is 208 tokens.
    assert long["p50"] == pytest.approx(prompt + 208 / committed * step, rel=0.15)


def test_throughput_is_the_arrivals_until_it_is_the_steps(simulate: Any) -> None:
    steps, prompt = simulate.read(results())
    assert simulate.simulate(steps, prompt, "off", 10, rate=20, tokens=20, requests=4000, seed=0)[
        "requests_per_second"
    ] == pytest.approx(20, rel=0.1)
    # Full: ten requests a step of 20 ms, a prompt of 5 ms in one step of its twenty: 1 / (20 *
    # 0.020 / 10 + 0.005) a replica.
    full = simulate.simulate(steps, prompt, "off", 10, rate=1000, tokens=20, requests=4000, seed=0)
    assert full["requests_per_second"] == pytest.approx(10 / (20 * 0.020 / 10 + 0.005), rel=0.1)
