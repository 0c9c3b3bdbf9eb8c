"""What refusals of a checkpoint's weights share."""

FETCH_AGAIN = (
    "fetch the checkpoint again (an interrupted download or a Git LFS pointer looks like this)"
)
CAME_WITH = "use the weights that the config.json came with"
_MOST_NAMED = 8


def some(items: list[str]) -> str:
    """The first of ``items``, and how many more there are."""
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more
