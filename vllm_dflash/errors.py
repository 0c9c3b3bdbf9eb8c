"""The error that says what is wrong with a drafter, and text that is safe to print.

Pure Python: no torch and no vLLM import.

    pytest tests/unit/test_config.py
"""

_LONGEST_PART = 2000


def printable(text: object) -> str:
    """``text`` with every character that a terminal would act on, or not show, written as its
    escape.

    Names in a checkpoint are whatever its maker chose, colours and line breaks included.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )


class DrafterConfigError(ValueError):
    """A drafter that cannot be used: what is wrong, what to do, and where.

    Attributes:
        problem: what is wrong; ``remedy``: what to do about it, empty where the problem says it.
        field: the key of ``config.json``, dotted where it is nested; empty where it is about
            something else.
        where: the file or folder.

    The message is these in one line, printable whatever a checkpoint holds.
    """

    def __init__(self, problem: str, remedy: str = "", *, field: str = "", where: str = "") -> None:
        self.problem, self.remedy, self.where = (_line(part) for part in (problem, remedy, where))
        self.field = field
        super().__init__(
            ": ".join(part for part in (self.where, self.problem, self.remedy) if part)
        )

    def at(self, where: object) -> "DrafterConfigError":
        """The same, found in a file or folder."""
        return DrafterConfigError(self.problem, self.remedy, field=self.field, where=str(where))

    def with_remedy(self, more: str) -> "DrafterConfigError":
        """The same, with a sentence more on what to do."""
        return DrafterConfigError(
            self.problem,
            f"{self.remedy}. {more}" if self.remedy else more,
            field=self.field,
            where=self.where,
        )


def _line(text: str) -> str:
    cut = text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}..."
    return printable(cut)
