"""A drafter that goes on learning from what is served: ``vllm-dflash refresh``. docs/follow.md is
the page."""
