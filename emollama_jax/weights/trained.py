"""Emotion-LLaMA's trained weights: adapters and projectors, from files or by parameter path.

Files are the reference's checkpoints, `{"model": {name: tensor}, ...}`, or a folder of our own, which PEFT reads too:

    adapter_config.json, adapter_model.safetensors   the adapters, as PEFT keeps them
    projectors.safetensors                           the projectors, under the reference's names

A training run keeps them by parameter path (`runs/run.py`).

A reference checkpoint also holds `attention.*`, a part of the model that its loss never reaches: we do not use these
tensors, but carry them along, so that what is written again has every name the reference saved.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from emollama_jax.errors import UserError
from emollama_jax.io.paths import PathLike
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, is_adapter
from emollama_jax.weights.engine import LoadReport, Rule, Table, param_values
from emollama_jax.weights.locate import locate
from emollama_jax.weights.model_identity import ANY_BASE, UNKNOWN, ModelIdentity, check_base
from emollama_jax.weights.peft import (
    adapter_base,
    adapter_table,
    check_adapters,
    find_adapter,
    load_into,
    open_adapter,
)
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from emollama_jax.weights.vit import linear_rules

PROJECTOR_NAMES = {  # ours by the reference's
    "llama_proj": "image_proj",
    "feats_llama_proj1": "mae_proj",
    "feats_llama_proj2": "videomae_proj",
    "feats_llama_proj3": "hubert_proj",
    "cls_tk_llama_proj": "cls_proj",
}
NOT_IN_MINIGPT = ("mae_proj", "videomae_proj", "hubert_proj", "cls_proj")  # its checkpoint has the image's alone
CARRIED = r"attention\..*"
LLAMA = "llama_model."  # before PEFT's names
PROJECTORS_FILE = "projectors.safetensors"
ADAPTER = re.compile(rf"(.*\.({'|'.join(PROJECTIONS)})\.lora_[AB])\.(?:([^.]+)\.)?weight")


@dataclass(frozen=True)
class TrainedWeights:
    """Trained weights, opened.

    Attributes:
        source: the tensors under the reference's names, without the adapter's name, or by parameter path.
        lora: the adapters that they are.
        adapter_name: what newer PEFT versions put before an adapter's ".weight"; "" where the file has nothing there.
        dropped: names in the file that are no weights of the model: the optimiser's.
        by_path: whether the tensors are named by parameter path.
        base: the name or folder of the language model that they were trained on; "" where that is not recorded.
        base_identity: which it is, as far as that is recorded.
    """

    source: WeightSource
    lora: LoRAConfig
    adapter_name: str = ""
    dropped: tuple[str, ...] = ()
    by_path: bool = False
    base: str = ""
    base_identity: ModelIdentity = UNKNOWN

    @classmethod
    def from_values(
        cls,
        path: PathLike,
        values: Mapping[str, np.ndarray],
        carried: Mapping[str, np.ndarray],
        *,
        lora: LoRAConfig,
        **recorded: Any,
    ) -> "TrainedWeights":
        """Makes them of arrays by parameter path, and tensors that are carried along under their own names.

        Args:
            path: where they are from, for messages.
            recorded: `adapter_name`, `base`, `base_identity`.
        """
        return cls(_array_source(path, {**values, **carried}), lora, by_path=True, **recorded)

    @property
    def path(self) -> epath.Path:
        """The file or folder that was opened."""
        return self.source.path

    def check_base(self, base: PathLike, found: ModelIdentity, *, otherwise: str = ANY_BASE) -> None:
        """Checks that the language model `base`, which is `found`, is the one that they were trained on.

        Raises:
            UserError: it is another.
        """
        check_base(self.path, self.base_identity, self.base, base, found, otherwise=otherwise)

    def carried(self) -> dict[str, np.ndarray]:
        """Reads the tensors that we do not use but keep."""
        return {name: self.source.read_weights(name) for name in self.source.names() if is_carried(name)}

    def reference_tensors(self) -> dict[str, np.ndarray]:
        """Reads every tensor, `attention.*` too, under the reference's name and in its layout.

        Raises:
            UserError: tensors are missing or do not fit each other, or hold no finite floats.
        """
        if not self.by_path:
            self._check_complete()
            return {name: self.source.read_weights(name) for name in self.source.names()}
        tensors = self.carried()
        for rule in trained_table(self.lora.targets).rules:
            value = self.source.read_weights(rule.param)
            layers = {rule.tensor.format(layer=i): x for i, x in enumerate(value)} if "{layer}" in rule.tensor else None
            tensors |= {name: rule.transform.out(x) for name, x in (layers or {rule.tensor: value}).items()}
        return dict(sorted(tensors.items()))

    def _check_complete(self) -> None:
        """Raises UserError when tensors are missing, or of shapes that do not fit each other; no model is needed."""
        names = set(self.source.names())
        layers = 1 + max(int(match[1]) for name in names if (match := re.search(r"layers\.(\d+)\..*lora_", name)))
        problems = []
        for rule in trained_table(self.lora.targets, minigpt=is_minigpt(self.source)).rules:
            if rule.param.split(".")[1] in NOT_IN_MINIGPT and is_minigpt(self.source):
                continue
            wanted = list(dict.fromkeys(rule.tensor.format(layer=layer) for layer in range(layers)))
            problems += [f"no {name}" for name in wanted if name not in names]
            shapes = {self.source.shape(name) for name in wanted if name in names}
            axis = {"lora_a": 0, "lora_b": 1}.get(rule.param.split(".")[-1])
            if len(shapes) > 1 or any(
                axis is not None and shape[axis : axis + 1] != (self.lora.rank,) for shape in shapes
            ):
                problems.append(f"{rule.tensor} of the shapes {', '.join(map(str, sorted(shapes)))}")
        for name in names & {f"{projector}.weight" for projector in PROJECTOR_NAMES}:
            bias = name.replace(".weight", ".bias")
            if bias in names and self.source.shape(bias) != self.source.shape(name)[:1]:
                problems.append(f"{name} {self.source.shape(name)} beside {bias} {self.source.shape(bias)}")
        if problems:
            raise UserError(f"incomplete trained weights, {', '.join(problems)}: {self.path}; save or copy them again")


def is_minigpt(source: WeightSource) -> bool:
    """Whether these are MiniGPT-v2's trained weights, which have the image's projector alone."""
    theirs = {ours: name for name, ours in PROJECTOR_NAMES.items()}
    others = tuple(f"{theirs[name]}." for name in NOT_IN_MINIGPT)
    return not any(name.startswith(others) for name in source.names())


def open_trained(path: PathLike, *, alpha: float | None = None, num_layers: int | None = None) -> TrainedWeights:
    """Opens a reference checkpoint (of Emotion-LLaMA or MiniGPT-v2), or a folder that `write_folder` wrote.

    Args:
        alpha: the α of the adapters in a reference checkpoint, which does not record it; default: 16, the reference's.
            Folders say their own.
        num_layers: blocks of the model; default: as many as have adapters.

    Raises:
        UserError: there are no trained weights, or files that are damaged or unsafe.
    """
    path = locate(path)
    if path.is_dir():
        return _open_folder(path, num_layers)
    source, adapter_name = _unnamed(open_source(path))
    found = [match for match in map(ADAPTER.fullmatch, source.names()) if match]
    if not found:
        raise UserError(f"no LoRA adapters in this file: {path}; give a checkpoint of Emotion-LLaMA or MiniGPT-v2")
    ranks = {source.shape(match[0])[0] for match in found if match[1].endswith("A")}
    if len(ranks) != 1:
        raise UserError(f"adapters of the ranks {sorted(ranks)}: {path}; only one rank for all is supported")
    _check_names(source)
    lora = LoRAConfig(
        rank=ranks.pop(), alpha=alpha or LoRAConfig().alpha, targets=tuple(sorted({match[2] for match in found}))
    )
    base, identity = str(source.extra.get("base", "")), ModelIdentity.from_metadata(source.extra)
    return TrainedWeights(source, lora, adapter_name, source.outside, base=base, base_identity=identity)


def _open_folder(folder: epath.Path, num_layers: int | None) -> TrainedWeights:
    lora, source = open_adapter(folder, num_layers)
    files = [where / PROJECTORS_FILE for where in (find_adapter(folder), folder)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"no {PROJECTORS_FILE}: {folder}; give a folder that `emollama export --to peft` wrote")
    projectors = open_source(file)
    tensors = {LLAMA + name: source.stored(name) for name in source.names()}
    tensors |= {name: projectors.stored(name) for name in projectors.names()}
    source = source.with_tensors(tensors)
    _check_names(source)
    base, identity = adapter_base(folder)
    adapter_name = projectors.extra.get("adapter_name", "")
    return TrainedWeights(source, lora, adapter_name, base=base, base_identity=identity)


def _check_names(source: WeightSource) -> None:
    """Raises UserError for tensors that are neither adapters nor projectors nor carried."""
    projectors = {f"{name}.{kind}" for name in PROJECTOR_NAMES for kind in ("weight", "bias")}
    known = lambda name: name in projectors or is_carried(name) or (name.startswith(LLAMA) and ADAPTER.fullmatch(name))
    if unknown := [name for name in source.names() if not known(name)]:
        raise UserError(
            f"{len(unknown)} unknown tensors: {', '.join(unknown)}: {source.path}; give a checkpoint of Emotion-LLaMA "
            "or MiniGPT-v2, which holds only what was trained"
        )


def _unnamed(source: WeightSource) -> tuple[WeightSource, str]:
    """The source without the adapter's name in the names of its tensors, and that name."""
    matches = {name: ADAPTER.fullmatch(name) for name in source.names()}
    adapter_names = {match[3] or "" for match in matches.values() if match}
    if len(adapter_names) > 1:
        raise UserError(f"several adapters, {', '.join(sorted(adapter_names))}: {source.path}; save one of them")
    short = {name: f"{match[1]}.weight" if match else name for name, match in matches.items()}
    return source.with_tensors({short[n]: source.stored(n) for n in source.names()}), "".join(adapter_names)


def is_carried(name: str) -> bool:
    """Whether a tensor is one that we do not use but keep."""
    return re.fullmatch(CARRIED, name) is not None


def trained_table(targets: tuple[str, ...], *, minigpt: bool = False) -> Table:
    """The reference's names of adapters and projectors; MiniGPT-v2's file has but one of the projectors."""
    rules = [Rule(LLAMA + r.tensor, f"llama.{r.param}", r.transform) for r in adapter_table(targets).rules]
    rules += linear_rules((theirs, f"projectors.{ours}") for theirs, ours in PROJECTOR_NAMES.items())
    init = tuple(rf"projectors\.{name}\..*" for name in NOT_IN_MINIGPT) if minigpt else ()
    return Table(tuple(rules), (CARRIED,), init)


def load_trained(model: EmotionLlama, trained: TrainedWeights) -> LoadReport:
    """Reads adapters and projectors into the model, in place.

    From MiniGPT-v2's checkpoint, which has neither features nor a class token, their projectors keep the values they
    have.

    Raises:
        UserError: the adapters are not those of the model, tensors are missing, unknown or of the wrong shape.
    """
    check_adapters(model, trained.lora, trained.path)
    if trained.by_path:
        table = Table(tuple(Rule(path, path) for path in param_values(nnx.state(model, is_trainable))), (CARRIED,))
    else:
        table = trained_table(trained.lora.targets, minigpt=is_minigpt(trained.source))
    return load_into(model, is_trainable, trained.source, table)


def load_adapters(model: Llama, trained: TrainedWeights) -> LoadReport:
    """Reads the adapters alone into a language model, in place. Raises UserError when they are not those it has."""
    check_adapters(model, trained.lora, trained.path)
    tensors = trained.reference_tensors()
    adapter = {name.removeprefix(LLAMA): array for name, array in tensors.items() if name.startswith(LLAMA)}
    return load_into(model, is_adapter, _array_source(trained.path, adapter), adapter_table(trained.lora.targets))


def _array_source(path: PathLike, arrays: Mapping[str, np.ndarray]) -> WeightSource:
    return WeightSource(path, "arrays", {name: StoredTensor(x.shape, lambda x=x: x) for name, x in arrays.items()})
