"""Base checkpoints as older versions wrote them."""

import json
import shutil
from pathlib import Path

from emollama_jax.io.file_list import write_file_list
from emollama_jax.io.orbax_arrays import save_arrays
from emollama_jax.weights.base_checkpoint import _packed
from emollama_jax.weights.pretrained import load_llama
from tests.weights.tiny import stored_values


def as_older_base(folder: Path, format: int) -> None:
    """Makes a base checkpoint what older versions wrote: its parameters in one folder, of format 1 without a list of
    its files."""
    values = stored_values(load_llama(folder)[0])
    shutil.rmtree(folder / "params")
    save_arrays(folder / "params", _packed(values))
    manifest = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(manifest | {"format": format}))
    (folder / "files.json").unlink()
    if format > 1:
        write_file_list(folder)
