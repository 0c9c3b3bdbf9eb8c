"""Stage five: the proven drafter in a published format, with a model card that says what it was
made of.

vllm-dflash train ... --only export         pytest tests/engine/test_train.py
"""

import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import vllm_dflash
from vllm_dflash import smollm2
from vllm_dflash.api_keys import masked, without_secrets
from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.files import whole_folder
from vllm_dflash.formats import METHOD, published_format
from vllm_dflash.kinds import kind_of
from vllm_dflash.serving_drafter import WEIGHTS
from vllm_dflash.tools.convert import convert
from vllm_dflash.training import learned, prove
from vllm_dflash.training.errors import TrainingError
from vllm_dflash.training.generate import sequences
from vllm_dflash.training.settings import Settings
from vllm_dflash.training.target import Target
from vllm_dflash.weights.identity import id_of_folder

_PAYS = 1.1
"""tau below which drafting cannot pay: a step with a draft costs at least a tenth more than one
without."""


def folder_of(settings: Settings) -> Path:
    """The drafter to serve."""
    return Path(settings.run.out) / "drafter"


def export(settings: Settings, target: Target, mask_why: str) -> Path:
    """Runs the stage; the folder.

    Raises:
        TrainingError: nothing is trained, what is trained is not proven, or the format cannot hold
            it.
    """
    trained, proof = learned.result(settings), prove.proof(settings)
    if trained is None or proof is None or proof["question"]["trained"] != trained:
        raise TrainingError(
            f"the drafter in {learned.final_folder(settings)} is not proven yet: run the stages train"
            " and prove first"
        )
    if not proof["agree"]:
        raise TrainingError(
            f"trainer and serving disagree about tau ({prove.path_of(settings)}): a drafter like"
            " that is not exported"
        )
    source, out = learned.trained_folder(settings), folder_of(settings)
    config = DrafterConfig.from_pretrained(source)
    with whole_folder(out) as part:
        try:
            convert(
                source,
                part,
                settings.export.format or published_format(config),
                verifier=target.name,
            )
        except DrafterConfigError as error:
            raise TrainingError(f"export: {error}") from None
        (part / "README.md").write_text(card(settings, target, config, trained, proof, mask_why))
        (part / "training.json").write_text(
            json.dumps(
                {
                    "settings": without_secrets(settings.to_dict()),
                    "result": trained,
                    "proof": proof,
                    WEIGHTS: id_of_folder(part),
                },
                indent=1,
            )
            + "\n"
        )
    if (served := served_tau(proof)) < _PAYS:
        print(
            f"warning: tau is {served:.2f}: next to nothing of its drafts is accepted, and serving"
            " with it gains nothing. Train it on more answers, or for longer (--epochs), on"
            " prompts of the kind that is served; docs/train.md says what to expect"
        )
    return out


def served_tau(proof: dict[str, Any]) -> float:
    """tau in vLLM, or in the reference loop where vLLM was skipped."""
    return float(proof["rows"][-1]["tau"])


def card(
    settings: Settings,
    target: Target,
    config: DrafterConfig,
    trained: dict[str, Any],
    proof: dict[str, Any],
    mask_why: str,
) -> str:
    """The model card, in Markdown."""
    data = sequences(settings)
    answered = int((data.lengths - data.prompt_lengths).sum())
    kind = kind_of(config)
    served = {
        "method": METHOD,
        "model": "DRAFTER",
        "num_speculative_tokens": config.max_speculative_tokens,
    }
    rates = "".join(
        f"| {row['by']} | {row['tau']:.2f} | {' '.join(f'{r:.2f}' for r in row['rates'])} |\n"
        for row in proof["rows"]
    )
    versions = ", ".join(f"{name} {_version(name)}" for name in ("vllm", "torch", "transformers"))
    table = settings.train
    begun = settings.drafter.init or (
        f"the layers of {layers}" if (layers := settings.drafter.init_layers) else None
    )
    weighting = (
        f"decay, gamma {table.gamma or 'of the block size'}"
        if table.weighting == "decay"
        else f"D-PACE, alpha {table.dpace_alpha:g}"
    )
    served_as = target.name
    what = ""
    if target.name == smollm2.NAME:
        served_as, what = '"$(python -m vllm_dflash.smollm2)"', f"{smollm2.DESCRIPTION}\n\n"
    pays = served_tau(proof) >= _PAYS
    verdict = (
        "" if pays else "**It gains nothing yet: next to none of its drafts is accepted.**\n\n"
    )
    return f"""---
base_model: {smollm2.HUB_NAME if what else target.name}
library_name: vllm
tags: [speculative-decoding, {kind.name}]
---
# {kind.label} drafter for {target.name}

```
vllm serve {served_as} \\
    --speculative-config '{json.dumps(served)}'
```

{what}{config.num_hidden_layers} layers, blocks of {config.block_size}, conditioned on target layers {", ".join(map(str, config.target_layer_ids))} (counted from 0).
The mask token is {config.mask_token_id}: {mask_why}.{_end_token(config, target)}{_vocabulary(config)}

## Acceptance
Greedy, {proof["prompts"]} held-out prompts x {settings.prove.prove_tokens} tokens, {target.dtype}. The trainer's own estimate: tau {proof["trainer_tau"]:.2f}.

{verdict}| by | tau | share of drafts accepted at position 1 to {config.max_speculative_tokens} |
|---|---|---|
{rates}
## Training
| | |
|---|---|
| data | {len(data)} prompts ({_sources(settings)}), {answered} tokens answered by the target at temperature {settings.generate.temperature:g} |
| budget | {trained["steps"]} steps of {table.batch_size} sequences x {trained["blocks"] // (trained["steps"] * table.batch_size)} blocks ({trained["epochs"]:.1f} epochs); skipped for a loss that was not finite: {trained["skipped"]} |
| optimizer | {table.optimizer}, learning rate {table.lr:g}, {table.schedule}, weighting {weighting}, EMA {table.ema:g} |
| begun from | {begun or ("target layers" if settings.drafter.init_from_target else "random weights")} |
| versions | vllm-dflash {vllm_dflash.__version__}, {versions} |
| command | `{shlex.join(["vllm-dflash", *masked(sys.argv[1:])])}` |

All settings are in training.json.
"""


def _end_token(config: DrafterConfig, target: Target) -> str:
    """Why an end token may stand for the mask, where one does."""
    if config.mask_token_id != target.eos_token_id:
        return ""
    return (
        " That costs nothing: decoding stops at an end token, so no draft begins with one. With"
        " ignore_eos some do; they are drafted worse, and the output is the same."
    )


def _vocabulary(config: DrafterConfig) -> str:
    """Which tokens it drafts, where it does not draft all."""
    if config.draft_vocab_size is None:
        return ""
    return (
        f" It drafts {config.draft_vocab_size} of the target's {config.vocab_size} tokens, those"
        " that its answers hold most often (`d2t`); what it cannot draft is decoded as ever."
    )


def _sources(settings: Settings) -> str:
    own, table = settings.data.own_prompts, settings.self_prompts
    written = (
        f"{own} that the target wrote itself at temperature {table.self_temperature:g}, top_p"
        f" {table.self_top_p:g}"
    )
    return ", ".join(
        [*([written] if own else []), *(Path(path).name for path in settings.data.files)]
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
