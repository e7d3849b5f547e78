"""Emotion-LLaMA in JAX and Flax.

    import emollama_jax

    engine = emollama_jax.Engine.load("runs/stage2")
    engine.label("clip.mp4").label

Importing the package is fast: JAX comes with the first use of a name.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {"Engine": "emollama_jax.infer.engine", "load_config": "emollama_jax.config"}
__all__ = ["Engine", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
