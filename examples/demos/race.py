"""Two answers to one question side by side, each as fast as it came.

They are recorded first, each method alone on the machine, and then shown together at the recorded
times: two engines at once would slow each other down.

pytest tests/unit/test_demo.py
"""

import time
from collections.abc import Callable, Mapping

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .asking import Answer

WIDTH = 80
"""Columns of a terminal from which on two texts fit beside each other."""
NOTE = "A replay of both answers at the recorded times; each method ran alone, in turn."
_FRAME_SECONDS = 1 / 25


def show(
    console: Console,
    question: str,
    answers: Mapping[str, Answer],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """The answers by method: side by side in a wide terminal, else as lines."""
    console.print("\n", indented(readable(question)), "\n", sep="", soft_wrap=True)
    if not console.is_terminal or console.width < WIDTH:
        console.print(indented(as_lines(answers)), soft_wrap=True)
        return
    console.print(NOTE, style="dim")
    longest, began = max(answer.seconds for answer in answers.values()), clock()
    with Live(console=console, auto_refresh=False) as live:
        while (seconds := clock() - began) < longest:
            live.update(side_by_side(answers, seconds), refresh=True)
            sleep(_FRAME_SECONDS)
        live.update(side_by_side(answers, longest), refresh=True)


def side_by_side(answers: Mapping[str, Answer], seconds: float) -> RenderableType:
    """A column a method, with what was there after so many seconds."""
    table = Table.grid(expand=True)
    for _ in answers:
        table.add_column(ratio=1)
    table.add_row(*(_panel(name, answer, seconds) for name, answer in answers.items()))
    return table


def _panel(name: str, answer: Answer, seconds: float) -> Panel:
    tokens, text = answer.by(seconds)
    is_done = seconds >= answer.seconds
    title = f"{name}: {tokens} tokens, {min(seconds, answer.seconds):.1f} s"
    return Panel(
        readable(text),
        title=Text(title + (", done" if is_done else "")),
        title_align="left",
        border_style="green" if is_done else "dim",
    )


def as_lines(answers: Mapping[str, Answer]) -> Text:
    """Each text once, after the methods that wrote it and the seconds that they took."""
    by_text: dict[str, list[str]] = {}
    for name, answer in answers.items():
        by_text.setdefault(answer.text, []).append(f"{name} {answer.seconds:.1f} s")
    parts = [
        Text.assemble((f"{', '.join(methods)}:", "bold"), "\n", readable(text))
        for text, methods in by_text.items()
    ]
    return Text("\n\n").join(parts)


def indented(text: Text) -> Text:
    """Apart from what the demo says itself."""
    return Text("\n").join(Text.assemble("    ", line) for line in text.split("\n"))


def readable(text: str) -> Text:
    """A model's text for a terminal: what would steer it is shown as a dot."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)
    return Text(shown.expandtabs(4), overflow="fold")
