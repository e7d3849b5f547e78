"""The programs of an experiment with abstract arguments, shapes and shardings alone: nothing is loaded or allocated.

They are the functions that training, prediction and extraction run, on a mesh of the devices to compile for.

Axes: B rows, T tokens, K clips a row, P prompt tokens, S soft tokens, D width.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.dtypes
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Config
from emollama_jax.data.batch import batch_sharding, batch_spec, soft_tokens_per_clip
from emollama_jax.data.datasets import expected_images
from emollama_jax.errors import UserError
from emollama_jax.features import encode
from emollama_jax.infer import generate
from emollama_jax.infer.sampling import Sampling
from emollama_jax.infer.shapes import bucket
from emollama_jax.media.audio import SAMPLE_RATE
from emollama_jax.models.emotion_llama import EmotionLlama
from emollama_jax.models.layers import QUANTISED
from emollama_jax.models.llama import Llama
from emollama_jax.models.lora import LoRAConfig
from emollama_jax.sharding import abstract, shardings, use_mesh
from emollama_jax.train.optimizer import make_optimizer
from emollama_jax.train.step import init_state, make_step, multimodal_loss
from emollama_jax.weights.encoders import ENCODERS

PROGRAMS = ("step", "prefill", "decode", *ENCODERS)
PROMPT_TEXT = 96  # tokens of a question about a clip, beside its soft tokens
SECONDS = 8  # of sound, for the encoder of the voice


@dataclass(frozen=True)
class Program:
    """A program before it is compiled.

    Attributes:
        bytes: what a device holds of its arguments, by kind, without the padding of layouts.
    """

    lower: Callable[[], Any]
    bytes: dict[str, int]


def make_program(name: str, config: Config, mesh: Mesh, *, rows: int) -> Program:
    """One of PROGRAMS.

    Args:
        rows: of the whole batch: packed rows of a step, requests, or images and sounds.

    Raises:
        UserError: the rows do not fit the mesh.
    """
    split = math.prod(mesh.shape[axis] for axis in _batch_axes(config)) if name not in ENCODERS else mesh.size
    parts = config.train.grad_accum_steps if name == "step" else 1
    if rows % (split * parts):
        what = f"config.data.batch_rows={rows}" if name == "step" else f"{rows} rows of {name}"
        raise UserError(
            f"{what}: not split over {split} devices{f' in {parts} parts' if parts > 1 else ''}; give a multiple of "
            f"{split * parts}, or a mesh with less data x fsdp"
        )
    models = {group: getattr(config, group).for_devices(mesh.devices.flat) for group in ("llama", *ENCODERS)}
    config = dataclasses.replace(config, **models)
    if name == "step":
        return _step(config, mesh, rows)
    if name in ENCODERS:
        return _encoder(name, config, mesh, rows)
    return _answers(name, config, mesh, rows)


def _batch_axes(config: Config) -> tuple[str, ...]:
    axes = dict(config.sharding)["batch"] or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _step(config: Config, mesh: Mesh, rows: int) -> Program:
    optimizer, rules = make_optimizer(config.train), config.sharding
    graphdef, frozen, state = jax.eval_shape(lambda: init_state(multimodal_model(config), optimizer, config.trainable))
    frozen = _placed(frozen, shardings(frozen, mesh, rules))
    trainable_shardings = shardings(state.trainable, mesh, rules)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = dataclasses.replace(
        state,
        trainable=_placed(state.trainable, trainable_shardings),
        opt_state=optax.tree_utils.tree_map_params(
            optimizer,
            _at,
            state.opt_state,
            trainable_shardings,
            transform_non_params=lambda x: _at(x, everywhere),
        ),
        step=_at(state.step, everywhere),
    )
    spec = batch_spec(config, images=expected_images(config.data.train), rows=rows)
    batch = jax.tree.map(lambda x: _at(x, batch_sharding(mesh, rules, x.shape)), spec)
    key = _at(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    options = {name: getattr(config.train, name) for name in ("grad_accum_steps", "loss_scale")}
    step = make_step(graphdef, optimizer, multimodal_loss, **options, mesh=mesh)

    def lower():
        with use_mesh(mesh, rules):
            return step.lower(state, frozen, batch, key)

    kinds = {"frozen": frozen, "trainable": state.trainable, "optimiser": state.opt_state, "batch": batch}
    return Program(lower, {kind: _bytes(tree) for kind, tree in kinds.items()})


def _answers(name: str, config: Config, mesh: Mesh, rows: int) -> Program:
    """The prefill of questions about a clip, or one further token of every answer."""
    # Adapters are merged where the kernels can take them.
    lora = config.lora if config.llama.kernel_dtype in QUANTISED else LoRAConfig(rank=0)
    graphdef, state = abstract(lambda: Llama(config.llama, lora, rngs=nnx.Rngs(0)))
    state = _placed(state, shardings(state, mesh, config.sharding))
    soft = soft_tokens_per_clip(config)
    prompt = bucket(soft + PROMPT_TEXT)
    sizes = {"cache_size": bucket(soft + PROMPT_TEXT + config.generate.max_new_tokens - 1)}
    whole = lambda shape, dtype: _rows(mesh, config, (rows, *shape), dtype)
    sampling = jax.eval_shape(lambda: Sampling.of([config.generate] * rows, [0] * rows))
    sampling = jax.tree.map(lambda x: _at(x, batch_sharding(mesh, config.sharding, x.shape)), sampling)
    eos = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    tokens = whole((prompt,), jnp.int32)
    embedded = whole((soft, config.llama.hidden_size), config.llama.compute_dtype)
    inputs = (tokens, whole((), jnp.int32), tokens, embedded, sampling, eos)

    def prefill():
        with use_mesh(mesh, config.sharding):
            return generate.prefill.lower(graphdef, state, *inputs, **sizes)

    if name == "prefill":
        return Program(prefill, {"parameters": _bytes(state), "batch": _bytes(inputs)})
    like = jax.eval_shape(lambda s, *args: generate.prefill(graphdef, s, *args, **sizes), state, *inputs)
    heads = dict(config.sharding)["kv_heads"]
    cache = NamedSharding(mesh, PartitionSpec(None, _batch_axes(config), None, heads, None))
    before = jax.tree.map(
        lambda x: _at(x, cache if x.ndim == 5 else batch_sharding(mesh, config.sharding, x.shape)), like
    )

    def decode():
        with use_mesh(mesh, config.sharding):
            return generate.decode_chunk.lower(graphdef, state, before, eos, length=1)

    return Program(decode, {"parameters": _bytes(state), "cache": _bytes(before)})


def _encoder(name: str, config: Config, mesh: Mesh, rows: int) -> Program:
    """Every device has the whole encoder and a part of the rows, as in extraction."""
    settings = getattr(config, name)
    graphdef, state = abstract(lambda: ENCODERS[name](settings, rngs=nnx.Rngs(0)))
    state = _placed(state, shardings(state, mesh, ()))
    split = encode.row_sharding(mesh)
    of_rows = lambda shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)
    if name == "hubert":
        inputs = (of_rows((SECONDS * SAMPLE_RATE,), jnp.float32), of_rows((), jnp.int32))
    else:
        frames = (settings.num_frames,) if name == "videomae" else ()
        inputs = (of_rows((*frames, settings.image_size, settings.image_size, 3), jnp.uint8),)

    def lower():
        with use_mesh(mesh, encode.split_rows(mesh)):
            return encode.run_encoder.lower(graphdef, state, *inputs)

    return Program(lower, {"parameters": _bytes(state), "batch": _bytes(inputs)})


def multimodal_model(config: Config) -> EmotionLlama:
    """The model that is trained; with the encoder of the frame where the batches hold frames."""
    sizes = (config.llama, config.lora, config.projectors, config.eva_vit)
    encodes = expected_images(config.data.train) == "frames"
    return EmotionLlama.init(*sizes, with_encoder=encodes, rngs=nnx.Rngs(0))


def _rows(mesh: Mesh, config: Config, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, config.sharding, shape))


def _at(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _placed(tree: Any, tree_shardings: Any) -> Any:
    return jax.tree.map(_at, tree, tree_shardings)


def _bytes(tree: Any) -> int:
    """What one device holds of the arrays."""
    leaves = jax.tree.leaves(tree)
    bits = lambda x: 64 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.dtypes.itemsize_bits(x.dtype)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * bits(x) for x in leaves) // 8
