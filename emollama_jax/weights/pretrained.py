"""Language models in and out: whichever format they come in, and Hugging Face folders.

model, report = load_llama("Llama-2-7b-chat-hf", kernel_dtype="int8")
save_hugging_face("merged", model, tokenizer, merge_adapters=True)
"""

from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from emollama_jax.io.atomic import write_json
from emollama_jax.io.paths import PathLike, as_path
from emollama_jax.models.llama import Llama, LlamaConfig
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import AxisRules
from emollama_jax.text.tokenizers import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_from_gguf
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, load_base
from emollama_jax.weights.engine import LoadReport, export, first_device, load
from emollama_jax.weights.llama import TABLES, architecture, hugging_face_config, hugging_face_table
from emollama_jax.weights.safetensors_files import write_safetensors_folder
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.tensors import WeightSource

NO_LORA = LoRAConfig(rank=0)


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
        return load(build(config), where, TABLES[where.format](config), mesh=mesh, rules=rules)
    if is_base_checkpoint(where):
        return load_base(where, build, execution, mesh=mesh, rules=rules)
    with open_source(where) as source:
        return load_llama(source, lora=lora, seed=seed, mesh=mesh, rules=rules, **execution)


def load_base_tokenizer(where: PathLike | WeightSource, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies beside a model's weights, or inside its GGUF file.

    Raises:
        UserError: there is none, it is damaged, or it has more ids than the model has rows (`vocab_size`).
    """
    path = as_path(where.path if isinstance(where, WeightSource) else where)
    if isinstance(where, WeightSource) and where.format == "gguf":
        tokenizer = tokenizer_from_gguf(where.config)
    elif path.suffix == ".gguf" and path.is_file():
        with open_source(path) as source:
            return load_base_tokenizer(source, vocab_size)
    else:
        tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    check_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


def save_hugging_face(
    folder: Path, model: Llama, tokenizer: Tokenizer, *, dtype: str | None = None, merge_adapters: bool = False
) -> None:
    """Writes a folder that `LlamaForCausalLM.from_pretrained` loads, with its tokenizer.

    Args:
        dtype: of the tensors; default: as the model stores them, bfloat16 for quantised kernels.
        merge_adapters: add the adapters to the kernels; otherwise they are left out (see `peft.save_adapter`).
    """
    config = model.config
    write_safetensors_folder(
        folder, export(model, hugging_face_table(config), dtype=dtype, merge_adapters=merge_adapters)
    )
    settings = hugging_face_config(config, dtype or config.param_dtype)
    settings |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "config.json", settings)
    tokenizer.save(folder)
