"""The README for a package index; all else about the package stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")
"""A link into the checkout, which leads nowhere on an index; the source distribution has what it
names."""


def description(readme: str) -> str:
    """The README with links into the checkout as plain text: what they say, and the path where they
    do not say it."""
    return _LINK.sub(
        lambda link: link[1] if link[1] == link[2] else f"{link[1]} ({link[2]})", readme
    )


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=description(readme), long_description_content_type="text/markdown")
