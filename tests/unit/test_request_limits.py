"""How many tokens may be drafted for a request: what its user may say, and who keeps to it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.adaptive.controller import Controller, Plan
from vllm_dflash.request_limits import Limits, RequestError, Said, said_of

K = 7


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({"draft": False}, 0),
        ({"draft": True}, None),
        ({}, None),
        (None, None),
        ({"max_draft": 3}, 3),
        ({"max_draft": 3, "draft": None}, 3),
        ({"max_draft": None, "draft": False}, 0),
        ({"max_draft": 0}, 0),
        ({"max_draft": K}, K),
        ({"max_draft": 3, "draft": True}, 3),
        ({"max_draft": 0, "draft": False}, 0),
        ('{"draft": false}', 0),
        ('{"max_draft": 3}', 3),
    ],
)
def test_what_a_user_may_say(given: Any, most: int | None) -> None:
    assert said_of({"other": 1, "dflash": given}, K) == Said(most)


def test_a_prompts_class() -> None:
    """By itself, beside a limit, and as text."""
    assert said_of({"dflash": {"prompt_class": "code"}}, K) == Said(None, "code")
    text = '{"prompt_class": "chat-2", "max_draft": 3}'
    assert said_of({"dflash": text}, K) == Said(3, "chat-2")
    limits = Limits(K)
    limits.learn(scheduled(new("a", {"prompt_class": "code"}), new("b", {"draft": False})))
    assert (limits.classes, limits.by_request) == ({"a": "code"}, {"b": 0})
    limits.learn(scheduled(finished="a"))
    assert (limits.classes, limits.by_request) == ({}, {"b": 0})


def test_what_others_say_is_theirs() -> None:
    for extra_args in (None, {}, {"max_draft": -1}, {"other": {"draft": 3}}):
        assert said_of(extra_args, K) == Said()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drafts": False}, r"dflash\.drafts is no setting of a request: give {\"draft\": false}"),
        ({"draft": 0}, "draft is 0: give true or false"),
        ({"max_draft": True}, "max_draft is True: give a whole number from 0 to 7"),
        ({"max_draft": -1}, "max_draft is -1: give a whole number from 0 to 7"),
        ({"max_draft": K + 1}, "max_draft is 8: .*the server's num_speculative_tokens"),
        ({"max_draft": 3.0}, "max_draft is 3.0"),
        ({"max_draft": "3"}, "max_draft is '3'"),
        ({"max_draft": 3, "draft": False}, "leave one of the two out"),
        (False, 'dflash is False: give {"draft": false}.* over HTTP as text'),
        ([["draft", False]], "dflash is"),
        ("off", "text that is no JSON object"),
        ('{"draft": false, "draft": true}', "no JSON object .*twice"),
        ("[1]", "no JSON object"),
        ("[" * 1000, "no JSON object"),
        ('{"max_draft": 1e999}', "max_draft is"),
        ({"prompt_class": 3}, "prompt_class is 3: give a name of at most 40 letters"),
        ({"prompt_class": ""}, "prompt_class is ''"),
        ({"prompt_class": 'a"}'}, "prompt_class is"),
        ({"prompt_class": "x" * 41}, "prompt_class is 'x+': give a name"),
    ],
)
def test_what_is_malformed_is_refused_with_a_remedy(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        said_of({"dflash": given}, K)


def new(request_id: str, said: Any) -> Any:
    return SimpleNamespace(
        req_id=request_id, sampling_params=SimpleNamespace(extra_args={"dflash": said})
    )


def scheduled(*news: Any, ids: str = "", finished: str = "", k: int = K) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=news,
        finished_req_ids=set(finished),
        num_scheduled_tokens=dict.fromkeys(ids, 1),
        num_spec_tokens_to_schedule=k,
    )


def test_a_limit_lasts_as_long_as_its_request() -> None:
    """A streaming session is scheduled again with the parameters of its next input; an id may come
    again in the step in which its first bearer is known to have ended."""
    limits = Limits(K)
    limits.learn(scheduled(new("a", {"draft": False}), new("b", {"max_draft": 2}), new("c", None)))
    assert (limits.by_request, limits.most("c")) == ({"a": 0, "b": 2}, K)
    assert [limits.most_of(ids) for ids in ("a", "ab", "abc", "")] == [0, 2, K, K]
    limits.learn(scheduled(new("a", {"draft": True}), finished="b"))
    assert limits.by_request == {}
    limits.learn(scheduled(new("b", {"max_draft": 1})))
    limits.learn(scheduled(new("b", {"max_draft": 4}), finished="b"))
    assert limits.by_request == {"b": 4}


def test_what_got_past_the_front_end_ends_no_engine() -> None:
    limits = Limits(K)
    limits.learn(scheduled(new("a", {"draft": "no"})))
    limits.learn(scheduled(SimpleNamespace(req_id="b", sampling_params=None)))
    assert limits.by_request == {}


def scheduler(asynchronous: bool, ranks: int = 1) -> tuple[Any, list[int]]:
    """As much of vLLM's as is needed, and K of each step that reached it."""
    found, planned = SimpleNamespace(), list[int]()

    def update_after_schedule(output: Any) -> None:
        planned.append(output.num_spec_tokens_to_schedule)
        for request_id in output.num_scheduled_tokens if asynchronous else ():
            found.requests[request_id].spec_token_ids = [-1] * planned[-1]

    def update_draft_token_ids(drafts: dict[str, list[int]]) -> None:
        for request_id, tokens in drafts.items():
            found.requests[request_id].spec_token_ids = tokens

    found.requests = {name: SimpleNamespace(spec_token_ids=[]) for name in "abc"}
    found.parallel_config = SimpleNamespace(data_parallel_size=ranks)
    found._update_after_schedule = update_after_schedule
    found.update_draft_token_ids = update_draft_token_ids
    return found, planned


@pytest.mark.vllm
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_scheduler_keeps_to_it(asynchronous: bool) -> None:
    """Under synchronous scheduling drafts come back with the step's output, under asynchronous
    places for them are made when it is scheduled."""
    from vllm_dflash.patches.request_drafts import PATCHES

    limits, (theirs, planned) = Limits(K), scheduler(asynchronous)
    schedule, take = (
        patch.replace(getattr(theirs, patch.name), theirs, limits) for patch in PATCHES
    )
    schedule(scheduled(new("a", {"draft": False}), new("b", {"max_draft": 3}), ids="abc"))
    if not asynchronous:
        take({name: list(range(K)) for name in "abc"})
    lengths = [len(request.spec_token_ids) for request in theirs.requests.values()]
    assert lengths == [0, 3, K]
    schedule(scheduled(ids="ab"))
    schedule(scheduled(ids="a"))
    schedule(scheduled(ids="ab", k=2))
    assert planned == [K, 3, 0, 2]
    del theirs.requests["a"]
    schedule(scheduled(ids="c", finished="a"))
    assert (planned[-1], limits.by_request) == (K, {"b": 3})


@pytest.mark.vllm
def test_data_parallel_ranks_go_on_drafting_alike() -> None:
    """A rank that did not draft would leave the others waiting for it; its drafts are dropped."""
    from vllm_dflash.patches.request_drafts import PATCHES

    theirs, planned = scheduler(asynchronous=True, ranks=2)
    schedule = PATCHES[0].replace(theirs._update_after_schedule, theirs, Limits(K))
    schedule(scheduled(new("a", {"draft": False}), ids="a"))
    assert (planned, theirs.requests["a"].spec_token_ids) == ([K], [])


def test_the_controller_verifies_no_more_and_expects_no_more() -> None:
    """Its rows go to the others, and rounding a step's rows up adds none to a request that is at
    its limit."""
    limits = {"a": 0, "b": 2}

    def limit(name: str) -> int:
        return limits.get(name, K)

    controller = Controller(K, K + 1, limit, limit)
    said = {name: [0.9] * K for name in "abc"}
    first, second = (controller.acceptance.expected([name])[0, 0].tolist() for name in "ab")
    assert first == [0.0] * K
    assert second[2:] == [0.0] * (K - 2)
    assert min(second[:2]) > 0
    lengths = controller.lengths(["a", "b", "c"], Plan(K), said)
    assert lengths["a"] == 0
    assert lengths["b"] <= 2
    assert lengths["c"] >= 6
    assert [bool((controller.acceptance.expected([name])[..., 2] > 0).all()) for name in "abc"] == [
        False,
        False,
        True,
    ]
    controller = Controller(K, K + 1, limit=lambda name: limits.get(name, K))
    assert controller.lengths(["a"], Plan(K)) == {"a": 0}
