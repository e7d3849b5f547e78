"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.lora import LoRAConfig, adapter_targets, adapters, is_adapter
from emollama_jax.weights.engine import (
    TRANSPOSE,
    LoadReport,
    Rule,
    Table,
    export,
    param_values,
    read_params,
    set_params,
)
from emollama_jax.weights.llama import projections
from emollama_jax.weights.safetensors_files import save_safetensors
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource

CONFIG = "adapter_config.json"
# Settings that change what an adapter computes and that ours do not have, with the values that switch them off.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}


def adapter_table(targets: tuple[str, ...], *, adapter: str = "") -> Table:
    """PEFT's names: A [r, in], B [out, r]. `adapter` is the adapter's name where the file spells it out."""
    suffix = f".{adapter}.weight" if adapter else ".weight"
    prefix = "base_model.model.model.layers.{layer}"
    return Table(
        tuple(
            Rule(f"{prefix}.{theirs}.lora_{letter.upper()}{suffix}", f"layers.{ours}.lora_{letter}", TRANSPOSE)
            for theirs, ours in projections(targets)
            for letter in "ab"
        )
    )


def adapter_config(folder: PathLike) -> LoRAConfig:
    """The adapters a PEFT folder holds.

    Raises:
        UserError: there is no configuration, or it asks for a kind of adapter that the model does not have.
    """
    file = as_path(folder) / CONFIG
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {CONFIG}: {folder}; give the folder that PEFT's save_pretrained wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the adapter's settings: {file} ({error}); copy it again") from error
    for name, plain in PLAIN.items():
        if settings.get(name, plain[0]) not in plain:
            raise UserError(f"adapter setting {name}={settings[name]!r}: {file}; only plain LoRA is supported")
    try:
        targets, rank = settings["target_modules"], settings["r"]
        if not (targets and isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
            raise ValueError(f"target_modules={targets!r} is no list of layers' names")
        if not (isinstance(rank, int) and rank > 0):
            raise ValueError(f"r={rank!r} is no rank")
        return LoRAConfig(
            rank=rank,
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout", 0.0)),
            targets=tuple(sorted(targets)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"unusable adapter settings: {file} ({error}); save the adapter again") from error


def load_adapter(model: nnx.Module, folder: PathLike) -> LoadReport:
    """Reads the adapters in `folder` into the model's own, in place.

    Raises:
        UserError: the adapters are not those of the model (rank, layers, scale), or damaged.
    """
    found = adapter_config(folder)
    check_adapters(model, found, folder)
    with open_source(folder) as source:
        named = any(name.endswith(".lora_A.default.weight") for name in source.names())
        return load_into(model, is_adapter, source, adapter_table(found.targets, adapter="default" if named else ""))


def check_adapters(model: nnx.Module, found: LoRAConfig, where: PathLike) -> None:
    """Raises UserError when the adapters found are not on the model's layers, or have another scale."""
    targets, scales = adapter_targets(model), {layer.scale for _, layer in adapters(model)}
    if targets != found.targets or scales != {found.alpha / found.rank}:
        raise UserError(
            f"the adapters are on {', '.join(found.targets)} with scale {found.alpha / found.rank:g}, the model's on "
            f"{', '.join(targets) or 'nothing'} with {', '.join(f'{s:g}' for s in scales) or 'none'}: {where}; "
            "make the model with the adapter's lora.targets, lora.rank and lora.alpha"
        )


def load_into(model: nnx.Module, which: nnx.filterlib.Filter, source: WeightSource, table: Table) -> LoadReport:
    """Reads the parameters that the filter `which` chooses into the model, in place."""
    state = nnx.state(model, which)
    params = param_values(state)
    values, report = read_params(source, table, params, jax.tree.map(lambda x: x.sharding, params))
    set_params(state, values)
    nnx.update(model, state)
    return report


def save_adapter(folder: Path, model: nnx.Module, *, base: str = "") -> None:
    """Writes the model's adapters into an existing folder, for PEFT's `PeftModel.from_pretrained`.

    `base` is the base model's name or path, which PEFT records.
    """
    layer = next((layer for _, layer in adapters(model)), None)
    if layer is None:
        raise ValueError("the model has no adapters")
    targets, rank = adapter_targets(model), layer.lora_a.shape[-1]
    lora = LoRAConfig(rank=rank, alpha=layer.scale * rank, dropout=layer.dropout, targets=targets)
    write_adapter(folder, dict(export(model, adapter_table(targets))), lora, base=base)


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], lora: LoRAConfig, *, base: str = "") -> None:
    """Writes adapters under PEFT's names into an existing folder, with their settings."""
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
