"""A drafter's weights, at the engine's start and into an engine that runs: tensors of any known
format, in portions of any size.

At the start each tensor is loaded as it comes, and the end of the load says what is missing. Into a
running engine vLLM pushes new ones between ``start_draft_weight_update`` and
``finish_weight_update``, or a swap brings them (``swapping``): they are kept in host memory until
all are there, so that an update that is refused changes nothing, and are then copied in place, for
CUDA graphs keep addresses. Limits: what goes wrong while they are copied (memory runs out) leaves
some layers with new weights and some with old ones.

    pytest tests/engine/test_reload.py
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.formats import IGNORED_TENSORS, tensor_name
from vllm_dflash.hub import drafter_folder
from vllm_dflash.kinds import own_tensors
from vllm_dflash.log import logger
from vllm_dflash.metrics.recorder import touch_here
from vllm_dflash.models.own import OwnTables
from vllm_dflash.models.parameters import load_into
from vllm_dflash.serving_drafter import PUSHED, Proof, id_of, proof_of
from vllm_dflash.weights import check_shapes, check_tables, expected_tensors
from vllm_dflash.weights.identity import digest_of
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING
from vllm_dflash.weights.values import check_finite

# A checkpoint's name of a projection -> (vLLM's fused parameter, its shard).
_FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_MOST_NAMED = 8
_UNSAID = (
    "the target's embedding ends in a factor of %g, and config.json of the drafter gives no"
    " input_embedding_scale: anchors and masks get that factor too. If few drafts are accepted, it"
    " was trained on bare rows: give it input_embedding_scale 1 (docs/checkpoints.md)"
)


class _Kind(NamedTuple):
    """What a tensor must be like to take another's place."""

    shape: tuple[int, ...]
    is_float: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} of {'floats' if self.is_float else 'whole numbers'}"


class Loading:
    """What loads a ``DrafterForCausalLM``."""

    def __init__(self, drafter: Any, model_config: Any) -> None:
        """``model_config``: vLLM's, of the drafter."""
        self._drafter, self._model_config, self._tables = drafter, model_config, OwnTables(drafter)
        self._serves = False
        self._kinds: dict[str, _Kind] = {}
        """Of the tensors that came at the start, by our names: an update brings the same."""
        self._kept: dict[str, Tensor] = {}
        """Tensors of an update that is not whole yet."""
        self._digests: dict[str, bytes] = {}
        """Of the tensors that came at the start."""

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes some of a checkpoint's tensors.

        Raises:
            DrafterConfigError: names each tensor that is unknown, misshaped or not finite. In an
                engine that runs the update is over then, and the weights from before it are in
                force.
        """
        try:
            found = dict(weights)
            named = self._checked_update(found) if self._serves else self._checked(found)
        except BaseException:
            self._abandon()
            raise
        if not self._serves:
            self._load(named)
            return
        # A transfer may write its next tensors where these are.
        self._kept |= {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}
        if self._kinds.keys() <= self._kept.keys():
            self._replace()

    def finish(self) -> None:
        """Called at the end of every load.

        Raises:
            DrafterConfigError: names the tensors that did not come. In an engine that runs the
                weights from before are in force.
        """
        if not self._serves:
            if self._kinds:
                check_shapes(
                    self._drafter.drafter_config,
                    {name: kind.shape for name, kind in self._kinds.items()},
                )
                mask = self._tables.read_mask_embedding()
                if mask is not None:
                    self._kinds[MASK_EMBEDDING] = _Kind(tuple(mask.shape), True)
                    self._digests[MASK_EMBEDDING] = digest_of(mask)
                self._note_start()
            else:  # vLLM's load format "dummy": updates bring the first weights
                self._kinds = {
                    name: _Kind(shape, name != "d2t")
                    for name, shape in expected_tensors(self._drafter.drafter_config).items()
                }
            self._serves = True
            if self._drafter.model.embedding_scale != 1.0:
                logger.warning(_UNSAID, self._drafter.model.embedding_scale)
        elif self._kept:
            missing, self._kept = sorted(self._kinds.keys() - self._kept.keys()), {}
            raise DrafterConfigError(
                f"the update of the drafter's weights ended without {_some(missing)}; the weights"
                " from before it stay in force. Call finish_weight_update once more, which closes"
                " this update, and send all tensors of the checkpoint in the next"
            )

    def judge(self, found: dict[str, Tensor]) -> str:
        """The id of a whole drafter's tensors, by our names, that may take the places of those in
        force; nothing is changed.

        Raises:
            DrafterConfigError: names each tensor that is missing, unknown, misshaped or not finite.
        """
        named = self._checked_update(found)
        missing = sorted(self._kinds.keys() - named.keys())
        if missing:
            raise DrafterConfigError(
                f"the update is without {_some(missing)}: send all tensors of the checkpoint. The"
                " weights from before the update stay in force"
            )
        return id_of({name: digest_of(tensor) for name, tensor in named.items()})

    def _checked(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by our names, at the engine's start; whether some are missing is not known
        yet."""
        config = self._drafter.drafter_config
        named = {tensor_name(name): tensor for name, tensor in found.items()}
        others = {
            name: shape for name, shape in expected_tensors(config).items() if name not in named
        }
        check_tables(config, found)
        check_shapes(config, others | {name: tuple(tensor.shape) for name, tensor in found.items()})
        check_finite(found, self._drafter.dtype)
        named = {name: tensor for name, tensor in named.items() if name not in IGNORED_TENSORS}
        self._digests |= {name: digest_of(tensor) for name, tensor in named.items()}
        self._kinds |= {
            name: _Kind(tuple(tensor.shape), tensor.is_floating_point())
            for name, tensor in named.items()
        }
        return named

    def _checked_update(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by our names that may take the places of those in force."""
        named = {tensor_name(name): tensor for name, tensor in found.items()}
        named = {name: tensor for name, tensor in named.items() if name not in IGNORED_TENSORS}
        unknown = sorted(named.keys() - self._kinds.keys())
        if unknown:
            raise DrafterConfigError(
                f"the update brings {_some(unknown)}, and the running drafter was started without:"
                " send the tensors that its checkpoint has, or restart vLLM with a checkpoint that"
                " has these. The weights from before the update stay in force"
            )
        kinds = {
            name: _Kind(tuple(tensor.shape), tensor.is_floating_point())
            for name, tensor in named.items()
        }
        wrong = [
            f"{name} is {kind} and should be {self._kinds[name]}"
            for name, kind in kinds.items()
            if kind != self._kinds[name]
        ]
        if wrong:
            raise DrafterConfigError(
                f"the update brings other tensors than the running drafter's: {_some(wrong)}. Send"
                " tensors of a drafter with the same config.json, or restart vLLM with that one."
                " The weights from before the update stay in force"
            )
        check_finite(named, self._drafter.dtype)
        self._tables.check_update(named)
        return named

    def put(self, judged: dict[str, Tensor], weights: str) -> None:
        """Puts tensors in force that ``judge`` has passed and given the id ``weights``.

        Raises:
            DrafterConfigError: an update by vLLM's own calls is not over; nothing is changed.
        """
        if self._kept or self._is_open():
            raise DrafterConfigError(
                "an update of the drafter's weights is under way: end it by finish_weight_update,"
                " and send the swap again"
            )
        self._kept = dict(judged)
        self._replace(weights)

    def _replace(self, weights: str | None = None) -> None:
        """Puts a whole update, whose id ``weights`` is if it is known, in place of the weights in
        force."""
        kept, self._kept = self._kept, {}
        if weights is None:
            weights = id_of({name: digest_of(tensor) for name, tensor in kept.items()})
        if self._is_open():
            self._load(kept)
        else:
            # ``load_weights`` without vLLM's calls around it: a layer's packed weight could not
            # take a part of a new one.
            initialize_layerwise_reload(self._drafter)
            self._load(kept)
            with _no_false_alarm():
                finalize_layerwise_reload(self._drafter, self._model_config)
        self._drafter.serving.put(PUSHED, weights, Proof())
        touch_here()

    def _note_start(self) -> None:
        """Notes which weights the engine has begun with."""
        drafter = self._drafter
        try:
            folder = drafter_folder(drafter.model_path, drafter.revision)
        except DrafterConfigError:  # what is not to be looked at says nothing of itself
            folder = None
        weights = id_of(self._digests)
        drafter.serving.put(drafter.model_path, weights, proof_of(folder, weights))
        touch_here()
        logger.info("%s serves", drafter.serving)

    def _abandon(self) -> None:
        """Ends an update of which nothing has been loaded yet: puts back what vLLM has moved aside
        for it."""
        self._kept = {}
        if self._serves and self._is_open():
            finalize_layerwise_reload(self._drafter, self._model_config)

    def _is_open(self) -> bool:
        """Whether vLLM has made the model ready for new weights."""
        return any(get_layerwise_info(module).can_load() for module in self._drafter.modules())

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Loads tensors by our names, each into every parameter that holds some of it."""
        model = self._drafter.model
        own, parameters = own_tensors(self._drafter.drafter_config), dict(model.named_parameters())
        for name, tensor in tensors.items():
            if self._tables.load(name, tensor):
                continue
            model.context_kv.load(name, tensor)
            model.head.load(name, tensor)
            if name not in own:
                _load_layer(parameters, name, tensor)


def _load_layer(parameters: dict[str, Any], name: str, tensor: Tensor) -> None:
    """Loads one tensor into the parameter that holds it; quantized ones have names such as
    ``q_proj.weight_scale``."""
    module, _, kind = name.rpartition(".")
    stem, _, projection = module.rpartition(".")
    fused, *shard = _FUSED.get(projection, (projection,))
    parameter = parameters.get(f"{stem}.{fused}.{kind}" if stem else name)
    if parameter is None:
        raise DrafterConfigError(
            f"{name} has no place in the drafter: its quantization_config does not say how this"
            " tensor is stored. Use a checkpoint that quantizes all projections of its layers"
            " alike"
        )
    load_into(parameter, tensor, *shard)


@contextmanager
def _no_false_alarm() -> Iterator[None]:
    """Keeps vLLM from warning of layers that were given no weights: all tensors have found their
    places by then, or ``_load`` has raised, so these are the rotary tables and what is the
    target's or the checkpoint has none of."""

    def passes(record: logging.LogRecord) -> bool:
        return record.msg != "%s: Failed to load weights"

    vllms = logging.getLogger(initialize_layerwise_reload.__module__)
    vllms.addFilter(passes)
    try:
        yield
    finally:
        vllms.removeFilter(passes)


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_NAMED} more" if len(items) > _MOST_NAMED else ""
    return ", ".join(items[:_MOST_NAMED]) + more
