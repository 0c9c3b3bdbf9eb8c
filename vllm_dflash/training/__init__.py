"""From a target to its drafter: generate, features, train, prove, export, one file or two each.
docs/train.md is the guide.

``tables`` is what may be set and the only home of the defaults, ``settings`` reads and checks them,
``pipeline`` is the order of the stages. Nothing here is imported by serving.
"""
