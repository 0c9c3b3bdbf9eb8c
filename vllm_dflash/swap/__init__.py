"""Another drafter into engines that run: what a worker does, the endpoint that asks it, and the
command. docs/follow.md is the page."""
