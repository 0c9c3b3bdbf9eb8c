"""Drafting inside vLLM: pure are layout, coverage and pending; thin are the V1 proposer and the V2
speculator."""
