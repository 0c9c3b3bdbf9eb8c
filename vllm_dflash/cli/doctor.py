"""The flags of ``vllm-dflash doctor``."""

from typing import Any

from vllm_dflash.cli.flags import DRAFTER, PAIR, add_command, run_of
from vllm_dflash.flag_types import DTYPES, MOST_TOKENS, count, given, whole


def add(commands: Any) -> None:
    """Adds the command."""
    doctor = add_command(
        commands,
        "doctor",
        "checks a target and a drafter before they are served, and says what to expect",
        "Compares shapes, layers, vocabulary, tokenizer, rotary positions, dtype and context length"
        " of the two; then runs a few prompts greedily in plain PyTorch and in vLLM, and says"
        " whether the two agree, how many tokens a step is worth (tau), at how many requests and"
        " what context that pays on this machine, and what to change. Ends with 0 where all is"
        " well, 1 where something would hurt serving, 2 on wrong usage.",
        [
            f"vllm-dflash doctor --target {PAIR}/target --draft {PAIR}/dflash --dtype float32",
            (
                "vllm-dflash doctor --target T --draft D --prompts mine.jsonl --skip-vllm    # a"
                ' line: {"prompt": "..."}'
            ),
        ],
    )
    doctor.add_argument(
        "--target", metavar="T", type=given, required=True, help="the target's folder or hub id"
    )
    doctor.add_argument("--draft", metavar="D", type=given, required=True, help=DRAFTER)
    doctor.add_argument(
        "--num-speculative-tokens",
        metavar="K",
        type=count,
        help="drafted tokens a step (default: a whole block)",
    )
    doctor.add_argument(
        "--prompts",
        metavar="FILE",
        type=given,
        help=(
            "JSON lines with prompt (text), messages (chat) or prompt_token_ids (default: built-in"
            " texts)"
        ),
    )
    doctor.add_argument(
        "--num-prompts",
        metavar="N",
        type=count,
        default=8,
        help="how many of them (default: %(default)s)",
    )
    doctor.add_argument(
        "--max-tokens",
        metavar="N",
        type=whole(1, MOST_TOKENS),
        default=64,
        help="generated tokens a prompt (default: %(default)s)",
    )
    doctor.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of both models (default: the target's own); float32 compares outputs exactly",
    )
    doctor.add_argument(
        "--max-model-len",
        metavar="N",
        type=count,
        help="as it will be served (default: the target's)",
    )
    doctor.add_argument(
        "--skip-vllm", action="store_true", help="plain PyTorch only: no engine is started"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    doctor.set_defaults(run=run_of("tools.doctor"))
