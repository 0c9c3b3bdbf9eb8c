"""A drafter that follows its target: refreshed from what is served (``refresh``), and swapped into
running servers (``swap``). docs/follow.md is the page."""
