"""The whole model from its files.

model, reports = load_emotion_llama(
    "weights/llama2", config, trained="Emotion_LLaMA.pth", eva_vit="eva_vit_g.pth"
)
"""

from flax import nnx
from jax.sharding import Mesh

from emollama_jax.config import Config
from emollama_jax.errors import UserError
from emollama_jax.fields import fields_affecting
from emollama_jax.io.paths import PathLike
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.llama import LlamaConfig
from emollama_jax.models.projectors import Projectors
from emollama_jax.sharding import init_sharded
from emollama_jax.weights.base_checkpoint import is_base_checkpoint, read_manifest
from emollama_jax.weights.engine import LoadReport, first_device
from emollama_jax.weights.eva_vit import load_eva_vit
from emollama_jax.weights.llama import architecture
from emollama_jax.weights.pretrained import load_llama
from emollama_jax.weights.sources import open_source
from emollama_jax.weights.trained import TrainedWeights, load_trained, open_trained


def load_emotion_llama(
    base: PathLike,
    config: Config,
    *,
    trained: TrainedWeights | PathLike | None = None,
    eva_vit: PathLike | None = None,
    ln_vision: PathLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[EmotionLlama, dict[str, LoadReport]]:
    """Loads the whole model, and reports what became of each file's tensors: "llama", "trained", "eva_vit".

    Args:
        base: the language model: a base checkpoint, or any other that `load_llama` reads.
        trained: adapters and projectors: a .pth, a PEFT folder, or opened ones, as of `Run.trained_weights`; without
            them they are new, after `config.seed`.
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
    if trained and not isinstance(trained, TrainedWeights):  # small, and read before the large
        trained = open_trained(trained, alpha=config.lora.alpha, num_layers=config.llama.num_layers)
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
    if trained:
        reports["trained"] = load_trained(model, trained)
    return model, reports


def _check_architecture(base: PathLike, config: LlamaConfig) -> None:
    """Raises UserError when the language model is not the one that the experiment describes."""
    if is_base_checkpoint(base):
        stored = read_manifest(base)["llama"]
        found = {name: getattr(stored, name) for name in LlamaConfig.__dataclass_fields__}
    else:
        with open_source(base) as source:
            found = architecture(source)
    execution = fields_affecting(LlamaConfig, "execution")
    wrong = [n for n, value in found.items() if n not in execution and value != getattr(config, n)]
    if wrong:
        there = ", ".join(f"{name}={found[name]!r}" for name in wrong)
        asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise UserError(f"the language model has {there}, the config llama: {asked}: {base}; use the model's config")
