"""What a part has measured, a JSON line each, so that nothing is measured twice; a word every half
minute; and what holds."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVERY_S = 30.0
HOLDS, OPEN, FAILS = "holds", "open ", "FAILS"


class Lines:
    """``OUT/PART.jsonl``."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a last line that a kill has cut is dropped."""
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [r for r in self.rows if all(r.get(name) == v for name, v in wanted.items())]

    def add(self, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


@contextmanager
def told(what: str | Callable[[], str]) -> Iterator[None]:
    """Prints ``what``, or what it says then, every half minute meanwhile."""
    stop, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not stop.wait(EVERY_S):
            said = what if isinstance(what, str) else what()
            print(f"  {time.monotonic() - began:.0f} s: {said}", flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def none_of(what: str, found: int, of: int, shown: Any = "") -> str:
    """A line: that none of so many is wrong."""
    state = FAILS if found else HOLDS if of else OPEN
    return f"{state} {found} of {of:,} {what}" + (f": {shown}" if found else "")
