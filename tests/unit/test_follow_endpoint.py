"""The endpoint over ASGI, with an engine of several ranks that is none: who may ask, what is
refused, and that no rank is changed unless all agree."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dflash.serving_drafter import ServingDrafter
from vllm_dflash.swap.endpoint import FROM, WORKER, DrafterEndpoint, keys_of
from vllm_dflash.swap.turns import PATH, agreed


class Engine:
    """Ranks that answer as the workers do; what they were asked."""

    def __init__(self, ranks: int = 2) -> None:
        self.serving = ["old"] * ranks
        self.staged: list[str | None] = [None] * ranks
        self.refusing: dict[int, str] = {}
        self.asked: list[str] = []
        self.cannot_reset = self.errored = False
        self.ends_at = ""
        self.ticket = ""
        self.refusals = 0
        model = SimpleNamespace(model="/no/folder")
        self.vllm_config = SimpleNamespace(model_config=model)

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        assert method == "dflash_drafter"
        call, *rest = args
        self.asked.append(call)
        await asyncio.sleep(0)
        if call == self.ends_at:
            await self.end()
        return [self.one(rank, call, rest) for rank in range(len(self.serving))]

    async def end(self) -> None:
        """As vLLM's: the call is left open."""
        self.errored = True
        await asyncio.Event().wait()

    def one(self, rank: int, method: str, args: list[Any]) -> dict[str, Any]:
        if method == "stage":
            self.ticket, folder, _ = args
            self.staged[rank] = Path(folder).name
            return {"pending": True}
        if method == "staged":
            assert args == [self.ticket]
            refused = {"refused": self.refusing[rank]} if rank in self.refusing else None
            return refused or {"id": self.staged[rank]}
        if method == "commit":
            ticket, weights = args
            assert (self.ticket, self.staged[rank]) == (ticket, weights)
            self.serving[rank], self.staged[rank] = weights, None
        if method == "drop":
            self.staged[rank] = None
        self.refusals += method == "count_refusal" and rank == 0
        return ServingDrafter("/d", self.serving[rank], 1.0).as_dict()

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        assert reset_running_requests
        self.asked.append("reset")
        if self.ends_at == "reset":
            await self.end()
        if self.cannot_reset:
            raise RuntimeError("requests wait for remote KV")
        return True


class Server:
    """The application behind the middleware, and a client."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
        monkeypatch.setenv(FROM, str(root))
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        self.engine = Engine()
        given = {"host": "127.0.0.1", "api_key": None, "worker_extension_cls": WORKER} | args
        self.app = SimpleNamespace(
            state=SimpleNamespace(args=SimpleNamespace(**given), engine_client=self.engine)
        )
        self.passed: list[str] = []
        self.endpoint = DrafterEndpoint(self.behind)

    async def behind(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed.append(scope.get("path", scope["type"]))

    def ask(
        self,
        method: str = "GET",
        body: Any = None,
        path: str = PATH,
        key: str | None = None,
        **headers: str,
    ) -> tuple[int, Any]:
        return asyncio.run(self.asked(method, body, path, key, **headers))

    async def asked(
        self, method: str, body: Any, path: str = PATH, key: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        """``headers``: by their names with an underscore for a hyphen."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        given = {"content_type": "application/json"} | headers
        given |= {} if key is None else {"authorization": f"Bearer {key}"}
        sent = [(n.replace("_", "-").encode(), value.encode()) for n, value in given.items()]
        scope = {"type": "http", "method": method, "path": path, "app": self.app}
        await self.endpoint(scope | {"headers": sent}, receive, send)
        return (said[0]["status"], json.loads(said[1]["body"])) if said else (0, None)

    def start(self) -> list[dict[str, Any]]:
        """What the lifespan's protocol is told at the server's start."""
        said: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "lifespan.startup"}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        asyncio.run(self.endpoint({"type": "lifespan", "app": self.app}, receive, send))
        return said


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "drafters" / "new").mkdir(parents=True)
    return tmp_path / "drafters"


def test_which(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch)
    assert server.ask() == (200, ServingDrafter("/d", "old", 1.0).as_dict())
    assert server.ask("DELETE")[0] == 405
    assert server.ask(path="/v1/models") == (0, None)
    assert server.passed == ["/v1/models"], "all else is the application's"


def test_swap(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks look before one commits; then requests in flight are computed anew."""
    server = Server(root, monkeypatch)
    status, found = server.ask("POST", {"drafter": str(root / "new")})
    assert (status, found["id"], found["before"], found["context"]) == (
        200,
        "new",
        "old",
        "recompute",
    )
    assert server.engine.serving == ["new", "new"]
    calls = ["which", "stage", "staged", "commit"]
    assert server.engine.asked == [*calls, "reset"]
    (root / "other").mkdir()
    assert server.ask("POST", {"drafter": "other", "context": "leave"})[1]["id"] == "other"
    assert server.engine.asked[5:] == calls


@pytest.mark.parametrize("call", ["which", "stage", "staged", "commit", "reset"])
def test_an_engine_that_ends_meanwhile(
    root: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The request ends too: once it waited for ever, and with it the end of the server, which no
    service manager then started again."""
    server = Server(root, monkeypatch)
    server.engine.ends_at = call
    ended = (503, {"refused": "the engine has ended: start the server again"})
    assert server.ask("POST", {"drafter": "new"}) == ended
    assert server.engine.asked[-1] == call
    server.engine.ends_at = "which"
    assert server.ask() == ended


def test_one_rank_refuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch)
    server.engine.refusing = {1: "the weights hold NaN"}
    status, found = server.ask("POST", {"drafter": "new"})
    assert (status, found) == (409, {"refused": "the weights hold NaN"})
    assert server.engine.serving == ["old", "old"]
    assert server.engine.staged == [None, None]
    assert server.ask()[1]["id"] == "old"


def test_ranks_that_read_different_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch)
    one = server.engine.one

    def differing(rank: int, method: str, args: list[Any]) -> dict[str, Any]:
        found = one(rank, method, args)
        return found | {"id": f"new-{rank}"} if method == "staged" else found

    server.engine.one = differing  # type: ignore[method-assign]
    status, found = server.ask("POST", {"drafter": "new"})
    assert status == 409
    assert "new-0, new-1" in found["refused"]
    assert server.engine.serving == ["old", "old"]
    assert server.engine.staged == [None, None]


def test_ranks_that_hold_different_drafters_can_be_mended(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(root, monkeypatch)
    server.engine.serving = ["old", "new"]
    status, found = server.ask()
    assert status == 409
    assert "different drafters (new, old)" in found["refused"]
    assert server.ask("POST", {"drafter": "new"})[1]["before"] == "new, old"
    assert server.engine.serving == ["new", "new"]


def test_context_that_cannot_be_computed_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch)
    server.engine.cannot_reset = True
    status, found = server.ask("POST", {"drafter": "new"})
    assert (status, found["id"], found["context"]) == (200, "new", "leave")
    assert "remote KV" in found["context_note"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"no json", "no JSON"),
        ([], "has no drafter"),
        ({"drafter": 3}, "has no drafter"),
        ({"drafter": "new", "context": "forget"}, "context is 'forget'"),
        ({"drafter": "/etc"}, "is not below"),
        ({"drafter": "../outside"}, "is not below"),
        ({"drafter": "."}, "is not below"),
        ({"drafter": "absent"}, "is no folder"),
        ({"drafter": "link"}, "is not below"),
        ({"drafter": "linked"}, "leads out of"),
        ({"drafter": "n" * 5000}, "name too long"),
        ({"drafter": "a\0b"}, "null"),
        (b"x" * (1 << 17), "more than"),
    ],
)
def test_what_is_no_swap(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    body: Any,
    said: str,
) -> None:
    """No path leads out of the administrator's folder, by a link neither, nor by one of a file; and
    the reason is in the answer, the log and the count."""
    (root / "linked").mkdir()
    (root / "linked" / "model.safetensors").symlink_to("/etc/hostname")
    (root.parent / "outside").mkdir()
    (root / "link").symlink_to(root.parent / "outside")
    server = Server(root, monkeypatch)
    status, found = server.ask("POST", body)
    assert status == 400
    assert said.lower() in found["refused"].lower()
    assert found["refused"] in caplog.text
    assert len(found["refused"]) < 500
    assert server.engine.asked == ["count_refusal"]
    assert server.engine.refusals == 1


def test_a_link_within_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the hub's cache, whose files are links to others of it."""
    (root / "blobs").mkdir()
    (root / "blobs" / "a").write_text("x")
    (root / "new" / "model.safetensors").symlink_to("../blobs/a")
    assert Server(root, monkeypatch).ask("POST", {"drafter": "new"})[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"content_type": ""}, 415),
        ({"content_type": "Application/JSON; charset=utf-8"}, 200),
        ({"origin": "https://evil.example", "host": "127.0.0.1:8000"}, 403),
        ({"origin": "null", "host": "127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, 200),
        ({"origin": "http://evil.example:8000", "host": "evil.example:8000"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "[::1"}, 403),
        ({"host": "10.0.0.5:8000"}, 200),
    ],
)
def test_a_web_page_cannot_swap(
    root: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], status: int
) -> None:
    """Without a key: neither by what a browser sends unasked, nor under a name of its own."""
    server = Server(root, monkeypatch)
    found, answer = server.ask("POST", {"drafter": "new"}, **headers)
    assert found == status, answer
    assert server.engine.serving == (["new", "new"] if status == 200 else ["old", "old"])


def test_with_a_key_any_name_will_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch, api_key=["k"])
    assert server.ask("POST", {"drafter": "new"}, key="k", host="vllm.example.org")[0] == 200
    page = {"host": "vllm.example.org", "origin": "https://evil.example"}
    assert server.ask("POST", {"drafter": "new"}, key="k", **page)[0] == 403


def test_the_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Middleware stands before vLLM's own check, so this one counts."""
    server = Server(root, monkeypatch, host="0.0.0.0", api_key=["first", "second"])
    for method in ("GET", "POST"):
        assert server.ask(method, {"drafter": "new"})[0] == 401
        assert server.ask(method, {"drafter": "new"}, key="wrong")[0] == 401
    assert server.engine.asked == []
    assert server.ask(key="first")[0] == 200
    assert server.ask("POST", {"drafter": "new"}, key="second")[0] == 200


def test_the_key_of_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(root, monkeypatch)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert server.ask()[0] == 401
    assert server.ask(key="secret")[0] == 200
    args = SimpleNamespace(api_key=["flag"])
    assert keys_of(args) != keys_of(SimpleNamespace(api_key=None)), "the flag goes before it"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", None, "10.0.0.5", "example.org"])
def test_a_public_address_without_a_key(
    root: Path, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    """Such a server does not start, and where its start was not asked for, nothing is answered."""
    server = Server(root, monkeypatch, host=host)
    (said,) = server.start()
    assert said["type"] == "lifespan.startup.failed"
    assert "--api-key" in said["message"]
    assert server.ask("POST", {"drafter": "new"})[0] == 403
    assert server.engine.asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_local_address_needs_none(root: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    server = Server(root, monkeypatch, host=host)
    assert server.start() == []
    assert server.passed == ["lifespan"]
    assert Server(root, monkeypatch, host=None, uds="/run/vllm.sock").start() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"root": ""}, f"{FROM} is not set"),
        ({"root": "/no/such/folder"}, "is no folder"),
        ({"worker_extension_cls": ""}, "--worker-extension-cls"),
    ],
)
def test_what_is_missing_at_the_start(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], said: str
) -> None:
    args = {name: value for name, value in change.items() if name != "root"}
    server = Server(root, monkeypatch, **args)
    server.endpoint.folder = change.get("root", str(root))
    (message,) = server.start()
    assert message["type"] == "lifespan.startup.failed"
    assert said in message["message"]


def test_two_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told to ask again, and one of the two is in force."""
    server = Server(root, monkeypatch)

    async def both() -> list[tuple[int, Any]]:
        swap = ("POST", {"drafter": "new"})
        return list(await asyncio.gather(server.asked(*swap), server.asked(*swap)))

    (first, _), (second, answer) = asyncio.run(both())
    assert (first, second) == (200, 409)
    assert "another swap is under way" in answer["refused"]
    assert server.engine.refusals == 1


def test_data_parallel_engines_are_all_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM answers such a call for the first engine alone."""
    server, other = Server(root, monkeypatch), Engine()

    async def all_engines(utility: str, method: str, timeout: Any, args: Any, kwargs: Any) -> Any:
        assert (utility, timeout, kwargs) == ("collective_rpc", None, {})
        return [await each.collective_rpc(method, args) for each in (server.engine, other)]

    server.engine.engine_core = SimpleNamespace(  # type: ignore[attr-defined]
        call_utility_all_async=all_engines
    )
    other.refusing = {0: "no memory"}
    assert server.ask("POST", {"drafter": "new"}) == (409, {"refused": "no memory"})
    assert server.engine.serving == other.serving == ["old", "old"]
    other.refusing = {}
    assert server.ask("POST", {"drafter": "new"})[0] == 200
    assert server.engine.serving == other.serving == ["new", "new"]


def test_reasons_of_all_ranks() -> None:
    refusals = [{"refused": "a"}, {"refused": "b"}, {"refused": "a"}, {"id": "x"}]
    assert agreed(refusals) == {"refused": "a; b"}
