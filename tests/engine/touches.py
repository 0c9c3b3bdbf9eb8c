"""What ``apply_model_worker.py`` has done to a running engine's model. By itself, so that a worker
in another process can import it: vLLM hands it on by name."""

import threading
import time
from pathlib import Path
from typing import Any


def hook(model: Any) -> bool:
    """Quieter attention in the second layer; returns whether the fast layers had stopped
    looking."""
    part = model.model.layers[1].self_attn
    part.kept = part.register_forward_hook(_quieter)
    untouched = getattr(vars(model.model).get("forward"), "_untouched", None)
    return untouched is not None and untouched._held_once


def unhook(model: Any) -> None:
    model.model.layers[1].self_attn.kept.remove()


def method(model: Any) -> None:
    part = model.model.layers[2].mlp
    part.forward = lambda x: type(part).forward(part, x) * 0.5


def unset(model: Any) -> None:
    del model.model.layers[2].mlp.forward


def hook_when_told(worker: Any, folder: str) -> None:
    """A thread waits for ``told`` in a folder, sets the hook, and says so by ``done``."""

    def wait() -> None:
        while not Path(folder, "told").exists():
            time.sleep(0.01)
        hook(worker.get_model())
        Path(folder, "done").touch()

    threading.Thread(target=wait, daemon=True).start()


def _quieter(_module: Any, _args: Any, out: Any) -> Any:
    return out * 0.5
