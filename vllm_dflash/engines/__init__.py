"""A vLLM engine in a process of its own: one runner for training, the benchmark and the tools.

``process`` is the parent's side, ``child`` the child's. What a child does with its engine is a
module
of the part that asks: ``training.generate_engine``, ``training.extract_engine``,
``evaluation.engine_child``,
``tools.engine_run``.
"""
