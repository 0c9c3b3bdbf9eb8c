"""Drafting inside vLLM: pure are layout, coverage, pending and drafts; thin are the V1 proposer and the V2 speculator."""
