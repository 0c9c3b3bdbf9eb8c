"""The stages in their order, and the command ``vllm-dflash train``.

vllm-dflash train --target T --prompts mine.jsonl --out RUN
pytest tests/engine/test_train.py
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_dflash.api_keys import without_secrets
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.files import RunError, write_record
from vllm_dflash.formats import write
from vllm_dflash.lock import hold
from vllm_dflash.training.errors import SettingsError, TrainingError
from vllm_dflash.training.settings import STAGES, Settings, load
from vllm_dflash.training.tables import Data, Generate

INTERRUPTED = 130
STOPPED = "stopped; what is finished is kept, and the same command goes on from there"


def run_stages(
    settings: Settings,
    stages: tuple[str, ...],
    *,
    minutes: float | None = None,
    says_how_to_serve: bool = True,
) -> bool:
    """Runs the stages, each from where it stopped; whether the drafter's tau is proven (true where
    that is not asked). Training takes ``minutes`` at most.

    Raises:
        RunError: a stage cannot go on, or another command is at work in the folder.
    """
    try:
        # What cannot be used is refused before the folder is made.
        planned = plan(settings)
        _check_inputs(settings, stages)
        with hold(Path(settings.run.out), "vllm-dflash train"):
            proven, folder = _run_stages(*planned, stages, minutes)
        if folder is not None and says_how_to_serve:
            print(f"\n{how_to_serve(planned[1].path, folder)}")
        return proven
    except DrafterConfigError as error:
        raise TrainingError(str(error)) from None


def plan(settings: Settings) -> tuple[Settings, Any, DrafterConfig, str]:
    """The settings with what was left to be decided, the target, the drafter's shape and why its
    mask token is what it is.

    Raises:
        TrainingError, DrafterConfigError: they do not go together.
    """
    from vllm_dflash.training import drafter, target

    found = target.find_target(settings)
    settings = drafter.decide_mask(settings, found)
    config, why = drafter.plan(settings, found)
    if settings.export.format:
        try:
            write(config, settings.export.format, verifier=found.name)
        except DrafterConfigError as error:
            raise SettingsError(f"format: {error}") from None
    return fit_lengths(settings, reach(found, config)), found, config, why


def _check_inputs(settings: Settings, stages: tuple[str, ...]) -> None:
    from vllm_dflash.training import prompts, self_prompts

    if "generate" in stages:
        prompts.check_files(settings.data)
    if "prompts" in stages and settings.data.own_prompts:
        self_prompts.openings(settings.self_prompts)


def _run_stages(
    settings: Settings,
    found: Any,
    config: DrafterConfig,
    why: str,
    stages: tuple[str, ...],
    minutes: float | None,
) -> tuple[bool, Path | None]:
    """Whether tau is proven, and the folder of an export."""
    from vllm_dflash.training import (
        export,
        features,
        generate,
        learned,
        prove,
        self_prompts,
        target,
    )

    print(_summary(settings, config, why))
    note = Path(settings.run.out) / "settings.json"
    if not note.exists():
        write_record(note, without_secrets(settings.to_dict()))
    if "prompts" in stages:
        self_prompts.write_prompts(settings, found, reach(found, config))
    if "generate" in stages:
        data = self_prompts.as_files(settings)
        generate.generate(
            settings,
            data,
            found.tokenizer,
            found.shape.vocab_size,
            found.dtype,
            reach(found, config),
        )
    model = None
    if "features" in stages and settings.features.cache:
        if settings.features.extract_with == "transformers":
            model = target.load_target(found, settings, target.device())
        features.cache(settings, config, found, model)
    if learned.result(settings) is not None:
        learned.check(settings, config, found.dtype)
    elif "train" in stages:
        _train(settings, config, found, model, minutes)
    model, folder = None, None
    if "prove" in stages and not prove.prove(settings, found, target.device()):
        return False, None
    if "export" in stages:
        folder = export.export(settings, found, why)
    # Only now: settings that a stage refuses are none of the run's.
    write_record(note, without_secrets(settings.to_dict()))
    return True, folder


def how_to_serve(target: str, drafter: Path) -> str:
    """The command, in two lines."""
    return (
        f'serve it:\n  vllm serve {target} --speculative-config \'{{"method": "dflash",'
        f' "model": "{drafter}"}}\''
    )


def _train(
    settings: Settings, config: DrafterConfig, found: Any, model: Any, minutes: float | None
) -> None:
    from vllm_dflash.training import loop, target

    if settings.train.workers > 1:
        from vllm_dflash.training.ray_workers import train_on_ray

        train_on_ray(settings)
        return
    loop.train(
        settings,
        config,
        found,
        model if model is not None else target.load_target(found, settings, target.device()),
        minutes,
    )


def reach(found: Any, config: DrafterConfig) -> int:
    """Positions of the longest sequence that target and drafter can take."""
    return min(
        getattr(found.config, "max_position_embeddings", None) or sys.maxsize,
        config.max_position_embeddings,
    )


def fit_lengths(settings: Settings, most: int) -> Settings:
    """The settings for sequences of at most ``most`` positions: a length that is left at its
    default is lowered, and said.

    Raises:
        SettingsError: the lengths that are set do not fit.
    """
    from vllm_dflash.training.generate import held_out_tokens

    data, answers = settings.data, settings.generate
    if answers.response_tokens == Generate.response_tokens:
        answers = replace(answers, response_tokens=min(answers.response_tokens, most // 2))
    room = most - max(answers.response_tokens, held_out_tokens(settings))
    if data.max_prompt_tokens == Data.max_prompt_tokens:
        data = replace(data, max_prompt_tokens=min(data.max_prompt_tokens, room))
    if not 0 < data.max_prompt_tokens <= room or answers.response_tokens < 2:
        raise SettingsError(
            f"max_prompt_tokens {settings.data.max_prompt_tokens} and response_tokens"
            f" {answers.response_tokens} (or prove_tokens {settings.prove.prove_tokens} and a"
            f" block) do not fit into the {most} tokens that target and drafter reach to: lower"
            " them"
        )
    if (data, answers) != (settings.data, settings.generate):
        print(
            f"target and drafter reach to {most} tokens: max_prompt_tokens is"
            f" {data.max_prompt_tokens}, response_tokens {answers.response_tokens}",
            file=sys.stderr,
        )
    return replace(settings, data=data, generate=answers)


def _summary(settings: Settings, config: DrafterConfig, why: str) -> str:
    layers = ", ".join(map(str, config.target_layer_ids))
    return (
        f"{config.kind} for {settings.run.target}: {config.num_hidden_layers} layers, blocks of"
        f" {config.block_size}, target layers {layers}, mask token {config.mask_token_id}"
        f" ({why})\nrun folder {settings.run.out}"
    )


def run(args: argparse.Namespace) -> int:
    """``vllm-dflash train``: 0 where all is done, 1 where a stage failed or tau is not what
    training said, 2 on wrong usage, 130 where it was stopped by Ctrl-C."""
    flags = {
        name: value
        for name, value in vars(args).items()
        if name not in ("run", "settings", "only", "dry_run")
    }
    try:
        settings = load(args.settings, flags)
        stages = tuple(args.only or STAGES)
        if args.dry_run:
            return _dry_run(settings)
        return 0 if run_stages(settings, stages) else 1
    except KeyboardInterrupt:
        print(f"\nvllm-dflash train: {STOPPED}", file=sys.stderr)
        return INTERRUPTED
    except SettingsError as error:
        print(f"vllm-dflash train: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"vllm-dflash train: {error}", file=sys.stderr)
        return 1


def _dry_run(settings: Settings) -> int:
    """Prints the drafter's shape and what the run takes as comments, and every setting as TOML."""
    import torch

    from vllm_dflash.training import budget, target

    settings, found, config, why = plan(settings)
    prompts, said = _expected_prompts(settings, found, reach(found, config))
    expected = budget.budget(settings, config, target.parameters(found, settings), prompts)
    cores = torch.get_num_threads() if target.device() == "cpu" else None
    lines = [
        _summary(settings, config, why),
        said,
        budget.as_text(expected, settings.train.workers, cores),
    ]
    print("\n".join(f"# {line}" for text in lines for line in text.splitlines()))
    for table, values in settings.to_dict().items():
        print(f"\n[{table}]")
        for name, value in values.items():
            print(
                f"{name} = {json.dumps(value)}"
                if value is not None
                else f"# {name}: left to the default"
            )
    return 0


def _expected_prompts(settings: Settings, found: Any, positions: int) -> tuple[int, str]:
    """How many prompts will be trained on, and a line about them; those that the target is to write
    may not be there yet."""
    from vllm_dflash.training import self_prompts
    from vllm_dflash.training.prompts import Reader, split

    own, to_write = settings.data.own_prompts, 0
    data = settings.data
    if own and self_prompts.path_of(settings).is_file():
        data = self_prompts.as_files(settings)
    elif own:
        to_write = own
        if not data.files:
            held_out = min(data.held_out, own // 2) if data.held_out_prompts is None else 0
            return (
                own - held_out,
                f"{own} prompts that the target is to write, {held_out} of them held out",
            )
    parts = split(
        Reader(found.tokenizer, found.shape.vocab_size, data.chat_template_kwargs, positions),
        data,
        settings.run.seed,
    )
    said = parts.describe(data.max_prompt_tokens) + (
        f"; and {to_write} that the target is to write" if to_write else ""
    )
    return len(parts.train) + to_write, said
