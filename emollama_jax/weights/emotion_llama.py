"""Emotion-LLaMA's trained weights, and the whole model from its files.

    model, reports = load_emotion_llama(
        "weights/llama2", config, trained="Emotion_LLaMA.pth", eva_vit="eva_vit_g.pth"
    )

Trained weights are adapters and projectors. They lie in the reference's checkpoints,
`{"model": {name: tensor}, ...}`, or in a folder of our own, which PEFT reads too:

    adapter_config.json, adapter_model.safetensors   the adapters, as PEFT keeps them
    projectors.safetensors                           the projectors, under the reference's names

or in a training run's folder (`weights/runs.py`).

A reference checkpoint also holds `attention.*`, a part of the model that its loss never reaches: we do not use these
tensors, but carry them along, so that what is written again has every name the reference saved.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.fields import fields_affecting
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import PROJECTIONS, LoRAConfig, adapters, is_adapter
from emollama_jax.models.projectors import Projectors
from emollama_jax.sharding import init_sharded
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.engine import LoadReport, Rule, Table, export, first_device
from emollama_jax.weights.eva_vit import load_eva_vit
from emollama_jax.weights.llama import architecture
from emollama_jax.weights.peft import adapter_config, adapter_table, check_adapters, load_into, write_adapter
from emollama_jax.weights.pretrained import load_llama
from emollama_jax.weights.runs import is_run, read_run
from emollama_jax.weights.safetensors_files import save_safetensors
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import StoredTensor, WeightSource
from emollama_jax.weights.torch_files import save_torch
from emollama_jax.weights.vit import linear_rules

PROJECTORS = {  # the reference's names, and ours
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
    """Trained weights in files, opened.

    Attributes:
        source: the tensors under the reference's names, without the adapter's name.
        lora: the adapters that they are.
        adapter_name: what newer PEFT versions put before an adapter's ".weight"; "" where the file has nothing there.
        dropped: names in the file that are no weights of the model: the optimiser's.
    """

    source: WeightSource
    lora: LoRAConfig
    adapter_name: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def path(self) -> epath.Path:
        """The file or folder that was opened."""
        return self.source.path

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor, `attention.*` too, under the reference's name."""
        return ((name, self.source.read(name)) for name in self.source.names())


def open_trained(path: PathLike, *, alpha: float | None = None) -> TrainedWeights:
    """Opens a reference checkpoint (of Emotion-LLaMA or MiniGPT-v2), a folder that `write_folder` wrote, or a training
    run's folder, whose newest checkpoint is read, or one of its checkpoints.

    Args:
        alpha: the α of the adapters in a reference checkpoint, which does not record it; default: 16, the reference's.
            Folders say their own.

    Raises:
        UserError: there are no trained weights, or files that are damaged or unsafe.
    """
    if is_run(path):
        return _open_run(path)
    path = as_path(path)
    if path.is_dir():
        return _open_folder(path)
    source = open_source(path)
    names = {name.removeprefix("model/"): name for name in source.names() if name.startswith("model/")}
    names = names or {name: name for name in source.names()}  # a bare state dict
    dropped = tuple(sorted(set(source.names()) - set(names.values())))
    source, adapter_name = _unnamed(source.with_tensors({name: source.stored(full) for name, full in names.items()}))
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
    return TrainedWeights(source, lora, adapter_name, dropped)


def _open_folder(folder: epath.Path) -> TrainedWeights:
    file = folder / PROJECTORS_FILE
    lora, source = adapter_config(folder), open_source(folder)
    if not file.is_file():
        raise UserError(f"no {PROJECTORS_FILE}: {folder}; give a folder that `emollama export --to peft` wrote")
    projectors = open_source(file)
    tensors = {LLAMA + name: source.stored(name) for name in source.names()}
    tensors |= {name: projectors.stored(name) for name in projectors.names()}
    source, _ = _unnamed(source.with_tensors(tensors))
    _check_names(source)
    return TrainedWeights(source, lora, projectors.extra.get("adapter_name", ""))


def _open_run(path: PathLike) -> TrainedWeights:
    run = read_run(path)
    settings = run.meta["config"]["lora"]
    lora = LoRAConfig(**settings | {"targets": tuple(sorted(settings["targets"]))})
    tensors = dict(run.carried)
    for rule in trained_table(lora.targets).rules:
        value = run.values[rule.param]
        layers = {rule.tensor.format(layer=i): x for i, x in enumerate(value)} if "{layer}" in rule.tensor else None
        tensors |= {name: rule.transform.out(x) for name, x in (layers or {rule.tensor: value}).items()}
    stored = {name: StoredTensor(x.shape, lambda x=x: x) for name, x in tensors.items()}
    return TrainedWeights(WeightSource(path, "orbax", stored), lora, run.meta["adapter_name"])


def _check_names(source: WeightSource) -> None:
    """Raises UserError for tensors that are neither adapters nor projectors nor carried."""
    projectors = {f"{name}.{kind}" for name in PROJECTORS for kind in ("weight", "bias")}
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
    rules += linear_rules((theirs, f"projectors.{ours}") for theirs, ours in PROJECTORS.items())
    init = tuple(rf"projectors\.{name}\..*" for name in NOT_IN_MINIGPT) if minigpt else ()
    return Table(tuple(rules), (CARRIED,), init)


def load_trained(model: EmotionLlama, trained: TrainedWeights) -> LoadReport:
    """Reads adapters and projectors into the model, in place. From MiniGPT-v2's checkpoint, which has neither features
    nor a class token, their projectors keep the values they have.

    Raises:
        UserError: the adapters are not those of the model, tensors are missing, unknown or of the wrong shape.
    """
    check_adapters(model, trained.lora, trained.path)
    theirs = {ours: name for name, ours in PROJECTORS.items()}
    present = trained.source.names()
    minigpt = not any(name.startswith(tuple(f"{theirs[n]}." for n in NOT_IN_MINIGPT)) for name in present)
    return load_into(model, is_trainable, trained.source, trained_table(trained.lora.targets, minigpt=minigpt))


def load_adapters(model: Llama, trained: TrainedWeights) -> LoadReport:
    """Reads the adapters alone into a language model, in place. Raises UserError when they are not those it has."""
    check_adapters(model, trained.lora, trained.path)
    names = [name for name in trained.source.names() if name.startswith(LLAMA)]
    source = trained.source.with_tensors({name.removeprefix(LLAMA): trained.source.stored(name) for name in names})
    return load_into(model, is_adapter, source, adapter_table(trained.lora.targets))


def trained_tensors(model: EmotionLlama, carried: Mapping[str, np.ndarray] | None = None) -> Iterator:
    """The model's adapters and projectors, (name, array) under the reference's names, and what is to be carried along
    (`attention.*`), as `write_pth` and `write_folder` take them."""
    targets = tuple(sorted({path[-1] for path, _ in adapters(model)}))
    yield from export(model, trained_table(targets))
    yield from (carried or {}).items()


def write_pth(path: Path, tensors: Iterable[tuple[str, np.ndarray]], *, adapter_name: str = "") -> list[str]:
    """Writes a checkpoint as the reference does, and returns the names in it.

    Args:
        adapter_name: put before an adapter's ".weight", for newer PEFT versions; "default" is theirs.
    """
    named = [(_named(name, adapter_name), array) for name, array in tensors]
    save_torch(path, named, {"optimizer": {}, "config": {}, "scaler": None, "epoch": 0})
    return [name for name, _ in named]


def write_folder(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], lora: LoRAConfig, *, base: str = "", adapter_name: str = ""
) -> list[str]:
    """Writes adapters and projectors into an existing folder, and returns the names in it.

    Args:
        base: the name or path of the language model, which PEFT records.
        adapter_name: to be put into the names again when a `.pth` is made of the folder.
    """
    tensors = dict(tensors)
    adapters = {name.removeprefix(LLAMA): a for name, a in tensors.items() if name.startswith(LLAMA)}
    write_adapter(folder, adapters, lora, base=base)
    return [*adapters, *write_projectors(folder, tensors.items(), adapter_name=adapter_name)]


def write_projectors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, adapter_name: str = "") -> list[str]:
    """Writes all of the tensors but the adapters into `projectors.safetensors`, and returns their names."""
    others = {name: array for name, array in tensors if not name.startswith(LLAMA)}
    save_safetensors(folder / PROJECTORS_FILE, others, adapter_name=adapter_name)
    return list(others)


def _named(name: str, adapter_name: str) -> str:
    match = ADAPTER.fullmatch(name)
    return f"{match[1]}.{adapter_name}.weight" if match and adapter_name else name


def load_emotion_llama(
    base: PathLike,
    config: Config,
    *,
    trained: PathLike | None = None,
    eva_vit: PathLike | None = None,
    ln_vision: PathLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[EmotionLlama, dict[str, LoadReport]]:
    """The whole model, and what became of each file's tensors: "llama", "trained", "eva_vit".

    Args:
        base: the language model: a base checkpoint, or any other that `load_llama` reads.
        trained: adapters and projectors to go on from; without them they are new, after `config.seed`.
        eva_vit: the encoder of the frame; without it the model takes batches of stored `image_tokens`.
        ln_vision: see `load_eva_vit`.
        mesh: where the parameters go, after `config.sharding`; default: the first device.

    Raises:
        UserError: files that are missing, damaged or not those of `config`.
    """
    _check_architecture(base, config.llama)
    rules = config.sharding if mesh else ()
    placed = {"mesh": mesh, "rules": rules}
    execution = {name: getattr(config.llama, name) for name in fields_affecting(LlamaConfig, "execution")}
    reports: dict[str, LoadReport] = {}
    opened = open_trained(trained, alpha=config.lora.alpha) if trained else None  # small, and read before the large
    llama, reports["llama"] = load_llama(base, lora=config.lora, seed=config.seed, **placed, **execution)
    projectors = init_sharded(
        lambda: Projectors(
            config.projectors,
            image_width=config.eva_vit.hidden_size,
            width=config.llama.hidden_size,
            compute_dtype=config.llama.compute_dtype,
            rngs=nnx.Rngs(config.seed),
        ),
        mesh or first_device(),
        rules,
    )
    encoder = None
    if eva_vit:
        encoder, reports["eva_vit"] = load_eva_vit(eva_vit, config.eva_vit, ln_vision=ln_vision, **placed)
    model = EmotionLlama(llama, projectors, encoder)
    if opened:
        reports["trained"] = load_trained(model, opened)
    return model, reports


def _check_architecture(base: PathLike, config: LlamaConfig) -> None:
    """Raises UserError when the language model is not the one that the experiment describes."""
    if is_base_checkpoint(base):
        found = {name: getattr(read_manifest(base)["llama"], name) for name in LlamaConfig.__dataclass_fields__}
    else:
        with open_source(base) as source:
            found = architecture(source)
    execution = fields_affecting(LlamaConfig, "execution")
    wrong = [n for n, value in found.items() if n not in execution and value != getattr(config, n)]
    if wrong:
        there = ", ".join(f"{name}={found[name]!r}" for name in wrong)
        asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise UserError(f"the language model has {there}, the config llama: {asked}: {base}; use the model's config")
