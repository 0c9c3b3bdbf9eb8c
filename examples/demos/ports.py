"""A port for a server that takes its time to start."""

import random
import socket
from pathlib import Path

# Which ports the system gives to whoever asks for any, and to connections that go out.
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10_000


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that the system gives to nobody by itself: a
    server that listens half a minute later still finds it free.

    Raises:
        OSError: none of 100 drawn ports is free.
    """
    try:
        end = int(_GIVEN_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = 32_768
    draw = random.SystemRandom()  # seeded tests that run beside each other draw different ones
    for _ in range(100):
        port = draw.randrange(_FIRST, end) if end > _FIRST else 0
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise OSError("no port of 100 that were drawn is free")
