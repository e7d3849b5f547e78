"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.io.atomic import write_json
from emollama_jax.io.json_files import read_json_object
from emollama_jax.io.paths import PathLike, is_file
from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, adapter_targets, adapters, is_adapter
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
from emollama_jax.weights.locate import locate
from emollama_jax.weights.model_identity import UNKNOWN, ModelIdentity
from emollama_jax.weights.peft_settings import CONFIG, MERGE, AdapterSettings, read_settings
from emollama_jax.weights.safetensors_files import save_safetensors
from emollama_jax.weights.sources import ADAPTER_FILES, open_source
from emollama_jax.weights.tensors import StoredTensor, WeightSource

PREFIX = "base_model.model."
# A tensor of an adapter: its module, "A" or "B", and the adapter's name where the file spells it out.
TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d+)\..+)\.lora_([AB])(?:\.[^.]+)?\.weight")


def adapter_table(targets: tuple[str, ...], *, adapter: str = "") -> Table:
    """PEFT's names: A [r, in], B [out, r]. `adapter` is the adapter's name where the file spells it out."""
    suffix = f".{adapter}.weight" if adapter else ".weight"
    block = PREFIX + "model.layers.{layer}"
    return Table(
        tuple(
            Rule(f"{block}.{theirs}.lora_{letter.upper()}{suffix}", f"layers.{ours}.lora_{letter}", TRANSPOSE)
            for theirs, ours in projections(targets)
            for letter in "ab"
        )
    )


def find_adapter(folder: PathLike) -> epath.Path:
    """The folder itself where it holds an adapter, or the only subfolder that does: PEFT writes adapters that are not
    named "default" into one of their name.

    Raises:
        UserError: several subfolders hold adapters, or a link to the settings leads nowhere.
    """
    folder = locate(folder)
    if is_file(folder / CONFIG) or not folder.is_dir():
        return folder
    found = sorted(inner for inner in folder.iterdir() if is_file(inner / CONFIG))
    if len(found) > 1:
        raise UserError(f"adapters in {', '.join(inner.name for inner in found)}: {folder}; give one of these folders")
    return found[0] if found else folder


def open_adapter(folder: PathLike, num_layers: int | None = None) -> tuple[LoRAConfig, WeightSource]:
    """The adapters of a PEFT folder, as adapters of one rank and one scale on the same layers of every block.

    Adapters of a smaller rank are filled up with zeros, those of another scale have it multiplied into B, and where a
    layer has none, A and B are zeros. What they compute is the same.

    Args:
        num_layers: blocks of the model; default: as many as have adapters.

    Raises:
        UserError: there is no adapter, or it is of a kind that the model does not have.
    """
    folder = find_adapter(folder)
    settings, opened = read_settings(folder), open_source(folder, ADAPTER_FILES)
    stored = _without_adapter_name(opened)
    found = [match for match in map(TENSOR.fullmatch, stored) if match]
    blocks = num_layers or 1 + max((int(match[2]) for match in found), default=0)
    linear = {  # every linear layer of the model, by its path
        f"model.layers.{i}.{theirs}": ours.split(".")[-1]
        for i in range(blocks)
        for theirs, ours in projections(PROJECTIONS)
    }
    lora, planned = _plan(settings, linear, folder)
    # Of layers that have an adapter in other blocks; any others are unknown to whoever loads these.
    idle = {module for module, target in linear.items() if target in lora.targets and module not in planned}
    if stray := [match[0] for match in found if match[1] in idle]:
        raise UserError(
            f"{len(stray)} unknown, {CONFIG} has no adapters there: {', '.join(stray)}: {folder}; save the adapter "
            "again"
        )
    arranged = {
        name: tensor
        for module, target in linear.items()
        if target in lora.targets
        for name, tensor in _arranged(module, target, stored, planned, linear, lora).items()
    }
    return lora, opened.with_tensors(stored | arranged)


def _without_adapter_name(source: WeightSource) -> dict[str, StoredTensor]:
    """The tensors without the adapter's name in theirs. Raises UserError when the file holds several adapters."""
    stored = {}
    for name in source.names():
        match = TENSOR.fullmatch(name)
        stored[f"{PREFIX}{match[1]}.lora_{match[3]}.weight" if match else name] = source.stored(name)
    if len(stored) != len(source.names()):
        raise UserError(f"several adapters in one file: {source.path}; save one of them")
    return stored


def _plan(
    settings: AdapterSettings, linear: Mapping[str, str], folder: PathLike
) -> tuple[LoRAConfig, dict[str, tuple[int, float]]]:
    """One configuration for all adapters, the widest and the largest scale among them, and the rank and α of each.

    Args:
        linear: the name of each linear layer in its block, by its path.

    Raises:
        UserError: settings that make no sense, or adapters where the model has none.
    """
    try:
        if outside := [name for name in ("model.embed_tokens", "lm_head") if settings.adapter(name)]:
            raise UserError(
                f"adapters on {' and '.join(outside)}: {folder}; only those on linear layers of blocks are "
                f"read: {MERGE}"
            )
        planned = {module: adapter for module in linear if (adapter := settings.adapter(module))}
        if not planned:
            raise ValueError(f"target_modules={settings.target_modules!r} names no linear layer of a block")
        widest, (rank, alpha) = max(r for r, _ in planned.values()), max(planned.values(), key=lambda x: x[1] / x[0])
        lora = LoRAConfig(
            rank=widest,
            alpha=alpha if rank == widest else alpha / rank * widest,
            dropout=settings.lora_dropout,
            targets=tuple(sorted({linear[module] for module in planned})),
        )
    except ValueError as error:
        raise UserError(f"unusable adapter settings: {folder / CONFIG} ({error}); save the adapter again") from error
    return lora, planned


def _arranged(
    module: str,
    target: str,
    stored: Mapping[str, StoredTensor],
    planned: Mapping[str, tuple[int, float]],
    linear: Mapping[str, str],
    lora: LoRAConfig,
) -> dict[str, StoredTensor]:
    """A and B of one linear layer, with the rank and the scale of `lora`; those that are missing are left out."""
    tensors = {}
    for letter, axis in (("A", 0), ("B", 1)):
        name = f"{PREFIX}{module}.lora_{letter}.weight"
        if module in planned:
            rank, alpha = planned[module]
            tensor, factor = stored.get(name), (alpha / rank) / (lora.alpha / lora.rank) if letter == "B" else 1.0
            if tensor is not None and len(tensor.shape) == 2 and tensor.shape[axis] == rank:
                tensors[name] = _widened(tensor, axis, lora.rank, factor)
        else:
            alike = (f"{PREFIX}{other}.lora_{letter}.weight" for other in planned if linear[other] == target)
            like = next((stored[other] for other in alike if other in stored), None)
            if like is not None and len(like.shape) == 2:
                shape = (lora.rank, like.shape[1]) if letter == "A" else (like.shape[0], lora.rank)
                tensors[name] = StoredTensor(shape, lambda shape=shape: np.zeros(shape, np.float32))
    return tensors


def _widened(tensor: StoredTensor, axis: int, rank: int, factor: float) -> StoredTensor:
    """A tensor with zeros behind it on one axis, and times a factor, in float32; the tensor itself where that is
    nothing."""
    missing = rank - tensor.shape[axis]
    if not missing and math.isclose(factor, 1, rel_tol=1e-12):
        return tensor
    pad = [(0, missing if i == axis else 0) for i in range(2)]

    def read() -> np.ndarray:
        return np.pad(tensor.read().astype(np.float32) * np.float32(factor), pad)

    return StoredTensor(tuple(size + after for size, (_, after) in zip(tensor.shape, pad, strict=True)), read)


def adapter_config(folder: PathLike, num_layers: int | None = None) -> LoRAConfig:
    """The adapters a PEFT folder holds: see `open_adapter`."""
    lora, source = open_adapter(folder, num_layers)
    source.close()
    return lora


def adapter_base(folder: PathLike) -> tuple[str, ModelIdentity]:
    """The language model that the adapters of a PEFT folder were trained on, as far as that is recorded: its name or
    path, "" where there is none, and which it is."""
    folder = find_adapter(folder)
    with open_source(folder, ADAPTER_FILES) as source:
        identity = ModelIdentity.from_metadata(source.extra)
    return str(read_json_object(folder / CONFIG).get("base_model_name_or_path") or ""), identity


def load_adapter(model: nnx.Module, folder: PathLike) -> LoadReport:
    """Reads the adapters in `folder` into the model's own, in place.

    Raises:
        UserError: the adapters are not those of the model (rank, layers, scale), or damaged.
    """
    found, source = open_adapter(folder, model.config.num_layers)
    with source:
        check_adapters(model, found, folder)
        return load_into(model, is_adapter, source, adapter_table(found.targets))


def check_adapters(model: nnx.Module, found: LoRAConfig, where: PathLike) -> None:
    """Raises UserError when the adapters found are not on the model's layers, or have another scale."""
    targets, scales = adapter_targets(model), {layer.scale for _, layer in adapters(model)}
    scale = found.alpha / found.rank
    if targets != found.targets or not all(math.isclose(ours, scale, rel_tol=1e-6) for ours in scales):
        raise UserError(
            f"the adapters are on {', '.join(found.targets)} with scale {scale:g}, the model's on "
            f"{', '.join(targets) or 'nothing'} with {', '.join(f'{s:g}' for s in scales) or 'none'}: {where}; "
            f"make the model with the adapter's lora.targets, lora.rank and lora.alpha: rank {found.rank}, "
            f"alpha {found.alpha:.8g}"
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


def write_adapter(
    folder: Path,
    tensors: dict[str, np.ndarray],
    lora: LoRAConfig,
    *,
    base: str = "",
    base_identity: ModelIdentity = UNKNOWN,
) -> None:
    """Writes adapters under PEFT's names into an existing folder, with their settings.

    Which language model they belong to is in the metadata of the tensors' file: older versions of PEFT refuse settings
    that they do not know.
    """
    save_safetensors(folder / "adapter_model.safetensors", tensors, **base_identity.as_metadata())
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
