"""``vllm-dflash batch`` and ``up``, whose flags are in ``cluster/``."""

from typing import Any

from vllm_dflash.cli.flags import add_command, run_of
from vllm_dflash.cluster import command as cluster


def add(commands: Any) -> None:
    """Adds both."""
    batch = add_command(
        commands,
        "batch",
        "answers every row of a data set, on one machine or many",
        cluster.BATCH,
        cluster.BATCH_EXAMPLES,
    )
    cluster.add_batch_flags(batch)
    batch.set_defaults(run=run_of("cluster.batch"))
    up = add_command(
        commands,
        "up",
        "serves on as many replicas as the load needs",
        cluster.UP,
        cluster.UP_EXAMPLES,
    )
    cluster.add_up_flags(up)
    up.set_defaults(run=run_of("cluster.serve"))
