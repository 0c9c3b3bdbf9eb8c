"""Test only: a vLLM platform that is the CPU's, but which Ray may give logical GPUs to, so that the
GPU code paths of vLLM's Ray executor run.

Stock vLLM refuses Ray on a CPU, and a general plug-in comes too late to change that. Put this
folder on PYTHONPATH of every process of the cluster (its dist-info makes it a distribution), and
start the cluster with logical GPUs: ``ray.init(num_gpus=2)``.

    pytest tests/engine/test_cluster_tensor_parallel.py
"""

from vllm.platforms.cpu import CpuPlatform


def activate() -> str:
    """The entry point: the class that vLLM is to use."""
    return "ray_cpu_platform.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    """The CPU, for which Ray counts GPUs."""

    ray_device_key = "GPU"
