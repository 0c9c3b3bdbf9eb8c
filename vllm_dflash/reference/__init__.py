"""DFlash in plain PyTorch: what training runs and what the served drafter is compared with. Imports
nothing of vLLM."""
