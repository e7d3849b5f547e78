"""Sets up a run: resumed, from trained weights, or new; with its model, data and state on the mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
import optax
from clu.parameter_overview import get_parameter_overview
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emollama_jax.config import Config
from emollama_jax.data.batch_shards import process_rows
from emollama_jax.data.datasets import IndexedRecords, find_encoders, find_images, open_datasets
from emollama_jax.data.pipeline import onto_devices, train_batches
from emollama_jax.distributed import barrier
from emollama_jax.errors import UserError
from emollama_jax.models.emotion_llama import EmotionLlama, is_trainable
from emollama_jax.runs.checkpoints import Checkpoints
from emollama_jax.runs.identity import describe_run
from emollama_jax.runs.run import Run
from emollama_jax.text.tokenizers import Tokenizer
from emollama_jax.train.optimizer import set_means
from emollama_jax.train.projector_inputs import projector_moments, standardize_projectors
from emollama_jax.train.speed import Cost, cost_of
from emollama_jax.train.step import TrainState, init_state
from emollama_jax.train.validation import Best, MoreMetrics, Validation
from emollama_jax.weights.base_checkpoint import is_base_checkpoint
from emollama_jax.weights.emotion_llama import load_emotion_llama
from emollama_jax.weights.engine import param_values, set_params
from emollama_jax.weights.model_identity import ModelIdentity
from emollama_jax.weights.pretrained import load_base_tokenizer
from emollama_jax.weights.trained import TrainedWeights, open_trained


@dataclass(frozen=True)
class TrainSetup:
    """A run before its next step.

    Attributes:
        step: steps done.
        best: the best validation so far.
        state: to be given to the next step, which takes its memory over.
        datasets: the training data.
        cost: of a step, for its utilisation of the devices.
        meta: what checkpoints keep of the run beside its arrays: `describe_run`, and what it carries along.
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
    meta: Mapping[str, Any]


def setup_run(
    config: Config,
    mesh: Mesh,
    checkpoints: Checkpoints,
    optimizer: optax.GradientTransformation,
    *,
    more_metrics: MoreMetrics | None,
    log: Callable[[str], None],
) -> TrainSetup:
    """Resumes from the newest sound checkpoint of the run's folder; without one starts with the weights of
    `weights.trained`; without these with new adapters and projectors.

    Raises:
        UserError: as `train`.
    """
    workdir, resumed = checkpoints.workdir, checkpoints.open_newest()
    datasets = open_datasets(config.data.train, config, "data.train")
    tokenizer = load_base_tokenizer(config.weights.base, config.llama.vocab_size)
    rows = process_rows(config, mesh, resumed.meta["num_shards"] if resumed else None)
    meta, best = describe_run(config, datasets, rows.num_parts), Best()
    if resumed:
        resumed.check_resume(meta)
        meta |= {name: resumed.meta[name] for name in ("carried", "adapter_name", "fixed") if name in resumed.meta}
        best = Best(**resumed.meta["best"])
        model = _load_model(config, mesh, datasets, None)
        _restore_fixed(checkpoints, model, config, meta.get("fixed"))
    else:
        trained = _open_trained(config, meta["encoders"], ModelIdentity(meta["base"], meta["base_origin"]), log)
        model = _load_model(config, mesh, datasets, trained)
        moments = projector_moments(model, datasets) if config.train.center_projectors else {}
        if not trained:
            standardize_projectors(model, moments)
        carried = trained.carried() if trained else {}
        meta |= {"carried": sorted(carried), "adapter_name": trained.adapter_name if trained else ""}
        meta["fixed"] = checkpoints.save_fixed(carried | _fixed_params(model, config))
    cost = cost_of(model.llama)
    barrier("loaded")
    graphdef, frozen, state = placed_state(model, optimizer, config, mesh)
    if not resumed and moments:
        state.opt_state = set_means(state.opt_state, {name: inputs.mean for name, inputs in moments.items()})
    log(get_parameter_overview(nnx.to_pure_dict(state.trainable), include_stats=False))
    iterator = iter(onto_devices(train_batches(config, tokenizer, rows), config, mesh))
    if resumed:
        state = checkpoints.restore(resumed.step, state, iterator)
        log(f"resumed from step {resumed.step:,}: {workdir}")
    validation = _validation(config, graphdef, mesh, tokenizer, datasets, more_metrics)
    step = resumed.step if resumed else 0
    return TrainSetup(step, best, graphdef, frozen, state, iterator, validation, datasets, cost, meta)


def check_paths(config: Config) -> None:
    """Raises UserError when the run's folder or the base model is not given or cannot be."""
    if not config.train.workdir:
        raise UserError("train.workdir: no folder for the run; give --config.train.workdir=FOLDER")
    if not config.weights.base:
        raise UserError("weights.base: no language model; give --config.weights.base=FOLDER, made by emollama convert")
    if not is_base_checkpoint(config.weights.base):
        raise UserError(
            f"weights.base: no base checkpoint: {config.weights.base}; make one with emollama convert MODEL FOLDER"
        )


def _open_trained(
    config: Config, encoders: Mapping[str, str], base: ModelIdentity, log: Callable[[str], None]
) -> TrainedWeights | None:
    """Opens `weights.trained`, once. Raises UserError when it is of another base, or a run with features of other
    encoders."""
    path = config.weights.trained
    if not path:
        return None
    if run := Run.find(path, log):
        run.check_encoders(encoders, otherwise="begin without weights.trained")
        trained = run.trained_weights()
    else:
        trained = open_trained(path, alpha=config.lora.alpha, num_layers=config.llama.num_layers)
    otherwise = f"begin with weights that name no base (emollama export {path} FOLDER --to peft --any-base)"
    trained.check_base(config.weights.base, base, otherwise=otherwise)
    return trained


def _load_model(
    config: Config, mesh: Mesh, datasets: Sequence[IndexedRecords], trained: TrainedWeights | None
) -> EmotionLlama:
    """Loads the base, adapters and projectors of `trained` or new ones, and the encoder where the data is of frames."""
    encodes = find_images(datasets) == "frames"
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
    model: nnx.Module, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh
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
    if config.train.best_metric != "loss" and more is None:
        raise UserError(f"train.best_metric={config.train.best_metric}: needs more_metrics, which computes it")
    find_encoders([*datasets, *open_datasets(config.train.validation, config, "train.validation")])
    return Validation(config, graphdef, mesh, tokenizer, images=find_images(datasets), more=more)


def _fixed_params(model: EmotionLlama, config: Config) -> dict[str, jax.Array]:
    """The adapters and projectors that `config.trainable` leaves out, by path."""
    is_trained = functools.partial(is_trainable, parts=config.trainable)
    return param_values(nnx.state(model, nnx.All(is_trainable, nnx.Not(is_trained))))


def _restore_fixed(checkpoints: Checkpoints, model: EmotionLlama, config: Config, digest: str | None) -> None:
    """Puts the parameters that the run keeps but does not train back into the model, in place."""
    values = checkpoints.restore_fixed(_fixed_params(model, config), digest)
    state = nnx.state(model, is_trainable)
    set_params(state, values)
    nnx.update(model, state)
