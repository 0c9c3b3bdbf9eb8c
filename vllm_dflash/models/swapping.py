"""Another drafter's weights in the place of those that serve, in two steps: looked at and kept in
host memory, then put in force. Every rank of an engine does the first before any does the second.

No step raises: an error in one rank of several would leave the answers of the others unread, and
vLLM would take them for those of its next call. Limits: a drafter of the same config.json; what
goes wrong while weights are copied (memory runs out) is mended by the old folder's.

    pytest tests/unit/test_follow_swapping.py tests/engine/test_swap.py
"""

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_dflash.config import DrafterConfig
from vllm_dflash.errors import DrafterConfigError
from vllm_dflash.log import logger
from vllm_dflash.metrics.recorder import touch_here
from vllm_dflash.serving_drafter import Proof, proof_of
from vllm_dflash.weights import check_tensors
from vllm_dflash.weights.identity import read_tensors
from vllm_dflash.weights.mask_embedding import MASK_EMBEDDING, read_mask_embedding

_MAY_DIFFER = ("dtype",)
"""Fields of the configuration that the engine decides itself."""
_NOT_STAGED = "the drafter is not staged any more: send the swap again"


class _Stage:
    """A drafter on its way: read in a thread, so that the engine goes on meanwhile."""

    def __init__(self, ticket: str, folder: str) -> None:
        self.ticket, self.folder = ticket, folder
        self.answer: dict[str, Any] = {"pending": True}
        self.proof, self.tensors = Proof(), dict[str, Tensor]()


class Swapping:
    """Of one loaded ``DrafterForCausalLM``."""

    def __init__(self, drafter: Any, loading: Any) -> None:
        """``loading``: the drafter's ``Loading``."""
        self._drafter, self._loading = drafter, loading
        self._stage: _Stage | None = None

    def stage(self, ticket: str, folder: str, target_files: str | None) -> dict[str, Any]:
        """Begins to read a drafter's folder; what serves is not touched.

        Args:
            ticket: of this swap, for the calls that follow.
            folder: of this machine.
            target_files: stands for the target that is served (``contents.of_folder``); None where
                it is no folder.

        Returns:
            As ``staged``.
        """
        if self._stage is not None and "pending" in self._stage.answer:
            return {"refused": "another swap is under way: ask again"}
        self._stage = stage = _Stage(ticket, folder)
        threading.Thread(
            target=self._look, args=(stage, target_files), name="drafter swap", daemon=True
        ).start()
        return stage.answer

    def _look(self, stage: _Stage, target_files: str | None) -> None:
        folder = Path(stage.folder)
        try:
            stage.tensors = self._read(folder)
            weights = self._loading.judge(stage.tensors)
            stage.proof = proof_of(folder, weights)
            if None not in (stage.proof.target_files, target_files) and (
                stage.proof.target_files != target_files
            ):
                raise DrafterConfigError(
                    f"{folder} was refreshed for another target (its refresh.json says so)",
                    "refresh it against the target that is served",
                )
            stage.answer = {"id": weights}
        except Exception as error:  # see above: whatever it is, it is an answer
            stage.tensors = {}
            stage.answer = self._refuse(stage.folder, error)

    def staged(self, ticket: str) -> dict[str, Any]:
        """``pending``; or the ``id`` of the weights that have passed; or ``refused`` with the
        reason and the remedy."""
        if self._stage is None or self._stage.ticket != ticket:
            return {"refused": _NOT_STAGED}
        return self._stage.answer

    def commit(self, ticket: str, weights: str) -> dict[str, Any]:
        """Puts the staged tensors in force, where their id is this one.

        Returns:
            What serves then, or ``refused``.
        """
        stage = self._stage
        if stage is None or (stage.ticket, stage.answer.get("id")) != (ticket, weights):
            return {"refused": _NOT_STAGED}
        self._stage, before = None, self._drafter.serving.name
        try:
            self._loading.put(stage.tensors, weights)
        except Exception as error:
            answer = self._refuse(stage.folder, error)
            self._mend(before)
            return answer
        self._note(stage.folder, stage.proof)
        logger.info("%s serves from now on", self._drafter.serving)
        return self.which()

    def drop(self, ticket: str) -> dict[str, Any]:
        """Forgets what is staged for this swap."""
        if self._stage is not None and self._stage.ticket == ticket:
            self._stage = None
        return self.which()

    def count_refusal(self) -> dict[str, Any]:
        """Counts a swap that was refused before it came here."""
        self._drafter.serving.count_refusal()
        touch_here()
        return self.which()

    def _note(self, folder: str, proof: Proof) -> None:
        self._drafter.serving.call(folder, proof)
        touch_here()

    def which(self) -> dict[str, Any]:
        """What serves."""
        found: dict[str, Any] = self._drafter.serving.as_dict()
        return found

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """A folder's tensors by our names.

        Raises:
            DrafterConfigError: they are not those of a drafter with the running one's shape.
        """
        ours: DrafterConfig = self._drafter.drafter_config
        config = DrafterConfig.from_pretrained(folder)
        differing = [
            f"{field.name} {getattr(config, field.name)!r} (the running one has"
            f" {getattr(ours, field.name)!r})"
            for field in fields(config)
            if field.compare
            and field.name not in _MAY_DIFFER
            and getattr(config, field.name) != getattr(ours, field.name)
        ]
        if differing:
            raise DrafterConfigError(
                f"{folder} is another kind of drafter: {', '.join(differing)}",
                "swap in one with the same config.json, or restart the server with it",
            )
        check_tensors(config, folder, self._drafter.dtype)
        tensors = read_tensors(folder)
        mask = read_mask_embedding(folder, config, self._drafter.dtype)
        return tensors if mask is None else tensors | {MASK_EMBEDDING: mask}

    def _mend(self, folder: str) -> None:
        """Loads the weights of before anew, after a copy that broke off."""
        try:
            weights = self._loading.judge(tensors := self._read(Path(folder)))
            self._loading.put(tensors, weights)
        except Exception:
            logger.exception(
                "the drafter's weights are of no one checkpoint now, which costs acceptance and"
                " changes no output: swap in a sound drafter, or restart the server"
            )
            self._drafter.serving.put(folder, "mixed", Proof())
            touch_here()
        else:
            self._note(folder, proof_of(Path(folder), weights))

    def _refuse(self, folder: str, error: Exception) -> dict[str, Any]:
        expected = isinstance(error, DrafterConfigError)
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        self._drafter.serving.count_refusal()
        touch_here()
        logger.warning(
            "%s is not swapped in, %s goes on: %s",
            folder,
            self._drafter.serving,
            said,
            exc_info=None if expected else error,
        )
        return {"refused": said}
