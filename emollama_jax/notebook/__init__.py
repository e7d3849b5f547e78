"""For notebooks: a clip played inline, labels as bars, a contact sheet, a run whose loss is drawn as it goes, and a
model behind a server of its own.

    from emollama_jax import notebook

    notebook.play("clip.mp4")
    notebook.bars(engine.label("clip.mp4"))
    notebook.train("runs/mine", "--config", "forkme")

The kernel needs Python, IPython and matplotlib, and none of the package's dependencies: where those would
replace the kernel's own, as on Colab, they go into an environment of their own, whose `bin` comes first on the PATH.
"""

from emollama_jax.notebook.colab import mount_drive, record, upload, use_secret
from emollama_jax.notebook.display import bars, contact_sheet, play
from emollama_jax.notebook.machine import check_machine
from emollama_jax.notebook.served import serve, share_demo
from emollama_jax.notebook.shell import stop_on_errors
from emollama_jax.notebook.small import make_small_run
from emollama_jax.notebook.training import train

__all__ = [
    "bars",
    "check_machine",
    "contact_sheet",
    "make_small_run",
    "mount_drive",
    "play",
    "record",
    "serve",
    "share_demo",
    "stop_on_errors",
    "train",
    "upload",
    "use_secret",
]
