"""Language models in and out: whichever format they come in, and Hugging Face folders.

model, report = load_llama("Llama-2-7b-chat-hf", kernel_dtype="int8")
save_hugging_face("merged", model, tokenizer, merge_adapters=True)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from emollama_jax.io.atomic import write_json
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import AxisRules, abstract, shardings
from emollama_jax.text.gguf_tokenizers import tokenizer_from_gguf
from emollama_jax.text.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from emollama_jax.weights.base_checkpoint import PARAMS, check_base, is_base_checkpoint, load_base
from emollama_jax.weights.engine import LoadReport, export, first_device, load, param_values, stream_params
from emollama_jax.weights.llama import TABLES, architecture, arrange, hugging_face_config, hugging_face_table
from emollama_jax.weights.locate import locate
from emollama_jax.weights.safetensors_files import write_safetensors_folder
from emollama_jax.weights.sources import open_source, read_config
from emollama_jax.weights.tensors import WeightSource

NO_LORA = LoRAConfig(rank=0)
# Settings that are not carried: records of how the files came to be, and what we compute ourselves.
NOT_CARRIED = frozenset("_name_or_path _commit_hash transformers_version dtype rope_scaling rope_parameters".split())


def load_llama(
    where: PathLike | WeightSource,
    *,
    lora: LoRAConfig = NO_LORA,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: AxisRules = (),
    **execution: str | bool | int,
) -> tuple[Llama, LoadReport]:
    """The decoder in a Hugging Face or Flax folder, a GGUF file, or a base checkpoint of our own.

    Args:
        where: the folder or file, or weights that are open already.
        lora: new adapters to put on it, initialised from `seed`.
        mesh: where the parameters go, after `rules`; default: the first device.
        execution: `LlamaConfig` fields that are not the architecture's: `kernel_dtype`, `compute_dtype`, `remat`, ...

    Raises:
        UserError: no model there, damaged files, another architecture, or tensors that do not fit it.
    """
    mesh, rules = (mesh, rules) if mesh else (first_device(), ())
    build = lambda config: lambda: Llama(config.for_devices(mesh.devices.flat), lora, rngs=nnx.Rngs(seed))
    if isinstance(where, WeightSource):
        config = LlamaConfig(**architecture(where), **execution)
        return load(build(config), arrange(where, config), TABLES[where.format](config), mesh=mesh, rules=rules)
    if is_base_checkpoint(where):
        return load_base(where, build, execution, mesh=mesh, rules=rules)
    with open_source(where) as source:
        return load_llama(source, lora=lora, seed=seed, mesh=mesh, rules=rules, **execution)


def stream_llama(
    source: WeightSource, **execution: str | bool | int
) -> tuple[LlamaConfig, Iterator[tuple[str, Any]], LoadReport]:
    """The decoder's settings, and its parameters by path in the order of the paths, each read when its turn comes: for
    a model that the machine could not hold as a whole. See `load_llama`.

    Raises:
        UserError: as `load_llama`, now or as the parameters come.
    """
    config, mesh = LlamaConfig(**architecture(source), **execution), first_device()
    config = config.for_devices(mesh.devices.flat)
    _, state = abstract(lambda: Llama(config, NO_LORA, rngs=nnx.Rngs(0)))
    where = param_values(shardings(state, mesh, ()))
    params, report = stream_params(arrange(source, config), TABLES[source.format](config), param_values(state), where)
    return config, params, report


def load_base_tokenizer(where: PathLike | WeightSource, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies beside a model's weights, or inside its GGUF file.

    Raises:
        UserError: there is none, it is damaged, or it has more ids than the model has rows (`vocab_size`).
    """
    path = locate(where.path if isinstance(where, WeightSource) else where)
    if isinstance(where, WeightSource) and where.format == "gguf":
        tokenizer = tokenizer_from_gguf(where.config)
    elif path.suffix == ".gguf" and path.is_file():
        with open_source(path) as source:
            return load_base_tokenizer(source, vocab_size)
    else:
        if is_base_checkpoint(path):
            check_base(path, lambda name: name != PARAMS)
        tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    check_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


@dataclass(frozen=True)
class CarriedSettings:
    """What a model's files say and a model of ours does not need; it is kept for other programs.

    Attributes:
        config: settings of a `config.json`.
        generation: the content of a `generation_config.json`, or None.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None


def read_carried(where: PathLike | WeightSource) -> CarriedSettings:
    """The settings beside a model that `load_llama` reads.

    Raises:
        UserError: as `open_source`, or files that are damaged.
    """
    if isinstance(where, WeightSource):
        if where.format == "gguf":
            length = where.config.get("llama.context_length")
            return CarriedSettings({"max_position_embeddings": length} if length else {})
        path, config = where.path, where.config or {}
    elif is_base_checkpoint(where):
        path, config = as_path(where), read_config(as_path(where))
    else:
        with open_source(where) as source:
            return read_carried(source)
    generation = read_config(path if path.is_dir() else path.parent, "generation_config.json")
    config = {name: value for name, value in (config or {}).items() if name not in NOT_CARRIED}
    return CarriedSettings(config, generation)


def save_settings(
    folder: Path, config: LlamaConfig, tokenizer: Tokenizer, carried: CarriedSettings, *, dtype: str
) -> None:
    """Writes `config.json` as transformers has it, `generation_config.json` where there is something to say, and the
    tokenizer, into an existing folder."""
    ends = list(tokenizer.end_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    settings = {**carried.config, **hugging_face_config(config, dtype), **ids, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "config.json", settings)
    generation = carried.generation or (ids if len(ends) > 1 else None)
    if generation:
        write_json(folder / "generation_config.json", dict(generation))
    tokenizer.save(folder)


def save_hugging_face(
    folder: Path,
    model: Llama,
    tokenizer: Tokenizer,
    *,
    dtype: str | None = None,
    merge_adapters: bool = False,
    carried: CarriedSettings = CarriedSettings(),
) -> None:
    """Writes a folder that `LlamaForCausalLM.from_pretrained` loads, with its tokenizer.

    Args:
        dtype: of the tensors; default: as the model stores them, bfloat16 for quantised kernels.
        merge_adapters: add the adapters to the kernels; otherwise they are left out (see `peft.save_adapter`).
        carried: what else the model's files said.
    """
    config = model.config
    write_safetensors_folder(
        folder, export(model, hugging_face_table(config), dtype=dtype, merge_adapters=merge_adapters)
    )
    save_settings(folder, config, tokenizer, carried, dtype=dtype or config.param_dtype)
