"""What a drafter is: one validated form for every checkpoint format, and the only home of its
defaults.

Pure Python: no torch and no vLLM import, so that every tool can check a checkpoint before anything
is loaded.
``vllm_dflash.formats`` reads a ``config.json`` into this form and writes it back.

    pytest tests/unit/test_config.py
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.errors import DrafterConfigError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""The rotary variants that the reference and vLLM compute alike."""

DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_ROPE_THETA = 1_000_000.0


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter's shape and its ties to the target. Sizes are in elements, positions in tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    """Layers of the target that it was trained with; None where the checkpoint does not say."""
    max_position_embeddings: int
    kind: str
    """One of ``kinds.names()``."""
    rms_norm_eps: float = DEFAULT_RMS_NORM_EPS
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_scaling: Mapping[str, Any] | None = None
    """``rope_type`` and its parameters, as transformers names them; None for plain rotary
    positions."""
    attention_bias: bool = False
    """Biases in q, k, v and o projections."""
    sliding_windows: tuple[int | None, ...] = ()
    """Per draft layer how many positions back a query sees, itself included; None: all. Empty: all
    in every layer."""
    sliding_causal: bool = False
    """In sliding layers a query does not see later ones of its block."""
    draft_vocab_size: int | None = None
    """Tokens that the drafter's own lm_head ranks, mapped to the target's by ``d2t``; None: the
    target's whole vocabulary."""
    quantization_config: Mapping[str, Any] | None = None
    """As in config.json, for vLLM's quantized layers."""
    dtype: str = "bfloat16"
    conv_kernel_size: int = 0
    """Rows of its block that each row's convolution takes in, itself included; 0: there is none."""
    conv_group_size: int = 0
    """Channels that share the part of a convolution's kernel that comes from the row."""
    logit_scale: float = 1.0
    """What logits are multiplied by before they become probabilities."""
    logit_cap: float | None = None
    """Then each logit x becomes ``logit_cap * tanh(x / logit_cap)``; None: it stays."""
    input_embedding_scale: float | None = None
    """What the rows of the embedding are multiplied by, and a mask embedding; None: what its kind
    has it be (``kinds.row_scale``)."""
    head: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the kind's head, by their keys in config.json; its defaults where they are
    left out."""
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its config.json that this package does not know: if one of them changes what is
    computed, tau is low."""
    format: str = field(default="z-lab", compare=False)
    """The checkpoint format that it was read from, one of
    ``vllm_dflash.formats.format_names()``."""

    def __post_init__(self) -> None:
        if self.kind in kinds.names():
            settings = kinds.kind_of(self).head.settings
            whole = {name: setting.default for name, setting in settings.items()}
            object.__setattr__(self, "head", whole | dict(self.head))

    @property
    def max_speculative_tokens(self) -> int:
        """The most tokens one draft can hold: the block's rows from the first that predicts on,
        mostly ``block_size - 1``."""
        return self.block_size - self.first_row

    @property
    def draft_tokens(self) -> int:
        """How many tokens the drafter ranks: its draft vocabulary's, or all of the target's."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def first_row(self) -> int:
        """The kind's ``first_row``."""
        return kinds.kind_of(self).first_row

    @property
    def num_features(self) -> int:
        """T, the number of captured target layers."""
        return len(self.target_layer_ids)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """``sliding_windows``, one entry a layer."""
        return self.sliding_windows or (None,) * self.num_hidden_layers

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DrafterConfig":
        """Parses and checks the contents of a ``config.json`` of any known format.

        Raises:
            DrafterConfigError: a field is missing, of the wrong type, out of range or of a kind not
                supported.
        """
        from vllm_dflash.formats import parse

        return parse(raw)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DrafterConfig":
        """Reads ``folder/config.json``; errors name the file."""
        from vllm_dflash.formats import read

        return read(folder)

    def with_(self, **changes: Any) -> "DrafterConfig":
        """A checked copy with some fields changed."""
        config = replace(self, **changes)
        config.check()
        return config

    def check(self) -> None:
        """Refuses a form that no drafter can have.

        Raises:
            DrafterConfigError: names the field and the remedy.
        """
        if self.kind not in kinds.names():
            raise DrafterConfigError(
                f"kind is {self.kind!r}", f"one of {', '.join(kinds.names())}", field="kind"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DrafterConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of"
                f" num_key_value_heads {self.num_key_value_heads}",
                "fix config.json",
                field="num_attention_heads",
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise DrafterConfigError(
                f"head_dim is {self.head_dim}",
                "rotary positions need an even one; fix config.json",
                field="head_dim",
            )
        if self.block_size < 2:
            raise DrafterConfigError(
                f"block_size is {self.block_size}",
                "a block holds an anchor and at least one drafted token, so at least 2",
                field="block_size",
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DrafterConfigError(
                f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}"
                " tokens",
                "use the id that the drafter was trained with",
                field="mask_token_id",
            )
        self._check_layers()
        self._check_head()
        if self.draft_vocab_size is not None and not 0 < self.draft_vocab_size < self.vocab_size:
            raise DrafterConfigError(
                f"draft_vocab_size {self.draft_vocab_size} is not between 1 and vocab_size"
                f" {self.vocab_size}",
                "use the file that the checkpoint came with",
                field="draft_vocab_size",
            )
        kind = (self.rope_scaling or {}).get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise DrafterConfigError(
                f"rope_scaling's rope_type is {kind!r}",
                f"known are {', '.join(ROPE_TYPES)}; use another checkpoint",
                field="rope_scaling.rope_type",
            )
        if self.rope_scaling is not None:
            from vllm_dflash.formats.rope import check_scaling

            check_scaling(self.rope_scaling, self.head_dim)

    def _check_head(self) -> None:
        kind = kinds.kind_of(self)
        if taken := {item.name for item in fields(self)} & kind.head.settings.keys():
            raise DrafterConfigError(
                f"the head of a {kind.label} drafter calls a setting {min(taken)}, as every drafter"
                " calls one of its own",
                "give it another name in the head's record",
                field=min(taken),
            )
        for name, value in self.head.items():
            setting = kind.head.settings.get(name)
            if setting is None:
                raise DrafterConfigError(
                    f"{name} is no setting of a {kind.label} drafter's head",
                    f"known are {', '.join(kind.head.settings)}"
                    if kind.head.settings
                    else "remove it: this head has none",
                    field=name,
                )
            if not setting.fits(value, self.vocab_size):
                raise DrafterConfigError(f"{name} is {value!r}", setting.wanted, field=name)
        if (problem := kind.head.problem(self)) is not None:
            name, wanted = problem
            raise DrafterConfigError(f"{name} is {self.head[name]!r}", wanted, field=name)
        self._check_convolution(kind)
        if (self.logit_scale, self.logit_cap) != (1.0, None) and not kind.head.is_argmax:
            raise DrafterConfigError(
                "logits are scaled or capped (logit_scale, final_logit_softcapping or another name"
                f" of theirs), and the head of a {kind.label} drafter adds to them",
                "use another checkpoint",
                field="logit_scale",
            )
        if self.draft_vocab_size is not None and not kind.head.is_argmax:
            raise DrafterConfigError(
                f"draft_vocab_size is {self.draft_vocab_size}, and the head of a {kind.label}"
                " drafter ranks the target's whole vocabulary",
                "leave draft_vocab_size out of training; a checkpoint that has one vLLM itself may"
                " serve, with VLLM_DFLASH=0",
                field="draft_vocab_size",
            )

    def _check_convolution(self, kind: kinds.Kind) -> None:
        taps, group = self.conv_kernel_size, self.conv_group_size
        if not taps and not group:
            return
        if not kind.convolves:
            raise DrafterConfigError(
                f"conv_kernel_size is {taps}, and a {kind.label} drafter has no convolution",
                "use another kind, or leave it out",
                field="conv_kernel_size",
            )
        if not 1 <= taps <= self.block_size:
            raise DrafterConfigError(
                f"conv_kernel_size is {taps}",
                f"1 to block_size {self.block_size}, with conv_group_size; or neither",
                field="conv_kernel_size",
            )
        if not group or self.hidden_size % group:
            raise DrafterConfigError(
                f"conv_group_size is {group}",
                f"a divisor of hidden_size {self.hidden_size}",
                field="conv_group_size",
            )

    def _check_layers(self) -> None:
        if not self.target_layer_ids:
            raise DrafterConfigError(
                "target_layer_ids is empty",
                "give a list of zero-based target layers",
                field="target_layer_ids",
            )
        if len(set(self.target_layer_ids)) != len(self.target_layer_ids):
            raise DrafterConfigError(
                f"target_layer_ids {list(self.target_layer_ids)} names a layer twice",
                "each layer once",
                field="target_layer_ids",
            )
        depth = self.num_target_layers
        bad = [i for i in self.target_layer_ids if i < 0 or (depth is not None and i >= depth)]
        if bad:
            known = "layers" if depth is None else f"{depth} layers (0 to {depth - 1})"
            raise DrafterConfigError(
                f"target_layer_ids {bad} are outside the target's {known}",
                "the drafter was trained for a deeper target, or the ids are one-based",
                field="target_layer_ids",
            )
        if self.sliding_windows and len(self.sliding_windows) != self.num_hidden_layers:
            raise DrafterConfigError(
                f"layer_types has {len(self.sliding_windows)} entries for {self.num_hidden_layers}"
                " layers",
                "one a layer",
                field="layer_types",
            )
        short = [w for w in self.sliding_windows if w is not None and w < self.block_size]
        if short:
            raise DrafterConfigError(
                f"sliding_window is {short[0]}, less than a block of {self.block_size}",
                "use the file that the checkpoint came with",
                field="sliding_window",
            )
