"""A rolling swap over replicas that come, go, die and refuse."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from vllm_dflash.cli import parser_of_all
from vllm_dflash.cluster.serve import Serving, app_args, serving_of
from vllm_dflash.cluster.settings import ClusterError, EngineSettings
from vllm_dflash.swap.endpoint import WORKER
from vllm_dflash.swap.rollout import Rollout, UnderWayError


class Replicas:
    """Each asks once a step, in an order of their own; what each has in force."""

    def __init__(self, *names: str) -> None:
        self.rollout, self.now = Rollout("first"), 0.0
        self.serving = dict.fromkeys(names, "first")
        self.busy: list[str] = []
        """In a swap, which takes as long as nobody ends it."""
        self.refusing: set[str] = set()

    def ask(self) -> list[str]:
        """Who began a swap in this step."""
        self.now += 2.0
        began = []
        for name in self.serving:
            if name in self.busy:
                continue
            want = self.rollout.turn(name, self.now)
            if want is not None:
                self.busy.append(name)
                began.append(name)
        return began

    def end(self, name: str) -> None:
        want = self.rollout.turn(name, self.now)
        assert want is not None, "the turn is its own until it says so"
        number, folder, _ = want
        self.busy.remove(name)
        if name in self.refusing and folder != "first":
            answer: dict[str, Any] = {"refused": f"{name} has no memory"}
        else:
            self.serving[name] = folder
            answer = {"id": f"id of {folder}"}
        self.rollout.done(name, number, answer, self.now)

    def settle(self) -> list[str]:
        """Until nobody has anything to do; in which order they swapped."""
        order = []
        for _ in range(50):
            for name in self.ask():
                assert len(self.busy) == 1, "one after another"
                self.end(name)
                order.append(name)
        return order


def test_one_after_another() -> None:
    replicas = Replicas("a", "b", "c")
    assert replicas.settle() == []
    replicas.rollout.want("new", "recompute", replicas.now)
    assert replicas.ask() == ["a"]
    assert replicas.ask() == [], "the others wait"
    assert replicas.rollout.state(replicas.now) == {"replicas": 3, "left": 3}
    replicas.end("a")
    assert replicas.ask() == ["b"]
    assert replicas.serving == {"a": "new", "b": "first", "c": "first"}
    replicas.end("b")
    assert replicas.settle() == ["c"]
    assert set(replicas.serving.values()) == {"new"}
    assert replicas.rollout.state(replicas.now) == {"id": "id of new", "replicas": 3, "left": 0}


def test_what_serves_before_any_swap() -> None:
    rollout = Rollout("first")
    rollout.greet("a", {"refused": "no drafter"}, 0.0)
    rollout.greet("b", {"id": "id of first"}, 0.0)
    assert rollout.state(1.0) == {"id": "id of first", "replicas": 2, "left": 0}


def test_a_replica_that_comes_later() -> None:
    """An autoscaler starts it with the drafter of the configuration."""
    replicas = Replicas("a")
    replicas.settle()
    replicas.rollout.want("new", "leave", replicas.now)
    replicas.settle()
    replicas.serving["late"] = "first"
    assert replicas.settle() == ["late"]
    assert set(replicas.serving.values()) == {"new"}


def test_a_replica_that_dies_in_its_turn() -> None:
    replicas = Replicas("a", "b")
    replicas.settle()
    replicas.rollout.want("new", "recompute", replicas.now)
    assert replicas.ask() == ["a"]
    del replicas.serving["a"]
    replicas.busy.clear()
    assert replicas.ask() == []
    assert replicas.settle() == ["b"], "after a minute"
    assert replicas.rollout.state(replicas.now)["replicas"] == 1
    assert replicas.rollout.state(replicas.now)["left"] == 0


def test_a_long_swap_keeps_its_turn() -> None:
    """A large drafter is read for minutes; its replica is not taken to be gone."""
    rollout = Rollout("first")
    for name in ("a", "b"):
        rollout.turn(name, 0.0)
    rollout.want("new", "recompute", 1.0)
    assert rollout.turn("a", 2.0)
    for now in range(4, 300, 2):
        rollout.beat("a", now)
        assert rollout.turn("b", now) is None
        assert rollout.state(now)["left"] == 2


def test_a_swap_that_never_ends_loses_its_turn() -> None:
    replicas = Replicas("a", "b")
    replicas.settle()
    replicas.rollout.want("new", "recompute", replicas.now)
    assert replicas.ask() == ["a"]
    for _ in range(400):
        replicas.now += 2.0
        replicas.rollout._replicas["a"].seen = replicas.now  # it lives
        if replicas.rollout.turn("b", replicas.now) is not None:
            break
    else:
        pytest.fail("b never had its turn")


@pytest.mark.parametrize("refusing", ["a", "b", "c"])
def test_one_refuses_and_all_go_back(refusing: str) -> None:
    """Whichever it is: afterwards all have the one before, and the reason is known."""
    replicas = Replicas("a", "b", "c")
    replicas.settle()
    replicas.refusing = {refusing}
    replicas.rollout.want("bad", "recompute", replicas.now)
    replicas.settle()
    assert set(replicas.serving.values()) == {"first"}
    state = replicas.rollout.state(replicas.now)
    assert (state["refused"], state["left"]) == (f"{refusing} has no memory", 0)
    replicas.refusing = set()
    replicas.rollout.want("good", "recompute", replicas.now)
    replicas.settle()
    assert set(replicas.serving.values()) == {"good"}
    assert "refused" not in replicas.rollout.state(replicas.now)


def test_back_to_the_one_before_and_not_the_first() -> None:
    replicas = Replicas("a", "b")
    replicas.settle()
    replicas.rollout.want("second", "recompute", replicas.now)
    replicas.settle()
    replicas.refusing = {"b"}
    replicas.rollout.want("bad", "recompute", replicas.now)
    for _ in range(5):
        for name in replicas.ask():
            if name == "b":
                replicas.refusing = set()
                want = replicas.rollout.turn("b", replicas.now)
                assert want is not None
                replicas.busy.remove("b")
                replicas.rollout.done("b", want[0], {"refused": "no"}, replicas.now)
            else:
                replicas.end(name)
    replicas.settle()
    assert replicas.serving == {"a": "second", "b": "second"}


def test_two_at_once() -> None:
    replicas = Replicas("a", "b")
    replicas.settle()
    replicas.rollout.want("new", "recompute", replicas.now)
    with pytest.raises(UnderWayError, match="under way"):
        replicas.rollout.want("newer", "recompute", replicas.now)
    replicas.settle()
    replicas.rollout.want("newer", "recompute", replicas.now)


def test_an_answer_of_a_swap_before_does_not_count() -> None:
    """It came late: its replica has to take the newest all the same."""
    rollout = Rollout("first")
    rollout.turn("a", 0.0)
    rollout.want("one", "leave", 0.0)
    want = rollout.turn("a", 1.0)
    assert want is not None
    rollout.done("a", want[0], {"id": "1"}, 2.0)
    rollout.want("two", "leave", 3.0)
    rollout.done("a", want[0], {"id": "1"}, 4.0)
    assert rollout.turn("a", 5.0) == (2, "two", "leave")


def test_by_default_nobody_may_swap() -> None:
    args = app_args(Serving(EngineSettings("org/t", "org/d"), "m"), {})
    assert "worker_extension_cls" not in args["llm_configs"][0]["engine_kwargs"]
    assert "ingress_extra_kwargs" not in args["ingress_cls_config"]


def test_what_a_deployment_is_told() -> None:
    serving = Serving(EngineSettings("org/t", "org/d"), "m", swap_from="/srv/drafters")
    args = app_args(serving, {})
    assert args["llm_configs"][0]["engine_kwargs"]["worker_extension_cls"] == WORKER
    assert args["ingress_cls_config"]["ingress_extra_kwargs"] == {
        "swap_from": "/srv/drafters",
        "drafter": "org/d",
        "deployment": "m",
    }


def flags(*given: str) -> argparse.Namespace:
    return parser_of_all().parse_args(["up", "--target", "org/t", "--swap-from", "d", *given])


def test_a_public_address_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    public = ("--draft", "org/d", "--host", "0.0.0.0")
    with pytest.raises(ClusterError, match="give one by VLLM_API_KEY or --api-key"):
        serving_of(flags(*public))
    assert serving_of(flags(*public, "--api-key", "secret")).swap_from == str(Path("d").resolve())
    assert serving_of(flags("--draft", "org/d")).swap_from is not None
    with pytest.raises(ClusterError, match="give one with --draft"):
        serving_of(flags())
