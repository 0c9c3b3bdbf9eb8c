"""When a refresh is due, and when the server is only to be given what was kept before; with a
server that is none."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from pairs import make_random_drafter
from unit.test_follow_rounds import ABOUT
from unit.test_follow_watch import page, scraped
from vllm_dflash.files import RunError
from vllm_dflash.follow import refresh
from vllm_dflash.follow.rounds import KEPT, Rounds
from vllm_dflash.swap import client
from vllm_dflash.weights.identity import id_of_folder


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    (tmp_path / "out").mkdir()
    return Rounds(tmp_path / "out")


def watched(rounds: Rounds) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rounds.watch.read_text())
    return found


def test_not_below(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    assert not refresh._has_fallen(rounds, scraped(page({4: 500})), 0.8)
    said = capsys.readouterr().out
    assert "tau 4.00" in said
    assert "proved at 4.00: 100% of it; not below 3.20: nothing to do" in said
    assert watched(rounds)["below_since"] is None


def test_below_and_since_when(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what came since the last look counts, and the first time below is remembered."""
    refresh._has_fallen(rounds, scraped(page({4: 5000})), 0.8)
    assert refresh._has_fallen(rounds, scraped(page({4: 5000, 2: 500})), 0.8)
    first = watched(rounds)["below_since"]
    assert first is not None
    assert "; below 3.20 since 20" in capsys.readouterr().out
    assert refresh._has_fallen(rounds, scraped(page({4: 5000, 2: 1000})), 0.8)
    assert watched(rounds)["below_since"] == first
    assert not refresh._has_fallen(rounds, scraped(page({4: 5600, 2: 1000})), 0.8)
    assert watched(rounds)["below_since"] is None


def test_a_new_drafter_is_judged_by_the_next_look(
    rounds: Rounds, capsys: pytest.CaptureFixture[str]
) -> None:
    refresh._has_fallen(rounds, scraped(page({4: 500})), 0.8)
    new = scraped(page({4: 500, 1: 500}, drafter_id="bbbb", swaps=1))
    assert not refresh._has_fallen(rounds, new, 0.8)
    assert "drafter bbbb is new since the last look" in capsys.readouterr().out
    later = scraped(page({4: 500, 1: 1000}, drafter_id="bbbb", swaps=1))
    assert refresh._has_fallen(rounds, later, 0.8)


def test_the_first_look_after_a_swap(rounds: Rounds, capsys: pytest.CaptureFixture[str]) -> None:
    assert not refresh._has_fallen(rounds, scraped(page({1: 500}, swaps=1)), 0.8)
    said = capsys.readouterr().out
    assert "has come into the server since it began, and this is the first look" in said


def test_a_small_limit_is_not_shown_as_none(
    rounds: Rounds, capsys: pytest.CaptureFixture[str]
) -> None:
    refresh._has_fallen(rounds, scraped(page({4: 500})), 0.0001)
    assert "not below 0.0004: nothing" in capsys.readouterr().out


def test_a_share_needs_a_proof(rounds: Rounds) -> None:
    with pytest.raises(refresh._UsageError, match="give a tau above 1"):
        refresh._has_fallen(rounds, scraped(page({2: 500}, proved=None)), 0.8)
    assert refresh._has_fallen(rounds, scraped(page({2: 500}, proved=None)), 2.5)


class Server:
    """In the place of ``swap.client``."""

    def __init__(self, weights: str, swapped: int) -> None:
        self.found = {"id": weights, "swaps": swapped}
        self.given: list[str] = []

    def which(self, server: str, key: str | None) -> dict[str, Any]:
        return self.found

    def swap(self, server: str, key: str | None, drafter: str, context: str) -> dict[str, Any]:
        self.given.append(drafter)
        return {"id": "new", "before": self.found["id"], "drafter": drafter, "context": context}


def kept(rounds: Rounds, *, swapped_in: bool) -> Path:
    each = rounds.new()
    each.traffic.write_text("{}\n")
    make_random_drafter(each.drafter)
    swapped = {"swapped_into": "url"} if swapped_in else {}
    each.note(**ABOUT, decision=KEPT, line="line", **swapped)
    return each.drafter


@pytest.mark.parametrize(
    ("other", "swapped_in", "swapped", "gives"),
    [
        (False, True, 1, False),
        (True, False, 1, True),  # a refresh was stopped before its swap
        (True, True, 0, True),  # the server was started anew with another
        (True, True, 3, False),  # somebody has swapped another in since
    ],
)
def test_catching_up(
    rounds: Rounds,
    monkeypatch: pytest.MonkeyPatch,
    other: bool,
    swapped_in: bool,
    swapped: int,
    gives: bool,
) -> None:
    drafter = kept(rounds, swapped_in=swapped_in)
    server = Server("other" if other else id_of_folder(drafter), swapped)
    monkeypatch.setattr(client, "which", server.which)
    monkeypatch.setattr(client, "swap", server.swap)
    assert refresh._catches_up(rounds, "url", None) == gives
    assert server.given == ([str(drafter.resolve())] if gives else [])
    assert ("swapped_into" in rounds.kept()[-1].notes()) == (swapped_in or gives)


def test_a_swap_that_fails_is_told(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the journal too, and the status is not that of a drafter which serves."""
    kept(rounds, swapped_in=False)

    def refuse(*_: Any) -> dict[str, Any]:
        raise client.ServerError("http://url refuses the API key")

    monkeypatch.setattr(client, "swap", refuse)
    with pytest.raises(RunError, match="http://url does not serve"):
        refresh._swap(rounds, "http://url", None)
    said = "round 1 is kept, and not swapped in: http://url refuses the API key"
    assert said in (rounds.out / "journal.txt").read_text()
    assert "swapped_into" not in rounds.kept()[-1].notes()


def test_what_came_meanwhile_is_not_swapped_over(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by the next refresh: only once the server has another one again."""
    kept(rounds, swapped_in=False)
    rounds.kept()[-1].note(meanwhile="other")
    server = Server("other", 1)
    monkeypatch.setattr(client, "which", server.which)
    monkeypatch.setattr(client, "swap", server.swap)
    assert not refresh._catches_up(rounds, "url", None)
    server.found["id"] = "third"
    assert refresh._catches_up(rounds, "url", None)


def test_the_look_before_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    before, other = (scraped(page({4: 9}, drafter_id=name)) for name in ("aaaa", "bbbb"))
    answers = {"scrape": before}
    monkeypatch.setattr(refresh, "_scrape", lambda server, key: answers["scrape"])
    assert refresh._meanwhile("url", None, before) is None
    answers["scrape"] = other
    assert refresh._meanwhile("url", None, before) == "bbbb"

    def gone(server: str, key: str | None) -> Any:
        raise client.ServerError("gone")

    monkeypatch.setattr(refresh, "_scrape", gone)
    assert refresh._meanwhile("url", None, before) is None


def test_nothing_was_kept(rounds: Rounds) -> None:
    assert not refresh._catches_up(rounds, "url", None)


def flags(**changes: Any) -> Namespace:
    given = {
        "server": None,
        "target": "t",
        "draft": "d",
        "api_key": None,
        "traffic": ["x"],
        "prompts": None,
        "most_prompts": 10,
        "held_out": 4,
        "settings": None,
        "out": Path("o"),
        "minutes": 15.0,
        "tokens": None,
        "dtype": None,
        "when_below": None,
        "swap": False,
    }
    return Namespace(**{**given, **changes})


def test_the_budget(rounds: Rounds) -> None:
    assert refresh._options(flags(), (), rounds).minutes == 15.0
    found = refresh._options(flags(tokens=100), (), rounds)
    assert (found.minutes, found.tokens) == (None, 100)
    assert refresh._options(flags(minutes=2.0), (), rounds).minutes == 2.0


def test_what_serves_is_what_is_begun_from(rounds: Rounds) -> None:
    now = str(rounds.out)
    assert refresh._options(flags(draft=None), [now], rounds).draft == now
    assert refresh._options(flags(), [now], rounds).draft == "d"
    with pytest.raises(
        refresh._UsageError, match="calls it a/b/c, and there is no such folder here"
    ):
        refresh._options(flags(draft=None), ["a/b/c"], rounds)
    with pytest.raises(refresh._UsageError, match="different drafters"):
        refresh._options(flags(draft=None), ["/d/one", "/d/two"], rounds)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"traffic": None}, "nothing to learn from"),
        ({"target": None}, "give the target"),
        ({"draft": None}, "give the drafter"),
        ({"swap": True}, "--swap asks a server"),
    ],
)
def test_what_is_missing(rounds: Rounds, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(refresh._UsageError, match=said):
        refresh._options(flags(**changes), (), rounds)
