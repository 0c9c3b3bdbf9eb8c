"""Threads that ask a server without a pause, for as long as a block runs."""

import threading
from typing import Self


class Clients:
    """A subclass says what a client asks, once a call of ``ask_one``."""

    def __init__(self, count: int) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def ask_one(self, number: int) -> None:
        """One request of the client with this number."""
        raise NotImplementedError

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            self.ask_one(number)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
