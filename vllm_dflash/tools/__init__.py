"""The tools around checkpoints, one file a sub-command of ``vllm-dflash``: inspect, convert,
doctor. docs/checkpoints.md shows them."""
