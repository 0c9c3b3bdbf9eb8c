"""The flags of ``vllm-dflash batch`` and ``up``, and the engine's settings that they share. Tests:
``pytest tests/unit/test_cluster_settings.py``."""

import argparse

from vllm_dflash.api_keys import VARIABLE
from vllm_dflash.cluster.settings import DEVICES, EngineSettings, parse_engine_args
from vllm_dflash.flag_types import (
    DTYPES,
    MOST_AT_ONCE,
    MOST_DEVICES,
    MOST_TOKENS,
    count,
    given,
    path,
    port,
    temperature,
    whole,
)

BATCH = (
    "Answers every row of JSON lines or Parquet with a target and its drafter, on Ray: on the"
    " cluster that RAY_ADDRESS names, or on this machine. A row has prompt, messages or"
    " prompt_token_ids, and sampling_params if it has its own; it is written with completion,"
    " finish_reason, prompt_tokens, completion_tokens, drafts, draft_tokens, accepted_tokens and"
    " error beside whatever else it held. The output is a folder of part files in the input's"
    " order. Run again after any stop, it does what is left. Ends with 0 where every row was"
    " answered, 1 where a row failed or the run could not go on, 2 on wrong usage."
)
BATCH_EXAMPLES = [
    (
        "vllm-dflash batch prompts.jsonl --target Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16"
        " --replicas 8 --out answers"
    ),
    (
        "vllm-dflash batch examples/embedded_pair/prompts.jsonl --target"
        " examples/embedded_pair/target \\"
    ),
    "    --draft examples/embedded_pair/dflash --device cpu --out answers",
]
UP = (
    "Serves a target and its drafter behind one OpenAI-compatible address, on Ray Serve: replicas"
    " that are added under load and taken away without it, replaced when they die, and let finish"
    " when they stop. Runs until Ctrl-C on this machine, or leaves the deployment on the cluster"
    " that RAY_ADDRESS names (--detach). --print-config writes the same as a Serve config file, for"
    " `serve deploy` or a RayService."
)
UP_EXAMPLES = [
    "vllm-dflash up --target Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16 --replicas 2",
    (
        "vllm-dflash up --target T --draft D --replicas 1,64 --print-config > serve.yaml      #"
        " from 1 to 64, by load"
    ),
]


def add_batch_flags(command: argparse.ArgumentParser) -> None:
    """The flags of ``batch``."""
    command.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE",
        type=given,
        help="files that all end in .jsonl, or all in .parquet",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        type=path,
        required=True,
        help="folder of the part files; a run begun there goes on",
    )
    _add_engine_flags(command)
    command.add_argument(
        "--replicas",
        metavar="N",
        type=whole(1, MOST_AT_ONCE),
        default=1,
        help="engines (default: %(default)s)",
    )
    rows = command.add_argument_group("rows")
    rows.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole(1, MOST_TOKENS),
        default=128,
        help="generated tokens a row (default: %(default)s)",
    )
    rows.add_argument(
        "--temperature", metavar="X", type=temperature, default="0", help="default: %(default)s"
    )
    rows.add_argument(
        "--sampling",
        metavar="JSON",
        default="{}",
        help="more of vLLM's sampling parameters, for all rows",
    )
    rows.add_argument(
        "--rows-per-part",
        metavar="N",
        type=count,
        default=64,
        help="rows that are written, and on a kill done again, together (default: %(default)s)",
    )
    rows.add_argument(
        "--max-errors",
        metavar="N",
        type=whole(0),
        help=(
            "stop once more than N rows have failed, those of earlier runs included (default:"
            " never; a row that fails is written with its error, and the others are answered)"
        ),
    )


def add_up_flags(command: argparse.ArgumentParser) -> None:
    """The flags of ``up``."""
    _add_engine_flags(command)
    serve = command.add_argument_group("serving")
    serve.add_argument(
        "--name",
        metavar="NAME",
        type=given,
        help="of the model, for clients (default: the target as given)",
    )
    serve.add_argument(
        "--replicas",
        metavar="N or MIN,MAX",
        default="1",
        help="engines; with two numbers as many as the load needs (default: %(default)s)",
    )
    serve.add_argument(
        "--requests-per-replica",
        metavar="N",
        type=whole(1, MOST_AT_ONCE),
        default=32,
        help="in flight on each, before one is added (default: %(default)s)",
    )
    serve.add_argument("--host", type=given, default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", metavar="N", type=port, default=8000, help="default: %(default)s")
    serve.add_argument(
        "--api-key",
        metavar="KEY",
        help=(
            f"requests must bring it (Authorization: Bearer KEY), others get status 401; {VARIABLE}"
            " gives it without showing it in the list of processes (default: none is asked for)"
        ),
    )
    serve.add_argument(
        "--swap-from",
        metavar="DIR",
        type=given,
        help=(
            "clients with the key may have all replicas take another drafter from below this"
            " folder, which every node has (vllm-dflash swap; default: nobody may)"
        ),
    )
    serve.add_argument(
        "--detach", action="store_true", help="leave it on the cluster of RAY_ADDRESS, and end"
    )
    serve.add_argument(
        "--print-config", action="store_true", help="write a Serve config (YAML) and start nothing"
    )


def settings_of(args: argparse.Namespace) -> EngineSettings:
    """The engine that the flags describe.

    Raises:
        ClusterError: a value that cannot be.
    """
    return EngineSettings(
        target=args.target,
        draft=args.draft,
        device=args.device,
        num_speculative_tokens=args.num_speculative_tokens,
        tensor_parallel_size=args.tensor_parallel_size,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        engine_args=parse_engine_args(args.engine_args),
    )


def _add_engine_flags(command: argparse.ArgumentParser) -> None:
    engine = command.add_argument_group("each engine")
    engine.add_argument(
        "--target",
        metavar="T",
        type=given,
        required=True,
        help="the target's folder (the same path on all nodes) or hub id",
    )
    engine.add_argument(
        "--draft", metavar="D", type=given, help="the drafter's; without it, plain decoding"
    )
    engine.add_argument("--device", choices=DEVICES, default="cuda", help="default: %(default)s")
    engine.add_argument(
        "-k",
        "--num-speculative-tokens",
        metavar="K",
        type=whole(1, MOST_TOKENS),
        help="drafted tokens a step (default: the drafter's block)",
    )
    engine.add_argument(
        "--tensor-parallel-size",
        metavar="N",
        type=whole(1, MOST_DEVICES),
        default=1,
        help="devices an engine (default: %(default)s)",
    )
    engine.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the target's own")
    engine.add_argument(
        "--max-model-len", metavar="N", type=count, help="default: the target's own"
    )
    engine.add_argument(
        "--engine-args", metavar="JSON", default="{}", help="more arguments of vLLM's engine"
    )
