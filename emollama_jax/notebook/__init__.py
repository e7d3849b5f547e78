"""For notebooks: a clip played inline, labels as bars, a contact sheet, a run whose loss is drawn as it goes, and a
model behind a server of its own.

    from emollama_jax import notebook

    notebook.play("clip.mp4")
    notebook.bars(engine.label("clip.mp4"))
    notebook.train("runs/mine", "--config", "forkme")

The kernel needs Python, IPython and matplotlib, and none of the package's dependencies: where those would
replace the kernel's own, as on Colab, they go into an environment of their own, whose `bin` comes first on the PATH.
"""

import importlib
from typing import Any

_HOMES = {
    "bars": "display",
    "check_machine": "machine",
    "contact_sheet": "display",
    "draw_clips": "small",
    "fetch_small_base": "small",
    "find_videos": "display",
    "make_small_run": "small",
    "mount_drive": "colab",
    "play": "display",
    "record": "colab",
    "serve": "served",
    "share_demo": "served",
    "stop_on_errors": "shell",
    "train": "training",
    "upload": "colab",
    "use_secret": "colab",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"emollama_jax.notebook.{_HOMES[name]}"), name)
