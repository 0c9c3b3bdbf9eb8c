"""The kinds of drafters: one record each, and whatever differs between them is asked of it.

A kind is a context (how the target's features become what the draft layers attend to), a head
(how the block's hidden states become tokens), the row of a block that predicts first, and names. It
is in a submodule of this package (``KIND``, or ``KINDS`` where a head goes with several contexts),
or of another package that has an entry point in the group ``vllm_dflash.kinds``; docs/kinds.md
shows how to add one. Nothing outside names a kind.

Records need no torch: what does is imported when a drafter is made.

    pytest tests/unit/test_kinds.py tests/unit/test_kind_records.py
"""

import functools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Literal

from vllm_dflash.kind_checks import missing_parts, namesake, namesake_in_vllm
from vllm_dflash.log import logger
from vllm_dflash.typed import check_fields

if TYPE_CHECKING:
    from vllm_dflash.config import DrafterConfig

GROUP = "vllm_dflash.kinds"
"""The entry point group of kinds in other packages; an entry's object is a ``Kind``."""

FOR_TRAINING = "dflare"
"""The kind that is trained where none is chosen (docs/study.md)."""

OURS = "vllm-dflash"
"""The format of kinds that nobody else has published."""

AFTER_ANCHOR: Final = 1
"""``Kind.first_row`` where the anchor's row predicts nothing."""

Tensors = dict[str, tuple[int, ...]]
"""Names of a checkpoint's tensors, without a prefix, to their shapes."""

_LEFT_OUT = "the kind of drafter %s is left out"


@dataclass(frozen=True)
class Context:
    """How the target's features become the context's keys and values."""

    modules: str
    """The module, by its full name, with the classes ``Reference`` and ``Served``."""
    own_tensors: Callable[["DrafterConfig"], Tensors]
    """The tensors that only this context has."""
    width: Callable[["DrafterConfig"], int]
    """Elements of a token's context, in the proposers' buffers."""
    over_context: tuple[str, ...]
    """Parts of the names of the matrices that are multiplied with the context's tokens."""
    own_projections: Mapping[str, str]
    """Projections of the context alone, each to the block's own that it may begin as or be tied
    to."""
    shares: str | None = None
    """The tensor [D, T] whose softmax is each target layer's share in a draft layer's context."""

    def __post_init__(self) -> None:
        check_fields(self)


def _no_tensors(config: "DrafterConfig") -> Tensors:
    return {}


def _no_problem(config: "DrafterConfig") -> tuple[str, str] | None:
    return None


@dataclass(frozen=True)
class Setting:
    """One of a head's settings in ``config.json``: a whole number, a number above 0, or a flag; as
    its default is."""

    default: int | float | bool
    """Where a drafter is trained."""
    absent: int | float | bool | None = None
    """Where a file does not give it; None: it has to."""
    least: int = 1
    """Of whole numbers."""
    most: float = 1 << 16
    counts_tokens: bool = False
    """It is at most the vocabulary."""

    def __post_init__(self) -> None:
        check_fields(self)

    def fits(self, value: object, vocab_size: int) -> bool:
        """Whether it may be ``value``."""
        if isinstance(value, bool) or isinstance(self.default, bool):
            return isinstance(value, bool) and isinstance(self.default, bool)
        if isinstance(self.default, float):
            return isinstance(value, int | float) and 0 < value <= self.most
        most = min(self.most, vocab_size) if self.counts_tokens else self.most
        return isinstance(value, int) and self.least <= value <= most

    @property
    def wanted(self) -> str:
        """What it may be, for a message."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, float):
            return f"a number above 0, at most {self.most}"
        end = ", and at most the vocabulary" if self.counts_tokens else ""
        return f"a whole number from {self.least} to {self.most}{end}"


@dataclass(frozen=True)
class Head:
    """How the hidden states of a block become its tokens."""

    modules: str
    """The module, by its full name, with the classes ``Reference`` and ``Served``."""
    own_tensors: Callable[["DrafterConfig"], Tensors] = _no_tensors
    """The tensors that only this head has, each name with ``head.`` before it, or, for ``parts``,
    the part's."""
    is_argmax: bool = False
    """A token is the best by its row's logits alone, so that vLLM's own ways of drafting do too."""
    name: str = ""
    """For ``train --head``; empty where it is chosen by its kind alone."""
    sentence: str = ""
    """What it does, for ``train --help``; begins with a verb."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """What ``DrafterConfig.head`` holds, by the keys of ``config.json``."""
    parts: tuple[str, ...] = ()
    """The submodules of ``Reference`` that hold its parameters, as a published checkpoint names
    them; none: their names begin with ``head.``."""
    says: Mapping[str, object] = field(default_factory=dict)
    """Keys that a file may give beside the settings, each with the one value that it may have: what
    is so anyway."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of tensors' names that some checkpoints have, each with what stands for it here."""
    problem: Callable[["DrafterConfig"], tuple[str, str] | None] = _no_problem
    """A setting that does not fit the others, and what it has to be."""
    bare_rows: bool = False
    """Where a file gives no ``input_embedding_scale`` the rows of the target's embedding are taken
    as they are, without a factor that the target has for them: so does its published code."""
    over_block: bool = False
    """It ranks a block's rows together, of which it then gets all whatever K is, and reads the
    target's embeddings and the context of the token before the anchor; no others go from row to
    row alone, so that the first K rows are enough."""

    def __post_init__(self) -> None:
        check_fields(self)
        if "" in {*self.settings, *self.says}:
            raise TypeError("Head: a setting has an empty name; give it its key in config.json")


ARGMAX = Head(
    "vllm_dflash.heads.argmax", is_argmax=True, name="argmax", sentence="takes each row's best"
)


@dataclass(frozen=True)
class Kind:
    """A kind of drafter."""

    name: str
    """In settings and tools, and the type and algorithm of speculators' format."""
    label: str
    """As its paper writes it."""
    sentence: str
    """What its context is, for people."""
    architecture: str
    """In ``config.json`` of published checkpoints."""
    format: str
    """The checkpoint format that it was published in."""
    speculators_architecture: str
    context: Context
    layers: Callable[[int], int]
    """Draft layers by default, from the target's number of layers."""
    features: Callable[[int, int], int]
    """Target layers captured by default, from the draft's and the target's numbers of layers."""
    head: Head = ARGMAX
    first_row: Literal[0, 1] = AFTER_ANCHOR
    """The row of a block that predicts the token after the anchor; 0: the anchor's own, as
    ``sample_from_anchor`` has it in speculators' format."""
    is_flat: bool = False
    """Its published format has no ``dflash_config``: what is in there stands at the top."""
    convolves: bool = False
    """Its layers may have DFlash2's convolution over a block's rows."""
    is_known_to_vllm: bool = False
    """vLLM itself reads its speculators format, which stays so: it may serve it by a method of its
    own."""
    own_method: str | None = None
    """The method that vLLM takes for its published architecture by itself, where that is not
    ``dflash``."""
    exported_as: str | None = None
    """The architecture that AngelSpec's trainer writes it under, with its name as ``model_arch``,
    where that is not the published one."""
    also_named: tuple[str, ...] = ()
    """Further names of its architecture in checkpoints of its published format."""
    served_as: str | None = None
    """What our model is registered as, where vLLM treats the published architecture in a way of its
    own."""

    def __post_init__(self) -> None:
        check_fields(self)
        names = "name", "label", "architecture", "format", "speculators_architecture"
        if empty := [name for name in names if not getattr(self, name)]:
            raise TypeError(f"Kind: {', '.join(empty)} must not be empty")

    @property
    def served_architecture(self) -> str:
        """What vLLM looks up: its method ``dflash`` puts DFlash before a name that lacks it."""
        if self.served_as is not None:
            return self.served_as
        return self.architecture if "DFlash" in self.architecture else f"DFlash{self.architecture}"

    def context_part(self, name: str) -> Any:
        """``Reference`` or ``Served`` of the context."""
        return getattr(import_module(self.context.modules), name)

    def head_part(self, name: str) -> Any:
        """``Reference`` or ``Served`` of the head."""
        return getattr(import_module(self.head.modules), name)

    def own_tensors(self, config: "DrafterConfig") -> Tensors:
        """The tensors that only this kind has."""
        return self.context.own_tensors(config) | self.head.own_tensors(config)


@functools.cache
def every() -> Mapping[str, Kind]:
    """All kinds by name: the package's, of these first what vLLM knows, then other packages'.

    One of another package that cannot be imported, that names parts which do not exist, or that
    takes a name of another or of a model of vLLM's, is left out with a warning: plain serving goes
    on.

    Raises:
        ValueError: two of this package have a name in common.
    """
    found = dict(own())
    for where, kind in _others():
        if taken := namesake(kind, found.values()) or namesake_in_vllm(kind):
            logger.warning("%s: it has the name %s. Rename it", _LEFT_OUT % where, taken)
        elif missing := missing_parts(kind):
            logger.warning("%s: %s. Mend its record", _LEFT_OUT % where, "; ".join(missing))
        else:
            found[kind.name] = kind
    return found


@functools.cache
def own() -> Mapping[str, Kind]:
    """This package's.

    Raises:
        ValueError: two have a name in common.
    """
    ours = [
        kind
        for item in pkgutil.iter_modules(__path__)
        for kind in _kinds_in(import_module(f"{__name__}.{item.name}"))
    ]
    found: dict[str, Kind] = {}
    for kind in sorted(ours, key=lambda k: (not k.is_known_to_vllm, k.name)):
        if taken := namesake(kind, found.values()):
            raise ValueError(f"{__name__}: {kind.name} has the name {taken}: rename one of the two")
        found[kind.name] = kind
    return found


def _kinds_in(module: Any) -> tuple[Kind, ...]:
    return module.KINDS if hasattr(module, "KINDS") else (module.KIND,)


def _others() -> Iterator[tuple[str, Kind]]:
    """Kinds of other packages, with the entry point that names each."""
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        try:
            kind = point.load()
        except (Exception, SystemExit) as error:  # whatever another package's import ends in
            logger.warning("%s: %r. Mend or uninstall its package", _LEFT_OUT % point.value, error)
            continue
        if isinstance(kind, Kind):
            yield point.value, kind
        else:
            logger.warning("%s: it is no vllm_dflash.kinds.Kind", _LEFT_OUT % point.value)


def names() -> tuple[str, ...]:
    """Of all kinds."""
    return tuple(every())


def labels() -> str:
    """For a sentence: ``DFlash or DFlare``."""
    return " or ".join(kind.label for kind in every().values())


@functools.cache
def renamed_parts() -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Each part of a head that some checkpoints name otherwise, with its ``renamed``."""
    heads = {kind.head.modules: kind.head for kind in every().values() if kind.head.renamed}
    return tuple((f"{part}.", head.renamed) for head in heads.values() for part in head.parts)


def head_names() -> tuple[str, ...]:
    """Of the heads that ``with_head`` finds."""
    return tuple(dict.fromkeys(kind.head.name for kind in every().values() if kind.head.name))


def heads_in_words() -> str:
    """The heads that ``with_head`` finds, each with its sentence."""
    found = {kind.head.name: kind.head.sentence for kind in every().values() if kind.head.name}
    return "; ".join(f"{name} {sentence}".strip() for name, sentence in found.items())


def setting_names() -> frozenset[str]:
    """The keys of all heads' settings."""
    return frozenset(name for kind in every().values() for name in kind.head.settings)


def said_names() -> frozenset[str]:
    """The keys that some head's file may give beside its settings."""
    return frozenset(name for kind in every().values() for name in kind.head.says)


def with_head(kind: str, head: str) -> Kind | None:
    """The kind with the context of ``kind`` and this head, one with the first row of ``kind`` if
    there is one; None where there is none."""
    own = every()[kind]
    found = [k for k in every().values() if k.context is own.context and k.head.name == head]
    found.sort(key=lambda k: k.first_row != own.first_row)
    return own if own in found else next(iter(found), None)


def kind_of(config: "DrafterConfig") -> Kind:
    """The drafter's."""
    return every()[config.kind]


def row_scale(config: "DrafterConfig") -> float | None:
    """What the rows of the embedding are multiplied by, and a mask embedding; None: rows of the
    target's by what the target multiplies them by."""
    given = config.input_embedding_scale
    return 1.0 if given is None and kind_of(config).head.bare_rows else given


def own_tensors(config: "DrafterConfig") -> Tensors:
    """The tensors that only the drafter's kind has."""
    return kind_of(config).own_tensors(config)


@functools.cache
def architectures() -> Mapping[str, Kind]:
    """Architecture names in checkpoints, and those that vLLM looks up for them, to their kinds."""
    by_name = {kind.architecture: kind for kind in every().values()}
    for kind in every().values():
        for name in kind.also_named:
            by_name.setdefault(name, kind)
    return by_name | {kind.served_architecture: kind for kind in every().values()}


def registered_architectures() -> tuple[str, ...]:
    """Those that our model is registered as; where vLLM has a model of its own by a published name,
    that stays."""
    return tuple(
        name
        for name, kind in architectures().items()
        if kind.served_as is None or name == kind.served_as
    )
