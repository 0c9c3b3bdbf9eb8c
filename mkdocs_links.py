"""Links out of the documents, for the site: what they lead to is not part of it.

A hook of mkdocs.yml. In a checkout such a link leads to the code; on the site it would lead
nowhere, so there it is text, with the path that it names.

    make docs
    pytest tests/unit/test_site.py
"""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.links")
"""mkdocs counts its warnings, and with ``strict`` fails on one."""


def as_text(markdown: str) -> str:
    """A document's text with the links that leave docs/ as text: what they say, and the path, from
    the checkout's root, where they do not say it."""
    return _LINK.sub(
        lambda link: link[1] if link[1].strip("`") == link[2] else f"{link[1]} (`{link[2]}`)",
        markdown,
    )


def targets(markdown: str) -> list[str]:
    """The paths that these links lead to, from the checkout's root."""
    return [path for _, path in _LINK.findall(markdown)]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls it with each document."""
    for path in targets(markdown):
        if not (ROOT / path).exists():
            _log.warning("%s leads to %s, which does not exist", page.file.src_path, path)
    return as_text(markdown)
