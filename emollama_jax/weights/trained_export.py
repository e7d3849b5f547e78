"""Trained weights written for PyTorch: the reference's `.pth`, or a PEFT folder with the projectors beside it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from emollama_jax.io.paths import PathLike
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.weights.model_identity import UNKNOWN, ModelIdentity
from emollama_jax.weights.peft import write_adapter
from emollama_jax.weights.safetensors_files import save_safetensors
from emollama_jax.weights.torch_files import save_torch
from emollama_jax.weights.trained import ADAPTER, LLAMA, PROJECTORS_FILE


def write_pth(
    path: PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    adapter_name: str = "",
    base: str = "",
    base_identity: ModelIdentity = UNKNOWN,
) -> list[str]:
    """Writes a checkpoint as the reference does, and returns the names in it.

    Args:
        adapter_name: put before an adapter's ".weight", for newer PEFT versions; "default" is theirs.
        base, base_identity: of the language model, which are kept beside the tensors.
    """
    named = [(_named(name, adapter_name), array) for name, array in tensors.items()]
    record = ({"base": base} if base else {}) | base_identity.as_metadata()
    save_torch(path, named, {"optimizer": {}, "config": {}, "scaler": None, "epoch": 0, **record})
    return [name for name, _ in named]


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    lora: LoRAConfig,
    *,
    base: str = "",
    base_identity: ModelIdentity = UNKNOWN,
    adapter_name: str = "",
) -> list[str]:
    """Writes adapters and projectors into an existing folder, and returns the names in it.

    Args:
        base: the name or path of the language model, which PEFT records.
        base_identity: which it is; PEFT passes it over.
        adapter_name: to be put into the names again when a `.pth` is made of the folder.
    """
    adapters = {name.removeprefix(LLAMA): a for name, a in tensors.items() if name.startswith(LLAMA)}
    write_adapter(folder, adapters, lora, base=base, base_identity=base_identity)
    return [*adapters, *write_projectors(folder, tensors, adapter_name=adapter_name)]


def write_projectors(folder: Path, tensors: Mapping[str, np.ndarray], *, adapter_name: str = "") -> list[str]:
    """Writes all of the tensors but the adapters into `projectors.safetensors`, and returns their names."""
    others = {name: array for name, array in tensors.items() if not name.startswith(LLAMA)}
    save_safetensors(folder / PROJECTORS_FILE, others, adapter_name=adapter_name)
    return list(others)


def _named(name: str, adapter_name: str) -> str:
    match = ADAPTER.fullmatch(name)
    return f"{match[1]}.{adapter_name}.weight" if match and adapter_name else name
