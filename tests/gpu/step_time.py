"""What a speculative step costs on a GPU, in plain steps: this package, vLLM's own dflash and plain
decoding in one run.

    python tests/gpu/step_time.py                 # on a GPU: the published pair's shapes at random
    python tests/gpu/step_time.py --shape tiny    # anywhere: a pair of a few thousand weights

Weights are random, so vLLM accepts drafts by a rate that is given (``rejection_sample_method``
``synthetic``): tau is the same for both
drafters, and what differs is time. Prints the step at each batch size over a plain step, and leaves
``vllm-dflash bench``'s report in ``--out``. Needs some 60 GiB of GPU memory: three engines share
it. torch.compile is as vLLM sets it; CUDA graphs are recorded for fewer sizes than vLLM would, so
that engines start sooner, and up to 2,048 tokens (128 requests' drafts), where vLLM's default ends
at 512.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vllm_dflash.cli import main as vllm_dflash
from vllm_dflash.config import DrafterConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pairs import make_random_drafter

K = 15
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
    },
}
DRAFTERS: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "num_hidden_layers": 5,
        "target_layer_ids": (1, 9, 17, 25, 33),
        "mask_token_id": 151669,
    },
    "tiny": {"num_hidden_layers": 3, "target_layer_ids": (0, 2, 3), "mask_token_id": 1},
}


def make_pair(shape: str, folder: Path) -> tuple[Path, Path]:
    """A target's config, whose weights vLLM makes up, and a drafter with random weights in
    bfloat16; returns their folders."""
    target, sizes = folder / "target", SHAPES[shape]
    target.mkdir(parents=True)
    config = sizes | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": 0,
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    shared = {name: value for name, value in sizes.items() if name != "num_hidden_layers"}
    drafter = DrafterConfig(
        **shared,
        **DRAFTERS[shape],
        num_target_layers=sizes["num_hidden_layers"],
        block_size=K + 1,
        dtype="bfloat16",
        kind="dflash",
    )
    return target, make_random_drafter(folder / "drafter", config=drafter, scale=0.02)


def main() -> int:
    """Makes the pair, runs the benchmark and prints the ratios; 0 where all three methods ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument(
        "--batch", default="1,8,32,128", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--tau",
        type=float,
        default=4.0,
        help="tokens that a verified draft yields (default: %(default)s)",
    )
    parser.add_argument("--max-tokens", default="64")
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--out", type=Path, default=Path("step-time"))
    args = parser.parse_args()
    # vLLM's CPU build has no synthetic acceptance: there nothing is accepted, and a step computes
    # the same.
    on_gpu = torch.cuda.is_available()
    engine: dict[str, Any] = {
        "load_format": "dummy",
        "kv_cache_memory_bytes": (12 if on_gpu else 1) << 30,
    }  # so engines start side by side
    if on_gpu:
        engine["compilation_config"] = {"cudagraph_capture_sizes": CAPTURED}
    synthetic = (
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": args.tau}
        if on_gpu
        else {}
    )
    with TemporaryDirectory() as folder:
        target, drafter = make_pair(args.shape, Path(folder))
        status = vllm_dflash(
            [
                "bench",
                "--methods",
                f"plain,native:{K},dflash:{K}",
                "--target",
                str(target),
                "--draft",
                str(drafter),
                "--dataset",
                "random",
                "--concurrency",
                args.batch,
                "--max-tokens",
                args.max_tokens,
                "--repeats",
                args.repeats,
                "--dtype",
                "bfloat16",
                "--engine-args",
                json.dumps(engine),
                "--spec-args",
                json.dumps(synthetic),
                "--out",
                str(args.out),
            ]
        )
    if status:
        return status
    results = json.loads((args.out / "results.json").read_text())
    steps = {(row["point"], row["method"]): row for row in results["rows"]}
    print("\nrequests  method        step, ms  x plain's   tau")
    for index, point in enumerate(results["points"]):
        plain = steps[index, "plain"]["step_ms"]["median"]
        for method in ("plain", f"native:{K}", f"dflash:{K}"):
            row = steps.get((index, method))
            if row is not None:
                step, tau = row["step_ms"]["median"], row["tau"]
                print(
                    f"{point['concurrency']:>8}  {method:<12} {step:>9.2f} {step / plain:>10.2f}"
                    f" {'' if tau is None else format(tau, '9.2f')}"
                )
    return int(any(method["state"] != "ran" for method in results["methods"]))


if __name__ == "__main__":
    sys.exit(main())
