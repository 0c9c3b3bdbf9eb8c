"""The settings of a training run: its tables (``tables``) from one TOML file, from flags of the
same names, or both, checked.

Plain Python, so that ``--help`` is quick. Tests: ``pytest tests/unit/test_train_settings.py``.
"""

import dataclasses
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dflash import kinds
from vllm_dflash.regular import check_input
from vllm_dflash.training.errors import SettingsError
from vllm_dflash.training.tables import (
    LARGEST,
    Choices,
    Data,
    Drafter,
    Export,
    Features,
    Generate,
    Prove,
    Run,
    SelfPrompts,
    Train,
)

STAGES = ("prompts", "generate", "features", "train", "prove", "export")


@dataclass(frozen=True)
class Settings:
    """All tables of the TOML file."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    self_prompts: SelfPrompts = field(default_factory=SelfPrompts)
    generate: Generate = field(default_factory=Generate)
    drafter: Drafter = field(default_factory=Drafter)
    features: Features = field(default_factory=Features)
    train: Train = field(default_factory=Train)
    prove: Prove = field(default_factory=Prove)
    export: Export = field(default_factory=Export)

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


def load(path: str | None, flags: Mapping[str, Any], decided: Collection[str] = ()) -> Settings:
    """The settings of a TOML file, if there is one, overruled by ``flags`` (names to values or to a
    command line's text).

    Args:
        decided: names that the caller decides, and the file may not have.

    Raises:
        SettingsError: the file cannot be read, a name is unknown or the caller's, a value is of the
            wrong type or out of range, or settings contradict.
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
        if taken := sorted(values.keys() & set(decided)):
            raise SettingsError(
                f"{path}: [{table}] has {taken[0]}, which this command decides itself: remove it"
            )
        tables[table] |= values
    for table, item in every_field():
        if item.name in flags:
            tables[table][item.name] = flags[item.name]
        if item.name in tables[table]:
            tables[table][item.name] = _value(item, tables[table][item.name])
    settings = Settings(**{name: kind(**tables[name]) for name, kind in TABLES.items()})
    settings = dataclasses.replace(settings, drafter=_with_head(settings.drafter))
    settings.check()
    return settings


def digest(path: str | None) -> str | None:
    """Stands for what a TOML file sets, whatever its layout and comments; None for no file."""
    if path is None:
        return None
    text = json.dumps(_read(path), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_head(table: Drafter) -> Drafter:
    """With the kind that has the context of ``kind`` and the head that is asked for."""
    if table.head is None:
        return table
    kind = kinds.with_head(table.kind, table.head)
    if kind is None:
        raise SettingsError(
            f"no kind has the context of {table.kind} and the head {table.head}: leave head out, or"
            " give another kind"
        )
    return dataclasses.replace(table, kind=kind.name)


def _read(path: str) -> dict[str, Any]:
    try:
        check_input(path)
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror or error}): give a TOML file of settings"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
        most = LARGEST
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
