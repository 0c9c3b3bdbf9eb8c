"""The drafters on vLLM's parallel layers, attention and paged KV cache."""
