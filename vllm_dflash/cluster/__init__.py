"""The same drafter over a data set (``batch``) and behind an autoscaled endpoint (``up``), on Ray.
Needs ``pip install 'vllm-dflash[ray]'``.

Training on several workers is ``vllm_dflash.training.ray_workers``.
"""
