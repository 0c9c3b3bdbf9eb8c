"""Drafting inside vLLM: the layout of a block (pure), the V1 proposer and the V2 speculator."""
