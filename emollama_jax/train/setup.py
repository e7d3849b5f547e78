"""Where a run begins: resumed, from given weights, or new; with its model, data and state on the mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Config
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_images, open_datasets
from emollama_jax.data.pipeline import onto_devices, process_shard, train_dataset
from emollama_jax.distributed import barrier
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.train.checkpoints import Checkpoints
from emollama_jax.train.identity import check_encoders, check_same, identity_of
from emollama_jax.train.speed import Cost, cost_of
from emollama_jax.train.step import TrainState, init_state
from emollama_jax.train.validation import Best, MoreMetrics, Validation
from emollama_jax.weights.emotion_llama import is_carried, load_emotion_llama, open_trained
from emollama_jax.weights.engine import param_values, set_params
from emollama_jax.weights.pretrained import load_tokenizer_of
from emollama_jax.weights.runs import FIXED


@dataclass(frozen=True)
class TrainSetup:
    """A run before its next step.

    Attributes:
        step: steps done.
        state: to be given to the next step, which takes its memory over.
        identity: what the run is, as its checkpoints keep it: `identity_of`, and what it carries along.
    """

    step: int
    best: Best
    graphdef: nnx.GraphDef
    frozen: nnx.State
    state: TrainState
    iterator: grain.DatasetIterator
    validation: Validation | None
    datasets: Sequence[IndexedRecords]
    cost: Cost
    identity: Mapping[str, Any]


def setup_run(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    optimizer: optax.GradientTransformation,
    *,
    more_metrics: MoreMetrics | None,
    log: Callable[[str], None],
) -> TrainSetup:
    """Resumes from the newest sound checkpoint; without one begins with the weights of `weights.trained`; without
    these with new ones.

    Raises:
        UserError: as `train`.
    """
    workdir, step = checkpoints.workdir, checkpoints.newest
    datasets = open_datasets(config.data.train, config, "data.train")
    tokenizer = load_tokenizer_of(config.weights.base, config.llama.vocab_size)
    shard_index, num_shards = process_shard(config, mesh)
    identity, best = identity_of(config, datasets, num_shards), Best()
    if step is not None:
        meta = checkpoints.meta(step)
        check_same(meta, identity, workdir)
        identity |= {name: meta[name] for name in ("carried", "adapter_name")}
        best = Best(**meta["best"])
        model = _load_model(config, mesh, identity, None)
        _restore_fixed(workdir, model, config)
    else:
        if config.weights.trained:
            check_encoders(config.weights.trained, identity)
        model = _load_model(config, mesh, identity, config.weights.trained or None)
        carried, adapter_name = _carried_tensors(config)
        identity |= {"carried": sorted(carried), "adapter_name": adapter_name}
        _save_fixed(workdir, carried | _fixed_params(model, config))
    cost = cost_of(model.llama)
    barrier("loaded")
    graphdef, frozen, state = placed_state(model, optimizer, config, mesh)
    dataset = train_dataset(config, tokenizer, shard_index=shard_index, num_shards=num_shards)
    iterator = iter(onto_devices(dataset, config, mesh))
    if step is not None:
        state = checkpoints.restore(step, state, iterator)
        log(f"resumed from step {step:,}: {workdir}")
    validation = _validation(config, graphdef, mesh, tokenizer, datasets, more_metrics)
    return TrainSetup(step or 0, best, graphdef, frozen, state, iterator, validation, datasets, cost, identity)


def _load_model(config: Config, mesh: Mesh, identity: Mapping[str, Any], trained: str | None) -> EmotionLlama:
    """The base, adapters and projectors of `trained` or new ones, and the encoder where the data is of frames."""
    encodes = identity["encoder"] is not None
    model, _ = load_emotion_llama(
        config.weights.base,
        config,
        trained=trained,
        eva_vit=config.weights.eva_vit if encodes else None,
        ln_vision=(config.weights.ln_vision or None) if encodes else None,
        mesh=mesh,
    )
    return model


def placed_state(
    model: EmotionLlama, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
) -> tuple[nnx.GraphDef, nnx.State, TrainState]:
    """`init_state`, with the counts, which have no place of their own, on every device."""
    graphdef, frozen, state = init_state(model, optimizer, config.trainable)
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: x if isinstance(x.sharding, NamedSharding) else jax.device_put(np.asarray(x), everywhere)
    return graphdef, frozen, jax.tree.map(place, state)


def _validation(
    config: Config,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    tokenizer: Tokenizer,
    datasets: Sequence[IndexedRecords],
    more: MoreMetrics | None,
) -> Validation | None:
    if not config.train.validation:
        return None
    find_encoders([*datasets, *open_datasets(config.train.validation, config, "train.validation")])
    return Validation(config, graphdef, mesh, tokenizer, images=find_images(datasets), more=more)


# -- what a run keeps but does not train


def _fixed_params(model: EmotionLlama, config: Config) -> dict[str, jax.Array]:
    """The adapters and projectors that `config.trainable` leaves out, by path."""
    is_trained = functools.partial(is_trainable, parts=config.trainable)
    return param_values(nnx.state(model, nnx.All(is_trainable, nnx.Not(is_trained))))


def _carried_tensors(config: Config) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of `weights.trained` that the model does not have, and the name of its adapter in files."""
    if not config.weights.trained:
        return {}, ""
    trained = open_trained(config.weights.trained, alpha=config.lora.alpha)
    return {name: array for name, array in trained.tensors() if is_carried(name)}, trained.adapter_name


def _save_fixed(workdir: epath.Path, arrays: Mapping[str, Any]) -> None:
    """Writes it once for all of the run's checkpoints."""
    if arrays:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(workdir / FIXED, args=ocp.args.PyTreeSave(dict(arrays)), force=True)


def _restore_fixed(workdir: epath.Path, model: EmotionLlama, config: Config) -> None:
    """Puts the parameters among it back into the model, in place."""
    params = _fixed_params(model, config)
    if not params:
        return
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in params.items()}
    how = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        values = checkpointer.restore(
            workdir / FIXED, args=ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
        )
    state = nnx.state(model, is_trainable)
    set_params(state, values)
    nnx.update(model, state)
